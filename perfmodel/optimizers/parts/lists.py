"""Lists of tensors, as `torch.optim`'s foreach and fused forms and clipping take them.

A `Spec` with copies stands for the like parameters of identical layers, so the lists stay short.
"""

from collections.abc import Callable, Sequence

from ...program.dims import Dim
from ...program.op import PLAIN, Attrs, Op, Spec
from ...program.part import Part
from ...program.streams import MAIN, Run
from ...tape.tensor import Parameter

Specs = list[Spec]


def trainable(parameters: Sequence[Parameter]) -> Specs:
    """The gradients of parameters that receive one, and so are clipped and updated."""
    shapes = [(p, p.shape if p.placement is None else p.placement.shape(p.shape)) for p in parameters if p.used]
    return [Spec(p.dtype, shape, p.count) for p, shape in shapes]


def specs_of(parameters: Sequence[Parameter]) -> Specs:
    """Parameters as a list of tensors."""
    return [Spec(p.dtype, p.shape, p.count) for p in parameters]


def by_dtype(specs: Specs) -> list[Specs]:
    """Groups of one dtype, in order of first appearance, as `torch.optim` groups its lists."""
    groups: dict[str, Specs] = {}
    for s in specs:
        groups.setdefault(s.dtype, []).append(s)
    return list(groups.values())


def list_bytes(specs: Specs) -> Dim:
    """Bytes of all tensors."""
    return sum(s.nbytes for s in specs)


def counters(group: Specs) -> Specs:
    """The fp32 step counters of `torch.optim`, one a tensor."""
    return [Spec("fp32", (), s.copies) for s in group]


class ListRecorder:
    """Appends ops on lists of tensors to a part."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __call__(
        self, name: str, inputs: Specs, outputs: Specs, *, attrs: Attrs = PLAIN, runs: Run = MAIN,
        distinct: Specs | None = None,
    ) -> None:  # fmt: skip
        """Record a call; `distinct` names the inputs where one tensor is passed twice."""
        read, written = list_bytes(distinct or inputs), list_bytes(outputs)
        self.part.ops.append(Op(name, tuple(inputs), tuple(outputs), read, written, attrs=attrs, runs=runs))

    def temporary(self, specs: Specs) -> Dim:
        """Allocate a list of new tensors; free what is returned."""
        size = list_bytes(specs)
        self.part.allocate(size)
        return size


def each(op: ListRecorder, specs: Specs, record: Callable[[Spec], None]) -> None:
    """Record ops for one tensor after another, as often as it has copies."""
    for s in specs:
        start = len(op.part.ops)
        record(s._replace(copies=1))
        op.part.ops.extend(op.part.ops[start:] * (s.copies - 1))
