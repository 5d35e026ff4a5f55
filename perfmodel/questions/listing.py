"""What can be asked for: bundled models, methods, devices and nodes, as rows of plain values."""

import inspect
from typing import Any

from .. import architectures
from ..architectures.names import name_order
from ..devices import own, profile
from ..errors import UserError, nearest
from ..methods import options, registered
from ..network import files

Row = dict[str, Any]
Rows = list[Row]
DIMS = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "tied")


def models() -> Rows:
    """The bundled models by family and size: dims (elements) and the source of their config.

    Those that the tape does not know, which are traced, come last; their dims are None.
    """
    rows, traced = [], []
    for name in sorted(architectures.model_names(), key=name_order):
        config = architectures.load(name)
        if config.kind not in architectures.supported():
            unknown = dict.fromkeys(DIMS)
            traced.append({"model": name, "model_type": config.kind, **unknown, "source": config.values.get("_source")})
            continue
        a = architectures.from_config(config)
        rows.append(
            {
                "model": name, "model_type": a.model_type, **{dim: getattr(a, dim) for dim in DIMS},
                "source": config.values.get("_source"),
            }
        )  # fmt: skip
    return rows + traced


def methods() -> Rows:
    """The fine-tuning methods: what trains, what they add to a step, where they come from, their options."""
    return [
        {
            "method": name, "trains": cls.what_trains, "adds": cls.what_it_adds, "source": cls.source,
            "what": cls.describe(), "description": inspect.getdoc(cls), "options": options(cls),
        }
        for name, cls in registered().items()
    ]  # fmt: skip


def method_named(name: str) -> Row:
    """One of `methods`.

    Raises:
        UserError: no method of that name.
    """
    if name not in registered():
        raise UserError(f"unknown method {name!r}: {nearest(name, registered())}")
    return next(row for row in methods() if row["method"] == name)


def devices() -> Rows:
    """Own and bundled devices by architecture: datasheet (SI), what was measured on them, errors on left-out rows."""
    bundled = sorted(map(profile.load, profile.names()), key=lambda p: (p.kind, p.architecture, name_order(p.slug)))
    return [
        {
            "device": p.slug, "architecture": p.architecture, "memory_bytes": p.hardware.memory_bytes,
            "memory_bandwidth": p.hardware.memory_bandwidth, "bf16_flops": p.hardware.peak("bf16"),
            "fp32_flops": p.hardware.peak("fp32"), "name": p.name, "measured": dict(p.fitted),
            "learned": p.residual or None,
            "residuals": {block: dict(figures) for block, figures in p.residuals.items()},
        }
        for p in [*profile.own_profiles()[0], *bundled]
    ]  # fmt: skip


def nodes() -> tuple[Rows, list[str]]:
    """Own and bundled nodes by link and name, and what is wrong with own files that hold none.

    A node's `bandwidth` is that of a GPU's link, `network` that of all its cards (None: it has none), B/s in one
    direction; `figures_of` are the nodes that were measured for it, and `measured` says so by collective.
    """
    found, complaints = [], []
    for name in own.calibrated(files.OWN):
        try:
            found.append(files.load(name))
        except UserError as error:
            complaints.append(str(error))
    bundled = sorted(map(files.load, files.names()), key=lambda node: (node.link, name_order(node.slug)))
    rows = [
        {
            "node": node.slug, "gpu": node.gpu, "gpus": node.links.gpus, "link": node.link,
            "bandwidth": node.links.tiers[0][1],
            "network": node.links.nics and node.links.nics.count * node.links.nics.bandwidth, "name": node.name,
            "figures_of": list(dict.fromkeys(block.node for block in node.blocks.values())),
            "measured": {kind: block.origin for kind, block in node.blocks.items()},
            "residuals": {kind: dict(b.residuals) for kind, b in node.blocks.items() if b.origin == "fitted"},
        }
        for node in [*found, *bundled]
    ]  # fmt: skip
    return rows, complaints
