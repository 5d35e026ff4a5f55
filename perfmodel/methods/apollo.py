"""APOLLO: full fine-tuning that scales gradients as AdamW would, which it finds out in a low rank."""

from dataclasses import dataclass
from typing import Any

from ..optimizers import Update
from ..optimizers.parts.adam_loop import denominator
from ..optimizers.parts.ops import in_place, new, read_item
from ..optimizers.parts.update import gradient
from ..program.op import Attrs
from ..tape.core import emit
from ..tape.linalg import matmul
from ..tape.pointwise import cast
from ..tape.shape import t, unsqueeze
from ..tape.tensor import Parameter, Tensor
from .galore import GaLore, ortho_matrix_of, tall
from .parts.base import Periodic, method, option
from .parts.checks import choice, positive


@method(
    "apollo",
    title="APOLLO",
    source="https://arxiv.org/abs/2412.05270; apollo_torch/apollo.py, random_projector.py",
    trains="every weight",
    adds="projections; scales",
)
@dataclass(frozen=True)
class Apollo(GaLore):
    """All weights train; AdamW's moments of the targets are those of their gradients, projected to r random directions.

    The optimizer is the authors' `APOLLOAdamW`, a Python loop over all weights, projection type `std`. What AdamW makes
    of a projected gradient gives a factor for each channel, or one for all, that scales the whole gradient. Its norm
    may grow by 1 % a step, which the host has to read; here it stays below.
    """

    r: Any = option(16, "rank of the projected gradients", positive)
    scale_type: str = option(
        "channel", "what has a factor of its own: channel or tensor", choice(("channel", "tensor"))
    )

    @property
    def own_optimizer(self) -> str | None:
        return "APOLLOAdamW"

    def projected_update(self, update: Update, p: Parameter) -> None:
        ortho_matrix = ortho_matrix_of(p, self.r)
        update.state(p, ortho_matrix.shape)
        grad = matmul(gradient(p), t(ortho_matrix)) if tall(p) else matmul(t(ortho_matrix), gradient(p))
        exp_avg, exp_avg_sq = update.state(p, grad.shape), update.state(p, grad.shape)
        norm_grad = new("div.Tensor", exp_avg, denominator(exp_avg, exp_avg_sq, grad))
        factor = new("div.Tensor", self._norms(p, norm_grad), new("add.Tensor", self._norms(p, grad)))
        if self.scale_type == "channel" and tall(p):
            factor = unsqueeze(factor, 1)
        scaled_grad = new("mul.Tensor", gradient(p), factor)
        norm = _norm(scaled_grad)
        growth = new("div.Tensor", norm, new("add.Tensor", update.state(p, ())))
        read_item(new("lt.Scalar", growth, dtype="bool"))
        scaled_grad = new("div.Tensor", scaled_grad)
        update.renew(new("div.Tensor", norm))
        in_place("add_.Tensor", p, in_place("mul_.Tensor", scaled_grad))

    def _norms(self, p: Parameter, x: Tensor) -> Tensor:
        """The norm of each channel, or of all."""
        if self.scale_type == "tensor":
            return _norm(x)
        dim = 1 if tall(p) else 0
        return emit("linalg_vector_norm", (x,), (x.shape[1 - dim],), x.dtype, attrs=Attrs(dims=(dim,)))

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("new random projections", self.update_proj_gap, self.renew_projections),)

    def new_projection(self, p: Parameter) -> Tensor:
        shape = ortho_matrix_of(p, self.r).shape
        return cast(new("div.Tensor", emit("randn.generator", (), shape, "fp32")), p.dtype)


def _norm(x: Tensor) -> Tensor:
    return emit("linalg_vector_norm", (x,), (), x.dtype)
