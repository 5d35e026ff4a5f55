"""What Megatron-Core's layers run: Transformer Engine's kernels, and linear layers that ranks share.

Hidden states are (seq, batch, hidden). A linear layer is one autograd Function: backward sends the gradient of its
input while the weight's gradient is computed, which its product adds to the fp32 gradient that is there (`main_grad`).
With sequence parallel a layer cut by columns gathers its input forward, and again backward if its weight trains; one
cut by rows scatters the sum of its output. A LoRA on either is two such layers, cut like it and by its rank.

Source: megatron-core 0.16.1, tensor_parallel/{layers,mappings}.py; TransformerEngine 2.11, pytorch/module/
{layernorm_linear,linear}.py; megatron-bridge 0.3.1, peft/{lora_layers,utils}.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...program.dims import contiguous_strides, decide, product
from ...program.op import Attrs
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, COMPUTE, Run
from ..autograd import differentiate
from ..core import new_tensor, record, tape
from ..linalg import addmm, layout_of, matmul, mm
from ..pointwise import add, cat, mul
from ..shape import clone, contiguous, narrow, t, view
from ..tensor import Grads, Node, Parameter, Storage, Tensor

Grad = Tensor | None
SENT, ARRIVED = Run(COMMUNICATION, (COMPUTE,)), Run(after=(COMMUNICATION,))


class LayerRanks(NamedTuple):
    """The ranks that share layers; `tokens`: the sequence between them, too (sequence parallel)."""

    ranks: Ranks
    tokens: bool

    @property
    def several(self) -> bool:
        """Whether there is more than one of them."""
        return decide(self.ranks.size > 1)


def runs_in_engine() -> None:
    """The Python of a module of Transformer Engine, which takes 2.7 times as long as a linear layer of PyTorch.

    Source: github.com/NVIDIA/TransformerEngine/issues/2053 (GB200 and GH200, bf16, 2025).
    """
    tape().part.host.modules += 3


def used(p: Parameter) -> Parameter:
    """A parameter that is about to be used, of which the hooks around the model are told."""
    if (wrapping := tape().wrapping) is not None:
        wrapping.weight(p)
    return p


def await_sent() -> None:
    """`handle.wait()`: the compute stream waits for what was sent."""
    record("cuda::wait_event", (), (), Attrs(host=True), view=True, runs=ARRIVED)


def send_gather(x: Tensor, ranks: Ranks, *, in_buffer: bool = False) -> Tensor:
    """All ranks' parts along the first dim, on their way, into new memory or a buffer that is there for good."""
    shape = (x.shape[0] * ranks.size, *x.shape[1:])
    if in_buffer:
        whole = Tensor(shape, x.dtype, contiguous_strides(shape), product(shape), Storage(0, None))
        tape().kept["gathered"] = whole.nbytes
    else:
        whole = new_tensor(shape, x.dtype)
    record("c10d::_allgather_base_", (x,), (whole,), Attrs(ranks=ranks), runs=SENT)
    return whole


def send_scatter(x: Tensor, ranks: Ranks) -> Tensor:
    """A rank's part along the first dim of a sum over ranks, on its way."""
    part = new_tensor((x.shape[0] // ranks.size, *x.shape[1:]), x.dtype)
    record("c10d::_reduce_scatter_base_", (x,), (part,), Attrs(ranks=ranks), runs=SENT)
    return part


def send_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """A sum over ranks in place, on its way."""
    record("c10d::allreduce_", (x,), (x,), Attrs(ranks=ranks), runs=SENT)
    return x


class DummyGradient(Tensor):
    """What autograd gets of a weight whose gradient a product has added to the main one already."""


def main_gradient(p: Parameter) -> Tensor:
    """The fp32 gradient that a parameter has for good, in the buffer of all; it counts with that."""
    if p.grad is None:
        p.grad = Tensor(p.shape, "fp32", p.strides, p.numel, Storage(0, None))
    return p.grad


def add_to_main(p: Parameter, grad: Tensor) -> None:
    """`param.main_grad.add_(param.grad)`: of a gradient that autograd made."""
    main = main_gradient(p)
    if isinstance(grad, DummyGradient):
        return
    with tape().belonging_to("adapter" if p.kind == "adapter" else "accumulation"):
        record("add_.Tensor", (main, grad), (main,))


def _accumulate_product(p: Parameter, grad: Tensor, x: Tensor, of_bias: Grad = None) -> Tensor:
    """main_grad += gradᵀ·x, the sum in the product's epilogue, and sums for a bias; what autograd gets in its place.

    That is a tensor for all weights of its shape, kept for good (`get_dummy_wgrad`). Of words that are the head's, too,
    it is zero, and added as theirs is (`zero_out_wgrad`).
    """
    main, left, right = main_gradient(p), t(_rows(grad)), _rows(x)
    outputs = (main,) if of_bias is None else (of_bias, main)
    record("addmm.dtype_out", (main, left, right, main), outputs, layout_of(left, right))
    dummy = (Tensor if p.embeds else DummyGradient)(p.shape, p.dtype, p.strides, p.numel, Storage(0, None))
    tape().kept[p.dtype, str(p.shape)] = dummy.nbytes
    if p.embeds:
        record("fill_.Scalar", (dummy,), (dummy,))
    return dummy


def _rows(x: Tensor) -> Tensor:
    return view(x, (product(x.shape[:-1]), x.shape[-1])) if len(x.shape) > 2 else x


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Transformer Engine's RMSNorm: one kernel; keeps x and the rows' 1/rms in fp32."""
    runs_in_engine()
    node = differentiate("_RMSNormBackward", (x, weight), _rms_norm_backward)
    with tape().no_grad():
        y, rstd = _normed(x, weight)
    if node:
        node.save(x, weight, rstd)
        node.produces(y)
    return y


def _normed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, rstd = new_tensor(x.shape, x.dtype), new_tensor((product(x.shape[:-1]),), "fp32")
    record("te::rmsnorm_fwd", (_rows(x), weight), (y, rstd))
    return y, rstd


def _norm_gradients(g: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and of the weight, frozen or not."""
    grad_x, grad_weight = new_tensor(x.shape, x.dtype), new_tensor(weight.shape, weight.dtype)
    record("te::rmsnorm_bwd", (_rows(g), _rows(x), rstd, weight), (grad_x, grad_weight))
    return grad_x, grad_weight


def _rms_norm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, weight, rstd) = grads, node.unpack()
    assert g is not None
    runs_in_engine()
    return _norm_gradients(g, x, rstd, weight)


def shared_linear(x: Tensor, weight: Parameter, by: str, shared: LayerRanks, *, always: bool = False) -> Tensor:
    """A linear layer of (…, n_in), its weight (n_out, n_in) cut "columns" or "rows" over ranks that share it.

    Args:
        always: whether backward makes the gradient of an input that needs none, as Megatron-Core's own layers do.
    """
    runs_in_engine()
    node = differentiate("_LinearBackward", (x, weight), _linear_backward, (by, shared, x.shape, always))
    with tape().no_grad():
        whole = x
        if by == "columns" and shared.tokens:
            whole = send_gather(x, shared.ranks, in_buffer=weight.requires_grad)
            await_sent()
        out = matmul(whole, t(weight))
        del whole
        if by == "rows":
            out = _summed(out, shared)
    if node:
        node.save(x if node.needs[1] else None, weight)
        node.produces(out)
    return out


def _summed(out: Tensor, shared: LayerRanks) -> Tensor:
    """The output of a layer cut by rows: the sum on every rank, or its part of the tokens."""
    if not shared.several:
        return out
    out = send_scatter(out, shared.ranks) if shared.tokens else send_sum(out, shared.ranks)
    await_sent()
    return out


def _linear_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, weight), (by, shared, shape, always) = grads, node.unpack(), node.attrs
    assert g is not None
    runs_in_engine()
    g = contiguous(g)
    if by == "rows" and shared.tokens:
        g = send_gather(g, shared.ranks)
        await_sent()
    grad_x, grad_w = _both_products(node.needs[0] or always, g, x, weight, by, shared)
    return (grad_x if grad_x is None else view(grad_x, shape), grad_w)


def _both_products(
    wanted: bool, g: Tensor, x: Grad, weight: Parameter, by: str, shared: LayerRanks, of_bias: Grad = None, *,
    of_engine: bool = False,
) -> tuple[Grad, Grad]:  # fmt: skip
    """The gradient of a layer's input, and what autograd gets of its weight, whose own is made while that travels.

    Args:
        x: the layer's input, None where its weight is frozen.
        of_bias: the gradient of a bias, made by the same product.
        of_engine: whether it is Transformer Engine's, which waits for the gathered input only where it needs it.
    """
    columns, whole = by == "columns" and shared.several, x
    gathers = columns and shared.tokens and x is not None
    if gathers:
        assert x is not None
        whole = send_gather(x, shared.ranks, in_buffer=not of_engine)
    grad_x = matmul(g, weight) if wanted else None
    if gathers and not of_engine:
        await_sent()
    sent = columns and grad_x is not None
    if sent:
        assert grad_x is not None
        grad_x = send_scatter(grad_x, shared.ranks) if shared.tokens else send_sum(grad_x, shared.ranks)
    if gathers and of_engine:
        await_sent()
    grad_w = _accumulate_product(weight, g, whole, of_bias) if whole is not None else None
    if sent:
        await_sent()
    return grad_x, grad_w


def norm_linear(
    x: Tensor, norm: Parameter, weight: Parameter, bias: Parameter | None, shared: LayerRanks, *, gives_input: bool
) -> tuple[Tensor, Tensor | None]:
    """`TELayerNormColumnParallelLinear`: an RMSNorm and a linear layer cut by columns in one Function.

    Args:
        bias: of (n_out,): a product's epilogue adds it, and sums its gradient.
        gives_input: whether the layer's input is returned, too, gathered where ranks share tokens (for a LoRA). Of
            that the gradient is dropped (Transformer Engine 2.4 and later).
    """
    runs_in_engine()
    attrs = (shared, gives_input)
    inputs = (x, norm, weight) if bias is None else (x, norm, weight, bias)
    node = differentiate("_LayerNormLinearBackward", inputs, _norm_linear_backward, attrs)
    with tape().no_grad():
        y, rstd = _normed(x, norm)
        whole = y
        if shared.tokens:
            whole = send_gather(y, shared.ranks)
            await_sent()
        rows = _rows(whole)
        out = mm(rows, t(weight)) if bias is None else addmm(bias, rows, t(weight))
        out = view(out, (*whole.shape[:-1], weight.shape[0]))
    if node:
        node.save(x, norm, rstd, y if node.needs[2] or gives_input else None, weight)
        node.produces(out)
        if gives_input:
            whole = whole.alias()
            node.produces(whole)
    return out, whole if gives_input else None


def _norm_linear_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g, *others), (x, norm, rstd, y, weight), (shared, gives) = grads, node.unpack(), node.attrs
    assert g is not None
    runs_in_engine()
    biased, given = len(node.needs) > 3, y if node.needs[2] else None
    of_bias = new_tensor((weight.shape[0],), g.dtype) if biased and node.needs[3] else None
    g = contiguous(g)
    grad_x, grad_w = _both_products(True, g, given, weight, "columns", shared, of_bias, of_engine=True)
    assert grad_x is not None
    if gives and not shared.tokens:
        assert others[0] is not None
        grad_x = add(grad_x, others[0])
    grad_x, grad_norm = _norm_gradients(grad_x, x, rstd, norm)
    return (grad_x, grad_norm, grad_w, of_bias) if biased else (grad_x, grad_norm, grad_w)


def beside(x: Tensor, a: Parameter, b: Parameter, by: str, shared: LayerRanks) -> Tensor:
    """`ParallelLinearAdapter` on a layer cut "columns" or "rows": (…, n_in) → (…, n_out), scaled, all with its layer's.

    A is (r / ranks, n_in) beside columns, (r, n_in / ranks) beside rows; B (n_out / ranks, r).

    Args:
        x: what the layer multiplied, of shared tokens all.
    """
    alone = shared._replace(tokens=False)
    if by == "columns":
        cut = "" if shared.tokens else "columns"  # `disable_grad_reduce`: its layer does it
        low = _gathered_last(shared_linear(x, used(a), cut, alone, always=True), shared)
        high = shared_linear(low, used(b), "columns", alone, always=True)
    else:
        low = shared_linear(x, used(a), "rows", alone, always=True)
        high = _gathered_last(shared_linear(low, used(b), "columns", alone, always=True), shared)
        high = _own_tokens(high, shared.ranks) if shared.tokens else high
    return mul(high, 1.0)


def _gathered_last(x: Tensor, shared: LayerRanks) -> Tensor:
    """Parts of the last dim, put together; backward each takes its own."""
    if not shared.several:
        return x
    node = differentiate("_GatherFromModelParallelRegionBackward", (x,), _part_of_last, (x.shape,))
    with tape().no_grad():
        parts = send_gather(x, shared.ranks)
        await_sent()
        each = [Tensor(x.shape, x.dtype, x.strides, x.numel, parts.storage) for _ in range(int(shared.ranks.size))]
        out = cat(each, len(x.shape) - 1)
    if node:
        node.produces(out)
    return out


def _part_of_last(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (shape,) = grads, node.attrs
    assert g is not None
    return (clone(narrow(g, len(shape) - 1, shape[-1])),)


def _own_tokens(x: Tensor, ranks: Ranks) -> Tensor:
    """A rank's tokens of all; backward those of all ranks are gathered."""
    node = differentiate("_ScatterToSequenceParallelRegionBackward", (x,), _all_tokens, (ranks,))
    with tape().no_grad():
        out = narrow(x, 0, x.shape[0] // ranks.size)
    if node:
        node.produces(out)
    return out


def _all_tokens(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (ranks,) = grads, node.attrs
    assert g is not None
    whole = send_gather(contiguous(g), ranks)
    await_sent()
    return (whole,)
