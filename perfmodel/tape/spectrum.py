"""Complex tensors and Fourier transforms (ATen/native/SpectralOps.cpp), with what their gradients run."""

from collections.abc import Sequence

from ..program.dims import Dim, by_stride, product, strides_in_order
from ..program.op import Attrs
from .autograd import differentiate
from .core import emit, record, tape
from .einsum import per_frequency, per_frequency_outer, per_frequency_transposed
from .pointwise import elementwise
from .shape import contiguous, reshape, view, view_as
from .tensor import Grads, Node, Tensor

Grad = Tensor | None


def to_complex(x: Tensor) -> Tensor:
    """The cast of a real tensor that a complex transform needs; its gradient is the real part, a view."""
    node = differentiate("ToCopyBackward0", (x,), _real_part_backward)
    return emit("_to_copy", (x,), x.shape, "c64", node=node)


def _real_part_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (_real_view(g),)


def fft(x: Tensor) -> Tensor:
    """`torch.fft.fft` of a complex tensor."""
    return _transform(x, Attrs(dims=_last(x, 1)))


def inverse_fft2(x: Tensor) -> Tensor:
    """`torch.fft.ifft2` of a complex tensor: over the last two dims, the result scaled."""
    return _transform(x, Attrs(dims=_last(x, 2), scaled=True))


def _last(x: Tensor, dims: int) -> tuple[int, ...]:
    return tuple(range(len(x.shape) - dims, len(x.shape)))


def _transform(x: Tensor, attrs: Attrs) -> Tensor:
    """One call, whatever the dims; backward is another that scales as this one does."""
    node = differentiate("FftC2CBackward0", (x,), _transform_backward, (attrs,))
    return _transformed("_fft_c2c", x, attrs, node)


def _transformed(name: str, x: Tensor, attrs: Attrs, node: Node | None = None) -> Tensor:
    """The call: what is transformed lies innermost, the other dims as in the input (SpectralOps.cpp, `_exec_fft`)."""
    ordered, inner = by_stride(x.shape, [x.strides]), attrs.dims or ()
    order = [i for i in ordered if i not in inner] + [i for i in ordered if i in inner]
    return emit(name, (x,), x.shape, "c64", strides=strides_in_order(x.shape, order), node=node, attrs=attrs)


def _transform_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (_transformed("_fft_c2c", g, node.attrs[0]),)


def fft_of_real(x: Tensor) -> Tensor:
    """`torch.fft.fft` of a real tensor; nothing differentiates it."""
    return _transformed("_fft_r2c", x, Attrs(dims=_last(x, 1)))


def inverse_fft_of_real(x: Tensor) -> Tensor:
    """`torch.fft.ifft` of a real tensor: the same transform scaled, conjugated lazily."""
    return _transformed("_fft_r2c", x, Attrs(dims=_last(x, 1), scaled=True))


def real(x: Tensor) -> Tensor:
    """`x.real`: every second number of the memory, a view."""
    node = differentiate("RealBackward", (x,), _real_backward, (x.shape,))
    out = _real_view(x)
    if node:
        node.produces(out)
    return out


def _real_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (shape,) = grads, node.attrs
    assert g is not None
    pairs = emit("select_backward", (g,), (*shape, 2), g.dtype)
    strides = tuple(s if i == len(shape) else _halved(s) for i, s in enumerate(pairs.strides[:-1]))
    return (Tensor(shape, "c64", strides, product(shape), pairs.storage),)


def _halved(stride: Dim) -> Dim:
    return stride // 2


def _real_view(x: Tensor) -> Tensor:
    strides = tuple(2 * s for s in x.strides)
    out = Tensor(x.shape, "fp32", strides, x.numel, x.storage)
    return view_as("view_as_real", out, x.shape, strides)


def turns_by(angles: Tensor) -> Tensor:
    """`torch.polar(torch.ones_like(angles), angles)`, of what needs no gradient."""
    ones = emit("ones_like", (angles,), angles.shape, angles.dtype)
    return emit("polar", (ones, angles), angles.shape, "c64")


def turn_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbours in the last dim of a real fp32 tensor as complex numbers, times constant ones of half as many."""
    pairs = view(x, (*x.shape[:-1], x.shape[-1] // 2, 2))
    made = differentiate("ViewAsComplexBackward0", (pairs,), _complex_backward)
    points = _as_complex(pairs)
    if made:
        made.produces(points)
    node = differentiate("MulBackward0", (points,), _turned_backward)
    if node:
        node.save(turns)
    points = elementwise("mul.Tensor", (points, turns), node)
    made = differentiate("ViewAsRealBackward0", (points,), _pairs_backward)
    pairs = _as_pairs(points)
    if made:
        made.produces(pairs)
    return view(pairs, x.shape)


def _as_complex(x: Tensor) -> Tensor:
    """`torch.view_as_complex`: (…, 2) → (…)."""
    strides = tuple(s // 2 for s in x.strides[:-1])
    out = Tensor(x.shape[:-1], "c64", strides, product(x.shape[:-1]), x.storage)
    record("view_as_complex", (x,), (out,), view=True)
    return out


def _as_pairs(x: Tensor) -> Tensor:
    """`torch.view_as_real`: (…) → (…, 2)."""
    shape = (*x.shape, 2)
    out = Tensor(shape, "fp32", (*(2 * s for s in x.strides), 1), product(shape), x.storage)
    record("view_as_real", (x,), (out,), view=True)
    return out


def _complex_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (_as_pairs(g),)


def _pairs_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (_as_complex(contiguous(g)),)


def _turned_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """The conjugate is marked lazily, and copied out for the product (ConjugateFallback.cpp)."""
    (g,), (turns,) = grads, node.unpack()
    assert g is not None
    conjugate = emit("clone", (view_as("_conj", turns, turns.shape, turns.strides),), turns.shape, turns.dtype)
    return (elementwise("mul.Tensor", (g, conjugate)),)


def block_circular_convolution(x: Tensor, w: Tensor) -> Tensor:
    """C³A's `BlockCircularConvolution`: x (b, l, n·k), w (m, n, k) in fp32 → (b, l, m·k); k the block size."""
    m, n, k = w.shape
    node = differentiate("BlockCircularConvolutionBackward", (x, w), _convolution_backward)
    with tape().no_grad():
        x = reshape(x, (*x.shape[:-1], n, k))
        out = real(fft(per_frequency(inverse_fft_of_real(x), fft_of_real(w))))
        out = reshape(out, (*x.shape[:-2], m * k))
    if node:
        node.save(x, w)
        node.produces(out)
    return out


def _convolution_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, w) = grads, node.unpack()
    assert g is not None
    m, n, k = w.shape
    spectrum = fft_of_real(reshape(g, (*g.shape[:-1], m, k)))
    grad_x = real(fft(per_frequency_transposed(spectrum, inverse_fft_of_real(w))))
    grad_x = reshape(grad_x, (*grad_x.shape[:-2], n * k))
    return grad_x, real(fft(per_frequency_outer(spectrum, inverse_fft_of_real(x))))
