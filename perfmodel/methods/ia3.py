"""(IA)³ as PEFT runs it: activations scaled by trained vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import UserError
from ..tape.pointwise import cast, mul
from ..tape.shape import view
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.targeted import Targeted

# TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING and _FEEDFORWARD_ (peft/utils/constants.py)
DEFAULT_TARGETS = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "bert": ("key", "value", "output.dense"),
}
DEFAULT_FEEDFORWARD = {
    "llama": ("down_proj",),
    "mistral": ("down_proj",),
    "qwen2": ("down_proj",),
    "opt": ("fc2",),
    "gpt2": ("mlp.c_proj",),
    "gpt_neo": ("c_proj",),
    "bert": ("output.dense",),
}


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
    default_targets: ClassVar[Mapping[str, tuple[str, ...]]] = DEFAULT_TARGETS
    takes_layers: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        stray = sorted(set(self.feedforward) - set(self.target_names))
        if stray:
            raise UserError(
                f"method ia3: feedforward {stray[0]!r} is not among the targets {'+'.join(self.target_names)}"
            )

    @property
    def feedforward_names(self) -> tuple[str, ...]:
        """The feed-forward targets, PEFT's default for the architecture filled in."""
        assert self.architecture is not None
        return self.feedforward or DEFAULT_FEEDFORWARD.get(self.architecture.model_type, ())

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
