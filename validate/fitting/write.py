"""Writes fitted blocks into device files: as text, so that everything before them stays as its author wrote it."""

import base64
import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from perfmodel.devices import profile
from perfmodel.devices.residual import load_residual
from perfmodel.program.dims import Array
from perfmodel.resources import write_text, written

from .judging import Fit
from .residual import Learned

AS_USUAL = ("tiles", "backward_wide", "row_tiles", "downcast_rate")  # left out of files where they are the default


def write_blocks(path: Path, blocks: Mapping[str, Fit], date: str) -> None:
    """Replace the [fitted…] tables of a file; all before the first of them is kept byte for byte.

    `blocks` maps what stands behind "fitted." (such as "gemm.bf16") to its fit.
    """
    content = path.read_bytes()
    tables = [block_text(f"fitted.{name}", fit, date) for name, fit in blocks.items()]
    if content.startswith(b"[fitted"):
        head = b""
    elif (at := content.find(b"\n[fitted")) >= 0:
        head = content[: at + 1]
    else:
        head = content.rstrip(b"\n") + b"\n\n"
    with written(path) as place:
        place.write_bytes(head + "\n".join(tables).encode())
    profile.forget()


def write_one(path: Path, name: str, fit: Fit, date: str) -> None:
    """Replace one block of a file, or add it behind the others."""
    content, text = path.read_bytes(), block_text(f"fitted.{name}", fit, date).encode()
    own = re.search(
        rf"^\[fitted\.{re.escape(name)}\].*?(?=^(?:#[^\n]*\n)*\[(?!fitted\.{re.escape(name)}\.)|\Z)".encode(),
        content,
        re.M | re.S,
    )  # without comments above the next block
    if own is None:
        content = content.rstrip(b"\n") + b"\n\n" + text
    else:
        behind = content[own.end() :]
        content = content[: own.start()] + text + (b"\n" + behind if behind else b"")
    with written(path) as place:
        place.write_bytes(content)
    profile.forget()


def block_text(name: str, fit: Fit, date: str) -> str:
    """One block: provenance, parameters, residuals."""
    lines = [f"[{name}]", f"source = {_value(fit.source)}", f'date = "{date}"', f"software = {_value(fit.software)}"]
    lines += [
        f"rows_fitted = {fit.rows_fitted}",
        f"rows_left_out = {fit.rows_left_out}",
        f"notes = {_value(fit.notes)}",
    ]
    lines += [f"{key} = {_value(names)}" for key, names in asdict(fit.caveats).items() if names]
    lines += ["", f"[{name}.parameters]"]
    for f in fields(fit.parameters):
        value = getattr(fit.parameters, f.name)
        if value is None or f.name == "dequantise_rate" or (f.name in AS_USUAL and value == f.default):
            continue
        lines.append(f"{f.name} = {_value(value)}")
    lines += ["", f"[{name}.residuals]", *(f"{k} = {_value(v)}" for k, v in fit.errors.rounded().items())]
    for key, errors in fit.slices.items():
        lines.append(f"{_key(key)} = {_value(errors.rounded())}")
    return "\n".join(lines) + "\n"


def write_residual(path: Path, found: Learned, date: str) -> None:
    """A residual's file: provenance, errors before and after on rows that no fit saw, and the tables."""
    given = {"source": found.source, "date": date, "software": found.software, "rows_fitted": found.rows_fitted}
    lines = [f"{key} = {_value(value)}" for key, value in given.items()]
    lines += [f"rows_left_out = {found.rows_left_out}", f"physics = {_value(found.physics)}"]
    for title, errors in (("physics_alone", found.before), ("with_residual", found.after)):
        lines += ["", f"[{title}]", *(f"{_key(name)} = {_value(e.rounded())}" for name, e in errors.items())]
    residual = found.residual
    lines += ["", "[tables]", f"tiles = {_value(tuple(residual.waves))}", f"bounds = {_value(residual.bounds)}"]
    lines += [f"step = {_value(found.step)}", f"shapes = {_coded(residual.shapes / found.step)}"]
    lines += [f"waves = [{', '.join(_coded(table / found.step) for table in residual.waves.values())}]"]
    write_text(path, "\n".join(lines) + "\n")
    load_residual.cache_clear()


def _coded(steps: Array) -> str:
    """Whole numbers as signed bytes in base64, a literal string of TOML."""
    text = base64.b64encode(np.round(steps).astype(np.int8).tobytes()).decode()
    return "'''\n" + "\n".join(textwrap.wrap(text, 116)) + "'''"


def _key(name: str) -> str:
    """A TOML key, quoted where it is not a bare one."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: object) -> str:
    """A TOML value; floats with four digits that count."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = f"{value:.4g}"
        return text if any(c in text for c in ".en") else text + ".0"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(str(k))} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # a named one
        return _value(value._asdict())
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    raise TypeError(f"no TOML value for {value!r}")
