"""`torch.nn.utils.clip_grad_norm_`. Source: torch/nn/utils/clip_grad.py."""

from ..tape.core import Part, Spec
from .lists import Recorder, Specs, by_dtype, each


def clip_grad_norm(part: Part, grads: Specs, *, foreach: bool) -> None:
    """Per-tensor norms, their norm, and a scaling of every gradient."""
    op = Recorder(part)
    dtype = _common([s.dtype for s in grads])
    scalar = Spec(dtype, ())
    count = sum(s.copies for s in grads)
    groups = by_dtype(grads)
    for group in groups:
        norms = [Spec(s.dtype, (), s.copies) for s in group]
        if foreach:
            op("_foreach_norm.Scalar", group, norms)
        else:
            each(op, group, lambda one: op("linalg_vector_norm", [one], [Spec(one.dtype, ())]))
    norms = [Spec(s.dtype, (), s.copies) for s in grads]
    op("stack", norms, [Spec(dtype, (count,))])
    op("linalg_vector_norm", [Spec(dtype, (count,))], [scalar])
    for name in ("add.Tensor", "reciprocal", "mul.Tensor", "clamp"):
        op(name, [scalar], [scalar])
    for group in groups:
        if foreach:
            op("_foreach_mul_.Tensor", [*group, scalar], group)
        else:
            each(op, group, lambda one: op("mul_.Tensor", [one, scalar], [one]))


def _common(dtypes: list[str]) -> str:
    return dtypes[0] if len(set(dtypes)) == 1 else "fp32"
