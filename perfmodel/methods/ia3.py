"""(IA)³ as PEFT runs it: activations scaled by trained vectors."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UserError
from ..tape.pointwise import cast, mul
from ..tape.shape import view
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.targeted import Targeted


@method(
    "ia3",
    title="(IA)³",
    source="https://arxiv.org/abs/2205.05638; peft/tuners/ia3/layer.py",
    trains="scales of k, v and MLP",
    adds="elementwise products",
)
@dataclass(frozen=True)
class Ia3(Targeted):
    """Trained vectors that scale the output of a linear layer, or the input of a feed-forward one."""

    feedforward: tuple[str, ...] = option((), "targets whose input is scaled instead; empty: PEFT's default")

    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "feedforward_modules": "feedforward"}
    family: ClassVar[str] = "ia3"
    takes_layers: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        stray = sorted(set(self.feedforward) - set(self.target_names)) if self.pattern is None else []
        if stray:
            raise UserError(
                f"method ia3: feedforward {stray[0]!r} is not among the targets {'+'.join(self.target_names)}"
            )

    @property
    def feedforward_names(self) -> tuple[str, ...]:
        """The feed-forward targets, PEFT's default filled in; none where it has no default and targets were named."""
        assert self.architecture is not None
        return self.feedforward or self.architecture.traits.targets.feedforward or ()

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        scales_input = layer.name.endswith(self.feedforward_names)  # PEFT compares suffixes, not whole names
        shape = (1, layer.n_in) if scales_input else (layer.n_out, 1)
        vector = layer.adapter("ia3_l", shape, dtype)
        scaling = mul(view(vector, (vector.numel,)), 1.0)
        if scales_input:
            previous_dtype = x.dtype
            x = cast(x, dtype)
            interm = cast(mul(x, scaling), previous_dtype)
            return layer(interm)
        result = layer(x)
        result_dtype = result.dtype
        return cast(mul(result, scaling), result_dtype)
