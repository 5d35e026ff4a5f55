"""Adam-mini 1.1, one second moment for a head, a row or a whole vector; without weight decay, its default.

A Python loop over single tensors, whose names say what shares a second moment.
Source: zyushun/Adam-mini at 402aadf, adam_mini/adam_mini.py.
"""

from ..errors import UserError
from ..program.dims import decide
from ..program.op import Attrs
from ..tape.core import emit
from ..tape.shape import view
from ..tape.tensor import Parameter, Tensor
from .parts.ops import in_place, new
from .parts.update import Parameters, Update, gradient, optimizer

HEADS = ("k_proj", "q_proj", "wq", "wk", "query", "key")
ROWS = (
    "embed", "embd", "wte", "lm_head", "output", "final_layer", "v_proj", "wv", "value", "feed_forward", "linear",
    "mlp", "o_proj", "wo", "attn.proj",
)  # fmt: skip


@optimizer("adam-mini")
def adam_mini(update: Update, parameters: Parameters, decay: bool) -> None:
    """A first moment in the parameter's dtype, and few second ones."""
    for run in update.runs(parameters):
        _loop(update, run)


def _loop(update: Update, run: list[Parameter]) -> None:
    for p in run:
        name = p.name.lower()
        if "bias" in name:
            _adam(update, p)
        elif any(word in name for word in HEADS):
            _by_blocks(update, p, _heads(update, p))
        elif any(word in name for word in ROWS):
            if len(p.shape) != 2:
                raise UserError(f"optimizer adam-mini: it takes {p.name} for a matrix, by its name; use adamw")
            _by_blocks(update, p, p)
        else:
            _whole(update, p)


def _heads(update: Update, p: Parameter) -> Tensor:
    """The parameter with a row for each head."""
    size = p.numel if update.head is None else update.head
    if not decide(p.numel % size == 0):
        raise UserError(f"optimizer adam-mini: {p.name} has no whole number of heads of {size} weights; use adamw")
    return view(p, (p.numel // size, size))


def _adam(update: Update, p: Parameter) -> None:
    v, m, grad = update.state(p), update.state(p), gradient(p)
    in_place("addcmul_", in_place("mul_.Tensor", v), grad, grad)
    in_place("lerp_.Scalar", m, grad)
    in_place("addcdiv_", p, m, _root(v))


def _root(v: Tensor) -> Tensor:
    """√v over its bias correction, + ε."""
    return in_place("add_.Tensor", new("div.Tensor", new("sqrt", v)))


def _by_blocks(update: Update, p: Parameter, blocks: Tensor) -> None:
    """A second moment for each row of `blocks`."""
    m, vmean = update.state(p, blocks.shape), update.state(p, (blocks.shape[0], 1))
    grad = view(gradient(p), blocks.shape)
    square = new("mul.Tensor", grad, grad)
    tmp_lr = emit("mean.dim", (square,), vmean.shape, p.dtype, attrs=Attrs(dims=(1,)))
    del square
    in_place("add_.Tensor", in_place("mul_.Tensor", vmean), tmp_lr)
    in_place("lerp_.Scalar", m, grad)
    _move(p, view(_scaled(m, vmean), p.shape))


def _whole(update: Update, p: Parameter) -> None:
    """One second moment for all."""
    m, vmean, grad = update.state(p), update.state(p, ()), gradient(p)
    tmp_lr = new("div.Tensor", emit("sum", (new("mul.Tensor", grad, grad),), (), p.dtype))
    in_place("lerp_.Scalar", m, grad)
    in_place("add_.Tensor", in_place("mul_.Tensor", vmean), tmp_lr)
    _move(p, _scaled(m, vmean))


def _scaled(m: Tensor, vmean: Tensor) -> Tensor:
    step_size = new("mul.Tensor", new("reciprocal", _root(vmean)))
    return new("mul.Tensor", m, step_size)


def _move(p: Parameter, update: Tensor) -> None:
    in_place("mul_.Tensor", update)
    in_place("add_.Tensor", p, new("neg", update))
