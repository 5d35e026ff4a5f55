"""Riemannian LoRA: LoRA whose gradients are preconditioned by r x r matrices before the optimizer's step."""

from dataclasses import dataclass
from typing import ClassVar

from ..optimizers import Update
from ..optimizers.parts.ops import in_place
from ..optimizers.parts.update import gradient
from ..tape.core import record
from ..tape.decompositions import pinv
from ..tape.elementary import eye
from ..tape.linalg import matmul
from ..tape.pointwise import add, cast, mul
from ..tape.shape import t
from ..tape.tensor import Parameter, Tensor
from .lora import Lora
from .parts.base import method


@method(
    "riemannian_lora",
    title="Riemannian LoRA",
    source="https://arxiv.org/abs/2402.02347; peft/optimizers/riemannian.py",
    trains="A, B",
    adds="lora + solves a pair",
)
@dataclass(frozen=True)
class RiemannianLora(Lora):
    """LoRA; the gradient of A is multiplied by (BᵀB + δI)⁻¹, that of B by (AAᵀ + δI)⁻¹, in fp32 whatever they are."""

    implementations: ClassVar[tuple[str, ...]] = ("peft",)

    def update(self, update: Update) -> None:
        factors = [p for p in update.parameters if ".lora_A." in p.name or ".lora_B." in p.name]
        for run in update.runs(factors):
            for a, b in zip(run[::2], run[1::2], strict=True):
                _precondition(a, b)
        update.group(update.parameters)


def _precondition(p_a: Parameter, p_b: Parameter) -> None:
    record("promote_types", (), ())
    a, b = cast(p_a, "fp32"), cast(p_b, "fp32")
    grad = matmul(_damped_inverse(matmul(t(b), b)), cast(gradient(p_a), "fp32"))
    in_place("copy_", gradient(p_a), cast(grad, p_a.dtype))
    grad = matmul(cast(gradient(p_b), "fp32"), _damped_inverse(matmul(a, t(a))))
    in_place("copy_", gradient(p_b), cast(grad, p_b.dtype))


def _damped_inverse(gram: Tensor) -> Tensor:
    return pinv(add(gram, mul(eye(gram.shape[0], gram.dtype), 1.0)))
