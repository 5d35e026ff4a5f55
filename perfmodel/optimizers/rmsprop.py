"""`torch.optim.RMSprop` without momentum, centring and weight decay, in its two forms. Source: torch/optim/rmsprop.py.

Transformers' Trainer takes it so (`optim: rmsprop`); torch has no fused form.
"""

from ..program.op import ON_HOST, Spec
from ..tape.tensor import Parameter
from .parts.lists import ListRecorder, by_dtype, counters, specs_of
from .parts.ops import advance_counter, in_place, new
from .parts.update import Parameters, Update, gradient, optimizer


@optimizer("rmsprop")
def rmsprop(update: Update, parameters: Parameters, decay: bool) -> None:
    """`_multi_tensor_rmsprop`, the default on CUDA: v = α·v + (1 - α)·g²; p -= lr·g / (√v + ε)."""
    for p in parameters:
        update.state(p), update.host_counter(p)
    part = update.part()
    op = ListRecorder(part)
    for group in by_dtype(specs_of(parameters)):
        steps = counters(group)
        params = grads = square_avgs = avg = group
        op("_foreach_add_.Tensor", [*steps, Spec("fp32", ())], steps, attrs=ON_HOST)
        op("_foreach_mul_.Scalar", square_avgs, square_avgs)
        op("_foreach_addcmul_.Scalar", square_avgs + grads + grads, square_avgs, distinct=square_avgs + grads)
        held = op.temporary(avg)
        op("_foreach_sqrt", square_avgs, avg)
        op("_foreach_add_.Scalar", avg, avg)
        op("_foreach_addcdiv_.Scalar", params + grads + avg, params)
        part.free(held)


@optimizer("rmsprop-loop")
def rmsprop_loop(update: Update, parameters: Parameters, decay: bool) -> None:
    """`_single_tensor_rmsprop`, the default on the CPU: the same, one tensor after another."""
    for run in update.runs(parameters):
        _single_tensor(update, run)


def _single_tensor(update: Update, run: list[Parameter]) -> None:
    avg = None
    for p in run:
        grad, square_avg = gradient(p), update.state(p)
        advance_counter(update.host_counter(p))
        in_place("addcmul_", in_place("mul_.Tensor", square_avg), grad, grad)
        avg = in_place("add_.Tensor", new("sqrt", square_avg))
        in_place("addcdiv_", p, grad, avg)
    del avg
