"""Muon as PyTorch has it: matrices of the blocks are made orthogonal after momentum, AdamW updates the rest.

Source: torch/optim/_muon.py, whose documentation leaves embeddings, head, norms and biases to AdamW.
"""

import re

from ..program.dims import decide
from ..tape.core import emit
from ..tape.linalg import addmm, matmul
from ..tape.pointwise import cast
from ..tape.shape import t
from ..tape.tensor import Parameter, Tensor
from .parts.ops import in_place, new
from .parts.update import Parameters, Update, gradient, optimizer, picked_form

IN_A_BLOCK = re.compile(r"\.\d+\.")
STEPS = 5  # of Newton-Schulz (DEFAULT_NS_STEPS)


def is_hidden(p: Parameter) -> bool:
    """Whether a parameter is a matrix of a block: by its part, or of a traced model by the number in its name."""
    inside = p.part.name == "blocks" if p.part is not None else IN_A_BLOCK.search(p.name) is not None
    return inside and len(p.shape) == 2 and p.kind != "embedding"


@optimizer("muon")
def muon(update: Update, parameters: Parameters, decay: bool) -> None:
    """One momentum in the parameter's dtype for a matrix; AdamW's states for the rest."""
    for run in update.runs([p for p in parameters if is_hidden(p)]):
        for p in run:
            _update(update, p)
    rest = [p for p in parameters if not is_hidden(p)]
    update.group(rest, decay=decay, optimizer=picked_form("adamw", update.tape.device))


def _update(update: Update, p: Parameter) -> None:
    grad, buf = gradient(p), update.state(p)
    in_place("lerp_.Scalar", buf, grad)
    x = _zeropower_via_newtonschulz(new("lerp.Scalar", grad, buf))
    in_place("mul_.Tensor", p)
    in_place("add_.Tensor", p, x)


def _zeropower_via_newtonschulz(grad: Tensor) -> Tensor:
    """Five quintic steps in bf16, on the wide form of the matrix: products of (s, l) with s <= l."""
    tall = decide(grad.shape[0] > grad.shape[1])
    x = cast(grad, "bf16")
    x = t(x) if tall else x
    in_place("div_.Tensor", x, new("clamp", emit("linalg_vector_norm", (x,), (), "bf16")))
    for _ in range(STEPS):
        gram_matrix = matmul(x, t(x))
        gram_update = addmm(gram_matrix, gram_matrix, gram_matrix)
        x = addmm(x, gram_update, x)
    return t(x) if tall else x
