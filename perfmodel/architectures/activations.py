"""Activations of an MLP by the names that configs give them, as transformers computes them (`ACT2FN`)."""

from collections.abc import Callable

from ..tape.pointwise import add, gelu, gelu_tanh, mul, relu, silu, tanh
from ..tape.tensor import Tensor


def gelu_fast(x: Tensor) -> Tensor:
    """`FastGELUActivation`, written out in Python: 0.5·x·(1 + tanh(x·√(2/π)·(1 + 0.044715·x·x)))."""
    inner = add(mul(mul(x, 0.044715), x), 1.0)
    return mul(mul(x, 0.5), add(tanh(mul(mul(x, 0.7978845608), inner)), 1.0))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu, "gelu_pytorch_tanh": gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_fast, "relu": relu, "silu": silu,
}  # fmt: skip  # the tanh form of gelu is one op of PyTorch as well
