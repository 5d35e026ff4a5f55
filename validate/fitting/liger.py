"""Liger-Kernel's benchmark rows (https://github.com/linkedin/Liger-Kernel benchmark/scripts) as sequences of kernels.

A row times an op eager (provider huggingface, torch, megatron) or fused (liger) in forward, backward or both ("full").
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from . import sequences as seq
from .judging import fold, measured_table
from .sequences import Kernels, TimedKernel

GPUS = {"NVIDIA A100-SXM4-80GB": "a100-80gb-sxm", "NVIDIA H100 80GB HBM3": "h100-sxm"}
HOST_BOUND = {"backward": 0.13, "full": 0.31}  # ms that Liger's autograd functions need on the host; Megatron's rows
# with a backward have a forward in them
EAGER_HOST_BOUND = {"megatron_rms_norm": 0.08, "llama4_rope": 0.14}  # ms, flat series
NLL_THREADS = 32  # PyTorch of 2024
# B of a table that an A100's L2 keeps between the rows that Inductor's kernel writes, fitted by hand to these rows.
# Liger takes 128 columns of all tokens at a time, so that what repeats is still there.
KEPT_TABLE = 18e6


class LigerRow(NamedTuple):
    """What a benchmark row says."""

    eager: bool
    provider: str
    forward: bool
    backward: bool
    x_name: str
    x: float
    config: dict[str, Any]

    def either(self, forward: Kernels, backward: Kernels) -> Kernels:
        """The kernels of the row's mode."""
        return (forward if self.forward else []) + (backward if self.backward else [])

    def size(self) -> int:
        """Bytes of an element."""
        return 2 if "bfloat16" in self.config.get("dtype", "") else 4


Family = tuple[str, Kernels] | None


def _rms_norm(r: LigerRow) -> Family:
    """fp32 weight, bf16 x: the eager output is fp32, the bf16 gradient is cast."""
    rows, n, size = r.config["M"], r.config["M"] * r.x, r.size()
    if r.eager:
        backward = seq.rms_norm_backward(rows, r.x, size, 4, size)
        return "rms norm eager", r.either(seq.rms_norm_forward(rows, r.x, size, 4), backward)
    if r.backward:  # Liger 0.2.1 writes the weight's gradient of every row, as no later version does
        return None
    return "rms norm fused", [TimedKernel(n * size, n * size, "fused_norm", n, rows)]


def _fused_add_rms_norm(r: LigerRow) -> Family:
    rows, n, size = r.config["M"], r.config["M"] * r.x, r.size()
    if r.eager:
        add, copy = (
            TimedKernel(2 * n * size, n * size),
            TimedKernel(n * size, n * size),
        )  # x and residual get the same gradient
        backward = [*seq.rms_norm_backward(rows, r.x, size, 4, max(size, 4)), add, copy]
        return "rms norm eager", r.either([add, *seq.rms_norm_forward(rows, r.x, size, 4)], backward)
    if r.provider != "liger_fused_add_rms_norm":
        return None
    fused = [TimedKernel(2 * n * size, 2 * n * size, "fused_norm", n, rows)]
    return "rms norm fused", r.either(fused, seq.fused_norm_backward(rows, r.x, size, 3))


def _megatron_rms_norm(r: LigerRow) -> Family:
    """torch.nn.RMSNorm in bf16; rows with a backward include forward and out.sum()."""
    rows = r.config["S"] * r.config["B"]
    n = rows * r.x
    total = [TimedKernel(2 * n, 4.0, "reduction"), TimedKernel(0.0, 2 * n)] if r.backward else []
    added = seq.accumulate_grad(n) if r.forward and r.backward else []
    if r.eager:
        grad = [
            TimedKernel(8 * n, 2 * n, "norm_backward", n, rows, r.x),
            TimedKernel(4 * n, 2 * r.x, "column_reduction"),
        ]
        kernels = [TimedKernel(2 * n, 2 * n, "norm", n, rows, r.x), *total, *(grad if r.backward else []), *added]
        return "rms norm torch native", kernels
    grad = seq.fused_norm_backward(rows, r.x, 2) if r.backward else []
    return "rms norm fused", [TimedKernel(2 * n, 2 * n, "fused_norm", n, rows), *total, *grad, *added]


def _layer_norm(r: LigerRow) -> Family:
    rows, n = r.config["M"], r.config["M"] * r.x
    if r.eager:
        return "layer norm eager", r.either(seq.layer_norm_forward(rows, r.x), seq.layer_norm_backward(rows, r.x))
    fused = [TimedKernel(4 * n, 4 * n, "fused_norm", n, rows)]
    return "layer norm fused", r.either(fused, [TimedKernel(8 * n, 4 * n, "fused_layer_norm_backward", n)])


def _query_key(r: LigerRow) -> tuple[float, float]:
    """Elements of q and of k."""
    hidden = r.x if r.x_name == "H" else float(r.config["hidden_size"])
    tokens = r.x if r.x_name == "T" else float(r.config["seq_len"])
    return tokens * hidden, tokens * hidden * r.config["num_kv_heads"] / r.config["num_q_heads"]


def _rope(r: LigerRow) -> Family:
    q, k = _query_key(r)
    if r.eager:
        return "rope eager", r.either(
            seq.rope_forward(q) + seq.rope_forward(k), seq.rope_backward(q) + seq.rope_backward(k)
        )
    one = [TimedKernel(2 * (q + k), 2 * (q + k), "pointwise", q + k)]
    return "rope fused", r.either(one, one)


def _llama4_rope(r: LigerRow) -> Family:
    """To fp32, complex product with broadcast angles, and back; the fused one copies first, as the bytes tell.

    Since torch 2.6, which is older than these rows, casts from fp32 only stream
    (https://github.com/pytorch/pytorch/pull/137053).
    """
    q, k = _query_key(r)
    if r.eager:
        one = [
            kernel
            for m in (q, k)
            for kernel in (
                TimedKernel(2 * m, 4 * m, "cast", m),
                TimedKernel(4 * m, 4 * m, "strided", m),
                TimedKernel(4 * m, 2 * m),
            )
        ]
        return "llama4 rope eager", r.either(one, one)
    fused = [TimedKernel(2 * (q + k), 2 * (q + k))] * 2
    return "llama4 rope fused", r.either(fused, fused)


def _cross_entropy(r: LigerRow) -> Family:
    """fp32 logits; full mode accumulates into .grad; the fused gradient replaces the logits."""
    rows = r.config["B"] * r.config["T"]
    n = rows * r.x
    if r.eager:
        backward = seq.cross_entropy_backward(rows, r.x) + seq.accumulate_grad(n, 4)
        return "cross entropy eager", r.either(seq.cross_entropy_forward(rows, r.x, NLL_THREADS), backward)
    fused = [TimedKernel(4 * n, 4 * n, "cross_entropy", n, rows)]
    return "cross entropy fused", r.either(fused, [TimedKernel(4 * n, 4 * n)])


def _megatron_cross_entropy(r: LigerRow) -> Family:
    if r.provider != "liger" or r.backward:
        return None
    rows = r.config["S"] * r.config["B"]
    return "cross entropy fused", [TimedKernel(2 * rows * r.x, 2 * rows * r.x, "cross_entropy", rows * r.x, rows)]


def _embedding(r: LigerRow) -> Family:
    """Rows with a backward also make a random gradient and accumulate into weight.grad."""
    tokens, hidden = r.config["B"] * r.config["T"], r.config["D"]
    n, cells = tokens * hidden, r.x * hidden
    if not r.eager:
        read = 4 * seq.distinct_rows(tokens, r.x) * hidden
        if r.provider == "torch_compile":
            read += (4 * n - read) * 4 * cells / (4 * cells + KEPT_TABLE)
        return None if r.backward else ("embedding fused", [TimedKernel(read, 4 * n)])
    backward = [TimedKernel(0.0, 4 * n, "pointwise", n), *seq.embedding_backward(tokens, hidden, r.x, 4)]
    backward += seq.accumulate_grad(cells, 4)
    return "embedding eager", r.either(seq.embedding_forward(tokens, hidden, r.x, 4), backward)


def _relu_squared(r: LigerRow) -> Family:
    n = r.config["M"] * r.x
    if r.eager:
        backward = [TimedKernel(2 * n, 2 * n)] * 2 + [TimedKernel(4 * n, 2 * n)] * 2
        return "relu squared eager", r.either([TimedKernel(2 * n, 2 * n)] * 2, backward)
    return "relu squared fused", r.either([TimedKernel(2 * n, 2 * n)], [TimedKernel(4 * n, 2 * n)])


FAMILIES: dict[str, Callable[[LigerRow], Family]] = {
    "rms_norm": _rms_norm,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "megatron_rms_norm": _megatron_rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "llama4_rope": _llama4_rope,
    "cross_entropy": _cross_entropy,
    "megatron_cross_entropy": _megatron_cross_entropy,
    "embedding": _embedding,
    "relu_squared": _relu_squared,
}


def _host_bound(name: str, eager: bool, mode: str, ms: float) -> bool:
    """Whether the row times the host: left aside."""
    if name == "llama4_rope" and not eager and ms < 0.16:
        return True
    if eager:
        return mode != "forward" and ms < EAGER_HOST_BOUND.get(name, 0.0)
    return ms < HOST_BOUND.get("full" if name == "megatron_rms_norm" and mode == "backward" else mode, 0.0)


def liger_rows(folder: Path) -> pd.DataFrame:
    """gpu, family, kernels, fold, seconds, host_bound."""
    d = measured_table(folder, "kernels_liger.csv")
    d = d[(d.metric_name == "speed") & d.gpu_name.isin(list(GPUS)) & d.kernel_name.isin(list(FAMILIES))]
    out = []
    for r in d.to_dict("records"):
        name, mode, ms = str(r["kernel_name"]), str(r["kernel_operation_mode"]), float(r["y_value_50"])
        eager = r["kernel_provider"] in ("huggingface", "torch", "megatron")
        x_value, text = r["x_value"], str(r["extra_benchmark_config_str"])
        forward, backward = mode in ("forward", "full"), mode in ("backward", "full")
        row = LigerRow(
            eager, str(r["kernel_provider"]), forward, backward, str(r["x_name"]), float(x_value), json.loads(text)
        )
        made = FAMILIES[name](row)
        if made is not None:
            shape = fold(name, r["x_name"], x_value, text)
            host = _host_bound(name, eager, mode, ms)
            out.append((GPUS[str(r["gpu_name"])], *made, shape, ms * 1e-3, host))
    return pd.DataFrame(out, columns=["gpu", "family", "kernels", "fold", "seconds", "host_bound"])
