"""What `perfmodel validate layers` prints."""

from typing import Any

from click import style

from perfmodel import units
from perfmodel.report.plain import paragraph, print_json, show, table

from . import layers, savings
from .reasons import FAR, reason


def show_layers(*, as_json: bool) -> bool:
    """Print errors of layer times and savings of DRAM traffic; returns whether the limits hold."""
    times, saved = layers.published_layers(), savings.published_savings()
    found = layers.summarise_layers(times)
    holds = found["all"] <= layers.MEAN_LIMIT and all(
        abs(s.predicted_share - s.share) <= savings.POINTS_LIMIT for s in saved
    )
    if as_json:
        print_json({"holds": holds, "mean": found, "savings": [_saving(s) for s in saved]})
        return holds
    errors = ([name, sum(name in ("all", t.component) for t in times), f"{100 * e:.1f} %"] for name, e in found.items())
    title = "times of LoRA layers under a CUDA graph on an H100, mean |relative error|"
    show(table(("what", "rows", "error"), errors, title=title))
    for far in (t for t in times if abs(t.error) > FAR):
        show(paragraph(f"{far.id}: {100 * far.error:+.0f} %: {reason(layers.FILE.stem, far.id)}", indent="  "))
    traffic = (
        [
            f"{s.tokens} x {s.width}", units.nbytes(s.torch), units.nbytes(s.predicted(fused=False)),
            units.nbytes(s.fused), units.nbytes(s.predicted(fused=True)), f"{100 * s.share:.0f} %",
            f"{100 * s.predicted_share:.0f} %",
        ]
        for s in saved
    )  # fmt: skip
    heads = ("tokens x width", "torch", "predicted", "fused", "predicted", "saved", "predicted")
    title = "DRAM traffic of a linear layer with LoRA, forward and backward, saved by LoRAFusion's kernels"
    show("\n" + table(heads, traffic, title=title))
    limits = (
        f"{100 * layers.MEAN_LIMIT:g} % in the mean of all times, {100 * savings.POINTS_LIMIT:g} points of a saving"
    )
    show(f"\nlimits ({limits}): " + (style("kept", fg="green") if holds else style("exceeded", fg="red")))
    return holds


def _saving(s: savings.Saving) -> dict[str, Any]:
    return {
        "tokens": s.tokens, "width": s.width, "rank": s.rank, "measured": s.share, "predicted": s.predicted_share,
        "source": s.source,
    }  # fmt: skip
