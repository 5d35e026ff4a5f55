"""BOFT as PEFT runs it without its CUDA extension: the input is rotated by one block-diagonal matrix."""

from dataclasses import dataclass
from typing import ClassVar

from ..program.dims import contiguous_strides, product
from ..tape.elementary import eye
from ..tape.linalg import autocast_operand, block_diagonal, bmm, matmul, solve_right
from ..tape.pointwise import add, cast, fill, mul, sub
from ..tape.shape import expand, permute, squeeze, transpose, unsqueeze, view
from ..tape.split import select
from ..tape.tensor import Storage, Tensor
from .parts.base import Linear, method, option
from .parts.checks import positive
from .parts.targeted import Targeted, base_bias


@method(
    "boft",
    title="BOFT",
    source="https://arxiv.org/abs/2311.06243; peft/tuners/boft/layer.py",
    trains="rotations, scales",
    adds="dense R, full GEMM",
)
@dataclass(frozen=True)
class Boft(Targeted):
    """y = s ∘ (xR)Wᵀ: R is block-diagonal and orthogonal, written out as a whole matrix in every forward.

    PEFT sets the butterfly factor to 1 where its CUDA extension is not built.
    """

    block_size: int = option(4, "width of a block (boft_block_size); divides the input width", positive)

    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "boft_block_size": "block_size"}
    takes_conv1d: ClassVar[bool] = False

    def sizes(self) -> tuple[str, ...]:
        return ("block_size",)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        size, n_in, n_out = self.block_size, layer.n_in, layer.n_out
        self.check_divides(layer, "block_size", "input")
        previous_dtype = x.dtype
        boft_rotation = eye(n_in, previous_dtype)
        boft_scale = fill("ones", (n_out, 1), previous_dtype)
        weight = layer.adapter("boft_R", (1, n_in // size, size, size), dtype)
        scale = layer.adapter("boft_s", (n_out, 1), dtype)
        butterfly, _ = self._butterfly(weight, n_in, x)
        boft_rotation = matmul(butterfly, boft_rotation)
        boft_scale = mul(scale, boft_scale)
        boft_rotation = cast(boft_rotation, previous_dtype)
        x_rotated = matmul(x, boft_rotation)
        result = layer(x_rotated)
        bias = base_bias(layer)
        if bias is not None:
            result = sub(result, bias)
        result = mul(result, squeeze(boft_scale, 1))
        if bias is not None:
            result = add(result, bias)
        return cast(result, previous_dtype)

    def _butterfly(self, weight: Tensor, n_in: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rotation (n_in, n_in), and its block diagonal, another local variable of PEFT's `forward` to its end.

        Of one factor the permutation P is an identity, and multiplied by all the same.
        """
        size = self.block_size
        blocks = view(weight, (n_in // size, size, size))
        rotation = squeeze(view(_cayley(blocks), (1, n_in // size, size, size)), 0)
        diagonal = unsqueeze(block_diagonal(rotation), 0)
        shape = (1, n_in, n_in)
        permutation = cast(Tensor(shape, "fp32", contiguous_strides(shape), product(shape), Storage(0, None)), x.dtype)
        diagonal = cast(diagonal, x.dtype)
        batch = _product(diagonal, permute(permutation, (0, 2, 1)))
        return select(_product(permutation, batch), 0), diagonal


def _product(a: Tensor, b: Tensor) -> Tensor:
    return bmm(autocast_operand(a), autocast_operand(b))


def _cayley(data: Tensor) -> Tensor:
    """`cayley_batch`: (I + S)⁻¹(I - S) from the right, S skew-symmetric, solved block by block."""
    n, k, _ = data.shape
    skew = mul(sub(data, transpose(data, 1, 2)), 0.5)
    identity = expand(unsqueeze(eye(k, "fp32"), 0), (n, k, k))
    q = solve_right(add(identity, skew), sub(identity, skew))
    return cast(q, data.dtype)
