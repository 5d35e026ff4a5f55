"""`F.linear` as DeepSpeed's ZeRO-3 has it, to be traced without DeepSpeed (`tape.packages.zero3` says what it does).

Source: deepspeed 0.19.8, runtime/zero/linear.py (`LinearFunctionForZeroStage3`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


class KeptInput(torch.autograd.Function):
    """A product that keeps its input whether or not the weight trains, behind the product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x·Wᵀ + b of x (…, in) and W (out, in)."""
        ctx.save_for_backward(x, weight, bias)
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        out = x.matmul(weight.t())
        if bias is not None:
            out += bias
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Of the input, the weight and the bias, as far as they need one."""
        x, weight, bias = ctx.saved_tensors
        (g,) = grads
        of_x = g.matmul(weight) if ctx.needs_input_grad[0] else None
        of_weight = _rows(g).t().matmul(_rows(x)) if ctx.needs_input_grad[1] else None
        of_bias = _rows(g).sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Tokens as the rows of a matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@contextmanager
def linear_of_zero3() -> Iterator[None]:
    """All linear layers run it."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return KeptInput.apply(x, weight, bias)  # type: ignore[no-untyped-call]

    with patch.object(torch.nn.functional, "linear", linear):
        yield
