"""transformers' `Adafactor`, as its Trainer runs it for `optim="adafactor"`: a given learning rate, no first moment.

A Python loop over single tensors, in fp32 whatever the weights are, so that a 16-bit weight and its gradient are copied
first. Source: transformers/optimization.py `Adafactor.step`, trainer_optimizer.py `_get_adafactor`.
"""

from ..program.op import Attrs
from ..tape.core import emit
from ..tape.pointwise import cast, mean_last
from ..tape.shape import unsqueeze
from ..tape.tensor import Parameter, Tensor
from .parts.ops import in_place, new
from .parts.update import Parameters, Update, gradient, optimizer


@optimizer("adafactor")
def adafactor(update: Update, parameters: Parameters, decay: bool) -> None:
    """Second moments as a row and a column of means for matrices, whole for vectors; no weight decay."""
    for run in update.runs(parameters):
        _loop(update, run)


def _loop(update: Update, run: list[Parameter]) -> None:
    grad = p_data_fp32 = change = None
    for p in run:
        grad = cast(gradient(p), "fp32")
        p_data_fp32 = cast(p, "fp32")
        update.state(p, (), "fp32")
        update.renew(_rms(p_data_fp32))
        change = new("add.Tensor", new("pow.Tensor_Scalar", grad))
        change = _factored(update, p, grad, change) if len(p.shape) > 1 else _whole(update, p, grad, change)
        in_place("div_.Tensor", change, in_place("clamp_", new("div.Tensor", _rms(change))))
        in_place("mul_.Tensor", change)
        in_place("add_.Tensor", p_data_fp32, new("neg", change))
        if p.dtype != "fp32":
            in_place("copy_", p, p_data_fp32)
    del grad, p_data_fp32, change


def _rms(x: Tensor) -> Tensor:
    return new("div.Tensor", emit("linalg_vector_norm", (x,), (), x.dtype))


def _factored(update: Update, p: Parameter, grad: Tensor, squares: Tensor) -> Tensor:
    """g / √V with V ≈ rows ⊗ columns, rescaled."""
    *rest, rows, columns = p.shape
    exp_avg_sq_row = update.state(p, (*rest, rows), "fp32")
    exp_avg_sq_col = update.state(p, (*rest, columns), "fp32")
    for state, dim in ((exp_avg_sq_row, len(rest) + 1), (exp_avg_sq_col, len(rest))):
        mean = emit("mean.dim", (squares,), state.shape, "fp32", attrs=Attrs(dims=(dim,)))
        in_place("add_.Tensor", in_place("mul_.Tensor", state), mean)
        del mean
    ratio = new("div.Tensor", exp_avg_sq_row, mean_last(exp_avg_sq_row))
    r_factor = unsqueeze(in_place("rsqrt_", ratio), -1)
    c_factor = new("rsqrt", unsqueeze(exp_avg_sq_col, -2))
    return in_place("mul_.Tensor", new("mul.Tensor", r_factor, c_factor), grad)


def _whole(update: Update, p: Parameter, grad: Tensor, squares: Tensor) -> Tensor:
    exp_avg_sq = update.state(p, dtype="fp32")
    in_place("add_.Tensor", in_place("mul_.Tensor", exp_avg_sq), squares)
    return in_place("mul_.Tensor", new("rsqrt", exp_avg_sq), grad)
