"""The orders in which RunLoRA can compute its products: their FLOPs in closed form, and their predicted times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...program.dims import Dim, decide
from ...program.part import Part
from ...tape.core import Tape, recording
from ...tape.custom import BACKWARDS, FORWARDS, run_lora
from ...tape.engine import run_backward
from ...tape.pointwise import fill
from ...tape.shape import t
from ...tape.tensor import Parameter, Tensor
from .base import Seconds

Formula = Callable[[Dim, Dim, Dim, Dim], Dim]  # tokens T, inputs n, outputs m, rank r → FLOPs
RUNS = 1000

FORWARD_FLOPS: dict[int, Formula] = {
    1: lambda T, n, m, r: 2 * T * n * m + 2 * T * r * (n + m),
    2: lambda T, n, m, r: 2 * T * n * m + 2 * n * m * r,
    3: lambda T, n, m, r: 2 * T * n * m + 2 * T * r * (n + m),
    4: lambda T, n, m, r: 2 * T * n * m + 2 * n * m * r,
}
BACKWARD_FLOPS: dict[int, Formula] = {  # gradients of x, U and V
    1: lambda T, n, m, r: 2 * T * n * m + 6 * T * n * r + 4 * T * m * r,
    2: lambda T, n, m, r: 4 * T * n * m + 4 * T * n * r + 2 * T * m * r + 2 * n * m * r,
    3: lambda T, n, m, r: 4 * T * n * m + 2 * T * r * (n + m) + 4 * n * m * r,
    4: lambda T, n, m, r: 4 * T * n * m + 6 * n * m * r,
    5: lambda T, n, m, r: 2 * T * n * m + 4 * T * r * (n + m) + 2 * n * m * r,
    6: lambda T, n, m, r: 4 * T * n * m + 4 * T * r * (n + m) + 2 * n * m * r,
    7: lambda T, n, m, r: 4 * T * n * m + 2 * T * r * (n + m) + 4 * n * m * r,
    8: lambda T, n, m, r: 4 * T * n * m + 2 * T * r * (n + m) + 4 * n * m * r,
}


class LayerShape(NamedTuple):
    """What a choice depends on: x (tokens, n), W (n, m), rank, dtype, whether there is a bias, how W lies in memory."""

    tokens: Dim
    n: Dim
    m: Dim
    r: Dim
    dtype: str = "bf16"
    bias: bool = False
    conv1d: bool = False


@dataclass(frozen=True)
class OrderChoice:
    """The orders of a kind of layer, and what every order costs: FLOPs, and seconds where those decided."""

    layer: str
    copies: int
    inputs: int
    outputs: int
    forward: int
    backward: int
    forward_flops: dict[int, Any]
    backward_flops: dict[int, Any]
    forward_seconds: dict[int, Any] | None = None
    backward_seconds: dict[int, Any] | None = None


def order_flops(shape: LayerShape) -> tuple[dict[int, Any], dict[int, Any]]:
    """FLOPs of every forward and every backward order; gradients of x, U and V are assumed, as the authors do."""
    forward, backward = (
        {order: formula(*shape[:4]) for order, formula in table.items()} for table in (FORWARD_FLOPS, BACKWARD_FLOPS)
    )
    return forward, backward


def times(shape: LayerShape, seconds: Seconds) -> tuple[dict[int, Any], dict[int, Any]]:
    """Predicted seconds of every forward and every backward order of one layer: the mean of many runs in a row, as the
    authors measure them (`blocked_autorange`), so that host and device each work ahead as far as they can."""

    def mean(parts: list[Part]) -> Any:
        for part in parts:
            part.repeat = RUNS
        return seconds(parts) / RUNS

    forward = {order: mean(_record(shape, order, 1)[0]) for order in FORWARDS}
    backward = {order: mean(_record(shape, 1, order)[1]) for order in BACKWARDS}
    return forward, backward


def _record(shape: LayerShape, forward: int, backward: int) -> tuple[list[Part], list[Part]]:
    """Forward and backward of the operator alone, on an input that needs a gradient."""

    def leaf(name: str, *dims: Dim, trainable: bool = True) -> Parameter:
        return Parameter(name, dims, shape.dtype, kind="weight", trainable=trainable)

    with recording(Tape()) as tape:
        tape.begin("layer", "forward")
        weight = leaf("W", *((shape.n, shape.m) if shape.conv1d else (shape.m, shape.n)), trainable=False)
        w: Tensor = weight if shape.conv1d else t(weight)
        x, u, v = leaf("x", shape.tokens, shape.n), leaf("U", shape.n, shape.r), leaf("V", shape.r, shape.m)
        bias = leaf("b", shape.m, trainable=False) if shape.bias else None
        y = run_lora(x, w, u, v, bias, forward, backward)
        run_backward(y, fill("ones_like", y.shape, y.dtype, like=y))
    return [p for p in tape.parts if p.phase == "forward"], [p for p in tape.parts if p.phase == "backward"]


def cheapest(costs: dict[int, Any]) -> int:
    """The first order that costs least, as the authors take it."""
    best = 1
    for order, cost in costs.items():
        if decide(cost < costs[best]):
            best = order
    return best
