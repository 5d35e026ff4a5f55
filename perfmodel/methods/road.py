"""RoAd as PEFT runs it: pairs of outputs are rotated and scaled."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UserError
from ..program.dims import product
from ..tape.elementary import cos, sin
from ..tape.pointwise import add, cast, mul, neg
from ..tape.shape import reshape, view
from ..tape.split import repeat_rows, select, stack
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import choice, positive
from .parts.targeted import Targeted

VARIANTS = ("road_1", "road_2", "road_4")


@method(
    "road",
    title="RoAd",
    source="https://arxiv.org/abs/2409.00119; peft/tuners/road/layer.py",
    trains="angles of the outputs",
    adds="elementwise products",
)
@dataclass(frozen=True)
class Road(Targeted):
    """The output's features are rotated in pairs by trained angles: activations only, no product."""

    variant: str = option("road_1", "road_1, road_2 or road_4: half, one or two angles a feature", choice(VARIANTS))
    group_size: int = option(64, "features whose halves are paired; divides the output width", positive)

    takes_conv1d: ClassVar[bool] = False
    takes_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise UserError(f"method {self.name}: group_size must be even, got {self.group_size}")

    def sizes(self) -> tuple[str, ...]:
        return ("variant",)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        n_out, half = layer.n_out, self.group_size // 2
        self.check_divides(layer, "group_size", "output")
        result = layer(x)
        result_dtype = result.dtype
        result = cast(result, dtype)
        size = {"road_1": n_out // 2, "road_2": n_out, "road_4": 2 * n_out}[self.variant]
        theta, alpha = (layer.adapter(f"road_{name}", (size,), dtype) for name in ("theta", "alpha"))
        first, second = self._columns(theta, alpha)
        pairs = reshape(result, (product(result.shape) // self.group_size, 2, half))
        x1, x2 = select(pairs, 1), select(pairs, 1)
        rotated = reshape(stack((neg(x2), x1), 1), result.shape)
        return cast(add(mul(result, first), mul(rotated, second)), result_dtype)

    def _columns(self, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """`_prepare_cols`: what each feature, and its partner, is multiplied by."""
        if self.variant == "road_1":
            theta, alpha = (self._twice(v) for v in (theta, alpha))
        if self.variant != "road_4":
            theta_cos, theta_sin = cos(theta), sin(theta)
            return mul(alpha, theta_cos), mul(alpha, theta_sin)
        theta = self._in_groups(theta)
        theta_cos, theta_sin = self._flat(cos(select(theta, 1))), self._flat(sin(select(theta, 1)))
        alpha = self._in_groups(alpha)
        first, second = self._flat(select(alpha, 1)), self._flat(select(alpha, 1))
        return mul(first, theta_cos), mul(second, theta_sin)

    def _twice(self, v: Tensor) -> Tensor:
        half = self.group_size // 2
        rows = repeat_rows(view(v, (v.shape[0] // half, half)), 2)
        return view(rows, (product(rows.shape),))

    def _in_groups(self, v: Tensor) -> Tensor:
        return view(v, (v.shape[0] // (2 * self.group_size), 2, self.group_size))

    @staticmethod
    def _flat(v: Tensor) -> Tensor:
        return reshape(v, (product(v.shape),))
