"""Published speeds of attention kernels, forward and backward: of FlashAttention-2, and of cuDNN's kernels.

TFLOP/s by the usual count: 4*b*h*s*s*d FLOPs, half if causal, 2.5 times that in backward. FlashAttention-2:

- FlashAttention-3 paper, figures 5 and 6 (https://arxiv.org/abs/2407.08608): H100 80GB SXM5, 16k tokens, hidden size
  2048 (heads = 2048 / head_dim), fp16; bar labels read from transcriptions of the figures.
- FlashAttention-2 paper, abstract and section 4.1 (https://arxiv.org/abs/2307.08691): up to 73 % (forward) and 63 %
  (backward) of peak on A100.
- https://github.com/gpu-mode/ring-attention issue 10: RTX A5000, batch*seq = 16k, hidden 2048, not causal, head 64.
- apache/tvm tl_doc/flash_perf.md: RTX 4090, seq 2k; batch and heads not stated, taken as 16k tokens, hidden 2048.
- https://github.com/Dao-AILab/flash-attention/issues/1589: B200, FA2 2.7.4, not causal, head 64, 16k tokens, hidden
  2048.
- https://github.com/NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training/artifacts (bb37575): B200, PyTorch's own
  kernel (`pyt_flash_attention`), causal, 128 heads of 128 over 8, batch 1, bf16. From 4,096 tokens: shorter calls
  contain the host (one of 512 tokens takes 0.1 ms).

cuDNN, all by https://github.com/NVIDIA/cudnn-frontend, benchmark/, bf16, device time of ten or twenty calls:

- sdpa_benchmark_training/results: h200_919_only_cudnn, gb200_919_only_cudnn (cuDNN 9.19), llama3.1/gb200 (9.22);
- attention_training/results: llama3.1/h200 and qwen35/h200 of 2026-09-28 (9.27);
- attention_inference/results: prefill_sweep/b200 of 2026-09-18 (9.27), as many queries as keys.

PyTorch 2.13 comes with cuDNN 9.20 (NVIDIA/cosmos-framework#153).
"""

import numpy as np
import pandas as pd

from perfmodel.devices.attention import AttentionParameters, attention_backward_time, attention_forward_time
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array

from ..judging import FitErrors, column, fold

A100_BACKWARD_EFFICIENCY = 0.63 / 0.73  # the FlashAttention-2 paper's peak shares on A100
A100_BACKWARD = "63 % of peak against forward's 73 % (https://arxiv.org/abs/2307.08691)"
CUDNN = "https://github.com/NVIDIA/cudnn-frontend"
SOURCES = {
    "h100-sxm": "https://arxiv.org/abs/2407.08608 figures 5 and 6",
    "rtx-a5000": "https://github.com/gpu-mode/ring-attention/issues/10",
    "rtx-4090": "https://github.com/apache/tvm tl_doc/flash_perf.md",
    "b200": f"https://github.com/Dao-AILab/flash-attention/issues/1589, {CUDNN}",
}
SEQ = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, HIDDEN = 16384, 2048

# (device, causal, head_dim, direction): TFLOP/s at SEQ (shorter tuples start at 512)
SERIES: dict[tuple[str, bool, int, str], tuple[float, ...]] = {
    ("h100-sxm", False, 64, "forward"): (282, 306, 318, 321, 322, 324),
    ("h100-sxm", False, 128, "forward"): (309, 350, 362, 368, 370, 370),
    ("h100-sxm", False, 256, "forward"): (275, 313, 321, 323, 324, 326),
    ("h100-sxm", True, 64, "forward"): (180, 229, 262, 284, 295, 299),
    ("h100-sxm", True, 128, "forward"): (191, 260, 298, 319, 333, 335),
    ("h100-sxm", True, 256, "forward"): (208, 251, 278, 293, 297, 298),
    ("h100-sxm", False, 64, "backward"): (198, 238, 264, 279, 287, 291),
    ("h100-sxm", False, 128, "backward"): (214, 260, 291, 310, 318, 322),
    ("rtx-a5000", False, 64, "forward"): (84.08, 81.02, 81.31, 81.69, 81.86),
    ("rtx-a5000", False, 64, "backward"): (52.88, 62.54, 70.07, 74.80, 77.42),
    ("b200", False, 64, "forward"): (308.40, 359.30, 380.99, 306.94, 343.07, 379.44),
    ("b200", False, 64, "backward"): (243.05, 280.64, 301.61, 314.71, 329.09, 333.95),
}
# (causal, head_dim, forward, backward) at sequence 2048
RTX_4090 = (
    (False, 64, 168.91, 124.81),
    (False, 128, 169.28, 124.57),
    (True, 64, 142.23, 96.53),
    (True, 128, 151.19, 99.23),
)
# device, causal, batch, heads, kv_heads, head_dim, direction, a sequence, milliseconds at it, at twice it, …
Timed = tuple[str, bool, int, int, int, int, str, int, tuple[float, ...]]
FLASH_TIMES: tuple[Timed, ...] = (
    ("b200", True, 1, 128, 8, 128, "forward", 4096, (1.692, 5.889, 22.297, 87.146, 344.321)),
    ("b200", True, 1, 128, 8, 128, "backward", 4096, (5.360, 18.395, 68.724, 265.902, 1049.021)),
)
CUDNN_TIMES: tuple[Timed, ...] = (
    ("h200", True, 1, 64, 8, 128, "forward", 2048, (0.142, 0.465, 1.708, 6.531, 25.566)),
    ("h200", False, 1, 64, 8, 128, "forward", 2048, (0.217, 0.819, 3.182, 12.524, 50.769)),
    ("h200", True, 1, 64, 8, 128, "backward", 2048, (0.464, 1.450, 5.083, 19.002, 75.688)),
    ("h200", False, 1, 64, 8, 128, "backward", 2048, (0.681, 2.453, 9.262, 35.947, 153.841)),
    ("h200", True, 2, 64, 8, 128, "forward", 2048, (0.257, 0.893, 3.357, 13.888, 56.813)),
    ("h200", False, 2, 64, 8, 128, "forward", 2048, (0.416, 1.600, 6.271, 27.502, 113.197)),
    ("h200", True, 2, 64, 8, 128, "backward", 2048, (0.856, 2.779, 10.448, 40.803, 166.714)),
    ("h200", False, 2, 64, 8, 128, "backward", 2048, (1.323, 4.768, 19.572, 80.092, 323.816)),
    ("h200", True, 1, 32, 2, 256, "forward", 2048, (0.143, 0.447, 1.595, 6.049, 25.936)),
    ("h200", True, 1, 32, 2, 256, "backward", 2048, (0.621, 1.942, 6.998, 30.087, 122.924)),
    ("b200", True, 1, 64, 8, 128, "forward", 2048, (0.075104, 0.228771, 0.784670, 2.955586)),
    ("b200", True, 1, 32, 4, 128, "forward", 2048, (0.047904, 0.131934, 0.419519, 1.507781)),
    ("b200", True, 1, 16, 2, 128, "forward", 2048, (0.030688, 0.080096, 0.243874, 0.793049)),
    ("b200", True, 1, 8, 1, 128, "forward", 2048, (0.029248, 0.052768, 0.147136, 0.463268)),
    ("gb200", True, 1, 64, 8, 128, "forward", 2048, (0.066, 0.206, 0.688, 2.606, 10.226)),
    ("gb200", False, 1, 64, 8, 128, "forward", 2048, (0.110, 0.345, 1.286, 4.972, 19.759)),
    ("gb200", True, 1, 64, 8, 128, "backward", 2048, (0.206, 0.607, 2.097, 7.845, 29.863)),
    ("gb200", False, 1, 64, 8, 128, "backward", 2048, (0.315, 1.068, 3.901, 15.111, 58.606)),
    ("gb200", True, 2, 64, 8, 128, "forward", 2048, (0.125, 0.391, 1.397, 5.150, 21.692)),
    ("gb200", False, 2, 64, 8, 128, "forward", 2048, (0.192, 0.687, 2.483, 10.369, 43.056)),
    ("gb200", True, 2, 64, 8, 128, "backward", 2048, (0.389, 1.198, 4.127, 16.554, 71.756)),
    ("gb200", False, 2, 64, 8, 128, "backward", 2048, (0.611, 2.037, 7.831, 32.014, 139.364)),
)
SHAPE = ["causal", "head_dim", "direction", "seq", "batch", "heads", "kv_heads"]


def flash_rows(device: str) -> pd.DataFrame:
    """SHAPE, seconds and left_out of FlashAttention-2 on a device: one row a published point."""
    points = [
        (causal, head_dim, direction, seq, speed)
        for (name, causal, head_dim, direction), speeds in SERIES.items()
        if name == device
        for seq, speed in zip(SEQ, speeds, strict=False)
    ]
    if device == "rtx-4090":
        for causal, head_dim, forward, backward in RTX_4090:
            points += [(causal, head_dim, "forward", 2048, forward), (causal, head_dim, "backward", 2048, backward)]
    found = pd.DataFrame(points, columns=["causal", "head_dim", "direction", "seq", "tflops"])
    found["batch"], found["heads"] = TOKENS // found.seq, HIDDEN // found.head_dim
    found["kv_heads"] = found.heads
    found["seconds"] = published_flops(found) / (found.tflops * 1e12)
    found["left_out"] = [
        fold(*shape) == 0 and len(found) > 8
        for shape in zip(found.batch, found.seq, found.heads, found.head_dim, found.causal.astype(int), strict=True)
    ]
    timed = _timed(FLASH_TIMES, (device,))
    return pd.concat([found, timed], ignore_index=True) if len(timed) else found


def cudnn_rows(*devices: str) -> pd.DataFrame:
    """The same of cuDNN's kernels, with the `device` of each row."""
    return _timed(CUDNN_TIMES, devices)


def _timed(table: tuple[Timed, ...], devices: tuple[str, ...]) -> pd.DataFrame:
    rows = [
        (device, causal, head_dim, direction, first * 2**i, batch, heads, kv_heads, ms * 1e-3)
        for device, causal, batch, heads, kv_heads, head_dim, direction, first, times in table
        if device in devices
        for i, ms in enumerate(times)
    ]
    found = pd.DataFrame(rows, columns=["device", *SHAPE, "seconds"])
    shapes = found[["batch", "seq", "heads", "kv_heads", "head_dim"]].itertuples(index=False)
    return found.assign(left_out=[fold(*map(int, shape)) == 0 for shape in shapes])


def published_flops(d: pd.DataFrame) -> Array:
    """FLOPs of published rows, by the usual count."""
    s, b, h, dim = (column(d, c) for c in ("seq", "batch", "heads", "head_dim"))
    return 4.0 * b * h * s * s * dim * np.where(d.causal, 0.5, 1.0) * np.where(d.direction == "backward", 2.5, 1.0)


def published_time(d: pd.DataFrame, hw: Hardware, p: AttentionParameters) -> Array:
    """Seconds of published rows."""
    out = np.empty(len(d))
    for (causal, direction), part in d.reset_index(drop=True).groupby(["causal", "direction"]):
        time = attention_forward_time if direction == "forward" else attention_backward_time
        b, s, h, kv, dim = (column(part, c) for c in ("batch", "seq", "heads", "kv_heads", "head_dim"))
        out[np.asarray(part.index)] = time(b, s, s, h, kv, dim, causal=bool(causal), hardware=hw, parameters=p)
    return out


def published_errors(d: pd.DataFrame, hw: Hardware, p: AttentionParameters) -> FitErrors:
    """Errors on published rows."""
    s, b, dim, h, kv = (column(d, c) for c in ("seq", "batch", "head_dim", "heads", "kv_heads"))
    moved = b * s * (h + kv) * dim * 2.0 * np.where(d.direction == "backward", 4.0, 2.0)
    plain = np.maximum(published_flops(d) / hw.peak("bf16"), moved / hw.memory_bandwidth)
    return FitErrors.of(published_time(d, hw, p), plain, column(d, "seconds"))
