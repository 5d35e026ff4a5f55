"""Values of a user's TOML file, checked: a fault becomes one line that names the file, the key and what is wrong."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError, nearest
from .attention import AttentionParameters
from .cpu_work import LIKE

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Table = dict[str, Any]
PROVENANCE = ("source", "date", "software", "rows_fitted", "rows_left_out", "notes")  # keys of a fitted block
SMALLEST, LARGEST = 1e-20, 1e20  # no figure of a device, in SI units, comes near them
RANGES = {  # ends of keys -> a tighter range, from the first computers to any that may come
    "_flops": (1e3, 1e19), "memory_bandwidth": (1e3, 1e17), "clock_hz": (1e3, 1e12), "memory_bytes": (1e3, 1e17),
    "usable_bytes": (1e3, 1e17),
    **dict.fromkeys(("mean", "median", "p90"), (0.0, 100.0)),  # relative errors
}  # fmt: skip
P = TypeVar("P", bound="DataclassInstance")

_MAY_BE_MISSING = (  # newer than files
    "power_share", "load_energy", "cold", "shared_bytes", "back16", "backward_wide", "row_tiles",
    "l2_write_cost", "downcast_rate", "dequantise_rate",
)  # fmt: skip
_MAY_BE_ZERO = {
    "launch_clocks", "derating", "derating_time", "power_share", "load_energy", "k_latency", "k_bubble", "epilogue",
    "wave_tail", "write_cost", "overlap_loss",
    "split_latency", "split_traffic", "long_row", "launch_floor", "cta_overhead", "exposed_memory",
    "backward_cta_overhead", "backward_launch_floor", "kernel_gap", "row_latency", "serial_latency",
    "row_copy_latency", "norm_reread", "softmax_reread", "mean", "median", "p90", "rows_fitted", "rows_left_out",
    "floor", "block", "score", "backward_floor", "backward_block", "backward_score", "a_passes", "b_passes",
    "c_passes", "floors", "clocks", "clocks16", "cold", "shared_bytes", "back16",
}  # fmt: skip


def parameters(kind: type[P], table: Table, where: str) -> P:
    """The parameters of a block: every key must be there, tiles and power excepted, and none besides."""
    known = {f.name: f for f in fields(kind)}
    no_others(table, known, where)
    values: Table = {}
    for name, field in known.items():
        if name in ("tiles", "batched_tiles"):
            if name in table:
                values[name] = number_pairs(table, name, where)
        elif name in _MAY_BE_MISSING and name not in table:
            continue
        elif name == "efficiency" and kind is AttentionParameters:
            values[name] = number_pairs(table, name, where)
        elif field.default_factory is not MISSING:
            values[name] = named_numbers(table, name, field.default_factory(), where)
        else:
            values[name] = number(table, name, where, whole=isinstance(field.default, int))
    return kind(**values)


def subtable(values: Table, key: str, where: str) -> Table:
    """The table under a key."""
    found = values.get(key)
    if not isinstance(found, dict):
        raise UserError(f"{where}: the table {key!r} is {'missing' if found is None else 'not a table'}")
    return found


def text(values: Table, key: str, where: str) -> str:
    """The text under a key, not empty."""
    found = values.get(key)
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{where}: {key} {'is missing' if found is None else f'must be a text, got {found!r}'}")
    return found


def number(values: Table, key: str, where: str, *, whole: bool = False) -> Any:
    """The finite number under a key, above zero (or from zero, where the models allow it)."""
    if key not in values:
        raise UserError(f"{where}: {key} is missing")
    return _checked(values[key], key, where, whole=whole)


def number_pairs(values: Table, key: str, where: str) -> tuple[tuple[int, Any], ...]:
    """[[a, b], …] under a key: tiles, or head sizes in ascending order with their efficiency."""
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(x, list) and len(x) == 2 for x in found):
        raise UserError(f"{where}: {key} must be a list of pairs, got {found!r}")
    whole = key != "efficiency"
    out = tuple((_checked(a, key, where, whole=True), _checked(b, key, where, whole=whole)) for a, b in found)
    if not whole and any(a >= b for (a, _), (b, _) in pairwise(out)):
        raise UserError(f"{where}: {key} must be sorted by head size, each once")
    return out


def named_numbers(values: Table, key: str, names: Iterable[str], where: str) -> dict[str, float]:
    """The table of numbers under a key, with exactly these names; a newer kind of a CPU's work may go as a like one."""
    found = subtable(values, key, where)
    inside = f"{where}: {key}"
    no_others(found, names, inside)
    for kind, like in LIKE.items():
        if kind in names and like in found:
            found = {kind: found[like], **found}
    for name in names:
        if name not in found:
            raise UserError(f"{inside}: {name} is missing")
    return {name: _checked(found[name], key, where, whole=False) for name in names}


def no_others(values: Table, known: Iterable[str], where: str) -> None:
    """Refuse keys that nobody reads: they are typing errors."""
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(key, known)}")


def _checked(value: Any, key: str, where: str, *, whole: bool) -> Any:
    kind, bound = "a whole number" if whole else "a number", "from 0" if key in _MAY_BE_ZERO else "above 0"
    wrong = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
    if wrong or not value >= 0 or (value == 0 and key not in _MAY_BE_ZERO):
        raise UserError(f"{where}: {key} must be {kind} {bound}, got {value!r}")
    least, most = next((r for end, r in RANGES.items() if key.endswith(end)), (SMALLEST, LARGEST))
    if value and not least <= value <= most:
        raise UserError(f"{where}: {key} is out of any range: {value!r}")
    return value if whole else float(value)
