"""The index arithmetic that transformers does before the first block: positions, attention masks, rotary tables.

In a dense batch the attention mask is all ones, which transformers finds out by reading one value back. PackedRows
documents come without one: their positions restart, which it finds out likewise.
Source: transformers/masking_utils.py (`sdpa_mask`, `eager_mask`).
"""

from typing import Any

from ..errors import UserError
from ..program.dims import Dim, Shape, contiguous_strides, decide, product, same
from ..program.lengths import Documents
from ..tape.core import emit, record, region, tape
from ..tape.packages.varlen import PackedRows
from ..tape.pointwise import add, binary_bool, cast, cat, fill, mul, sub, unary, where
from ..tape.shape import clone, expand, narrow, unsqueeze, view, view_as
from ..tape.spectrum import turns_by
from ..tape.tensor import Storage, Tensor
from .base import Scope


def positions(seq: Any) -> Tensor:
    """`torch.arange(seq) + past`: (1, seq)."""
    return unsqueeze(add(fill("arange", (seq,), "i64"), 0), 0)


def positions_of(model: Scope, ids: Tensor, seq: Any) -> Tensor:
    """As `positions`, or those that came with the ids, (batch, seq): they restart with every document."""
    setup = model.build.setup
    packed = model_buffer(ids.shape) if setup.within_documents else None
    if packed is not None or setup.unpads:
        model.build.packed = PackedRows(packed, Documents(setup.lengths, setup.seq))
    if packed is not None:
        return packed
    given = model.build.given_positions
    model.build.positions = found = positions(seq) if given is None else given
    return found


def read_scalar(x: Tensor) -> None:
    """`.item()`: the host waits for the device."""
    record("_local_scalar_dense", (x,), ())


@region
def causal_mask(
    attention: Tensor, seq: Dim, implementation: str, dtype: str, window: int | None, *, padded: bool,
    skip: bool = True, packed: PackedRows | None = None,
) -> Tensor | None:  # fmt: skip
    """The mask for a causal model, or None where the kernel's own causal flag does.

    Args:
        attention: (batch, keys) of ones; nothing reads it where documents are packed.
        seq: queries; fewer than there are keys where a cache holds the first of them.
        window: sliding window in tokens; a fused kernel's mask is skipped where the window does not bind.
        padded: whether the mask has zeros, so that it cannot be dropped.
        skip: whether the model lets a mask be dropped (`allow_is_causal_skip`).
        packed: documents that see themselves only, or are padded.
    """
    if packed is not None and packed.positions is not None:
        return _packed_mask(packed.positions, implementation, dtype, window)
    allowed = cast(attention, "bool")
    if implementation == "flash2":
        read_scalar(emit("all", (allowed,), (), "bool"))
        return allowed if packed is not None else None
    batch, length = attention.shape
    skippable = skip and same(seq, length) and not (window is not None and decide(seq >= window))
    if implementation == "sdpa" and skippable:
        read_scalar(unary_bool(emit("sum", (allowed,), (), "i64")))
        if not padded:
            return None
    if implementation == "sdpa" and skippable:  # asked once more: could it be the padding of a static cache?
        read_scalar(unary_bool(emit("sum", (allowed,), (), "i64")))
    rows, queries, keys = _indices(batch, seq, length)
    mask = _causal(queries, keys, queries, window)
    padding = emit("index.Tensor", (allowed, rows, keys), (batch, 1, 1, length), "bool")
    mask = binary_bool("bitwise_and.Tensor", mask, padding)
    return _expanded(mask, (batch, 1, seq, length), implementation, dtype)


def _indices(batch: Dim, seq: Dim, length: Dim) -> tuple[Tensor, Tensor, Tensor]:
    """The indices of samples, queries and keys, each along a dim of its own (`_non_vmap_expansion_sdpa`)."""
    rows = unsqueeze(unsqueeze(unsqueeze(fill("arange", (batch,), "i64"), 1), 2), 3)
    fill("arange", (1,), "i64")  # head indices, unused by the mask
    queries = view(add(fill("arange", (seq,), "i64"), 0), (1, 1, seq, 1))
    return rows, queries, view(add(fill("arange", (length,), "i64"), 0), (1, 1, 1, length))


def _causal(queries: Tensor, keys: Tensor, like: Tensor, window: int | None) -> Tensor:
    """Which keys a query may see, by their positions, as the first of several conditions (`and_masks`)."""
    every = fill("new_ones", (), "bool", like)
    if window is None:
        return binary_bool("bitwise_and.Tensor", every, binary_bool("le.Tensor", keys, queries))
    inner = fill("new_ones", (), "bool", queries)
    inside = binary_bool("gt.Tensor", keys, sub(queries, window))
    inside = binary_bool("bitwise_and.Tensor", inner, inside)
    inside = binary_bool("bitwise_and.Tensor", inside, binary_bool("le.Tensor", keys, queries))
    return binary_bool("bitwise_and.Tensor", every, inside)


def _expanded(mask: Tensor, shape: Shape, implementation: str, dtype: str) -> Tensor:
    """The mask of every query and key; for eager attention as what is added to the scores."""
    mask = expand(mask, shape)
    if implementation == "eager":
        mask = where(mask, fill("zeros", (), dtype), fill("scalar_tensor", (), dtype))
    return mask


def _packed_mask(positions: Tensor, implementation: str, dtype: str, window: int | None) -> Tensor | None:
    """The mask of packed documents, (batch, 1, seq, seq); flash-attn finds them itself.

    A document begins where a position is not one more than the last; its number is the count of those before
    (`find_packed_sequence_indices`). Their own positions take the place of indices.
    """
    batch, seq = positions.shape
    before = sub(narrow(positions, 1, 1), 1)
    longer = cat((before, positions), 1)
    starts = emit("ne.Scalar", (sub(narrow(longer, 1, seq), narrow(longer, 1, seq)),), (batch, seq), "bool")
    numbers = emit("cumsum", (starts,), (batch, seq), "i64")
    read_scalar(emit("all", (unary_bool(view_as("select.int", numbers, (batch,), (seq,))),), (), "bool"))
    if implementation == "flash2":
        return None
    rows, queries, keys = _indices(batch, seq, seq)

    def of(table: Tensor) -> tuple[Tensor, Tensor]:
        by_query = emit("index.Tensor", (table, rows, queries), (batch, 1, seq, 1), "i64")
        return by_query, emit("index.Tensor", (table, rows, keys), (batch, 1, 1, seq), "i64")

    mask = _causal(*of(positions), queries, window)
    mask = binary_bool("bitwise_and.Tensor", mask, binary_bool("eq.Tensor", *of(numbers)))
    return _expanded(mask, (batch, 1, seq, seq), implementation, dtype)


def unary_bool(x: Tensor) -> Tensor:
    """`x == number`."""
    return emit("eq.Scalar", (x,), x.shape, "bool")


def decoder_mask(shape: Shape, implementation: str, dtype: str) -> Tensor | None:
    """A causal mask of (batch, seq) tokens of which nobody said which are real; SDPA gets none."""
    if implementation == "sdpa":
        return None
    batch, seq = shape
    _, queries, keys = _indices(batch, seq, seq)
    return _expanded(binary_bool("le.Tensor", keys, queries), (batch, 1, seq, seq), implementation, dtype)


def bidirectional_mask(attention: Tensor, implementation: str, dtype: str, *, padded: bool) -> Tensor | None:
    """An encoder's mask: none for a dense batch, after reading that it is one."""
    allowed = cast(attention, "bool")
    read_scalar(emit("all", (allowed,), (), "bool"))
    if not padded:
        return None
    batch, seq = attention.shape
    rows, queries, keys = _indices(batch, seq, seq)
    padding = emit("index.Tensor", (allowed, rows, keys), (batch, 1, 1, seq), "bool")
    every = fill("new_ones", (), "bool", queries)
    mask = binary_bool("bitwise_and.Tensor", every, emit("ge.Scalar", (queries,), queries.shape, "bool"))
    mask = binary_bool("bitwise_and.Tensor", mask, padding)
    return _expanded(mask, (batch, 1, seq, seq), implementation, dtype)


@region
def rotary_tables(
    position_ids: Tensor, half: int, dtype: str, *, longrope: bool = False, layout: str = "halves"
) -> tuple[Tensor, Tensor]:
    """cos and sin of (1, seq, 2·half), computed in fp32.

    Args:
        longrope: whether the frequencies are chosen by the largest position (`longrope_frequency_update`).
        layout: of the dims that turn together: "halves", half a head apart; "interleaved", neighbours; "once", as
            halves, but the tables have each angle once, (1, seq, half); "complex", each as one number of cos and sin.
    """
    frequencies = model_buffer((half,), "fp32")
    tape().buffers += [frequencies.spec] * 2  # and the original ones, which a change of them would start from
    if longrope:
        choice = emit("gt.Scalar", (add(emit("max", (position_ids,), (), "i64"), 1),), (), "bool")
        chosen = where(choice, *(model_buffer((half,), "fp32") for _ in range(2)))
        record("copy_", (frequencies, chosen), (frequencies,))
    at = cast(unsqueeze(position_ids, 2), "fp32")
    angles = mul(at, frequencies)
    if layout == "complex":
        turns = mul(turns_by(angles), 1.0)
        return turns, turns
    if layout != "once":
        angles = repeat_last(angles) if layout == "interleaved" else cat((angles, angles), -1)
    cos, sin = mul(unary("cos", angles), 1.0), mul(unary("sin", angles), 1.0)
    return cast(cos, dtype), cast(sin, dtype)


def repeat_last(x: Tensor) -> Tensor:
    """`x.repeat_interleave(2, dim=-1)` of what needs no gradient."""
    copies = clone(expand(unsqueeze(x, -1), (*x.shape, 2)))
    return view(copies, (*x.shape[:-1], 2 * x.shape[-1]))


def model_buffer(shape: tuple[Any, ...], dtype: str = "i64") -> Tensor:
    """A buffer of the model (position ids, frequencies): it is there before the step begins."""
    return Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))


def check_positions(model: Scope, seq: Any, what: str = "learned positions") -> None:
    """Raise `UserError` where the sequence is longer than a table of positions, or what else they are called."""
    architecture = model.build.architecture
    limit = architecture.max_positions
    if limit is not None and decide(seq > limit):
        virtual = _largest(seq) - _largest(model.build.setup.seq)
        also = f" with {virtual} virtual tokens" if virtual else ""
        raise UserError(
            f"{architecture.name}: seq {_largest(seq)}{also} exceeds its {limit} {what}; "
            f"use --seq {limit - virtual} or less"
        )


def _largest(x: Any) -> int:
    return int(x if isinstance(x, int) else x.max())
