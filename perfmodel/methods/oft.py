"""OFT as PEFT runs it: the input of a linear layer is rotated, block by block."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.einsum import grouped
from ..tape.elementary import eye
from ..tape.gather import index_put
from ..tape.inplace import add_in_place
from ..tape.linalg import autocast_operand, bmm
from ..tape.pointwise import cast, fill, sub
from ..tape.shape import repeat, reshape, transpose
from ..tape.tensor import Storage, Tensor
from .parts.base import Linear, method, option
from .parts.checks import positive
from .parts.targeted import Targeted


@method(
    "oft",
    title="OFT",
    source="https://arxiv.org/abs/2306.07280; peft/tuners/oft/layer.py",
    trains="rotations of the input",
    adds="solves, input rotation",
)
@dataclass(frozen=True)
class Oft(Targeted):
    """y = (xR)Wᵀ: R is block-diagonal and orthogonal, a Cayley transform taken as a Neumann series of 5 terms."""

    block_size: int = option(32, "width of a block; adjusted to a divisor of the layer's width, as PEFT does", positive)

    takes_conv1d: ClassVar[bool] = False
    takes_four_dims: ClassVar[bool] = False
    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "oft_block_size": "block_size"}

    def sizes(self) -> tuple[str, ...]:
        return ("block_size",)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        previous_dtype = x.dtype
        block = nearest_divisor(layer.n_in, self.block_size)
        if block == 1:
            raise UserError(
                f"method oft: block_size {self.block_size} makes blocks of width 1 in a layer of {layer.n_in}, where "
                "nothing trains: use a divisor from 2 up"
            )
        weight = layer.adapter("oft_R.weight", (layer.n_in // block, block * (block - 1) // 2), dtype)
        x = cast(x, dtype)
        x = _rotate(x, weight, block)
        result = self.rotated(layer, cast(x, previous_dtype))
        return cast(result, previous_dtype)

    def rotated(self, layer: Linear, x: Tensor) -> Tensor:
        """The base layer on its rotated input."""
        return layer(x)


def _rotate(x: Tensor, weight: Tensor, block: int) -> Tensor:
    """`OFTRotationModule.forward`."""
    required_dtype = x.dtype
    orth_rotate = _cayley(weight, block)
    blocks = weight.shape[0]
    x_reshaped = reshape(x, (*x.shape[:-1], blocks, block))
    x_rotated_reshaped = grouped(x_reshaped, orth_rotate)
    x_rotated = reshape(x_rotated_reshaped, x.shape)
    return cast(x_rotated, required_dtype)


def _cayley(q: Tensor, block: int) -> Tensor:
    """`_cayley_batch`: I + 2Q + 2Q² + 2Q³ + Q⁴ of skew-symmetric matrices."""
    previous_dtype = q.dtype
    q_skew = _skew_symmetric(q, block)
    r = repeat(eye(block, q.dtype), q.shape[0])
    r = add_in_place(r, q_skew, doubled=True)
    q_squared = _product(q_skew, q_skew)
    r = add_in_place(r, q_squared, doubled=True)
    q_power = q_squared
    q_power = _product(q_power, q_skew)
    r = add_in_place(r, q_power, doubled=True)
    q_power = _product(q_power, q_skew)
    r = add_in_place(r, q_power)
    return cast(r, previous_dtype)


def _skew_symmetric(vec: Tensor, block: int) -> Tensor:
    matrix = fill("zeros", (vec.shape[0], block, block), vec.dtype)
    rows, columns = (_indices(vec.shape[1]) for _ in range(2))
    matrix = index_put(matrix, rows, columns, vec)
    return sub(matrix, transpose(matrix, -2, -1))


def _indices(n: Any) -> Tensor:
    """A buffer of the module: no parameter, so it appears in no count."""
    return Tensor((n,), "i64", (1,), n, Storage(0, None))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return bmm(autocast_operand(a), autocast_operand(b))


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of a width that is nearest to what was asked for, the lower of two (`adjust_oft_parameters`).

    >>> nearest_divisor(3072, 32), nearest_divisor(96, 20), nearest_divisor(64, 100)
    (32, 16, 64)
    """
    if wanted >= width:
        return width
    above = next(d for d in range(wanted, width + 1) if width % d == 0)
    below = next(d for d in range(wanted, 0, -1) if width % d == 0)
    return below if wanted - below <= above - wanted else above
