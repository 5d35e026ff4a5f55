"""Products by expert (`torch._grouped_mm`), and the index arithmetic that sorts tokens by expert, or finds them.

Source: ATen/native/GroupedMMUtils.h, Onehot.cpp, derivatives.yaml.
"""

from collections.abc import Sequence

from ..errors import UserError
from ..program.dims import same
from ..program.op import Attrs
from ..program.routing import Routing
from .autograd import differentiate
from .core import emit, new_tensor, record, tape
from .gather import mark
from .pointwise import cast, fill
from .shape import transpose, unsqueeze
from .tensor import Grads, Node, Tensor

Grad = Tensor | None
ONE_KERNEL = ("9", "10")  # compute capabilities whose bf16 products are one kernel (GroupedBlas.cpp)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, routing: Routing) -> Tensor:
    """(rows, k) by (experts, k, n) → (rows, n), rows sorted by expert; `offsets` (experts,) int32 says where each ends.

    Autocast does not know it: transformers casts x to the weight's dtype.
    """
    x = cast(x, weight.dtype)
    columns = same(weight.strides[1], 1)
    node = differentiate("GroupedMmBackward0", (x, weight), _grouped_mm_backward, (columns, routing))
    if node:
        node.save(x if node.needs[1] else None, weight if node.needs[0] else None, offsets)
    attrs = _attrs("tn", x.dtype, routing)
    return emit("_grouped_mm", (x, weight, offsets), (x.shape[0], weight.shape[2]), x.dtype, node=node, attrs=attrs)


def _grouped_mm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, weight, offsets), (columns, routing) = grads, node.unpack(), node.attrs
    assert g is not None
    grad_weight = None
    if node.needs[1]:
        a, b = (g, x) if columns else (x, g)
        each, attrs = (offsets.shape[0], a.shape[1], b.shape[1]), _attrs("nt", g.dtype, routing)
        grad_weight = emit("_grouped_mm", (transpose(a, 0, 1), b, offsets), each, g.dtype, attrs=attrs)
        grad_weight = transpose(grad_weight, 1, 2) if columns else grad_weight
    if not node.needs[0]:
        return (None, grad_weight)
    turned, shape, attrs = transpose(weight, 1, 2), (g.shape[0], weight.shape[1]), _attrs("nn", g.dtype, routing)
    return (emit("_grouped_mm", (g, turned, offsets), shape, g.dtype, attrs=attrs), grad_weight)


def _attrs(layout: str, dtype: str, routing: Routing) -> Attrs:
    return attrs_of_experts(layout, dtype, routing, tape().device, tape().capability)


def attrs_of_experts(layout: str, dtype: str, routing: Routing, device: str, capability: str) -> Attrs:
    """Where there is no kernel for all experts, ATen reads the offsets on the host and calls a product for each.

    Raises:
        UserError: ATen has nothing of the kind on the device.
    """
    cuda, major = device == "cuda", capability.split(".")[0]
    if cuda and int(major) < 8:
        raise UserError(
            "experts by grouped products need compute capability 8.0: what transformers does before it is not "
            "modelled; use --experts eager (built-in models have it), or a newer GPU"
        )
    return Attrs(layout, routing=routing, sync=cuda and not (major in ONE_KERNEL and dtype == "bf16"))


def sort_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.sort` of a vector of integers: values and int64 places."""
    values, places = new_tensor(x.shape, x.dtype), new_tensor(x.shape, "i64")
    record("sort", (x,), (values, places))
    return values, places


def ends_of_groups(sorted_ids: Tensor, groups: int) -> Tensor:
    """Where each group of equal ids ends, (groups,) int32: a histogram and its running sum."""
    counted = cast(sorted_ids, "fp32" if tape().device == "cpu" else "i32")
    histogram = emit("histc", (counted,), (groups,), counted.dtype)
    return emit("cumsum", (histogram,), (groups,), "i32")


def one_hot(x: Tensor, classes: int) -> Tensor:
    """`F.one_hot(x, classes)` of int64 numbers, whose range the host looks at on a CPU alone."""
    if tape().device == "cpu":
        ends = new_tensor((), x.dtype), new_tensor((), x.dtype)
        record("aminmax", (x,), ends)
        for end in ends:
            record("_local_scalar_dense", (end,), ())
    flags = fill("zeros", (*x.shape, classes), x.dtype)
    mark(flags, unsqueeze(x, -1))
    return flags


def inverse_order(order: Tensor) -> Tensor:
    """`inverse[order] = arange(n)` of a permutation."""
    inverse = emit("empty_like", (order,), order.shape, order.dtype)
    places = emit("arange", (), order.shape, order.dtype)
    record("index_put_", (inverse, order, places), (inverse,))
    return inverse
