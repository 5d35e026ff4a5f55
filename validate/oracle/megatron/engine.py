"""Transformer Engine's modules that Megatron-Core's layers consist of, call for call what theirs do, in PyTorch.

Without Transformer Engine Megatron-Core has modules of its own. They exchange the same, but for a LoRA under sequence
parallelism: there the linear layer behind a norm returns that norm's gathered output, too, and drops its gradient.

Source: TransformerEngine 2.11, pytorch/module/{layernorm_linear,linear,base}.py, pytorch/ops/basic/rmsnorm.py,
pytorch/attention/{rope.py,dot_product_attention/utils.py}; megatron-core 0.16.1, extensions/transformer_engine.py.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .recorder import as_kernel

Works = tuple[torch.Tensor, Any]  # a tensor, and what to wait for before it is there


def sent_whole(x: torch.Tensor, group: Any, *, later: bool = False) -> Works:
    """`gather_along_first_dim`."""
    whole = torch.empty((x.shape[0] * group.size(), *x.shape[1:]), dtype=x.dtype)
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=later)


def sent_parts(x: torch.Tensor, group: Any, *, later: bool = False) -> Works:
    """`reduce_scatter_along_first_dim`."""
    part = torch.empty((x.shape[0] // group.size(), *x.shape[1:]), dtype=x.dtype)
    return part, dist.reduce_scatter_tensor(part, x.contiguous(), group=group, async_op=later)


def sent_sum(x: torch.Tensor, group: Any, *, later: bool = False) -> Works:
    """`allreduce`."""
    return x, dist.all_reduce(x, group=group, async_op=later)


def weight_product(x: torch.Tensor, g: torch.Tensor, main: torch.Tensor, *, biased: bool = False) -> Any:
    """A weight's gradient, added to what there is in the product's epilogue; that of a bias is made there, too."""

    def run() -> Any:
        main.add_(g.t().float() @ x.float())
        return g.sum(0) if biased else None

    return as_kernel("addmm.dtype_out", (main, g.t(), x, main), run, flops=2 * g.numel() * x.shape[-1], into=(main,))


@cache
def _dummy(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def dummy_gradient(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """`get_dummy_wgrad`: what autograd gets for a gradient that is in the buffer already."""
    made = _dummy(tuple(shape), dtype)
    if zero:  # of a weight that is tied, whose other gradient autograd adds to it
        made.fill_(0)
    return made.detach()


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    """`rmsnorm_fwd`: the norm of rows, and 1/rms of each."""

    def run() -> Any:
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return (x.float() * inverse * weight.float()).to(x.dtype), inverse.flatten()

    return as_kernel("te::rmsnorm_fwd", (x, weight), run)


def norm_gradients(g: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> Any:
    """`rmsnorm_bwd`: of rows and of the weight, frozen or not."""

    def run() -> Any:
        normal, scaled = x.float() * inverse[:, None], g.float() * weight.float()
        rows = inverse[:, None] * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
        return rows.to(x.dtype), (g.float() * normal).sum(0).to(weight.dtype)

    return as_kernel("te::rmsnorm_bwd", (g, x, inverse, weight), run)


class NormRows(torch.autograd.Function):
    """An RMSNorm by itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `normed` of rows that lie in a row."""
        rows = x.contiguous().view(-1, x.shape[-1])
        out, inverse = normed(rows, weight, eps)
        ctx.save_for_backward(rows, inverse, weight)
        return out.view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of x and of the weight."""
        rows, inverse, weight = ctx.saved_tensors
        of_x, of_weight = norm_gradients(grads[0].contiguous().view(rows.shape), rows, inverse, weight)
        return of_x.view(grads[0].shape), of_weight, None


class EngineNorm(torch.nn.Module):
    """`TENorm` of RMSNorm."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight, self.eps = _weight(hidden_size, dtype=config.params_dtype), eps
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> Any:
        """The norm of the last dim."""
        return NormRows.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]


class NormLinear(torch.autograd.Function):
    """`_LayerNormLinear`: an RMSNorm and a linear layer that is cut by columns."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Any, weight: Any, bias: Any, layer: Any) -> Any:
        """The layer's output, and its input if that is asked for."""
        rows = x.view(-1, x.shape[-1])
        y, inverse = normed(rows, norm, layer.eps)
        whole = sent_whole(y, layer.group)[0] if layer.shares_tokens else y
        out = torch.mm(whole, weight.t()) if bias is None else torch.addmm(bias, whole, weight.t())
        gives, kept = layer.return_layernorm_output, weight.requires_grad or layer.return_layernorm_output
        ctx.save_for_backward(rows, norm, weight, inverse, y if kept else None)
        ctx.layer, ctx.shape, ctx.biased = layer, x.shape, bias is not None
        returned = whole if layer.return_layernorm_output_gathered else y
        return out.view(-1, *x.shape[1:-1], weight.shape[0]), returned.view(-1, *x.shape[1:]) if gives else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of its input is on its way while that of its weight is computed."""
        rows, norm, weight, inverse, y = ctx.saved_tensors
        layer, trains = ctx.layer, weight.requires_grad
        g = grads[0].reshape(-1, weight.shape[0]).contiguous()
        gathers = trains and layer.shares_tokens
        whole, arriving = sent_whole(y, layer.group, later=True) if gathers else (y, None)
        of_rows, sent = torch.mm(g, weight), None
        if layer.group.size() > 1:
            send = sent_parts if layer.shares_tokens else sent_sum
            of_rows, sent = send(of_rows, layer.group, later=True)
        if arriving is not None:
            arriving.wait()
        of_bias = weight_product(whole, g, layer.weight.main_grad, biased=ctx.biased) if trains else None
        if sent is not None:
            sent.wait()
        if layer.return_layernorm_output and not layer.return_layernorm_output_gathered:
            of_rows = of_rows + grads[1].view_as(of_rows)
        of_rows, of_norm = norm_gradients(of_rows, rows, inverse, norm)
        return of_rows.view(ctx.shape), of_norm, _added(layer.weight) if trains else None, of_bias, None


class RowLinear(torch.autograd.Function):
    """`_Linear` that is cut by rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, layer: Any) -> torch.Tensor:
        """The sum over ranks, or a rank's tokens of it."""
        rows = x.view(-1, x.shape[-1])
        out = torch.mm(rows, weight.t())
        if layer.group.size() > 1:
            out, _ = (sent_parts if layer.shares_tokens else sent_sum)(out, layer.group)
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        ctx.layer, ctx.shape = layer, x.shape
        return out.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Both products of the whole gradient."""
        (rows, weight), layer = ctx.saved_tensors, ctx.layer
        g = grads[0].reshape(-1, weight.shape[0]).contiguous()
        if layer.shares_tokens:
            g, _ = sent_whole(g, layer.group)
        of_x = torch.mm(g, weight).view(ctx.shape)
        if rows is None:
            return of_x, None, None
        weight_product(rows, g, layer.weight.main_grad)
        return of_x, _added(layer.weight), None


def _added(weight: Any) -> torch.Tensor:
    """Tell Megatron's DistributedDataParallel that a gradient is in its buffer."""
    weight.grad_added_to_main_grad = True
    return dummy_gradient(list(weight.shape), weight.dtype, getattr(weight, "zero_out_wgrad", False))


def _weight(*shape: int, dtype: torch.dtype) -> Any:
    """A weight, or the vector of a norm."""
    made = torch.full(shape, 1.0, dtype=dtype) if len(shape) == 1 else torch.randn(shape).mul_(0.02).to(dtype)
    return torch.nn.Parameter(made)


class EngineLinear(torch.nn.Module):
    """What both linear layers have.

    Attributes:
        in_features, out_features: of this rank.
        shares_tokens: whether ranks share the tokens of a sequence, too.
    """

    return_layernorm_output = False  # Megatron-Bridge sets these beside a LoRA
    return_layernorm_output_gathered = False

    def __init__(self, n_in: int, n_out: int, config: Any, group: Any, by: int) -> None:
        super().__init__()
        self.config, self.group, self.eps = config, group, config.layernorm_epsilon
        self.shares_tokens = config.sequence_parallel
        n_out, n_in = (n // group.size() if dim == by else n for dim, n in enumerate((n_out, n_in)))
        self.in_features, self.out_features = n_in, n_out
        if by == 0:
            self.layer_norm_weight = _weight(n_in, dtype=config.params_dtype)
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.weight = _weight(n_out, n_in, dtype=config.params_dtype)
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, by, 1


class EngineNormLinear(EngineLinear):
    """`TELayerNormColumnParallelLinear`."""

    def __init__(self, n_in: int, n_out: int, *, config: Any, bias: bool, tp_group: Any = None, **_: Any) -> None:
        super().__init__(n_in, n_out, config, tp_group, by=0)
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=config.params_dtype)) if bias else None
        if self.bias is not None:
            self.bias.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> Any:
        """(output, None), of which the output has the layer's input with it if that is asked for."""
        out = NormLinear.apply(x, self.layer_norm_weight, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return (out if self.return_layernorm_output else out[0]), None


class EngineRowLinear(EngineLinear):
    """`TERowParallelLinear`."""

    def __init__(self, n_in: int, n_out: int, *, config: Any, tp_group: Any = None, **_: Any) -> None:
        super().__init__(n_in, n_out, config, tp_group, by=1)

    def forward(self, x: torch.Tensor) -> Any:
        """(output, None)."""
        return RowLinear.apply(x, self.weight, self), None  # type: ignore[no-untyped-call]


class FusedRotary(torch.autograd.Function):
    """`FusedRoPEFunc`, which keeps the angles alone and takes any layout."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, angles: torch.Tensor) -> Any:
        """Turned by the angles."""
        ctx.save_for_backward(angles)
        return as_kernel("te::fused_rope_forward", (x, angles), lambda: _turned(x, angles))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Turned back."""
        (angles,) = ctx.saved_tensors
        return as_kernel("te::fused_rope_backward", (grads[0], angles), lambda: _turned(grads[0], -angles)), None


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    out = x * angles.cos().to(x.dtype) + torch.cat((-high, low), -1) * angles.sin().to(x.dtype)
    return out.contiguous()


class EngineAttention(torch.nn.Module):
    """`TEDotProductAttention`: one kernel, here PyTorch's, of queries, keys and values that each lie in a row."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any = None, **_: Any) -> torch.Tensor:
        """(seq, batch, heads, d) each → (seq, batch, heads · d)."""
        q, k, v = (x.contiguous().transpose(0, 1).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        return out.transpose(1, 2).transpose(0, 1).reshape(*query.shape[:2], -1)
