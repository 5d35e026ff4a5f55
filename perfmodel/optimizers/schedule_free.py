"""Schedule-free AdamW (transformers' `schedule_free_adamw`), over lists of tensors.

It keeps the second moment and the sequence z, each in the parameter's dtype, and overwrites the gradient. Source:
facebookresearch/schedule_free 1.4, adamw_schedulefree.py, whose lists are not grouped by dtype.
"""

from .parts.lists import ListRecorder, by_dtype, specs_of
from .parts.update import Parameters, Update, optimizer


@optimizer("schedule-free-adamw")
def schedule_free(update: Update, parameters: Parameters, decay: bool) -> None:
    """Ten passes over the lists, eleven with weight decay."""
    for p in parameters:
        update.state(p), update.state(p)
    part = update.part()
    op = ListRecorder(part)
    for group in by_dtype(specs_of(parameters)):
        op("_foreach_mul_.Scalar", group, group)
        op("_foreach_addcmul_.Scalar", group * 3, group, distinct=group * 2)
        denominator = op.temporary(group)
        op("_foreach_div.Scalar", group, group)
        op("_foreach_sqrt_", group, group)
        op("_foreach_add_.Scalar", group, group)
        op("_foreach_div_.List", group * 2, group)
        for _ in range(1 if decay else 0):
            op("_foreach_add_.List", group * 2, group)
        op("_foreach_lerp_.Scalar", group * 2, group)
        op("_foreach_add_.List", group * 2, group)
        op("_foreach_sub_.List", group * 2, group)
        part.free(denominator)
