"""P-tuning as PEFT runs it: an MLP makes the prompt."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError, one_of
from ..tape.linalg import linear
from ..tape.nn import embedding
from ..tape.pointwise import relu
from ..tape.tensor import Tensor
from .parts.base import Scope, method, option
from .parts.checks import positive
from .parts.virtual import SoftPrompt


@method(
    "p_tuning",
    title="P-tuning",
    source="https://arxiv.org/abs/2103.10385; peft/tuners/p_tuning/model.py",
    trains="an encoder of prompts",
    adds="longer text, an MLP",
)
@dataclass(frozen=True)
class PTuning(SoftPrompt):
    """Prompt tuning whose embeddings come from a trained MLP of three layers over trained vectors."""

    width: Any = option(None, "hidden width of the encoder; default the model's", positive)
    encoder: str = option("mlp", "mlp, PEFT's default; its LSTM is not modelled")

    aliases: ClassVar[dict[str, str]] = {
        **SoftPrompt.aliases, "encoder_hidden_size": "width", "encoder_reparameterization_type": "encoder"
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder.lower() == "lstm":
            raise UserError(f"method {self.name}: encoder lstm (cuDNN's recurrent kernels) is not modelled; use mlp")
        one_of(f"method {self.name}: encoder", self.encoder.lower(), ("mlp",))

    def encode(self, model: Scope, indices: Tensor) -> Tensor:
        assert self.architecture is not None
        hidden = self.architecture.hidden
        width = hidden if self.width is None else self.width
        x = embedding(self.weight(model, "embedding.weight", self.tokens, hidden), indices)
        x = relu(self._layer(model, 0, x, width))
        x = relu(self._layer(model, 2, x, width))
        return self._layer(model, 4, x, hidden)

    def _layer(self, model: Scope, index: int, x: Tensor, n_out: Any) -> Tensor:
        weight = self.weight(model, f"mlp_head.{index}.weight", n_out, x.shape[-1])
        return linear(x, weight, self.weight(model, f"mlp_head.{index}.bias", n_out))
