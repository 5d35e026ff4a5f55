"""`perfmodel models`, `methods`, `devices` and `nodes`."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import click

from ..errors import UserError, nearest
from ..report.plain import print_json
from .options import json_option

Rows = list[dict[str, Any]]
Formats = dict[str, Callable[[Any], str]]
HEADS = {"memory_bytes": "memory", "hidden": "width", "intermediate": "MLP"}  # the names of the JSON would be too wide


part_of_name = click.argument("name", required=False)


@click.command()
@part_of_name
@json_option
def models(name: str | None, as_json: bool) -> None:
    """List the bundled models, or those with a part of a NAME: of a built-in form, then the traced."""
    from .. import units
    from ..architectures.names import name_order
    from ..questions import listing

    columns = ("model", "model_type", "layers", "hidden", "heads", "kv_heads", "intermediate", "vocab")
    formats: Formats = {"vocab": units.count}
    rows = _named(listing.models(), "model", name)
    known = rows if as_json else [row for row in rows if row["layers"] is not None]
    if known or as_json:
        _list(known, columns, as_json, formats, left=(0, 1), group=lambda row: name_order(row["model"])[0])
    names = ", ".join(row["model"] for row in rows if row["layers"] is None)
    if names and not as_json:
        from ..report.plain import paragraph, show

        show(
            "\n" * bool(known)
            + paragraph(f"traced when they are asked for (pip install 'perfmodel[validate]'): {names}")
        )


@click.command()
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the fine-tuning methods, or describe one and its options."""
    from ..questions import listing

    if name is None:
        columns = ("method", "trains", "adds", "source")
        _list(listing.methods(), columns, as_json, {"source": _short}, left=range(4))
        if not as_json:
            click.echo("\nperfmodel methods NAME describes one and its options; numbers are arXiv's")
        return
    row = listing.method_named(name)
    if as_json:
        print_json(row)
        return
    from ..report.terminal import show_method

    show_method(row)


def _short(source: str) -> str:
    """The first source: an arXiv paper by its number, code by its library."""
    first = source.partition(";")[0].removeprefix("https://").removeprefix("arxiv.org/abs/")
    return first.partition("/")[0]


@click.command()
@part_of_name
@json_option
def devices(name: str | None, as_json: bool) -> None:
    """List the devices, or those with a part of a NAME, and what was measured on them."""
    from .. import units
    from ..devices.profile import own_profiles
    from ..questions import listing

    formats: Formats = {
        "memory_bytes": lambda v: f"{v / 2**30:.0f} GiB", "memory_bandwidth": lambda v: units.count(v, "B/s"),
        "bf16_flops": units.count, "fp32_flops": units.count,
        "measured": _measured,
    }  # fmt: skip
    columns = ("device", "memory_bytes", "memory_bandwidth", "bf16_flops", "fp32_flops", "measured")
    rows = _named(listing.devices(), "device", name)
    _list(rows, columns, as_json, formats, left=(0, 5), group=lambda row: row["architecture"])
    for complaint in own_profiles()[1]:
        click.echo(f"perfmodel: left out: {complaint}", err=True)


@click.command()
@part_of_name
@json_option
def nodes(name: str | None, as_json: bool) -> None:
    """List the nodes of GPUs, or those with a part of a NAME, and what was measured on them."""
    from .. import units
    from ..questions import listing

    formats: Formats = {
        "bandwidth": lambda v: units.count(v, "B/s"), "network": lambda v: units.count(v, "B/s") if v else "none",
        "figures_of": ", ".join,
    }  # fmt: skip
    columns = ("node", "gpu", "link", "bandwidth", "network", "figures_of")
    found, complaints = listing.nodes()
    rows = _named(found, "node", name)
    shown = rows if as_json else [{**row, "gpu": f"{row['gpus']} x {row['gpu']}"} for row in rows]
    _list(shown, columns, as_json, formats, left=(0, 1, 2, 5), group=lambda row: row["link"])
    for complaint in complaints:
        click.echo(f"perfmodel: left out: {complaint}", err=True)


def _named(rows: Rows, key: str, part: str | None) -> Rows:
    """The rows whose short or full name holds a part of it, or else every word of that; all without one."""
    if part is None:
        return rows
    asked = part.lower().replace("-", " ")
    names = [f"{row[key]} {row.get('name', '')}".lower().replace("-", " ") for row in rows]
    for words in ([asked], asked.split()):
        found = [row for row, name in zip(rows, names, strict=True) if all(word in name for word in words)]
        if found:
            return found
    near = nearest(part, [row[key] for row in rows], otherwise=f"perfmodel {key}s lists all")
    raise UserError(f"no {key} is named {part!r}: {near}")


def _measured(origins: dict[str, str]) -> str:
    """The blocks of a profile that measurements stand behind."""
    found = [block for block, origin in origins.items() if origin != "class"]
    return "everything" if len(found) == len(origins) else ", ".join(found) or "nothing: class defaults"


def _list(
    rows: list[dict[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    formats: Formats,
    *,
    left: Sequence[int],
    group: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> None:
    """A table with an empty line between groups, or JSON."""
    if as_json:
        print_json(rows)
        return
    from ..report.plain import show, table

    cells: list[list[str]] = []
    for _, members in groupby(rows, group):
        cells += [[""] * len(columns)] * bool(cells)
        cells += [[formats.get(c, str)(row[c]) for c in columns] for row in members]
    show(table([HEADS.get(c, c.replace("_", " ")) for c in columns], cells, left=left))
