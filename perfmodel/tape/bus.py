"""Tensors that Python makes on the host and moves to the model's device: blocking copies from pageable memory."""

from ..program.dims import Shape, contiguous_strides, product
from ..program.op import ON_HOST, OVER_BUS
from .core import emit, record, tape
from .tensor import Storage, Tensor


def from_host(name: str, shape: Shape, dtype: str) -> Tensor:
    """A tensor that the call `name` makes without naming a device, moved there: `torch.ones(…).to(device)`."""
    if tape().device == "cpu":
        return emit(name, (), shape, dtype)
    made = Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))
    record(name, (), (made,), ON_HOST)
    return emit("_to_copy", (made,), shape, dtype, attrs=OVER_BUS)


def scalar(dtype: str, shape: Shape = ()) -> Tensor:
    """`torch.tensor(value, device=…)`: one number (or a list of them); making it is no call of its own."""
    made = Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))
    return emit("_to_copy", (made,), shape, dtype, attrs=OVER_BUS) if tape().device == "cuda" else made


def coin() -> None:
    """`torch.rand(1) > p` as a condition: drawn and read on the host, where no device waits for it."""
    x = Tensor((1,), "fp32", (1,), 1, Storage(0, None))
    heads = Tensor((1,), "bool", (1,), 1, Storage(0, None))
    record("rand", (), (x,), ON_HOST)
    record("gt.Scalar", (x,), (heads,), ON_HOST)
    record("_local_scalar_dense", (heads,), (), ON_HOST)
