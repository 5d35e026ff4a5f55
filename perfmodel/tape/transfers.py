"""Tensors from elsewhere: made on the host and moved to the model's device, or exchanged with other GPUs.

What Python makes on the host takes blocking copies from pageable memory.

Linear layers that tensor-parallel ranks share are cut by the columns of their outputs, or by their rows. Of a layer cut
by columns every rank has the whole input and makes a part of the output; of one cut by rows it has a part of the input,
and outputs are summed. Of an adapter on either, what lies at the cut dim is cut as well. They exchange through
functional collectives, for each of which the compute stream waits at once.

Sources: transformers 5.24, distributed/tensor_parallel.py (`ColwiseParallel`, `RowwiseParallel`); peft 0.21,
tuners/lora/model.py (`add_lora_tp_hooks_dtensor`); torch 2.13, distributed/tensor (`redistribute`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..program.dims import Shape, contiguous_strides, product
from ..program.op import ON_HOST, OVER_BUS, Attrs
from ..program.ranks import Ranks
from ..program.streams import COMMUNICATION, COMPUTE, WITHIN, Run
from .autograd import differentiate
from .core import emit, new_tensor, record, tape
from .pointwise import cat
from .shape import clone, contiguous, narrow, unsqueeze, view
from .tensor import Grads, Node, Parameter, Storage, Tensor

BESIDE = Run(WITHIN, (COMPUTE,))
WAITING = Run(after=(WITHIN,))


def from_host(name: str, shape: Shape, dtype: str) -> Tensor:
    """A tensor that the call `name` makes without naming a device, moved there: `torch.ones(…).to(device)`."""
    if tape().device == "cpu":
        return emit(name, (), shape, dtype)
    made = Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))
    record(name, (), (made,), ON_HOST)
    return emit("_to_copy", (made,), shape, dtype, attrs=OVER_BUS)


def scalar(dtype: str, shape: Shape = ()) -> Tensor:
    """`torch.tensor(value, device=…)`: one number (or a list of them); making it is no call of its own."""
    return moved_to_device(shape, dtype)


def moved_to_device(shape: Shape, dtype: str) -> Tensor:
    """`x.to(device)` of a tensor that lies on the host: copied to a GPU every time, and already there on a CPU."""
    lying = Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))
    return emit("_to_copy", (lying,), shape, dtype, attrs=OVER_BUS) if tape().device == "cuda" else lying


def coin() -> None:
    """`torch.rand(1) > p` as a condition: drawn and read on the host, where no device waits for it."""
    x = Tensor((1,), "fp32", (1,), 1, Storage(0, None))
    heads = Tensor((1,), "bool", (1,), 1, Storage(0, None))
    record("rand", (), (x,), ON_HOST)
    record("gt.Scalar", (x,), (heads,), ON_HOST)
    record("_local_scalar_dense", (heads,), (), ON_HOST)


def summed_over(x: Tensor, ranks: Ranks) -> Tensor:
    """A sum whose parts lie on several ranks (`Partial` to `Replicate`); its gradient is everywhere the same."""
    if not tape().grad_enabled:
        return summed_in_place(x, ranks)
    node = differentiate("RedistributeBackward", (x,), _as_it_is)
    out = functional_collective("_c10d_functional::all_reduce", x, x.shape, ranks)
    if node is not None:
        node.produces(out)
    return out


def summed_in_place(x: Tensor, ranks: Ranks) -> Tensor:
    """`dist.all_reduce`, for which the compute stream waits at once."""
    record("c10d::allreduce_", (x,), (x,), Attrs(ranks=ranks), runs=BESIDE)
    record("cuda::wait_event", (), (), Attrs(host=True), view=True, runs=WAITING)
    return x


def summed_in_backward(x: Tensor, ranks: Ranks) -> Tensor:
    """What all ranks have, of which each makes another use: its gradient is the sum of theirs."""
    node = differentiate("ToTorchTensorBackward", (x,), _summed, (ranks,))
    if node is None:
        return x
    out = x.alias()
    node.produces(out)
    return out


def gathered_over(x: Tensor, ranks: Ranks) -> Tensor:
    """Parts of the last dim, put together: (…, n) on each of several ranks is (…, n · ranks) on all."""
    node = differentiate("RedistributeBackward", (x,), _own_part, (x.shape,))
    with tape().no_grad():
        parts = functional_collective(
            "_c10d_functional::all_gather_into_tensor", x, (x.shape[0] * ranks.size, *x.shape[1:]), ranks
        )
        each = [Tensor(x.shape, x.dtype, x.strides, x.numel, parts.storage) for _ in range(int(ranks.size))]
        out = cat(each, len(x.shape) - 1)
    if node is not None:
        node.produces(out)
    return out


def of_all_ranks(x: Tensor) -> Tensor:
    """`accelerator.gather`: what all ranks have behind one another, (ranks · n, …), without gradient; alone, `x`.

    Source: accelerate 1.15, utils/operations.py (`_gpu_gather`).
    """
    wrapping = tape().wrapping
    ranks = None if wrapping is None else wrapping.everyone
    if ranks is None:
        return x
    with tape().no_grad():
        x = contiguous(x) if x.shape else unsqueeze(clone(x), 0)
        out = emit("empty.memory_format", (), (x.numel * ranks.size,), x.dtype)
        sent, waiting = Run(COMMUNICATION, (COMPUTE,)), Run(after=(COMMUNICATION,))
        record("c10d::_allgather_base_", (view(x, (x.numel,)),), (out,), Attrs(ranks=ranks), runs=sent)
        record("cuda::wait_event", (), (), Attrs(host=True), view=True, runs=waiting)
        return view(out, (x.shape[0] * ranks.size, *x.shape[1:]))


def functional_collective(name: str, x: Tensor, shape: Shape, ranks: Ranks, on: str = WITHIN) -> Tensor:
    """What a functional collective makes of a tensor, for which the compute stream waits at once."""
    out = new_tensor(shape, x.dtype)
    record(name, (x,), (out,), Attrs(ranks=ranks), runs=Run(on, (COMPUTE,)))
    record("_c10d_functional::wait_tensor", (out,), (out,), view=True, runs=Run(after=(on,)))
    return out


def _as_it_is(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    return tuple(grads)


def _summed(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (ranks,), (grad,) = node.attrs, grads
    assert grad is not None
    return (functional_collective("_c10d_functional::all_reduce", grad, grad.shape, ranks),)


def _own_part(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (shape,), (grad,) = node.attrs, grads
    assert grad is not None
    return (clone(narrow(grad, len(shape) - 1, shape[-1])),)


class Cut(NamedTuple):
    """How a layer is cut: "columns", "rows", or not at all, and by how many ranks."""

    by: str = ""
    ranks: Ranks = Ranks(1)

    def given(self, x: Tensor) -> Tensor:
        """The layer's input."""
        return summed_in_backward(x, self.ranks) if self.by == "columns" else x

    def made(self, y: Tensor) -> Tensor:
        """The layer's output."""
        return summed_over(y, self.ranks) if self.by == "rows" else y

    def between(self, low: Tensor) -> Tensor:
        """What passes from an adapter's first weight to its second: of columns the second is cut, of rows the first."""
        return self.made(self.given(low))

    def counted(self, p: Parameter) -> Parameter:
        """A part of a parameter, which stands for the elements of all parts."""
        if self.by:
            p.elements = p.numel * self.ranks.size
        return p


WHOLE = Cut()
