"""What a sum runs over: along the last dim, whose elements lie side by side, or down the others."""

from ..program.op import Op


def along_rows(op: Op) -> bool:
    """Whether a sum (mean, norm, maximum, …) takes elements that lie side by side; else it keeps the last dim."""
    dims = op.attrs.dims
    return dims is None or len(op.inputs[0].shape) - 1 in dims
