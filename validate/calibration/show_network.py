"""What `perfmodel calibrate --network` prints, in the first process alone."""

from perfmodel import units
from perfmodel.report.plain import print_json, show, table

from ..measuring.team import end, leave
from ..quiet import without_warnings_of_packages
from .network import calibrate_network


def show_network_calibration(device: str, name: str, *, seconds: float, as_json: bool) -> None:
    """Calibrate, print what came of it, and end this process of the group.

    Raises:
        UserError: as `calibrate_network`, before there is a group.
    """
    without_warnings_of_packages()
    done = calibrate_network(device, name, seconds=seconds)
    if done is not None:
        errors = {kind: fit.errors.rounded() for kind, fit in done.fits.items()}
        if as_json:
            print_json({"name": name, "node": str(done.path), "blocks": errors})
        else:
            columns = ("collective", "rows", "mean error", "median", "p90", "plain line")
            cells = (
                (kind, e["rows"], *(units.percent(e[k], 1) for k in ("mean", "median", "p90", "line_mean")))
                for kind, e in errors.items()
            )
            show(table(columns, cells, title="on message sizes that the fit did not see"))
            show(f"\n{done.path}\nuse it with --node {name}")
    leave()
    end(False)
