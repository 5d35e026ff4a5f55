"""What is measured: rows of (block, op, dtype, sizes), the most telling ones first within each block.

A run stops when its time is over, so the order matters: shapes of a block are shuffled with a fixed seed, and the
blocks take turns (`run`).
"""

import random
from dataclasses import asdict, dataclass
from itertools import cycle, product
from typing import Any

from perfmodel.devices.gemm_parameters import LAYOUTS

SEED = 0
DTYPES = ("fp32", "bf16")  # of the kernels that are measured


@dataclass(frozen=True)
class MicroCase:
    """One measurement.

    Attributes:
        block: gemm, attention, pointwise or host: which fit reads it.
        op: an ATen op or an overhead by name.
        dtype: of the floating-point operands.
        sizes: dims by name (m, n, k; rows, columns; batch, seq, heads, kv_heads, head_dim), elements.
        layout: of a product: tn (forward), nn (input gradient), nt (weight gradient).
        backward: whether the time is that of the backward call.
    """

    block: str
    op: str
    dtype: str
    sizes: tuple[tuple[str, int], ...] = ()
    layout: str = ""
    backward: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {**asdict(self), "sizes": dict(self.sizes)}

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


def design(device: str, dtypes: tuple[str, ...]) -> dict[str, list[MicroCase]]:
    """The cases of a kind of device by block."""
    wide = device == "cuda"
    blocks: dict[str, list[MicroCase]] = {"host": host(device)}
    for dtype in dtypes:
        blocks[f"gemm {dtype}"] = gemms(dtype, wide=wide)
        blocks[f"pointwise {dtype}"] = stream_cases(dtype, wide=wide)
    blocks["attention"] = attentions("bf16" if wide else "fp32", wide=wide)
    if not wide:
        blocks["attention bf16"] = attentions("bf16", wide=wide)
    return blocks


def gemms(dtype: str, *, wide: bool) -> list[MicroCase]:
    """Products like those of training: tokens by features, some features a rank; the three layouts of each."""
    tokens = (64, 128, 256, 512, 1024, 2048, 4096, 8192) if wide else (64, 96, 128, 256, 384, 512, 1024)
    features = (1024, 1536, 2048, 3072, 4096, 8192, 11008) if wide else (192, 256, 384, 512, 768, 1024, 2048, 3072)
    vocabularies = (32000,) if wide else (4000, 8000, 12000)
    ranks = (8, 16, 32, 64)
    most = 4e11 if wide else 4e8  # multiply-adds of one product
    pairs = [*product(features, features), *product(features, vocabularies), *product(ranks, features)]
    pairs += [(n, k) for k, n in product(ranks, features)]
    shapes = [(t, n, k) for t, (n, k) in product(tokens, pairs) if t * n * k <= most]
    chosen = random.Random(f"{SEED} {dtype}")
    chosen.shuffle(shapes)
    # a third skinny: adapters are made of them
    thin = [s for s in shapes if min(s) < 64]
    full = [s for s in shapes if min(s) >= 64]
    mixed = [s for group in zip(thin, full[::2], full[1::2], strict=False) for s in group]
    cases = [[of_linear(dtype, layout, *shape) for layout in LAYOUTS] for shape in mixed]
    if not wide:  # few rows and narrow results have ways of their own (devices/cpu_work.py): one of each more a triple
        few = [of_linear(dtype, "nn", *s) for s in shapes if s[0] < 192 and min(s) >= 64]
        narrow = [of_linear(dtype, layout, *s) for s in thin for layout in LAYOUTS]
        narrow = [case for case in narrow if case["n"] == min(ranks)]
        cases = [[*triple, *more] for triple, *more in zip(cases, cycle(few), cycle(narrow), strict=False)]
    return [case for group in cases for case in group]


def of_linear(dtype: str, layout: str, tokens: int, out_features: int, in_features: int) -> MicroCase:
    """The product of that layout in a linear of `out_features` by `in_features`."""
    m, n, k = {
        "tn": (tokens, out_features, in_features),
        "nn": (tokens, in_features, out_features),
        "nt": (out_features, in_features, tokens),
    }[layout]
    return MicroCase("gemm", "mm", dtype, (("m", m), ("n", n), ("k", k)), layout)


def attentions(dtype: str, *, wide: bool) -> list[MicroCase]:
    """Causal attention, forward and backward, by sequence, heads and head size."""
    seqs = (128, 256, 512, 1024, 2048, 4096, 8192) if wide else (32, 48, 64, 128, 256, 384, 512)
    most = 16384 if wide else 1024  # tokens
    found = []
    for seq, (heads, kv), dim, batch in product(seqs, ((4, 4), (12, 4), (16, 16), (32, 8)), (64, 128), (1, 4)):
        if batch * seq <= most and (wide or heads * batch <= 24):
            sizes = (("batch", batch), ("seq", seq), ("heads", heads), ("kv_heads", kv), ("head_dim", dim))
            found += [MicroCase("attention", "sdpa", dtype, sizes, backward=b) for b in (False, True)]
    pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
    random.Random(SEED).shuffle(pairs)
    return [case for pair in pairs for case in pair]


STREAMS = (
    "add", "mul", "mul_", "lerp_", "addcmul_", "addcdiv_", "sqrt", "div", "silu", "silu_backward", "gelu",
    "gelu_backward", "tanh", "exp", "cos", "mul_row", "mul_column", "transpose", "cat", "cast", "add_mixed", "mean_row",
    "sum_columns", "norm", "norm_row", "log_softmax", "log_softmax_backward", "layer_norm", "layer_norm_backward",
    "embedding", "fill",
)  # fmt: skip


PLAIN = ("add", "mul", "mul_", "lerp_", "addcmul_")  # these show the memory's bandwidth


def stream_cases(dtype: str, *, wide: bool) -> list[MicroCase]:
    """Pointwise calls, reductions, norms, softmax: in cache and out of it; floors and bandwidth come first."""
    largest = ((16384, 8192), (8192, 4096)) if wide else ((2048, 1024), (1024, 3072))
    shapes = [(1, 16), (64, 256), (96, 384), (256, 768), (512, 768), (512, 2048), *largest]
    cases = [
        MicroCase("pointwise", op, dtype, (("rows", r), ("columns", c))) for (r, c), op in product(shapes, STREAMS)
    ]
    big = (("rows", largest[0][0]), ("columns", largest[0][1]))
    first = [c for c in cases if c["rows"] == 1 or (c.sizes == big and c.op in PLAIN)]
    rest = [c for c in cases if c not in first]
    random.Random(f"{SEED} {dtype}").shuffle(rest)
    return first + rest


def host(device: str) -> list[MicroCase]:
    """Costs that come with a call, whatever its size."""
    ops = ["dispatch", "view", "autograd_node", "module_call", *(["launch"] if device == "cuda" else [])]
    lists = [
        MicroCase("host", op, "fp32", (("tensors", n),)) for op in ("foreach_mul_", "foreach_norm") for n in (1, 64)
    ]
    return [MicroCase("host", op, "fp32") for op in ops] + lists
