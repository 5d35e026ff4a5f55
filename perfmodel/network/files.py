"""Node files: data/nodes/NAME.toml, or a user's own in $PERFMODEL_HOME/nodes.

A file holds `name`, `gpu` (a device), `gpus` (of a node), `link` (nvswitch, bridge, pcie, pcie_host or none),
`channels` (thread blocks that NCCL's kernels take at most), `aliases`, `like` (the node whose figures it takes where it
has none), `host_bandwidth` (B/s of the memory of all its processors, datasheet; where it is missing, classes.toml's of
its links), [[tiers]] with `gpus` and `bandwidth` (of a GPU's link, B/s in one direction), [nics] with `kind`, `count`
and `bandwidth` (of one card, likewise), [source], and fitted blocks `[fitted.all_reduce]`, …, `[fitted.between]` with
their provenance and the tables `parameters` and `residuals`. Where a file has no block for a kind, the node that is
`like` it has, else the one that classes.toml names for its kind of link or card.
"""

import tomllib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from ..devices import own, toml
from ..errors import UserError, check_kind, nearest
from ..resources import DATA, is_file, read_toml, stems
from .parameters import PROTOCOLS, Between, CollectiveParameters, InSwitch, Nics, Protocol
from .price import KINDS, Links

NODES = DATA / "nodes"
CLASSES = "classes"  # the file of class defaults, no node
OWN = "nodes"  # a user's folder of them
BETWEEN = "between"  # the block of what passes between nodes
LIKE_KINDS = {  # kinds whose figures stand for one that nobody measured on such links, the nearest first
    "all_reduce": (), "all_gather": ("reduce_scatter", "all_reduce"), "reduce_scatter": ("all_gather", "all_reduce"),
    "all_to_all": ("all_gather", "all_reduce"), "broadcast": ("all_gather", "all_reduce"),
    "send_recv": ("all_gather", "all_reduce"), BETWEEN: (),
}  # fmt: skip
KEYS = (
    "name",
    "gpu",
    "gpus",
    "link",
    "channels",
    "aliases",
    "like",
    "tiers",
    "nics",
    "source",
    "fitted",
    "host_bandwidth",
)

Table = dict[str, Any]


class NodeBlock(NamedTuple):
    """A fitted block and where it comes from.

    Attributes:
        origin: "fitted" (own measurements), "sibling" (those of the like node) or "class" (class defaults).
        node: slug of the node that was measured.
        kind: what was measured there: itself, or a like kind of collective.
        provenance: source, date, software, rows_fitted, rows_left_out, notes.
        residuals: mean, median and p90 of |predicted/measured - 1| on rows that no fit saw.
    """

    parameters: Any
    origin: str
    node: str
    kind: str
    provenance: Mapping[str, Any]
    residuals: Mapping[str, Any]


class NodeFile(NamedTuple):
    """What a node's file says, class defaults put in."""

    slug: str
    name: str
    gpu: str
    link: str
    channels: int
    links: Links
    host_bandwidth: float
    sources: Mapping[str, str]
    blocks: Mapping[str, NodeBlock]


def names() -> list[str]:
    """Bundled nodes, by the names of their files."""
    return [stem for stem in stems(NODES, ".toml") if stem != CLASSES]


def bundled(name: str) -> str:
    """The slug of the bundled node of a name or alias, in any case; empty if there is none."""
    slug = name.strip().lower()
    return slug if slug in names() else _aliases().get(slug, "")


def standing_for(gpu: str) -> str:
    """The bundled node whose links stand for those of a device that no known node holds."""
    classes = _classes()
    return str(classes["gpu"].get(gpu, classes["link"]["pcie"]))


def load(name_or_path: str | PathLike[str]) -> NodeFile:
    """A bundled node by name or alias (in any case), an own one by name, or any by the path of its TOML file.

    Raises:
        UserError: unknown node; broken TOML; a key that is missing, unknown, mistyped or out of range.
    """
    check_kind("node", name_or_path, (str, PathLike), "a name or the path of a TOML")
    text = str(name_or_path).strip()
    if slug := bundled(text):
        return _bundled(slug)
    if (mine := own.find(text, OWN)) is not None:
        return from_table(mine.stem, read_toml(mine), str(mine))
    path = Path(name_or_path)
    if path.suffix.lower() == ".toml" or is_file(path):
        if not is_file(path):
            raise UserError(f"no such node file: {path}")
        return from_table(path.stem, read_toml(path), str(path))
    known = [*names(), *own.calibrated(OWN)]
    hint = nearest(text, known, also=_aliases(), otherwise="perfmodel nodes lists those that are known")
    raise UserError(f"unknown node {text!r}: {hint} (or give the path of a .toml file)")


def from_table(slug: str, table: Table, where: str) -> NodeFile:
    """A node from the parsed TOML; `where` names the file in error messages."""
    toml.no_others(table, KEYS, where)
    gpus = toml.number(table, "gpus", where, whole=True)
    link = toml.text(table, "link", where)
    if link not in _classes()["link"]:
        raise UserError(f"{where}: link {link!r} is unknown: {nearest(link, _classes()['link'])}")
    tiers, nics = _tiers(table, gpus, where), _nics(table, where)
    given = toml.subtable(table, "fitted", where) if "fitted" in table else {}
    toml.no_others(given, (*KINDS, BETWEEN), f"{where}: fitted")
    like = toml.text(table, "like", where) if "like" in table else ""
    blocks = {kind: _block(kind, slug, given, like, _classes()["link"][link], len(tiers), where) for kind in KINDS}
    if nics is not None:
        alike = like if like and _table(like).get("nics", {}).get("kind") == nics.kind else ""
        blocks[BETWEEN] = _block(BETWEEN, slug, given, alike, _classes()["nics"][nics.kind], len(tiers), where)
    sources = toml.subtable(table, "source", where) if "source" in table else {}
    return NodeFile(
        slug=slug,
        name=toml.text(table, "name", where),
        gpu=toml.text(table, "gpu", where),
        link=link,
        channels=toml.number(table, "channels", where, whole=True),
        links=Links(gpus, tiers, nics),
        host_bandwidth=toml.number(
            table if "host_bandwidth" in table else {"host_bandwidth": _classes()["host_bandwidth"][link]},
            "host_bandwidth",
            where,
        ),
        sources={key: str(value) for key, value in sources.items()},
        blocks=blocks,
    )


def forget() -> None:
    """Drop what was cached: for after a file was rewritten."""
    for cached in (_bundled, _aliases, _classes, _table):
        cached.cache_clear()


def _tiers(table: Table, gpus: int, where: str) -> tuple[tuple[int, float], ...]:
    found = table.get("tiers")
    if not isinstance(found, list) or not found or not all(isinstance(tier, dict) for tier in found):
        raise UserError(f"{where}: [[tiers]] with gpus and bandwidth are missing")
    inside = f"{where}: tiers"
    tiers = tuple(
        (toml.number(tier, "gpus", inside, whole=True), toml.number(tier, "bandwidth", inside)) for tier in found
    )
    sizes = [size for size, _ in tiers]
    if sizes != sorted(set(sizes)) or sizes[-1] != gpus:
        raise UserError(f"{inside}: gpus must ascend to the {gpus} of the node, got {sizes}")
    return tiers


def _nics(table: Table, where: str) -> Nics | None:
    if "nics" not in table:
        return None
    nics, inside = toml.subtable(table, "nics", where), f"{where}: [nics]"
    toml.no_others(nics, ("kind", "count", "bandwidth"), inside)
    kind = toml.text(nics, "kind", inside)
    if kind not in _classes()["nics"]:
        raise UserError(f"{inside}: kind {kind!r} is unknown: {nearest(kind, _classes()['nics'])}")
    return Nics(kind, toml.number(nics, "count", inside, whole=True), toml.number(nics, "bandwidth", inside))


def _block(kind: str, slug: str, given: Table, like: str, default: str, tiers: int, where: str) -> NodeBlock:
    """The block of a kind: the file's own, else the like node's, else the class default's; else of a like kind."""
    for wanted in (kind, *LIKE_KINDS[kind]):
        for origin, node in (("fitted", slug), ("sibling", like), ("class", default)):
            blocks = given if origin == "fitted" else _table(node).get("fitted", {}) if node else {}
            if wanted in blocks:
                place = where if origin == "fitted" else f"{node}.toml"
                origin = "sibling" if origin == "fitted" and wanted != kind else origin
                return _parsed(wanted, blocks[wanted], origin, node, tiers, f"{place}: [fitted.{wanted}]")
    raise UserError(f"{where}: no [fitted.{kind}], and {default}.toml, whose figures it would take, has none")


def _parsed(kind: str, block: Any, origin: str, node: str, tiers: int, where: str) -> NodeBlock:
    if not isinstance(block, dict):
        raise UserError(f"{where} must be a table")
    values, inside = toml.subtable(block, "parameters", where), f"{where} parameters"
    residuals = toml.subtable(block, "residuals", where)
    parameters = _between(values, inside) if kind == BETWEEN else _collective(values, tiers, inside)
    provenance = {key: block[key] for key in toml.PROVENANCE if key in block}
    return NodeBlock(parameters, origin, node, kind, provenance, residuals)


def _collective(values: Table, tiers: int, where: str) -> CollectiveParameters:
    toml.no_others(values, (*PROTOCOLS, "own_part", "through", "in_switch"), where)
    through = values.get("through")
    if not isinstance(through, list) or not through:
        raise UserError(f"{where}: through must be a list of one share a tier")
    shares = [toml.number({"through": share}, "through", where) for share in through]
    shares += shares[-1:] * (tiers - len(shares))  # those of a smaller like node
    ll, ll128, simple = (_protocol(values, name, where) for name in PROTOCOLS)
    return CollectiveParameters(
        ll,
        ll128,
        simple,
        own_part=toml.number(values, "own_part", where),
        through=tuple(shares[:tiers]),
        in_switch=InSwitch(*_line(InSwitch._fields, values, "in_switch", where)) if "in_switch" in values else None,
    )


def _between(values: Table, where: str) -> Between:
    toml.no_others(values, ("ll", "simple"), where)
    return Between(_protocol(values, "ll", where), _protocol(values, "simple", where))


def _protocol(values: Table, name: str, where: str) -> Protocol:
    return Protocol(*_line(Protocol._fields, values, name, where))


def _line(keys: tuple[str, ...], values: Table, name: str, where: str) -> list[float]:
    """The numbers of the table `name`, of which there are no others."""
    line, inside = toml.subtable(values, name, where), f"{where}: {name}"
    toml.no_others(line, keys, inside)
    return [toml.number(line, key, inside) for key in keys]


@lru_cache(maxsize=64)
def _bundled(slug: str) -> NodeFile:
    return from_table(slug, _table(slug), f"{slug}.toml")


@lru_cache(maxsize=64)
def _table(slug: str) -> Table:
    """The file of a bundled node.

    Raises:
        UserError: no such node.
    """
    if slug not in names():
        raise UserError(f"no bundled node {slug!r} to take figures of: {nearest(slug, names())}")
    return read_toml(NODES / f"{slug}.toml")


@lru_cache(maxsize=1)
def _classes() -> Table:
    """Of a kind of link or network card, and of a GPU, the node whose figures stand for it; host memory of a link."""
    return read_toml(NODES / f"{CLASSES}.toml")


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    """Alias, in lower case -> slug, from the heads of the files alone."""
    found: dict[str, str] = {}
    for slug in names():
        head = (NODES / f"{slug}.toml").read_text(encoding="utf-8").partition("\n[")[0]
        aliases: Iterable[Any] = tomllib.loads(head).get("aliases", [])
        found.update({str(alias).lower(): slug for alias in aliases})
    return found
