"""flash-attn over documents that lie behind one another in one row and attend within themselves.

Of packed rows transformers finds them in every layer anew: is this a packed row, where do its documents begin, how long
is the longest one? Of padded rows it takes out the tokens in every layer, and puts what comes of them back. The host
waits for each answer. Source: transformers/modeling_flash_attention_utils.py (`_is_packed_sequence`,
`prepare_fa_kwargs_from_position_ids`, `_upad_input`); flash-attn 2.8, flash_attn/bert_padding.py (`IndexPutFirstAxis`),
flash_attn_interface.py (`FlashAttnVarlenFunc`, whose operators take the longest length as an int: a tensor is read).
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...program.dims import Dim
from ...program.lengths import Documents
from ...program.op import Attrs
from ..attention import heads_last
from ..autograd import differentiate
from ..core import emit, new_tensor, record
from ..gather import picked
from ..pointwise import add, cast, cat, fill, sub
from ..shape import contiguous, narrow, pad_last, reshape, view
from ..tensor import Grads, Node, Tensor
from ..transfers import scalar

Grad = Tensor | None
FORWARD, BACKWARD = "flash_attn::_flash_attn_varlen_forward", "flash_attn::_flash_attn_varlen_backward"
LONGEST_TWICE = 2  # of the queries and of the keys


class PackedRows(NamedTuple):
    """Documents packed into rows, or each padded to a row.

    Attributes:
        positions: of their tokens, (rows, tokens of a row), beginning anew with each document; None: rows are padded.
    """

    positions: Tensor | None
    documents: Documents


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packed: PackedRows, attrs: Attrs) -> Tensor:
    """Attention of q (1, h, s, d) over k, v (1, kv, s, d) within documents → (1, s, h, d), as transformers calls it."""
    q, k, v = heads_last(q, k, v)
    shape, positions = q.shape, packed.positions
    assert positions is not None
    ask_whether_packed(positions)
    q, k, v = (view(contiguous(x), x.shape[1:]) for x in (q, k, v))
    ends, longest = _boundaries(positions, packed.documents)
    return view(_varlen(q, k, v, ends, longest, attrs), shape)


def unpadded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, packed: PackedRows, attrs: Attrs) -> Tensor:
    """As `packed_attention`, of rows (b, h, s, d) with padding, which the mask (b, s) tells of → (b, s, h, d)."""
    q, k, v = heads_last(q, k, v)
    shape, (batch, seq) = q.shape, mask.shape
    tokens = packed.documents.in_rows(batch)
    lengths = emit("sum.dim_IntList", (mask,), (batch,), "i32", attrs=Attrs(dims=(1,)))
    places = emit("nonzero", (view(mask, (batch * seq,)),), (tokens, 1), "i64")
    places = view(places, (tokens,))
    _read(emit("max", (lengths,), (), "i32"))
    ends = pad_last(emit("cumsum", (lengths,), (batch,), "i32"), 1)
    k, v, q = (picked(reshape(x, (batch * seq, *x.shape[2:])), places) for x in (k, v, q))
    out = _varlen(q, k, v, ends, None, attrs)
    return view(_put_back(out, places, batch * seq), shape)


def _put_back(x: Tensor, places: Tensor, rows: Dim) -> Tensor:
    """`index_put_first_axis`: rows of x at their places among zeros."""
    node = differentiate("IndexPutFirstAxisBackward", (x,), _put_back_backward)
    out = fill("zeros", (rows, *x.shape[1:]), x.dtype)
    record("index_put_", (out, places, x), (out,))
    if node:
        node.save(places)
        node.produces(out)
    return out


def _put_back_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (places,) = grads, node.unpack()
    assert g is not None
    return (emit("index.Tensor", (g, places), (*places.shape, *g.shape[1:]), g.dtype),)


def ask_whether_packed(positions: Tensor) -> None:
    """Positions that are those of one document differ nowhere from a range (`_is_packed_sequence`)."""
    whole = add(fill("arange", (positions.shape[1],), "i64"), emit("min", (positions,), (), "i64"))
    away = emit("abs", (sub(whole, positions),), positions.shape, "i64")
    _read(emit("_to_copy", (emit("sum", (away,), (), "i64"),), (), "bool"))


def _boundaries(positions: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Where documents begin, with the end of the last, (documents + 1,) int32; and the length of the longest."""
    tokens = positions.shape[1]
    flat = view(positions, (tokens,))
    first = emit("eq.Tensor", (flat, emit("min", (flat,), (), "i64")), (tokens,), "bool")
    number = documents.number(tokens)
    starts = cast(view(emit("nonzero", (first,), (number, 1), "i64"), (number,)), "i32")
    ends = cat((starts, scalar("i32", (1,))), 0)
    lengths = sub(narrow(ends, 0, number), narrow(ends, 0, number))
    return ends, emit("max", (lengths,), (), "i32")


def _read(x: Tensor) -> None:
    record("_local_scalar_dense", (x,), ())


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: Tensor | None, attrs: Attrs) -> Tensor:
    """`flash_attn_varlen_func`: all (s, h, d); `longest` is None where the host knows it."""
    node = differentiate("FlashAttnVarlenFuncBackward", (q, k, v), _varlen_backward, (attrs,))
    _read_longest(longest)
    out, statistics = new_tensor(q.shape, q.dtype), new_tensor((q.shape[1], q.shape[0]), "fp32")
    record(FORWARD, (q, k, v, ends, ends), (out, statistics), attrs=attrs)
    if node:
        node.save(q, k, v, out.alias(), statistics, ends, longest)
        node.produces(out)
    return out


def _read_longest(longest: Tensor | None) -> None:
    if longest is not None:
        for _ in range(LONGEST_TWICE):
            _read(longest)


def _varlen_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (attrs,) = grads, node.attrs
    assert g is not None
    q, k, v, out, statistics, ends, longest = node.unpack()
    _read_longest(longest)
    found = [new_tensor(x.shape, x.dtype) for x in (q, k, v)]
    record(BACKWARD, (g, q, k, v, out, statistics, ends, ends), found, attrs=attrs)
    return tuple(x if need else None for x, need in zip(found, node.needs, strict=True))
