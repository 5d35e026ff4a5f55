"""LoRA on the weights of a mixture of experts, which are no linear layers: PEFT adapts the parameter itself.

Every forward pass folds the adapter into a copy of the weights of all experts; once in vain, when the parametrisation
is registered. So the gradient of the whole weight is computed, as in full fine-tuning, before those of A and B.
Source: peft/tuners/lora/layer.py (`ParamWrapper`), peft/utils/transformers_weight_conversion.py.
"""

from typing import Any

from ...tape.core import record
from ...tape.linalg import baddbmm, matmul
from ...tape.pointwise import add, cast, mul
from ...tape.shape import permute, reshape, transpose
from ...tape.tensor import Tensor
from .base import Scope


def folded(layer: Scope, name: str, weight: Tensor, dtype: str, r: Any, *, scaled: bool, flipped: bool) -> Tensor:
    """W + s·BA of a weight (experts, out, in), or (experts, in, out) if `flipped`, or a plain (out, in).

    A is (r·experts, in), B (out, r·experts), in `dtype`. `scaled` says whether s is another number than 1.
    """
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    n_out, n_in = weight.shape[-2:] if not flipped else (weight.shape[-1], weight.shape[-2])
    a = layer.parameter(f"{name}.lora_A.weight", (r * experts, n_in), "adapter", dtype=dtype, trainable=True)
    b = layer.parameter(f"{name}.lora_B.weight", (n_out, r * experts), "adapter", dtype=dtype, trainable=True)
    if experts == 1:
        delta = cast(mul(matmul(b, a), 1.0), weight.dtype)
        _register(weight)
        add(weight, delta)
        return add(weight, delta)
    left, right = permute(reshape(b, (n_out, r, experts)), (2, 0, 1)), reshape(a, (experts, r, n_in))
    if flipped:
        left, right = transpose(right, -2, -1), transpose(left, -2, -1)
    left, right = cast(left, weight.dtype), cast(right, weight.dtype)
    _register(weight)
    baddbmm(weight, left, right, scaled=scaled)
    return baddbmm(weight, left, right, scaled=scaled)


def _register(weight: Tensor) -> None:
    """`register_parametrization`: the original weight becomes a parameter of another module, which runs once."""
    record("set_.source_Tensor", (weight, weight), (weight,))
