"""transformers' former AdamW, a Python loop over single tensors, from which peft's LoRA-FA and GaLore are made.

The step counter is a Python number, and there is no weight decay by default.
"""

from ...tape.tensor import Parameter, Tensor
from .ops import in_place, new
from .update import Update


def denominator(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor) -> Tensor:
    """Both moments move towards the gradient and its square; returns √v + ε."""
    in_place("add_.Tensor", in_place("mul_.Tensor", exp_avg), grad)
    in_place("addcmul_", in_place("mul_.Tensor", exp_avg_sq), grad, grad)
    return in_place("add_.Tensor", new("sqrt", exp_avg_sq))


def adam(update: Update, p: Parameter, grad: Tensor) -> None:
    """p -= lr·m / (√v + ε), with moments like the parameter."""
    exp_avg, exp_avg_sq = update.state(p), update.state(p)
    in_place("addcdiv_", p, exp_avg, denominator(exp_avg, exp_avg_sq, grad))
