"""How the rate of a job grows with its GPUs, as a picture (matplotlib)."""

from pathlib import Path

from ..questions.sweeps import Sweep
from .heatmap import save
from .sweeps import FinishedSweep, best_rates, efficiencies


def draw_scaling(planned: Sweep, result: FinishedSweep, path: Path) -> None:
    """One panel per device: tokens a second of each GPU over their number; dashed what scaled without loss.

    Raises:
        UserError: a place that cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    gpus, devices = planned.gpus.tolist(), [device.slug for device in planned.devices]
    size = (1.2 + 4.2 * len(devices), 4.2)
    figure, grid = plt.subplots(1, len(devices), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axes, device in zip(grid[0], devices, strict=True):
        for method in (m.spec() for m in planned.methods):
            rates = best_rates(planned, device, method, result)
            shares, each = efficiencies(gpus, rates), [rate / n for n, rate in zip(gpus, rates, strict=True)]
            fitting = [i for i, rate in enumerate(each) if rate > 0]
            if not fitting:  # no line, so no entry of the legend either
                continue
            last = fitting[-1]
            share = f" ({100 * shares[last]:.0f} % at {gpus[last]})" if len(fitting) > 1 else ""
            (line,) = axes.plot(gpus, each, marker="o", label=method + share)
            axes.axhline(each[fitting[0]], color=line.get_color(), alpha=0.4, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xticks(gpus, [str(n) for n in gpus])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("GPUs")
        axes.set_title(device, fontsize=9)
        if axes.get_lines():
            axes.legend(fontsize=8, loc="lower left")
        else:
            axes.text(0.5, 0.5, "nothing fits", ha="center", transform=axes.transAxes)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("tokens a second of a GPU, at best")
    figure.suptitle(f"{planned.model}, {planned.setup.parallel}: dashed: scaling without loss", fontsize=10)
    save(figure, path)
    plt.close(figure)
