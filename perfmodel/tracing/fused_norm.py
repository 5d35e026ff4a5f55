"""`aten::_fused_rms_norm` and its backward, which torch has for CUDA alone: of the same names, for traces on the CPU.

Source: aten/src/ATen/native/layer_norm.cpp (`rms_norm_symint`) and derivatives.yaml of PyTorch 2.13. Nothing is
computed: a fake tensor has shapes only.
"""

from collections.abc import Callable
from typing import Any

import torch

Norm = Callable[..., torch.Tensor]
library: Any = torch.library.Library("cuda_forms", "DEF")  # type: ignore[no-untyped-call]
library.define("_fused_rms_norm(Tensor input, int[] shape, Tensor? weight, float? eps) -> (Tensor, Tensor)")
library.define(
    "_fused_rms_norm_backward(Tensor grad_out, Tensor input, int[] shape, Tensor rstd, Tensor? weight, bool[2] mask)"
    " -> (Tensor, Tensor)"
)
ops = torch.ops.cuda_forms


def instead_of(original: Norm) -> Norm:
    """A `torch.nn.functional.rms_norm` that dispatches CUDA's kernel where CUDA would."""

    def rms_norm(
        input: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
    ) -> torch.Tensor:
        if input.is_complex() or (weight is not None and weight.dtype != input.dtype):
            return original(input, normalized_shape, weight, eps)
        normed: torch.Tensor = ops._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]
        return normed

    return rms_norm


@torch.library.impl(library, "_fused_rms_norm", "Meta")
def _forward(input: Any, shape: list[int], weight: Any, eps: float | None) -> tuple[Any, Any]:
    """The normed input and, in fp32, what a row was multiplied by."""
    rows = (*input.shape[: input.dim() - len(shape)], *(1 for _ in shape))
    return torch.empty(input.shape, dtype=input.dtype, device="meta"), torch.empty(rows, device="meta")


@torch.library.impl(library, "_fused_rms_norm_backward", "Meta")
def _backward(grad_out: Any, input: Any, shape: list[int], rstd: Any, weight: Any, mask: list[bool]) -> tuple[Any, Any]:
    """Gradients of the input and of the weight, as far as they are wanted."""
    like = (input, input if weight is None else weight)
    first, second = (
        torch.empty(t.shape if wanted else (0,), dtype=t.dtype, device="meta")
        for t, wanted in zip(like, mask, strict=True)
    )
    return first, second


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.shape = inputs[1]
    ctx.save_for_backward(inputs[0], inputs[2], output[1])


def _differentiate(ctx: Any, grad: Any, _: Any) -> tuple[Any, ...]:
    input, weight, rstd = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    of_input, of_weight = ops._fused_rms_norm_backward(grad, input, ctx.shape, rstd, weight, wanted)
    return of_input if wanted[0] else None, None, of_weight if wanted[1] else None, None


torch.library.register_autograd("cuda_forms::_fused_rms_norm", _differentiate, setup_context=_keep)
