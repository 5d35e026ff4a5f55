"""GaLore: full fine-tuning whose optimizer works on gradients projected to a low rank."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..architectures.stacks import block_of
from ..errors import UserError
from ..optimizers import Update
from ..optimizers.parts.adam_loop import denominator
from ..optimizers.parts.ops import in_place, new
from ..optimizers.parts.update import existing, gradient, runs
from ..program.dims import decide
from ..program.op import OVER_BUS
from ..tape.core import record
from ..tape.decompositions import smaller, svd
from ..tape.linalg import matmul
from ..tape.pointwise import cast, mul
from ..tape.shape import narrow, t
from ..tape.tensor import Parameter, Tensor
from .parts.base import Method, Periodic, method, option
from .parts.checks import positive
from .parts.periodic import Recorded, layers_alike
from .parts.targeted import ALL_LINEAR, check_targets, named


@method(
    "galore",
    title="GaLore",
    source="https://arxiv.org/abs/2403.03507; galore_torch/adamw.py, galore_projector.py",
    trains="every weight",
    adds="projections; SVDs",
)
@dataclass(frozen=True)
class GaLore(Method):
    """All weights train; AdamW's moments of the targets live in an r-dimensional projection of their gradients.

    The optimizer is the authors' `GaLoreAdamW` (transformers: `optim="galore_adamw"`), a Python loop over all weights,
    projection type `std`: the shorter side of a gradient shrinks to r. The projections come from an SVD of the fp32
    gradient every `update_proj_gap` steps. The form that updates weights inside backward (`_layerwise`) is left out.
    """

    r: Any = option(128, "rank of the projected gradients", positive)
    targets: tuple[str, ...] = option((ALL_LINEAR,), "layer names joined by +, whose gradients are projected")
    update_proj_gap: int = option(200, "steps between two SVDs; changes no cost of a step", positive)

    aliases: ClassVar[dict[str, str]] = {"rank": "r", "gap": "update_proj_gap"}

    def check(self) -> None:
        assert self.architecture is not None
        check_targets(self.name, self.targets, self.architecture)

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return True

    @property
    def own_optimizer(self) -> str | None:
        return "GaLoreAdamW"

    def projects(self, p: Parameter) -> bool:
        """Whether the gradient of a weight is projected: that of a linear layer, which stacked experts are not.

        Raises:
            UserError: its shorter side is less than the rank.
        """
        assert self.architecture is not None
        path = p.name.removesuffix(".weight")
        block, name = block_of(self.architecture.stacks, path)
        if p.kind != "weight" or len(p.shape) != 2 or (block is None and path not in self.targets):
            return False
        if not named(name, self.targets):
            return False
        if np.any(np.greater(self.r, smaller(*p.shape))):
            raise UserError(f"method {self.name}: r {np.max(self.r)} exceeds the width of {p.name}")
        return True

    def update(self, update: Update) -> None:
        projected = [p for p in update.parameters if self.projects(p)]
        for run in update.runs([p for p in update.parameters if not self.projects(p)]):
            for p in run:
                _plain_update(update, p)
        for run in update.runs(projected):
            for p in run:
                self.projected_update(update, p)

    def projected_update(self, update: Update, p: Parameter) -> None:
        """A tall gradient (m, n) is projected to (m, r) by rows of Vᴴ, a wide one to (r, n) by columns of U."""
        ortho_matrix, k = ortho_matrix_of(p, self.r), smaller(*p.shape)
        update.state(p, (k, k) if p.dtype == "fp32" else ortho_matrix.shape)  # an fp32 one is a view of a whole factor
        grad = matmul(gradient(p), t(ortho_matrix)) if tall(p) else matmul(t(ortho_matrix), gradient(p))
        exp_avg, exp_avg_sq = update.state(p, grad.shape), update.state(p, grad.shape)
        denom = denominator(exp_avg, exp_avg_sq, grad)
        norm_grad = new("div.Tensor", exp_avg, denom)
        norm_grad = mul(matmul(norm_grad, ortho_matrix) if tall(p) else matmul(ortho_matrix, norm_grad), 1.0)
        in_place("add_.Tensor", p, norm_grad)

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("SVD of the projected gradients", self.update_proj_gap, self.renew_projections),)

    def renew_projections(self, step: Recorded) -> None:
        """Record what makes new projections for all targets."""
        for count, run in runs([p for p in step.parameters if self.projects(p)]):
            with layers_alike("projections", count):
                for p in run:
                    self.new_projection(p)

    def new_projection(self, p: Parameter) -> Tensor:
        """The projection of a target's gradient."""
        u, _, vh = svd(cast(gradient(p), "fp32"))
        return cast(narrow(vh, 0, self.r) if tall(p) else narrow(u, 1, self.r), p.dtype)


@method(
    "fedgalore",
    title="federated GaLore",
    source="https://arxiv.org/abs/2410.23111; the step of GaLore",
    trains="every weight",
    adds="as galore; averages",
)
@dataclass(frozen=True)
class FedGaLore(GaLore):
    """GaLore as the local step of federated fine-tuning: clients average their weights every so many steps.

    A round sends every weight to the host and brings the averaged one back, all of them where LoRA's clients exchange
    adapters. The network and the server are outside the model, as is a client's fresh optimizer state.
    """

    local_steps: int = option(10, "steps of a client between two rounds; changes no cost of a step", positive)

    def periodic(self) -> tuple[Periodic, ...]:
        return (*super().periodic(), Periodic("exchange of all weights with the host", self.local_steps, _exchange))


def _exchange(step: Recorded) -> None:
    for count, run in runs([p for p in step.parameters if p.requires_grad]):
        with layers_alike("exchange", count):
            for p in run:
                on_host = existing(p.shape, p.dtype)
                record("_to_copy", (p,), (on_host,), OVER_BUS)
                record("copy_", (p, on_host), (p,), OVER_BUS)


def tall(p: Parameter) -> bool:
    """Whether a weight has at least as many rows as columns."""
    return decide(np.greater_equal(p.shape[0], p.shape[1]))


def ortho_matrix_of(p: Parameter, r: Any) -> Tensor:
    """The projection that a target's gradient is multiplied by."""
    m, n = p.shape
    return existing((r, n) if tall(p) else (m, r), p.dtype)


def _plain_update(update: Update, p: Parameter) -> None:
    exp_avg, exp_avg_sq = update.state(p), update.state(p)
    norm_grad = new("div.Tensor", exp_avg, denominator(exp_avg, exp_avg_sq, gradient(p)))
    in_place("add_.Tensor", p, norm_grad)
