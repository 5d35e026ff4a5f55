"""A prediction of a grid against predictions of its points."""

from typing import Any

import numpy as np
import pytest

from perfmodel.prediction.predict import Prediction, predict


def figures(p: Prediction) -> dict[str, Any]:
    """All numbers of a prediction under flat names, but those of a pipeline's ranks, which a grid does not have."""
    flat: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}", inner)
        else:
            flat[path] = value

    for key, value in p.as_dict().items():
        if key not in ("model", "device", "method", "setup", "notes", "periodic", "choices", "pipeline"):
            walk(key, value)
    return flat


def check_every_point(model: Any, shape: tuple[int, ...], whole: Prediction, setups: Any, **machine: Any) -> None:
    """A prediction of a grid has at each point what predicting `setups(point)`, a setup and a method, gives alone.

    Args:
        machine: device and host, if others than the grid's own device and its host.
    """
    machine = {"device": whole.device, **machine}
    grid = {name: np.asarray(value) for name, value in figures(whole).items()}
    for at in np.ndindex(shape):
        setup, method = setups(at)
        alone = figures(predict(model, method, setup, **machine))
        for name, value in alone.items():
            got = np.broadcast_to(grid[name], shape)[at]
            if isinstance(value, float):
                assert got == pytest.approx(value, rel=1e-9), (name, setup, method.spec())
            else:
                assert got == value, (name, setup, method.spec())
