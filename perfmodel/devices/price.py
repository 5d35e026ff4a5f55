"""The price of every op of a part on a device, in seconds.

Ops are sorted into tables by the model that prices them (GEMM, attention, memory-bound kernels, lists of an optimizer),
and each table is priced in one vectorised call, over the whole grid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import costs
from ..tape.core import Op
from ..tape.dims import product
from . import cpu
from .attention import attention_backward_time, attention_forward_time
from .gemm import gemm_time
from .packages import gemm_shape, memory_bound
from .pointwise import pointwise_time
from .profile import DeviceProfile
from .solver import solver_time
from .tables import Model, Tables

SOFTMAX_IN_REGISTERS = 1024  # longest row that softmax keeps in registers (ATen/native/cuda/PersistentSoftmax.cuh)


BUS = (
    10e9  # B/s of copies between pageable host memory and the device: PCIe 4.0 x16 through the driver's staging buffer
)


def durations(ops: Sequence[Op], profile: DeviceProfile) -> np.ndarray:
    """Device seconds of each op, shape (ops, *grid); 0 for views and for work on host tensors."""
    if profile.cpu is not None:
        return cpu.durations(ops, profile.hardware, profile.cpu)
    tables = Tables()
    for i, op in enumerate(ops):
        if not op.view and "host" not in op.attrs:
            _sort(i, op, tables)
    models: dict[str, Model] = {
        "gemm": _gemm,
        "attention": _attention,
        "solver": _solver,
        "bus": _bus,
        "memory": _memory,
    }
    return tables.seconds(len(ops), {name: partial(model, profile) for name, model in models.items()})


def _sort(i: int, op: Op, tables: Tables) -> None:
    """Put one op into the table of its model; an op of several kernels gets several rows."""
    name, inputs = op.name, op.inputs
    if name in costs.GEMMS:
        dtype = inputs[0].dtype
        layout, m, n, k, batch = gemm_shape(op)
        if dtype == "c64":  # four real products: [Re A, -Im A; Im A, Re A] by [Re B; Im B]
            dtype, m, k = "fp32", 2 * m, 2 * k
        tables.add("gemm", (name, dtype, layout), i, m, n, k, batch)
    elif "attention" in name or "flash_attn" in name:
        backward = name.endswith("_backward")
        q, k = inputs[1:3] if backward else inputs[:2]
        heads = 2 if "flash_attn" in name else 1  # the flash-attn package puts the sequence first
        seq = 3 - heads
        sizes = (q.shape[0], q.shape[seq], k.shape[seq], q.shape[heads], k.shape[heads], q.shape[3])
        causal = bool(op.attrs and op.attrs[0])
        tables.add("attention", ("cudnn" in name, backward, causal, q.dtype), i, *sizes)
    elif "bus" in op.attrs:
        tables.add("bus", (), i, op.outputs[0].nbytes)
    elif name in costs.SOLVERS:
        *batch, rows, columns = inputs[0].shape
        tables.add("solver", (name,), i, product(tuple(batch)), rows, columns)
    else:
        for kind, *row in _memory_bound(op):
            tables.add("memory", (kind,), i, *row)


_WRITE_ONLY = (
    "zeros_like",
    "new_zeros",
    "zero_",
    "uniform_",
    "normal_",
)  # dispatched with a tensor that they do not read


def _memory_bound(op: Op) -> list[tuple[Any, ...]]:
    """(kind, kernels, bytes read, bytes written, elements, rows, elements of a row) of each kernel of an op."""
    kernels = costs.kernels(op)
    if isinstance(kernels, int) and kernels == 0:
        return []
    if "::" in op.name:
        return [memory_bound(op)]
    name, out = op.name, op.outputs[0] if op.outputs else op.inputs[0]
    read, written, n = op.bytes_read, op.bytes_written, out.numel
    if name.startswith(("_foreach", "_fused")):
        if name == "_fused_adamw_":
            read, written = read, written * 3 / 4  # the schema's fourth list, the gradients, is only read
        return [("optimizer", kernels, read, written, n, 1, 1)]
    if name.startswith("bitsandbytes::optimizer"):  # the schema's first output, the gradient, is only read
        return [("optimizer", kernels, read, written - out.nbytes, n, 1, 1)]
    if name == "embedding":
        return [("embedding", 1, written, written, n, _rows(out), out.shape[-1])]
    if name == "embedding_dense_backward":
        grad = op.inputs[0]
        fill = ("pointwise", 1, 0, written, n, 1, 1)
        return [fill, ("embedding", kernels - 1, 2 * grad.nbytes, grad.nbytes, grad.numel, _rows(grad), grad.shape[-1])]
    if name == "native_layer_norm":
        return [("norm", 1, read, written, n, _rows(out), out.shape[-1])]
    if name == "native_layer_norm_backward":
        x = op.inputs[1]
        both = [("norm_backward", 1, 2 * read, x.nbytes, x.numel, _rows(x), x.shape[-1])]
        if len(op.outputs) > 1:
            both.append(("column_reduction", 1, read, x.shape[-1] * 8, x.numel, _rows(x), x.shape[-1]))
        return both
    if name in ("_log_softmax_backward_data", "_softmax_backward_data"):
        first = op.inputs[0].nbytes * (1 if "log" in name else 2)  # summed over the row, then all is read again
        longer = np.greater(out.shape[-1], SOFTMAX_IN_REGISTERS)
        return [("pointwise", 1, read + first * longer, written, n, 1, 1)]
    if "softmax" in name:
        return [("softmax", 1, read, written, n, _rows(out), out.shape[-1])]
    if name in ("sum.dim_IntList", "mean.dim"):
        x = op.inputs[0]
        columns = not _last_is_one(out)
        return [("column_reduction" if columns else "reduction", 1, read, written, x.numel, _rows(x), x.shape[-1])]
    if name == "slice_backward":
        part = op.inputs[0]
        return [("pointwise", 1, 0, written, n, 1, 1), ("strided", 1, read, read, part.numel, 1, 1)]
    if name in ("index.Tensor", "index_put_"):  # only the indexed part of the big operand moves
        moved = out if name == "index.Tensor" else op.inputs[-1]
        return [("strided", kernels, moved.nbytes, moved.nbytes, moved.numel, 1, 1)]
    kind = {"_to_copy": "cast", "cat": "cat", "clone": "strided", "copy_": "pointwise"}.get(name, "pointwise")
    if kind == "pointwise" and "strided" in op.attrs:
        kind = "strided"
    if name in _WRITE_ONLY:
        read = 0
    if name == "nll_loss_backward":
        read = op.inputs[2].nbytes  # one logit a row is touched, and the whole gradient is filled with zeros
    if name == "nll_loss_forward":
        read = 2 * op.inputs[1].nbytes
    return [(kind, kernels, read, written, n, 1, 1)]


def _rows(spec: Any) -> Any:
    return spec.numel // spec.shape[-1] if spec.shape else 1


def _last_is_one(spec: Any) -> bool:
    return not spec.shape or (isinstance(spec.shape[-1], int) and spec.shape[-1] == 1)


def _gemm(profile: DeviceProfile, name: str, dtype: str, layout: Any, *shape: Any) -> np.ndarray:
    """A weight comes from HBM, an activation may still lie in L2; weight gradients and bmm have two activations."""
    m, n, k, batch = shape
    two_activations = name == "bmm" or layout == "nt"
    accumulates = name in ("addmm_", "addmm.out")
    return np.asarray(
        gemm_time(
            m, n, k, batch,
            hardware=profile.hardware, parameters=profile.gemm[dtype], dtype=dtype, layout=layout,
            accumulate=accumulates, b_copies=1.0 if two_activations else np.inf,
        )
    )  # fmt: skip


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
    """Memory-bound kernels; an op of several launches pays the floor of each."""
    kernels, read, written, elements, rows, length = columns
    p = profile.pointwise
    row_wise = kind in ("norm", "norm_backward", "softmax", "embedding", "cross_entropy", "fused_norm")
    seconds = pointwise_time(
        read, written, hardware=profile.hardware, parameters=p, kind=kind, elements=elements,
        rows=rows if row_wise else None,
        row_elements=length if row_wise or kind == "fused_norm_backward" else None,
    )  # fmt: skip
    return np.asarray(np.asarray(seconds) + (kernels - 1) * (p.launch_floor + p.kernel_gap))


MODELS: dict[str, Model] = {
    "gemm": _gemm, "attention": _attention, "solver": _solver, "bus": _bus, "memory": _memory,
}  # fmt: skip
