"""RunLoRA: LoRA whose products are computed in the cheapest order.

One operator computes b + xW + (xU)V in four forward and eight backward orders; the authors pick one of each per layer
shape, by FLOPs or by measuring (github.com/KamikaziZen/RunLoRA, runlora/runlora.py). Adapters have the base's dtype.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from ..architectures.stacks import block_of
from ..errors import UserError
from ..tape.custom import BACKWARDS, FORWARDS, run_lora
from ..tape.pointwise import mul
from ..tape.shape import t
from ..tape.tensor import Tensor
from .parts.base import Linear, Seconds, method, option
from .parts.checks import choice, float_dtype, positive
from .parts.periodic import Recorded
from .parts.runlora_orders import BACKWARD_FLOPS, FORWARD_FLOPS, LayerShape, OrderChoice, cheapest, order_flops, times
from .parts.targeted import Targeted, base_bias, base_weight


@method(
    "runlora",
    title="RunLoRA",
    source="https://arxiv.org/abs/2312.03415",
    trains="U, V",
    adds="products, cheapest order",
)
@dataclass(frozen=True)
class RunLora(Targeted):
    """LoRA with its products in the cheapest of four forward and eight backward orders, chosen per layer shape."""

    adapter_dtype: str | None = option(
        None, "must be the base's dtype: the operator mixes both in one product", float_dtype
    )
    r: Any = option(8, "rank", positive)
    alpha: float = option(8.0, "scale numerator; changes no cost")
    choose: str = option(
        "flops", "criterion of the choice: flops, or time as predicted for the device", choice(("flops", "time"))
    )
    forward: int | None = option(None, "a forward order from 1 to 4 instead of the choice")
    backward: int | None = option(None, "a backward order from 1 to 8 instead of the choice")
    seconds: Seconds | None = field(default=None, repr=False, compare=False)
    timed: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (("forward", self.forward, FORWARDS), ("backward", self.backward, BACKWARDS)):
            if value is not None and value not in known:
                raise UserError(f"method runlora: {name} must be from 1 to {known[-1]}, got {value}")

    def dtype_beside(self, dtype: str) -> str:
        return self.dtype_of_base(dtype)

    def priced(self, seconds: Seconds) -> "RunLora":
        return replace(self, seconds=seconds, timed={})

    def costs(self, shape: LayerShape) -> tuple[dict[int, Any], dict[int, Any]]:
        """What the choice goes by, for every forward and backward order: FLOPs or seconds."""
        if self.choose == "flops":
            return order_flops(shape)
        if self.seconds is None:
            raise UserError("method runlora: choose=time needs a device to predict times for")
        key = shape._replace(tokens=0, r=0)  # which are the same in all layers of a step
        if key not in self.timed:
            self.timed[key] = times(shape, self.seconds)
        found: tuple[dict[int, Any], dict[int, Any]] = self.timed[key]
        return found

    def orders(self, shape: LayerShape) -> tuple[int, int]:
        """Forward and backward order for a layer."""
        forward, backward = self.costs(shape)
        return self.forward or cheapest(forward), self.backward or cheapest(backward)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if layer.scope.build.setup.amp:
            raise UserError("method runlora: its operator does not run under autocast; leave out --amp")
        self.check_rank(layer, self.r)
        weight, bias = base_weight(layer), base_bias(layer)
        u = layer.adapter("lora_U", (layer.n_in, self.r), dtype)
        v = layer.adapter("lora_V", (self.r, layer.n_out), dtype)
        w = weight if layer.conv1d else t(weight)
        tokens = x.numel // x.shape[-1]
        shape = LayerShape(tokens, layer.n_in, layer.n_out, self.r, dtype, layer.has_bias, layer.conv1d)
        return run_lora(x, w, mul(u, self.alpha), v, bias, *self.orders(shape))

    def choices(self, step: Recorded) -> list[OrderChoice]:
        names = {p.name: p for p in step.parameters}
        found: dict[str, OrderChoice] = {}
        for full, u in names.items():
            if full.endswith(".lora_U"):
                layer = full.removesuffix(".lora_U")
                _, name = block_of(step.architecture.stacks, layer)
                n, m = (names[f"{layer}.lora_{of}"].elements // self.r for of in "UV")  # a rank may hold a part
                shape = LayerShape(
                    step.setup.batch * step.setup.seq, n, m, self.r, u.dtype, layer + ".bias" in names,
                    step.architecture.traits.conv1d,
                )  # fmt: skip
                copies = u.count + (found[name].copies if name in found else 0)
                seconds = self.costs(shape) if self.choose == "time" else (None, None)
                sizes = (copies, shape.n, shape.m)
                found[name] = OrderChoice(name, *sizes, *self.orders(shape), *order_flops(shape), *seconds)
        return list(found.values())


__all__ = ["BACKWARD_FLOPS", "FORWARD_FLOPS", "LayerShape", "OrderChoice", "RunLora"]
