"""AdaLoRA as PEFT runs it: LoRA as a singular value decomposition whose ranks are pruned by importance."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..optimizers import Update
from ..optimizers.parts import importance
from ..optimizers.parts.update import runs
from ..tape.core import emit, record, tape
from ..tape.elementary import div
from ..tape.inplace import add_in_place, add_to_output, frobenius_norm
from ..tape.linalg import matmul
from ..tape.pointwise import add, cast, dropout, mul, sub
from ..tape.shape import t
from ..tape.tensor import Parameter, Tensor
from .parts.base import Linear, Periodic, method, option
from .parts.checks import fraction, positive
from .parts.periodic import Recorded
from .parts.targeted import Targeted


@method(
    "adalora",
    title="AdaLoRA",
    source="https://arxiv.org/abs/2303.10512; peft/tuners/adalora",
    trains="A, E, B; ranks pruned",
    adds="lora + loss and scores",
)
@dataclass(frozen=True)
class AdaLora(Targeted):
    """y = xWᵀ + (α/ranknum)·x(A∘E)ᵀBᵀ, an orthogonality loss on A and B, importance scores after every step.

    PEFT 0.21 trains `ranknum`, too, which the paper keeps constant, where it moves it to a GPU or casts it to the
    base's dtype (there it becomes a new parameter): five more passes over every adapted output in backward. A step is
    one of the budgeting phase (`AdaLoraModel.update_and_allocate`, called after the optimizer).
    """

    r: Any = option(12, "initial rank of every layer (PEFT's init_r)", positive)
    alpha: float = option(8.0, "scale numerator; changes no cost")
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)
    delta_t: int = option(
        1, "steps between two allocations of ranks; 1, as PEFT's default: part of every step", positive
    )

    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "init_r": "r", "deltaT": "delta_t"}
    family: ClassVar[str] = "adalora"

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = layer(x)
        self.check_rank(layer, self.r)
        lora_a = layer.adapter("lora_A", (self.r, layer.n_in), dtype)
        lora_b = layer.adapter("lora_B", (layer.n_out, self.r), dtype)
        lora_e = layer.adapter("lora_E", (self.r, 1), dtype)
        moved = tape().device == "cuda" or layer.scope.dtype != "fp32"
        ranknum = add(layer.adapter("ranknum", (1,), dtype, trainable=moved), 1e-5)
        x = cast(x, dtype)
        delta = div(
            mul(matmul(matmul(dropout(x, self.dropout), t(mul(lora_a, lora_e))), t(lora_b)), self.alpha), ranknum
        )
        return add_to_output(result, delta, viewed=layer.conv1d or layer.has_bias)

    def loss(self, loss: Tensor, parameters: list[Parameter]) -> Tensor:
        """`AdaLoraModel.forward`: the mean of ‖AAᵀ - I‖ and ‖BᵀB - I‖ over all layers."""
        regulariser = None
        for count, run in runs([p for p in parameters if p.name.endswith(("lora_A", "lora_B"))]):
            tape().begin("regulariser", "forward").repeat = count
            for p in run:
                norm = _distance_from_orthogonality(p)
                regulariser = add(norm, 0.0) if regulariser is None else add_in_place(regulariser, norm)
        if regulariser is None:  # no layer has an adapter: the step says so
            return loss
        tape().begin("regulariser", "forward")
        return add_in_place(loss, mul(div(regulariser, 1.0), 0.5))

    def update(self, update: Update) -> None:
        update.group(update.parameters)
        importance.update_scores(update)
        if self.delta_t == 1:
            importance.allocate(update)

    def periodic(self) -> tuple[Periodic, ...]:
        return () if self.delta_t == 1 else (Periodic("allocation of ranks", self.delta_t, _allocate),)


def _allocate(step: Recorded) -> None:
    importance.allocate(Update(tape(), step.optimizer, step.parameters))


def _distance_from_orthogonality(p: Parameter) -> Tensor:
    para_cov = matmul(p, t(p)) if p.name.endswith("lora_A") else matmul(t(p), p)
    identity = emit("empty_like", (para_cov,), para_cov.shape, para_cov.dtype)
    record("eye.m_out", (identity,), (identity,))
    return frobenius_norm(sub(para_cov, identity))
