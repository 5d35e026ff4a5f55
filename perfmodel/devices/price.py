"""The price of every op of a part on a device, in seconds.

Ops are sorted into tables by the model that prices them (GEMM, attention, memory-bound kernels, lists of an optimizer),
and each table is priced in one vectorised call, over the whole grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from .. import costs
from ..tape.core import Op
from ..tape.dims import product
from ..tape.dtypes import ITEMSIZE
from . import kernels
from .attention import attention_backward_time, attention_forward_time
from .gemm import gemm_time
from .packages import gemm_shape
from .pointwise import pointwise_time
from .profile import DeviceProfile
from .solver import solver_time

Row = tuple[Any, ...]  # a model's arguments, each an int or an array over the grid


@dataclass
class _Table:
    """Rows of one model, by what must be equal within a call; equal rows are priced once for all their ops."""

    rows: dict[Any, dict[Row, tuple[Row, list[int]]]] = field(default_factory=dict)

    def add(self, key: Any, i: int, row: Row, equal: Row) -> None:
        """A row of op `i`; rows with the same `equal` have the same price."""
        self.rows.setdefault(key, {}).setdefault(equal, (row, []))[1].append(i)


class _Tables:
    """The tables of all models."""

    def __init__(self) -> None:
        self.gemm, self.attention, self.solver, self.bus, self.memory = (_Table() for _ in range(5))
        self.arrays: dict[Any, list[np.ndarray]] = {}

    def add(self, table: _Table, key: Any, i: int, *row: Any) -> None:
        """Put a row of op `i` into a table."""
        table.add(key, i, row, tuple(x if not isinstance(x, np.ndarray) else self._token(x) for x in row))

    def _token(self, x: np.ndarray) -> Any:
        """What stands for an array's values: computing the same dim twice makes two arrays."""
        key = (x.shape, x.flat[0], x.flat[-1], x.sum())
        known = self.arrays.setdefault(key, [])
        for n, other in enumerate(known):
            if x is other or np.array_equal(x, other):
                return key, n
        known.append(x)
        return key, len(known) - 1


BUS = (
    10e9  # B/s of copies between pageable host memory and the device: PCIe 4.0 x16 through the driver's staging buffer
)


def durations(ops: Sequence[Op], profile: DeviceProfile) -> np.ndarray:
    """Device seconds of each op, shape (ops, *grid); 0 for views and for work on host tensors."""
    if profile.kind == "cpu":
        return _cpu(ops, profile)
    tables = _Tables()
    for i, op in enumerate(ops):
        if not op.view and "host" not in op.attrs:
            _sort(i, op, tables)
    priced: list[tuple[list[list[int]], np.ndarray]] = []
    models = (
        (_gemm, tables.gemm), (_attention, tables.attention), (_solver, tables.solver), (_bus, tables.bus),
        (_memory, tables.memory),
    )  # fmt: skip
    for model, table in models:
        for key, rows in table.rows.items():
            seconds = _price([row for row, _ in rows.values()], partial(model, profile, *key))
            priced.append(([index for _, index in rows.values()], seconds))
    grid = np.broadcast_shapes(*(seconds.shape[1:] for _, seconds in priced)) if priced else ()
    total = np.zeros((len(ops), *grid))
    for indices, seconds in priced:
        for index, of_row in zip(indices, seconds, strict=True):
            for i in index:
                total[i] += of_row
    return total


def _price(rows: list[Row], model: Callable[..., np.ndarray]) -> np.ndarray:
    """Stack the rows' arguments to arrays of shape (rows, *grid) and price them at once."""
    columns = list(zip(*rows, strict=True))
    shapes = {x.shape for column in columns for x in column if isinstance(x, np.ndarray)}
    grid = np.broadcast_shapes(*shapes) if shapes else ()
    return np.asarray(model(*(_stacked(column, grid) for column in columns)))


def _stacked(column: tuple[Any, ...], grid: tuple[int, ...]) -> np.ndarray:
    if not grid:
        return np.array(column, dtype=np.float64)
    stacked = np.empty((len(column), *grid))
    for i, x in enumerate(column):
        stacked[i] = x
    return stacked


def _sort(i: int, op: Op, tables: _Tables) -> None:
    """Put one op into the table of its model; an op of several kernels gets several rows."""
    name, inputs = op.name, op.inputs
    if name in costs.GEMMS:
        dtype = inputs[0].dtype
        layout, m, n, k, batch = gemm_shape(op)
        if dtype == "c64":  # four real products: [Re A, -Im A; Im A, Re A] by [Re B; Im B]
            dtype, m, k = "fp32", 2 * m, 2 * k
        tables.add(tables.gemm, (name, dtype, layout), i, m, n, k, batch)
        _launch(i, kernels.operand_copies(op), tables)
    elif "attention" in name or "flash_attn" in name:
        backward = name.endswith("_backward")
        q, k = inputs[1:3] if backward else inputs[:2]
        heads = 2 if "flash_attn" in name else 1  # the flash-attn package puts the sequence first
        seq = 3 - heads
        sizes = (q.shape[0], q.shape[seq], k.shape[seq], q.shape[heads], k.shape[heads], q.shape[3])
        causal = bool(op.attrs and op.attrs[0])
        tables.add(tables.attention, ("cudnn" in name, backward, causal, q.dtype), i, *sizes)
    elif "bus" in op.attrs:
        tables.add(tables.bus, (), i, op.outputs[0].nbytes)
    elif name in costs.SOLVERS:
        *batch, rows, columns = inputs[0].shape
        tables.add(tables.solver, (name,), i, product(tuple(batch)), rows, columns)
    else:
        _launch(i, kernels.memory_bound(op), tables)


def _launch(i: int, launched: list[kernels.Kernel], tables: _Tables) -> None:
    for kind, *row in launched:
        tables.add(tables.memory, (kind,), i, *row)


def _gemm(profile: DeviceProfile, name: str, dtype: str, layout: Any, *shape: Any) -> np.ndarray:
    """A weight comes from HBM, an activation may still lie in L2; weight gradients and bmm have two activations.

    cuBLAS splits the k of no batch in fp32: of the 9,343 that NeuSight profiled (https://github.com/sitar-lab/NeuSight)
    none ran a sliced or split kernel, while of its single products those with few tiles did.
    """
    two_activations = name == "bmm" or layout == "nt"
    price = partial(
        gemm_time, *shape, hardware=profile.hardware, dtype=dtype, layout=layout,
        accumulate=name in ("addmm_", "addmm.out"), b_copies=1.0 if two_activations else np.inf,
    )  # fmt: skip
    parameters = profile.gemm[dtype]
    seconds = price(parameters=parameters)
    if name == "bmm" and dtype == "fp32":
        whole = price(parameters=replace(parameters, max_split=1))
        seconds = np.where(np.greater(shape[-1], 1), whole, seconds)
    return np.asarray(seconds)


def _attention(
    profile: DeviceProfile, cudnn: bool, backward: bool, causal: bool, dtype: str, *shape: Any
) -> np.ndarray:
    model = attention_backward_time if backward else attention_forward_time
    parameters = profile.cudnn_attention if cudnn else profile.attention
    return np.asarray(model(*shape, hardware=profile.hardware, parameters=parameters, causal=causal, dtype=dtype))


def _bus(profile: DeviceProfile, nbytes: Any) -> np.ndarray:
    return np.asarray(nbytes / BUS)


def _solver(profile: DeviceProfile, name: str, *shape: Any) -> np.ndarray:
    return solver_time(name, *shape, hardware=profile.hardware)


def _memory(profile: DeviceProfile, kind: str, *columns: Any) -> np.ndarray:
    """Memory-bound kernels; several launches pay the floor of each, and `spread` is what every byte costs."""
    launches, read, written, elements, rows, length, spread = columns
    p = profile.pointwise
    floor = p.launch_floor + p.kernel_gap
    row_wise = kind in ("norm", "norm_backward", "softmax", "embedding", "cross_entropy", "fused_norm")
    seconds = pointwise_time(
        read, written, hardware=profile.hardware, parameters=p, kind=kind, elements=elements,
        rows=rows if row_wise else None,
        row_elements=length if row_wise or kind == "fused_norm_backward" else None,
    )  # fmt: skip
    if kind == "serial":  # its steps wait for one another, however many bytes each moves
        return np.asarray(seconds + (launches - 1) * floor)
    return np.asarray((seconds - floor) * spread + launches * floor)


CPU_EFFICIENCY = 0.7  # of the peaks; a calibrated profile replaces it


def _cpu(ops: Sequence[Op], profile: DeviceProfile) -> np.ndarray:
    """A plain roofline for CPUs, until a calibration gives better."""
    seconds = []
    for op in ops:
        if op.view or "host" in op.attrs:
            seconds.append(np.float64(0.0))
            continue
        dtype = op.inputs[0].dtype if op.inputs else "fp32"
        compute = costs.flops(op) / profile.hardware.peak(dtype if dtype in ITEMSIZE else "fp32")
        memory = (op.bytes_read + op.bytes_written) / profile.hardware.memory_bandwidth
        seconds.append(np.maximum(compute, memory) / CPU_EFFICIENCY)
    return np.stack(np.broadcast_arrays(*seconds)) if seconds else np.zeros(0)
