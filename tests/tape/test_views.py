"""Views of the tape: shapes and strides are PyTorch's, whichever dim they are of."""

from collections.abc import Callable
from typing import Any

import pytest

from perfmodel.tape import shape, split
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.tensor import Parameter, Tensor

torch = pytest.importorskip("torch")

SIZES = (2, 3, 4)
VIEWS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Any, int], Any]]] = {
    "select": (split.select, lambda x, dim: x.select(dim, 0)),
    "narrow": (lambda x, dim: shape.narrow(x, dim, 1), lambda x, dim: x.narrow(dim, 0, 1)),
    "unsqueeze": (shape.unsqueeze, lambda x, dim: x.unsqueeze(dim)),
    "transpose": (lambda x, dim: shape.transpose(x, dim, 0), lambda x, dim: x.transpose(dim, 0)),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[:2], SIZES, (5, *SIZES)])
def test_a_view_has_the_shape_and_strides_of_pytorchs(name: str, sizes: tuple[int, ...]) -> None:
    """Strides decide what the next product copies: a view along another dim is another program."""
    ours, real = VIEWS[name]
    with recording(Tape()) as tape, tape.no_grad():
        tape.begin("views", "forward")
        x = Parameter("x", sizes, "fp32", kind="weight", trainable=False)
        for dim in range(-len(sizes), len(sizes)):
            made, expected = ours(x, dim), real(torch.empty(sizes, device="meta"), dim)
            assert (made.shape, made.strides) == (tuple(expected.shape), expected.stride()), dim
