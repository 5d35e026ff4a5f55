"""What `perfmodel validate power` prints."""

from click import style

from perfmodel.report.plain import print_json, show, table

from . import power


def show_power(*, as_json: bool) -> bool:
    """Print measured and predicted power of a GPU's share of its node; returns whether the limits hold."""
    rows, checked = power.power_rows(), power.checked()
    worst = max(abs(row.error) for row in checked)
    holds = power.mean_error() <= power.MEAN_LIMIT and worst <= power.WORST_LIMIT
    if as_json:
        found = [{"id": r.id, "watts": r.watts, "error": r.error, "checked": r in checked} for r in rows]
        print_json({"holds": holds, "mean": power.mean_error(), "worst": worst, "rows": found})
        return holds
    shown = (
        [row.id, row.gpus, f"{row.watts:.0f}", f"{power.share_watts(row, power.h100()):.0f}",
         f"{100 * row.error:+.1f} %" if row in checked else "fitted, or the same runs"]
        for row in rows
    )  # fmt: skip
    title = "power of a GPU and its share of the node in MLPerf runs on H100, W"
    show(table(("submission", "GPUs", "measured", "predicted", "error"), shown, title=title))
    limits = f"mean {100 * power.MEAN_LIMIT:g} %, none beyond {100 * power.WORST_LIMIT:g} %"
    told = style("kept", fg="green") if holds else style("exceeded", fg="red")
    show(f"\nmean {100 * power.mean_error():.1f} %, worst {100 * worst:.1f} %; limits ({limits}): {told}")
    return holds
