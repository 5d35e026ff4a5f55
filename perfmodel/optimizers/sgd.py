"""`torch.optim.SGD`, foreach, without weight decay. Source: torch/optim/sgd.py, `_multi_tensor_sgd`."""

from .parts.lists import ListRecorder, by_dtype, specs_of
from .parts.update import Parameters, Update, optimizer


@optimizer("sgd")
def sgd(update: Update, parameters: Parameters, decay: bool) -> None:
    """One pass: p -= lr·g."""
    _foreach(update, parameters, momentum=False)


@optimizer("sgd-momentum")
def momentum(update: Update, parameters: Parameters, decay: bool) -> None:
    """One buffer in the parameter's dtype: b = μ·b + g; p -= lr·b."""
    for p in parameters:
        update.state(p)
    _foreach(update, parameters, momentum=True)


def _foreach(update: Update, parameters: Parameters, *, momentum: bool) -> None:
    op = ListRecorder(update.part())
    for group in by_dtype(specs_of(parameters)):
        if momentum:
            op("_foreach_mul_.Scalar", group, group)
            op("_foreach_add_.List", group * 2, group)
        op("_foreach_add_.List", group * 2, group)
