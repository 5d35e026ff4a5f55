"""Bottleneck adapters: small MLPs in series with the sublayers of every block."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.core import tape
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, gelu, relu, silu
from ..tape.tensor import Tensor
from .parts.base import Method, Scope, method, option
from .parts.checks import choice, float_dtype, positive

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "silu": silu}


@dataclass(frozen=True)
class Bottleneck(Method):
    """up(activation(down(h))) of width r behind a sublayer: on the critical path, where LoRA is beside it."""

    r: Any = option(64, "width of the bottleneck", positive)
    activation: str = option("relu", "relu, gelu or silu", choice(ACTIVATIONS))
    norms: bool = option(False, "whether the norms train too, as Houlsby et al. have it")
    layers_to_transform: tuple[int, ...] | None = option(None, "block numbers such as 0-7+12; default all")
    adapter_dtype: str | None = option(None, "bf16, fp16 or fp32; default that of the base", float_dtype)

    aliases: ClassVar[dict[str, str]] = {"rank": "r", "bottleneck": "r", "layers": "layers_to_transform"}
    behind: ClassVar[tuple[str, ...]]  # the sublayers that get an adapter

    def check(self) -> None:
        for layer in self.layers_to_transform or ():
            if not 0 <= layer < self.layers:
                raise UserError(f"method {self.name}: layer {layer} is outside 0-{self.layers - 1}")

    def layer_key(self, layer: int) -> Hashable:
        return self.layers_to_transform is None or layer in self.layers_to_transform

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return self.norms and kind == "norm"

    def sublayer(self, layer: Scope, name: str, x: Tensor, residual: Tensor, norm: str | None) -> Tensor:
        assert layer.layer is not None
        if name not in self.behind or not self.layer_key(layer.layer):
            return x
        tape().part.host.adapters += 1
        return self.adapted(layer, name, x, residual, norm)

    def adapted(self, layer: Scope, name: str, x: Tensor, residual: Tensor, norm: str | None) -> Tensor:
        """A sublayer's output with its adapter."""
        raise TypeError(f"{type(self).__name__} must define adapted")

    def bottleneck(self, layer: Scope, name: str, h: Tensor) -> Tensor:
        """The bottleneck of h (batch, seq, hidden), in h's dtype."""
        hidden, dtype = h.shape[-1], h.dtype
        inner = self._linear(layer, f"adapter.{name}.down", cast(h, self.adapter_dtype or layer.dtype), self.r)
        return cast(self._linear(layer, f"adapter.{name}.up", ACTIVATIONS[self.activation](inner), hidden), dtype)

    def _linear(self, layer: Scope, name: str, x: Tensor, n_out: Any) -> Tensor:
        dtype = self.adapter_dtype or layer.dtype
        weight, bias = (
            layer.parameter(f"{name}.{part}", shape, "adapter", dtype=dtype, trainable=True)
            for part, shape in (("weight", (n_out, x.shape[-1])), ("bias", (n_out,)))
        )
        return linear(x, weight, bias)


@method(
    "houlsby",
    title="Houlsby adapters",
    source="https://arxiv.org/abs/1902.00751",
    trains="2 bottlenecks a block",
    adds="4 thin GEMMs a block",
)
@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """Two adapters a block, behind attention and behind the MLP: x + up(act(down(x))) before the residual sum."""

    activation: str = option("gelu", "relu, gelu or silu", choice(ACTIVATIONS))

    behind: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    def adapted(self, layer: Scope, name: str, x: Tensor, residual: Tensor, norm: str | None) -> Tensor:
        return add(x, self.bottleneck(layer, name, x))


@method(
    "pfeiffer",
    title="Pfeiffer adapters",
    source="https://arxiv.org/abs/2005.00052",
    trains="1 bottleneck a block",
    adds="2 thin GEMMs a block",
)
@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """One adapter a block, behind the MLP: x + up(act(down(h))), h the block's output as it would be without it."""

    behind: ClassVar[tuple[str, ...]] = ("mlp",)

    def adapted(self, layer: Scope, name: str, x: Tensor, residual: Tensor, norm: str | None) -> Tensor:
        h = add(x, residual)
        if norm is not None:
            h = layer.norm(norm, h)
        return add(x, self.bottleneck(layer, name, h))
