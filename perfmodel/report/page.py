"""`perfmodel report`: everything about a comparison on one page that opens offline, prints, and reads on a phone."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..devices import host as hosts
from ..devices.device import Device, profile_of
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods import Method
from ..prediction.predict import Model
from ..program.installed import installed
from ..questions.comparison import Comparison, compare
from ..questions.explanation import Explanation, of_predictions
from ..setup import Setup
from ..today import today
from . import evidence, exhibits
from .figures import any_best, figures, mfu_of, shared_setup
from .svg import typeset
from .theme import CHARTS, FONT, PALETTE, variables

FOLDER = Path(__file__).parent


def report(
    model: Model,
    methods: Sequence[str | Method] = ("full", "lora"),
    setup: Setup | None = None,
    device: str | DeviceProfile | Device = "l40s",
    *,
    host: str | Host = "default",
    axes: Sequence[str] = ("batch", "seq", "size", "targets"),
    command: str = "",
    differs: str = "",
    **options: Any,
) -> str:
    """The page as HTML; the first method is the baseline.

    Args:
        axes: along which to look for a change of the verdict (see `explain`).
        command: what to print as the way to make the page again.
        differs: how the step differs from that of a training config; it stands before the answer.

    Other arguments and errors are those of `compare`; the setup must be a single one.
    """
    on = profile_of(device)
    by = hosts.host_of(host, on)
    c = compare(model, methods, setup, on, host=by, **options)
    base, *others = c.predictions
    explained = [of_predictions(base, p, on, by, axes) for p in others]
    labels = [explained[0].labels[0], *(e.labels[1] for e in explained)]
    context = {
        "title": f"{base.model} on {on.name}",
        "setup_line": shared_setup(base),
        "differs": differs,
        "answers": [*(e.answer for e in explained), *c.unanswered],
        "labels": labels,
        "figures": rows_of_page(c),
        "mfu": mfu_of(*c.predictions),
        "command": command,
        "signature": f"perfmodel {installed('perfmodel') or '(not installed)'}, {today().isoformat()}. Made by:",
        **exhibits.waterfalls(explained),
        **exhibits.limit_exhibits(explained, fastest(explained)),
        **exhibits.memories(c.predictions, labels, on),
        **exhibits.crossings(explained),
        **exhibits.heat_map(turning(explained), by),
        **evidence.assumptions(c.predictions, by),
        **evidence.accuracy(on),
        **evidence.provenance(model, c.predictions, on, by),
    }
    return render(context)


def rows_of_page(c: Comparison) -> list[dict[str, Any]]:
    """The rows of a comparison for a template, which indents those that are parts of others."""
    return [
        {"name": r.name.strip(), "sub": r.name != r.name.strip(), "cells": r.cells, "marked": any_best([r])}
        for r in figures(c)
    ]


def fastest(explained: list[Explanation]) -> Explanation:
    """The fastest method that fits, or the fastest if none does."""
    fitting = [e for e in explained if e.b.fits] or explained
    return min(fitting, key=lambda e: float(e.b.time.phases["total"]))


def turning(explained: list[Explanation]) -> Explanation:
    """The first method whose verdict turns along batch or length, or the fastest if none does."""
    turns = (e for e in explained if any(c.changes for c in e.crossovers if c.axis in ("batch", "seq")))
    return next(turns, fastest(explained))


def render(context: dict[str, Any], template: Path = FOLDER / "page.html.j2") -> str:
    """The page of a context; templates of other folders find those of this one.

    Raises:
        UserError: Jinja2 is not installed.
    """
    _, safe = _jinja()
    return fragment(context | {"command": safe.escape(context["command"]), "style": safe.Markup(style())}, template)


def fragment(context: dict[str, Any], template: Path) -> str:
    """What a template makes of a context: every text escaped, pictures as they are.

    Raises:
        UserError: Jinja2 is not installed.
    """
    _, safe = _jinja()
    told = {k: _markup(v, safe.Markup) for k, v in context.items()}
    return str(_environment(template.parent).get_template(template.name).render(**told))


def _jinja() -> tuple[Any, Any]:
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise UserError("the page needs the report extra (Jinja2): pip install 'perfmodel[report]'") from None
    return jinja2, markupsafe


@cache
def _environment(folder: Path) -> Any:
    """Templates of a folder and of this one; what they show is escaped and typeset."""
    jinja, safe = _jinja()

    def finalize(value: Any) -> Any:
        if isinstance(value, evidence.Link):
            return safe.Markup('<a href="{}">{}</a>').format(value.url, value.text)
        return value if isinstance(value, safe.Markup) or not isinstance(value, str) else safe.escape(typeset(value))

    return jinja.Environment(
        loader=jinja.FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        finalize=finalize,
    )


def _markup(value: Any, markup: Any) -> Any:
    """The same context with its pictures marked as markup."""
    if isinstance(value, exhibits.Picture):
        return {"wide": markup(value.wide), "narrow": markup(value.narrow)}
    if isinstance(value, dict):
        return {k: _markup(v, markup) for k, v in value.items()}
    return [_markup(v, markup) for v in value] if isinstance(value, list) else value


def style() -> str:
    """The style sheet, palette included; print is always on light ground."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8").replace("FONT", FONT)
    keys = "".join(f".key.f-{name}{{background:var(--{name})}}" for name in PALETTE)
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(dark=True)}}}}}"
    return f":root{{color-scheme:light dark;{variables()}}}{dark}{css}{CHARTS}{keys}"
