"""`torch.optim.AdamW` with weight decay, in its three forms. Sources: torch/optim/adamw.py, adam.py."""

from ..program.op import ON_HOST, Spec
from ..program.part import Part
from ..tape.tensor import Parameter
from .parts.lists import ListRecorder, Specs, by_dtype, counters, each, specs_of
from .parts.ops import advance_counter, in_place, new, read_counter
from .parts.update import Parameters, Update, both_gradients, gradient, gradients_anew, moves, optimizer


def _keep_states(update: Update, parameters: Parameters, *, fused: bool = False) -> None:
    """Two moments in the parameter's dtype and the step counter, on the host unless the form is fused."""
    for p in parameters:
        update.state(p), update.state(p)
        update.state(p, (), "fp32") if fused else update.host_counter(p)


@optimizer("adamw-foreach")
def foreach(update: Update, parameters: Parameters, decay: bool) -> None:
    """`_multi_tensor_adamw`: ten passes over the lists of each dtype."""
    _keep_states(update, parameters)
    part = update.part()
    for group in by_dtype(specs_of(parameters)):
        _foreach_group(part, group, [p for p in parameters if p.dtype == group[0].dtype], decay=decay)


def _foreach_group(part: Part, group: Specs, parameters: Parameters, *, decay: bool) -> None:
    """The bias corrections are computed on the host, whose counters are read there."""
    op = ListRecorder(part)
    steps = counters(group)
    params = grads = moments = group
    op("_foreach_add_.Tensor", [*steps, Spec("fp32", ())], steps, attrs=ON_HOST)
    if decay:
        op("_foreach_mul_.Scalar", params, params)
    here = gradients_anew(parameters)
    op("_foreach_lerp_.Scalar", moments + grads, moments)
    del here
    op("_foreach_mul_.Scalar", moments, moments)
    here = gradients_anew(parameters) + gradients_anew(parameters)
    twice = specs_of([p for p in parameters if moves(p)])
    op("_foreach_addcmul_.Scalar", moments + grads + grads, moments, distinct=moments + grads + twice)
    del here
    each(op, steps, lambda one: op("_local_scalar_dense", [one], [], attrs=ON_HOST))
    each(op, steps, lambda one: op("_local_scalar_dense", [one], [], attrs=ON_HOST))
    denominator = op.temporary(group)
    op("_foreach_sqrt", moments, group)
    op("_foreach_div_.ScalarList", group, group)
    op("_foreach_add_.Scalar", group, group)
    op("_foreach_addcdiv_.ScalarList", params + moments + group, params)
    part.free(denominator)


@optimizer("adamw-loop")
def loop(update: Update, parameters: Parameters, decay: bool) -> None:
    """`_single_tensor_adamw`: the same passes, one tensor after another."""
    for run in update.runs(parameters):
        _single_tensor(update, run, decay=decay)


def _single_tensor(update: Update, run: list[Parameter], *, decay: bool) -> None:
    denom = None
    for p in run:
        exp_avg, exp_avg_sq = update.state(p), update.state(p)
        step = advance_counter(update.host_counter(p))
        if decay:
            in_place("mul_.Tensor", p)
        in_place("lerp_.Scalar", exp_avg, gradient(p))
        in_place("addcmul_", in_place("mul_.Tensor", exp_avg_sq), *both_gradients(p))
        read_counter(step)
        denom = in_place("add_.Tensor", new("div.Tensor", new("sqrt", exp_avg_sq)))
        in_place("addcdiv_", p, exp_avg, denom)
    del denom


@optimizer("adamw-fused")
def fused(update: Update, parameters: Parameters, decay: bool) -> None:
    """`_fused_adamw_`: one pass over all lists; the step counters live on the device.

    Its schema names the gradients as written (they are, when it unscales them), so they count as outputs.
    """
    _keep_states(update, parameters, fused=True)
    op = ListRecorder(update.part())
    for group in by_dtype(specs_of(parameters)):
        steps = counters(group)
        op("_foreach_add_.Scalar", steps, steps)
        here = gradients_anew([p for p in parameters if p.dtype == group[0].dtype])
        op("_fused_adamw_", group * 4 + steps, group * 4)
        del here
