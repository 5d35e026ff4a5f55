"""`torch.nn.utils.clip_grad_norm_`. Source: torch/nn/utils/clip_grad.py."""

from collections.abc import Sequence

from ...program.op import Attrs, Spec
from ...program.part import Part
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, COMPUTE, Run
from ...tape.tensor import Parameter
from .lists import ListRecorder, Specs, by_dtype, each

SUMMED = Run(COMMUNICATION, after=(COMPUTE,))


def clip_grad_norm(
    part: Part, grads: Specs, across: Sequence[Ranks] = (), stages: Ranks | None = None, dtype: str = "fp32",
    parameters: Sequence[Parameter] = (),
) -> None:  # fmt: skip
    """Per-tensor norms, their norm, and a scaling of every gradient; lists on CUDA and CPU alike.

    Of shards (`across` ranks of one dim of a mesh or two) the squares of the norms are summed over ranks first, as
    DTensor does; what is not cut, or not summed yet, of `parameters` among them is summed before, and its norm divided
    by the ranks. Of stages of a pipeline the square of the norm is (torchtitan, distributed/utils.py:
    `clip_grad_norm_`), `dtype` that of a stage in which nothing trains.
    """
    op, displaced = ListRecorder(part), [p for p in parameters if p.used and p.placement is not None]
    if not grads:
        _over_stages(op, Spec(dtype, ()), stages)
        return
    dtype = _common([s.dtype for s in grads])
    scalar = Spec(dtype, ())
    count = sum(s.copies for s in grads)
    groups = by_dtype(grads)
    for group in groups:
        norms = [Spec(s.dtype, (), s.copies) for s in group]
        here = [t for p in displaced if p.dtype == group[0].dtype for t in p.placement.summed(p)]
        op("_foreach_norm.Scalar", group, norms)
        del here
    each(op, [Spec(p.dtype, (), p.count) for p in displaced], lambda norm: op("div.Tensor", [norm], [norm]))
    norms = [Spec(s.dtype, (), s.copies) for s in grads]
    op("stack", norms, [Spec(dtype, (count,))])
    squares = [Spec(dtype, (count,))]
    for ranks in across:
        op("pow.Tensor_Scalar", squares, squares)
        op("_c10d_functional::all_reduce", squares, squares, attrs=Attrs(ranks=ranks), runs=SUMMED)
        op("pow.Tensor_Scalar", squares, squares, runs=Run(after=(COMMUNICATION,)))
    op("linalg_vector_norm", [Spec(dtype, (count,))], [scalar])
    _over_stages(op, scalar, stages)
    for name in ("add.Tensor", "reciprocal", "mul.Tensor", "clamp"):
        op(name, [scalar], [scalar])
    for group in groups:
        op("_foreach_mul_.Tensor", [*group, scalar], group)


def _over_stages(op: ListRecorder, norm: Spec, stages: Ranks | None) -> None:
    if stages is not None:
        op("pow_.Scalar", [norm], [norm])
        op("c10d::allreduce_", [norm], [norm], attrs=Attrs(ranks=stages), runs=SUMMED)
        op("pow_.Scalar", [norm], [norm], runs=Run(after=(COMMUNICATION,)))


def _common(dtypes: list[str]) -> str:
    return dtypes[0] if len(set(dtypes)) == 1 else "fp32"
