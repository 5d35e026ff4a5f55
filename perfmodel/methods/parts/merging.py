"""LoRA that is merged into the base every so often and starts anew, as peft's layers do both.

Source: peft/tuners/lora/layer.py (`get_delta_weight`, `merge`, `reset_lora_parameters`).
"""

from ...tape.core import record, tape
from ...tape.linalg import mm
from ...tape.pointwise import cast, mul
from ...tape.shape import t
from ...tape.tensor import Parameter
from .periodic import Recorded, adapted_layers, fresh_states, layers_alike, trained

LORA = ("lora_A.weight", "lora_B.weight")


def merge_and_restart(step: Recorded) -> None:
    """W += (α/r)·BA in every adapted layer, A and B as at the start, and optimizer states of zeros."""
    layers = list(adapted_layers(step, *LORA))
    for weight, a, b in layers:
        with layers_alike("merge", a.count):
            _merge(weight, a, b)
    for _, a, b in layers:
        with layers_alike("restart", a.count):
            record("uniform_", (a,), (a,))
            record("zero_", (b,), (b,))
    fresh_states(step, trained(step))


def _merge(weight: Parameter, a: Parameter, b: Parameter) -> None:
    """The product is taken in fp32 where a CPU would multiply 16-bit matrices."""
    dtype = "fp32" if tape().device == "cpu" else a.dtype
    delta = mm(cast(b, dtype), cast(a, dtype))
    if weight.shape[0] != b.shape[0]:  # GPT-2's Conv1D keeps its weight the other way round
        delta = t(delta)
    delta = cast(mul(delta, 1.0), a.dtype)
    record("add_.Tensor", (weight, delta), (weight,))
