"""TwoNN: the intrinsic dimension of points, from the distances to their two nearest neighbours.

Source: https://www.nature.com/articles/s41598-017-11873-y; the maximum-likelihood form, d = N / Σ log(r₂/r₁).
"""

from ..tape.core import emit, new_tensor, record
from ..tape.elementary import div, sum_dim
from ..tape.linalg import mm
from ..tape.pointwise import add, mul, power, sub, unary
from ..tape.shape import t, unsqueeze, view_as
from ..tape.tensor import Tensor

NEAREST = 3  # the point itself and two neighbours


def intrinsic_dimension(x: Tensor) -> Tensor:
    """Of N points (N, width): squared distances of all pairs from one product of 2·N²·width FLOPs, nearest by row."""
    n = x.shape[0]
    squares = sum_dim(power(x), 1)
    distances = sub(add(unsqueeze(squares, 1), squares), mul(mm(x, t(x)), 2.0))
    values, indices = new_tensor((n, NEAREST), x.dtype), new_tensor((n, NEAREST), "i64")
    record("topk", (distances,), (values, indices))
    first, second = (view_as("unbind.int", values, (n,), (NEAREST,)) for _ in range(2))
    logs = emit("sum", (unary("log", div(second, first)),), (), x.dtype)
    return mul(unary("reciprocal", mul(logs, 0.5)), float(n))
