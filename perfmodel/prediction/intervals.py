"""90 % intervals of times and ratios from the residuals of the price models.

A step's time is a sum over components (GEMMs by precision, attention, memory-bound kernels, optimizer, waiting for the
host), each priced by one model whose relative error on rows that no fit saw is known. Within a component the error is
taken as common, between components as independent; one more term stands for what no component explains. In a ratio of
two steps on one device a component's error cancels as far as both steps have the same share of it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..devices.profile import CUDNN_ATTENTION, DeviceProfile

Components = Mapping[str, Any]  # component -> seconds
Devices = tuple[DeviceProfile, ...]  # answered together: their figures are columns beside those of a grid

BUBBLE = "bubble"  # the component in which a stage of a pipeline waits for others: their work is like its own
COLLECTIVE = "collective"  # the component of what GPUs exchange: seconds in which nothing else runs beside it

OFFLOAD = "offload"  # that of copies over the bus, and of the host's cores, likewise

Z90 = 1.645  # two-sided 90 % of a normal distribution
SIGMA_OF_MEAN = 1.2533  # standard deviation of a normal error whose mean absolute value is 1: sqrt(pi / 2)

# Relative standard deviations, 0.25 for 25 %, where no residuals tell. Four have no source: they were judged, from no
# measurement, when what they stand for was written, and fitted to nothing since. What speaks for them is how many
# published steps lie in the intervals that they widen (`perfmodel validate published`, docs/limits.md).
HOST = 0.25  # of the host's time: its CPU is rarely known
OFFLOADED = 0.3  # of offloading: hosts differ in memory, in cores, in what else they do
SOLVER = 0.5  # of dense decompositions: a factor of 2.3 at 90 %, published ones lie within 2 (devices/solver.py)
UNEXPLAINED = 0.05  # of a step beyond its components (clocks, allocator, data loading)
UNEXPLAINED_RATIO = 0.02  # the same for the ratio of two steps measured on one machine

# component -> block of a device profile whose residuals it has; attention: cuDNN's where PyTorch prefers that
_BLOCK = {
    "gemm16": "gemm.bf16", "gemm32": "gemm.fp32", "attention": "attention", "memory": "pointwise",
    "optimizer": "pointwise", BUBBLE: "gemm.bf16",
}  # fmt: skip


def of_each(on: DeviceProfile | Devices, figure: Callable[[DeviceProfile], float]) -> Any:
    """A figure of one device, or of several as a column, shape (devices, 1)."""
    return figure(on) if isinstance(on, DeviceProfile) else np.array([[figure(device)] for device in on])


def priced_by(component: str, profile: DeviceProfile) -> str | None:
    """The block of a device profile that prices a component, if one does."""
    if component == "attention" and CUDNN_ATTENTION in profile.residuals:
        return CUDNN_ATTENTION
    return _BLOCK.get(component)


def sigma(component: str, on: DeviceProfile | Devices) -> Any:
    """Relative standard deviation of one component on a device, or on each of several."""
    return of_each(on, partial(_sigma, component))


def _sigma(component: str, profile: DeviceProfile) -> float:
    if component == "host":
        return HOST
    if component == "solver":
        return SOLVER
    if component == OFFLOAD:
        return OFFLOADED
    if component == COLLECTIVE:
        return SIGMA_OF_MEAN * profile.network.sigma if profile.network is not None else 0.0
    block = priced_by(component, profile)
    assert block is not None
    return SIGMA_OF_MEAN * profile.residuals[block]["mean"]


def step_sigma(components: Components, total: Any, on: DeviceProfile | Devices) -> Any:
    """Relative standard deviation of a step's time."""
    variance = sum((sigma(c, on) * t / total) ** 2 for c, t in components.items())
    return np.sqrt(variance + UNEXPLAINED**2)


def ratio_sigma(a: Components, a_total: Any, b: Components, b_total: Any, on: DeviceProfile | Devices) -> Any:
    """Relative standard deviation of the ratio of two steps on one device, or on each of several."""
    names = sorted({*a, *b})  # in one order, so that every process adds up alike
    shares = {c: a.get(c, 0.0) / a_total - b.get(c, 0.0) / b_total for c in names}
    variance = sum((sigma(c, on) * share) ** 2 for c, share in shares.items())
    return np.sqrt(variance + UNEXPLAINED_RATIO**2)


def interval_bounds(center: Any, relative_sigma: Any) -> tuple[Any, Any]:
    """The 90 % interval of a positive figure with a log-normal error."""
    factor = np.exp(Z90 * relative_sigma)
    return center / factor, center * factor


def component(kind: str, dtype: str) -> str:
    """The component of an op, from `costs.kind` and the dtype of its operands."""
    if kind == "gemm":
        return "gemm32" if dtype in ("fp32", "c64") else "gemm16"
    return kind if kind in ("attention", "optimizer", "solver", COLLECTIVE, OFFLOAD) else "memory"
