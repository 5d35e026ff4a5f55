"""The product of a base layer, in the form that the setup gives it."""

from ..setup import Setup
from ..tape import linalg
from ..tape.packages.converted import fake_quantised, float8_or_plain, in_int8
from ..tape.tensor import Tensor


def base_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, setup: Setup, *, conv1d: bool, by_matmul: bool, inside: bool,
    first: bool,
) -> Tensor:  # fmt: skip
    """y = x·Wᵀ (+ b), x (…, n_in).

    Args:
        conv1d: the weight is GPT-2's Conv1D, (n_in, n_out), with a bias.
        by_matmul: Python multiplies by the transposed weight (Falcon's), without a bias.
        inside: the layer stands in a block.
        first: it is the model's first one: accelerate leaves that and the head out of a conversion to float8.
    """
    if conv1d:
        assert bias is not None
        return linalg.conv1d(x, weight, bias)
    if setup.qat_group is not None:
        return fake_quantised(x, weight, bias, setup.qat_group)
    if setup.int8 != "none" and inside:
        return in_int8(x, weight, bias)
    if by_matmul:
        return linalg.matmul_linear(x, weight)
    return float8_or_plain(x, weight, bias, setup.fp8 if inside and not first else "none")
