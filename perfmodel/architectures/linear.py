"""A linear layer as a method sees it, in the precision that the setup asks for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..program.dims import decide
from ..tape import linalg
from ..tape.core import tape
from ..tape.inplace import add_to_output
from ..tape.packages.float8 import MULTIPLE, float8_linear
from ..tape.tensor import Parameter, Tensor

if TYPE_CHECKING:
    from .base import Scope


@dataclass(frozen=True)
class Linear:
    """A linear layer as a method sees it. Weight (n_out, n_in), or (n_in, n_out) for GPT-2's Conv1D.

    `by_matmul`: it multiplies by the transposed weight in Python (Falcon's), without a bias.
    """

    scope: "Scope"
    name: str
    n_in: int
    n_out: int
    has_bias: bool
    conv1d: bool = False
    by_matmul: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The base layer: y = x·Wᵀ (+ b)."""
        shape = (self.n_in, self.n_out) if self.conv1d else (self.n_out, self.n_in)
        weight = self.scope.parameter(f"{self.name}.weight", shape, "weight")
        bias = self.scope.parameter(f"{self.name}.bias", (self.n_out,), "bias") if self.has_bias else None
        with tape().belonging_to("base"):
            if self.conv1d:
                assert bias is not None
                return linalg.conv1d(x, weight, bias)
            if self.by_matmul:
                return linalg.matmul_linear(x, weight)
            return self.product(x, weight, bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·Wᵀ + b of an `nn.Linear`: the layer's own, or one of an adapter beside it."""
        recipe = self.scope.build.setup.fp8
        if recipe == "none" or self._stays(weight):
            return linalg.linear(x, weight, bias)
        return float8_linear(x, weight, bias, recipe)

    def _stays(self, weight: Tensor) -> bool:
        """Whether accelerate leaves it out of a conversion to float8 (`filter_linear_layers`)."""
        n_out, n_in = weight.shape
        if not (decide(n_out % MULTIPLE == 0) and decide(n_in % MULTIPLE == 0)):
            return True
        first = self.scope.layer == 0 and self.name == self.scope.build.architecture.first_linear()
        own = isinstance(weight, Parameter) and weight.kind != "adapter"
        return own and (first or self.scope.layer is None)

    def add_to(self, result: Tensor, other: Tensor) -> Tensor:
        """`result += other` on this layer's output: a view of a matrix where the product has a bias."""
        return add_to_output(result, other, viewed=self.has_bias)

    def adapter(self, name: str, shape: tuple[Any, ...], dtype: str, *, trainable: bool = True) -> Parameter:
        """A parameter that the method adds to this layer."""
        return self.scope.parameter(f"{self.name}.{name}", shape, "adapter", dtype=dtype, trainable=trainable)
