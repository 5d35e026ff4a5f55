"""Makes a case run: a function of the repeat's number that makes one call on operands that lie where training's do.

What a step made just before is warm: the repeats share two copies of it. Weights, what forward saved, the optimizer's
state and the memory of a fresh result were last touched long ago: they are cold. Cold operands are cut from a pool that
is several times as large as the caches, one after the other, over all cases; results are kept until so many bytes of
them are there, so that a call writes to memory that was not touched just before. On a GPU everything is cold.
"""

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle, islice
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

from perfmodel.devices.cpu_work import HOT, STATE
from perfmodel.devices.hardware import ITEMSIZE
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES

from ..measuring.environment import caches
from .designs import MicroCase

aten = torch.ops.aten
Call = Callable[[int], object]
ROOM = 6.0  # times the largest cache
RING = {"cpu": min(max(64e6, ROOM * max(caches().values(), default=0)), 512e6), "cuda": 512e6}  # bytes of a pool
MOST_COPIES = 64
FEW = 2  # copies of a warm operand
LINE = 64  # bytes: operands begin at whole lines
_kept: deque[tuple[object, int]] = deque()  # results of earlier cases, and their bytes
_cursor: dict[int, int] = {}  # address of a pool -> element at which the next operand begins


def build_call(case: MicroCase, device: str) -> tuple[Call, int]:
    """The call of a case, and how many calls a repeat should have."""
    with torch.device(device):
        call, inner = BUILDERS[case.block](case, device)
    return (call if case.block == "host" else _holding(case, call, device)), inner


def _holding(case: MicroCase, call: Call, device: str) -> Call:
    """The call, its results held, and those of earlier cases until so many bytes of them are there."""
    _touched(RING[device], device)
    if case.op in HOT and device == "cpu":
        few: deque[object] = deque(maxlen=FEW)
        return lambda i: few.append(call(i))
    nbytes = sum(t.nbytes for t in tree_leaves(call(0)) if isinstance(t, Tensor))
    held: deque[object] = deque(maxlen=max(1, min(MOST_COPIES, int(RING[device] / max(nbytes, 1)))))
    _kept.append((held, nbytes * (held.maxlen or 1)))
    while sum(size for _, size in _kept) > RING[device] and len(_kept) > 1:
        _kept.popleft()
    return lambda i: held.append(call(i))


@lru_cache(maxsize=4)
def _touched(nbytes: float, device: str) -> None:
    """Have the allocator own so many bytes beyond what is held: no call waits for the system to give it a page."""
    torch.zeros(int(2 * nbytes), dtype=torch.uint8, device=device)


@lru_cache(maxsize=8)
def _pool(nbytes: float, dtype: str, device: str, positive: bool) -> Tensor:
    some = torch.rand(1 << 20, device=device) + 0.5 if positive else torch.randn(1 << 20, device=device)
    return some.to(TORCH_DTYPES[dtype]).repeat(ceil(nbytes / ITEMSIZE[dtype] / len(some)))


def release_pools(device: str) -> None:
    """Give back pools and results: what is measured next needs the memory, and must not find it held."""
    _kept.clear()
    _cursor.clear()
    _touched.cache_clear()
    _pool.cache_clear()
    if device == "cuda":
        torch.cuda.empty_cache()


class Ring:
    """Copies of an operand; `ring[i]` is the copy of repeat i.

    Args:
        of: large operands of the case. They share the pool and no memory: of a sum with itself half is read.
    """

    def __init__(
        self, *shape: int, dtype: str = "fp32", device: str, positive: bool = False, warm: bool = False,
        most: int | None = None, of: int = 1,
    ) -> None:  # fmt: skip
        numel, per_line = prod(shape), int(LINE // ITEMSIZE[dtype])
        step = int(ceil(numel / per_line) * per_line)
        shares = of + (of > 1)  # less than one is passed over where the pool ends
        pool = _pool(max(RING[device], max(2, shares) * step * ITEMSIZE[dtype]), dtype, device, positive)
        most = min(most or MOST_COPIES, MOST_COPIES)
        most = min(most, FEW) if warm and device == "cpu" else most
        copies = max(1, min(most, len(pool) // (shares * step)))
        begin = _cursor.get(pool.data_ptr(), 0)
        if begin + copies * step > len(pool):
            begin = 0
        _cursor[pool.data_ptr()] = begin + copies * step
        self.copies = [pool[o : o + numel].view(shape) for o in range(begin, begin + copies * step, step)]

    def __getitem__(self, i: int) -> Tensor:
        return self.copies[i % len(self.copies)]


def gemm(case: MicroCase, device: str) -> tuple[Call, int]:
    """A product in the layout of forward, input gradient or weight gradient."""
    m, n, k = case["m"], case["n"], case["k"]
    a = Ring(*((k, m) if case.layout == "nt" else (m, k)), dtype=case.dtype, device=device, warm=True, of=2)
    b = Ring(*((n, k) if case.layout == "tn" else (k, n)), dtype=case.dtype, device=device, of=2)
    calls: dict[str, Call] = {
        "tn": lambda i: torch.mm(a[i], b[i].t()),
        "nn": lambda i: torch.mm(a[i], b[i]),
        "nt": lambda i: torch.mm(a[i].t(), b[i]),
    }
    return calls[case.layout], 1


def _attention(case: MicroCase, device: str) -> tuple[Call, int]:
    """As transformers lays heads out: (batch, seq, heads, head_dim), transposed."""
    b, s, d = case["batch"], case["seq"], case["head_dim"]
    heads = (case["heads"], case["kv_heads"], case["kv_heads"])
    own: Any = {"dtype": case.dtype, "device": device, "warm": not case.backward, "most": 8, "of": 3}
    q, k, v = (Ring(b, s, h, d, **own) for h in heads)
    inputs = [[x[i].transpose(1, 2) for x in (q, k, v)] for i in range(len(q.copies))]
    grad = torch.ones_like(inputs[0][0])
    if device == "cpu":  # the kernels themselves: their wrapper costs as much as small ones
        if not case.backward:
            return lambda i: aten._scaled_dot_product_flash_attention_for_cpu(*inputs[i % len(inputs)], 0.0, True), 1
        results = [aten._scaled_dot_product_flash_attention_for_cpu(*x, 0.0, True) for x in inputs]

        def kernel(i: int) -> object:
            i = i % len(inputs)
            return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, *inputs[i], *results[i], 0.0, True)

        return kernel, 1
    grouped = case["heads"] != case["kv_heads"]
    if not case.backward:
        return lambda i: _sdpa(inputs[i % len(inputs)], grouped), 1
    leaves = [[x.detach().requires_grad_() for x in parts] for parts in inputs]
    outputs = [_sdpa(parts, grouped) for parts in leaves]

    def backward(i: int) -> object:
        i = i % len(leaves)
        return torch.autograd.grad(outputs[i], leaves[i], grad, retain_graph=True)

    return backward, 1


def _sdpa(parts: list[Tensor], grouped: bool) -> Tensor:
    q, k, v = parts
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _stream(case: MicroCase, device: str) -> tuple[Call, int]:
    rows, columns = case["rows"], case["columns"]

    def ring(*shape: int) -> Ring:
        return Ring(*shape, dtype=case.dtype, device=device, positive=True, warm=case.op in HOT, of=operands)

    operands = OPERANDS.get(case.op, 1)
    x = Ring(rows, columns, dtype=case.dtype, device=device, positive=True, warm=case.op not in STATE, of=operands)
    return STREAM_CALLS[case.op](x, ring, rows, columns), 10 if rows * columns < 4096 else 1


def _binary(call: Callable[[Tensor, Tensor], object]) -> Callable[..., Call]:
    def make(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
        y = ring(rows, columns)
        return lambda i: call(x[i], y[i])

    return make


def _unary(call: Callable[[Tensor], object]) -> Callable[..., Call]:
    return lambda x, ring, rows, columns: lambda i: call(x[i])


def _ternary(call: Callable[[Tensor, Tensor, Tensor], object]) -> Callable[..., Call]:
    def make(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
        y, z = ring(rows, columns), ring(rows, columns)
        return lambda i: call(x[i], y[i], z[i])

    return make


def _with(call: Callable[[Tensor, Tensor], object], shape: str) -> Callable[..., Call]:
    """A second operand that is broadcast: a row or a column."""

    def make(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
        other = ring(*((columns,) if shape == "row" else (rows, 1)))
        return lambda i: call(x[i], other[i])

    return make


def _layer_norm(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
    weight, bias = ring(columns)[0], ring(columns)[0]
    return lambda i: aten.native_layer_norm(x[i], [columns], weight, bias, 1e-5)


def _layer_norm_backward(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
    weight, bias, grad = ring(columns)[0], ring(columns)[0], ring(rows, columns)
    _, mean, scale = aten.native_layer_norm(x[0], [columns], weight, bias, 1e-5)
    return lambda i: aten.native_layer_norm_backward(
        grad[i], x[i], [columns], mean, scale, weight, bias, [True, True, True]
    )


def _embedding(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
    indices = torch.tensor(list(islice(cycle(range(0, 7 * rows, 7)), rows))) % rows
    return lambda i: torch.embedding(x[i], indices)


def _add_mixed(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
    """As PEFT adds an fp32 adapter to the output of a 16-bit layer."""
    y, other = ring(rows, columns), torch.bfloat16 if x[0].dtype == torch.float32 else torch.float32
    cast = [part.to(other) for part in y.copies[:FEW]]
    return lambda i: x[i] + cast[i % len(cast)]


def _cast(x: Ring, ring: Callable[..., Ring], rows: int, columns: int) -> Call:
    target = torch.bfloat16 if x[0].dtype == torch.float32 else torch.float32
    return lambda i: x[i].to(target)


OPERANDS = {  # as large as the first one, of ops that have several
    **dict.fromkeys(("add", "mul", "div", "lerp_", "addcmul_", "silu_backward", "gelu_backward"), 2),
    **dict.fromkeys(("log_softmax_backward", "layer_norm_backward", "add_mixed"), 2), "addcdiv_": 3,
}  # fmt: skip
STREAM_CALLS: dict[str, Callable[..., Call]] = {
    "add": _binary(torch.add),
    "mul": _binary(torch.mul),
    "mul_": _unary(lambda x: x.mul_(0.999)),
    "lerp_": _binary(lambda x, y: x.lerp_(y, 0.1)),
    "addcmul_": _binary(lambda x, y: x.addcmul_(y, y, value=1e-3)),
    "addcdiv_": _ternary(lambda x, y, z: x.addcdiv_(y, z, value=-1e-3)),
    "sqrt": _unary(torch.sqrt),
    "div": _binary(torch.div),
    "silu": _unary(aten.silu),
    "silu_backward": _binary(aten.silu_backward),
    "gelu": _unary(aten.gelu),
    "gelu_backward": _binary(aten.gelu_backward),
    "tanh": _unary(torch.tanh),
    "exp": _unary(torch.exp),
    "cos": _unary(torch.cos),
    "mul_row": _with(torch.mul, "row"),
    "mul_column": _with(torch.mul, "column"),
    "transpose": _unary(lambda x: x.view(x.shape[0], -1, 16).transpose(0, 1).contiguous()),
    "cat": _unary(lambda x: torch.cat((x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]), -1)),
    "cast": _cast,
    "add_mixed": _add_mixed,
    "mean_row": _unary(lambda x: x.mean(-1, keepdim=True)),
    "sum_columns": _unary(lambda x: x.sum(0, keepdim=True)),
    "norm": _unary(torch.linalg.vector_norm),
    "norm_row": _unary(lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
    "log_softmax": _unary(lambda x: aten._log_softmax(x, -1, False)),
    "log_softmax_backward": _binary(lambda x, y: aten._log_softmax_backward_data(x, y, -1, x.dtype)),
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "embedding": _embedding,
    "fill": _unary(torch.zeros_like),
}


def _host(case: MicroCase, device: str) -> tuple[Call, int]:
    """Work of the host is done on its own tensors: a call on a GPU's would be timed with its launch."""
    one = torch.ones(1, device=device if case.op == "launch" else "cpu")
    leaf = torch.ones(1, requires_grad=True, device="cpu")
    module = torch.nn.Identity()
    if case.op in ("foreach_mul_", "foreach_norm"):
        tensors = [torch.ones(16) for _ in range(case["tensors"])]
        function = torch._foreach_mul_ if case.op == "foreach_mul_" else torch._foreach_norm
        argument = 0.999 if case.op == "foreach_mul_" else 2
        return lambda i: function(tensors, argument), 20
    calls: dict[str, Call] = {
        "dispatch": lambda i: torch.neg(one),
        "launch": lambda i: torch.neg(one),
        "view": lambda i: one.view(1),
        "autograd_node": lambda i: torch.autograd.grad(leaf * 1.0, leaf),
        "module_call": lambda i: module(one),
    }
    return calls[case.op], 50


BUILDERS: dict[str, Callable[[MicroCase, str], tuple[Call, int]]] = {
    "gemm": gemm, "attention": _attention, "pointwise": _stream, "host": _host,
}  # fmt: skip
