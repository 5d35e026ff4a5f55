"""Published forward and backward speeds of FlashAttention-2, TFLOP/s by the usual count.

The count is 4*b*h*s*s*d FLOPs, half if causal, 2.5 times that in backward. Sources:

- FlashAttention-3 paper, figures 5 and 6 (https://arxiv.org/abs/2407.08608): H100 80GB SXM5, 16k tokens, hidden size
  2048 (heads = 2048 / head_dim), fp16; bar labels read from transcriptions of the figures.
- FlashAttention-2 paper, abstract and section 4.1 (https://arxiv.org/abs/2307.08691): up to 73 % (forward) and 63 %
  (backward) of peak on A100.
- https://github.com/gpu-mode/ring-attention issue 10: RTX A5000, batch*seq = 16k, hidden 2048, not causal, head 64.
- apache/tvm tl_doc/flash_perf.md: RTX 4090, seq 2k; batch and heads not stated, taken as 16k tokens, hidden 2048.
- https://github.com/Dao-AILab/flash-attention/issues/1589: B200, FA2 2.7.4, not causal, head 64, 16k tokens, hidden
  2048.
"""

import pandas as pd

from .judging import fold

A100_BACKWARD_EFFICIENCY = 0.63 / 0.73  # the FlashAttention-2 paper's peak shares on A100
A100_BACKWARD = "63 % of peak against forward's 73 % (https://arxiv.org/abs/2307.08691)"
SOURCES = {
    "h100-sxm": "https://arxiv.org/abs/2407.08608 figures 5 and 6",
    "rtx-a5000": "https://github.com/gpu-mode/ring-attention/issues/10",
    "rtx-4090": "https://github.com/apache/tvm tl_doc/flash_perf.md",
    "b200": "https://github.com/Dao-AILab/flash-attention/issues/1589",
}
SEQ = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, HIDDEN = 16384, 2048

# (device, causal, head_dim, direction): TFLOP/s at SEQ (shorter tuples start at 512)
SERIES: dict[tuple[str, bool, int, str], tuple[float, ...]] = {
    ("h100-sxm", False, 64, "forward"): (282, 306, 318, 321, 322, 324),
    ("h100-sxm", False, 128, "forward"): (309, 350, 362, 368, 370, 370),
    ("h100-sxm", False, 256, "forward"): (275, 313, 321, 323, 324, 326),
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


def flash_rows(device: str) -> pd.DataFrame:
    """causal, head_dim, direction, batch, seq, heads, seconds, left_out: one row a published point."""
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
    flops = 4.0 * found.batch * found.heads * found.seq**2 * found.head_dim * (1.0 - 0.5 * found.causal)
    found["seconds"] = flops * (1.0 + 1.5 * (found.direction == "backward")) / (found.tflops * 1e12)
    shapes = zip(found.batch, found.seq, found.heads, found.head_dim, found.causal.astype(int), strict=True)
    found["left_out"] = [fold(*shape) == 0 and len(found) > 8 for shape in shapes]
    return found
