"""LoRA-FA: LoRA with A frozen at its random start."""

from dataclasses import dataclass
from typing import ClassVar

from ..optimizers import Update
from ..optimizers.parts.adam_loop import adam
from ..optimizers.parts.update import gradient
from ..tape.custom import autocasting
from ..tape.decompositions import pinv
from ..tape.linalg import matmul
from ..tape.pointwise import add, cast, mul
from ..tape.shape import t
from ..tape.tensor import Parameter
from ..tape.transfers import from_host
from .lora import Lora
from .parts.base import Linear, method, option


@method(
    "lora_fa",
    title="LoRA-FA",
    source="https://arxiv.org/abs/2308.03303; peft/optimizers/lorafa.py",
    trains="B",
    adds="no dA; its own optimizer",
)
@dataclass(frozen=True)
class LoraFa(Lora):
    """LoRA whose A is frozen: no gradient of A, and of the input only xAᵀ (T × r) is kept.

    It brings its own optimizer, peft's `LoraFAOptimizer`: AdamW in a Python loop over the pairs, on the gradient of B
    times (AAᵀ)⁻¹, which is the one of full fine-tuning projected on A.
    """

    projected: bool = option(True, "peft's LoraFAOptimizer; false: the setup's optimizer")

    implementations: ClassVar[tuple[str, ...]] = ("peft",)

    def weights(self, layer: Linear, dtype: str) -> tuple[Parameter, Parameter]:
        self.check_rank(layer, self.r)
        a = layer.adapter("lora_A.weight", (self.r, layer.n_in), dtype, trainable=False)
        return a, layer.adapter("lora_B.weight", (layer.n_out, self.r), dtype)

    @property
    def own_optimizer(self) -> str | None:
        return "peft's LoraFAOptimizer" if self.projected else None

    def update(self, update: Update) -> None:
        if not self.projected:
            super().update(update)
            return
        adapters = [p for p in update.everything if p.kind == "adapter"]
        for run in update.runs(adapters):
            pairs = [p for p in run if "lora" in p.name]
            for a, b in zip(pairs[::2], pairs[1::2], strict=True):
                _update_pair(update, a, b)
            for whole in (p for p in run if p not in pairs):  # copies of modules_to_save, a new head
                adam(update, whole, gradient(whole))


def _update_pair(update: Update, a: Parameter, b: Parameter) -> None:
    """One pass of the loop in `LoraFAOptimizer.step`; A (r, n), B (m, r). Its product runs in bf16 by autocast."""
    grad_b_orin = gradient(b)
    aa_t = matmul(a, t(a))
    aa_t_inv = pinv(add(aa_t, mul(from_host("eye", (a.shape[0], a.shape[0]), "fp32"), 1e-8)))
    with autocasting("bf16"):
        grad_b = mul(matmul(grad_b_orin, aa_t_inv), 0.25)
    grad_b = cast(grad_b, grad_b_orin.dtype)
    adam(update, b, grad_b)
