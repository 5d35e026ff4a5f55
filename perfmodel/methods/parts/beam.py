"""BeamLoRA's replacement of weak ranks, as its authors write it (`analyze_rank_importance`, `inherit_param_ckpt`)."""

from typing import Any

from ... import optimizers
from ...tape.core import emit, new_tensor, record, tape
from ...tape.custom import index_buffer
from ...tape.elementary import div
from ...tape.nn import softmax
from ...tape.pointwise import add, mul
from ...tape.shape import view
from ...tape.tensor import Parameter, Tensor
from .periodic import Recorded, adapted_layers, layers_alike

TEMPERATURE = 0.05  # τ of the authors' code
ADAPTERS = ("lora_gate", "lora_A.weight", "lora_B.weight")


def share(gate: Tensor) -> Tensor:
    """softmax(g/τ): what part each rank has."""
    return softmax(div(gate, TEMPERATURE))


def importance(gate: Tensor) -> Tensor:
    """r·softmax(g/τ): the weight of each rank."""
    return mul(share(gate), 1.0)


def expand_ranks(step: Recorded) -> None:
    """Rank importance over all layers, then in each layer strong ranks into the places of weak ones."""
    layers = [adapters for _, *adapters in adapted_layers(step, *ADAPTERS)]
    for gate, *_ in layers:
        with layers_alike("importance", gate.count):
            importance(gate)
    tape().begin("threshold", "optimizer")
    _threshold([_flat(gate) for gate, *_ in layers for _ in range(gate.count)])
    for gate, a, b in layers:
        with layers_alike("replacement", gate.count):
            _replace(gate, a, b, optimizers.moments(a, step.optimizer))


def _flat(gate: Parameter) -> Tensor:
    return Tensor((gate.numel,), gate.dtype, (1,), gate.numel, gate.storage)


def _threshold(scores: list[Tensor]) -> None:
    """Top-p: all scores sorted, and those beyond p of the sum marked."""
    ranks, dtype = sum(s.numel for s in scores), scores[0].dtype
    values, order = new_tensor((ranks,), dtype), new_tensor((ranks,), "i64")
    record("sort", (emit("cat", scores, (ranks,), dtype),), (values, order))
    emit("gt.Scalar", (emit("cumsum", (values,), (ranks,), dtype),), (ranks,), "bool")


def _replace(gate: Parameter, a: Parameter, b: Parameter, states: int) -> None:
    """Half of a layer's ranks, with their moments; the gate's value is shared between both, its moments are zeroed."""
    r = gate.shape[1]
    n = (r + 1) // 2
    weak, strong = index_buffer(n), index_buffer(n)
    values, order = new_tensor((1, n), gate.dtype), new_tensor((1, n), "i64")
    record("topk", (importance(gate),), (values, order))
    for p, shape in ((a, (n, a.shape[1])), (b, (b.shape[0], n))):
        for _ in range(1 + states):
            _put(p, weak, _take(p, strong, shape))
    half = view(mul(add(_take(gate, weak, (1, n)), _take(gate, strong, (1, n))), 0.5), (n,))
    for place in (weak, strong):
        _put(gate, place, half)
    for _ in range(states):
        record("zero_", (gate,), (gate,))


def _take(x: Tensor, at: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return emit("index.Tensor", (x, at), shape, x.dtype)


def _put(x: Tensor, at: Tensor, values: Tensor) -> None:
    record("index_put_", (x, at, values), (x,))
