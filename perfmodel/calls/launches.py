"""How many CUDA kernels a call launches where its row alone does not say: lists, transforms, copied operands."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from ..program.dims import Dim
from ..program.formulas import Formula
from ..program.op import PLAIN, Op, Spec
from ..program.software import LONG_ARGUMENTS
from .table import row

# index_put that accumulates (Indexing.cu): remainder, stride, division and range of the indices, sort, sums.
_KERNELS_OF_ACCUMULATION = 6

# cuFFT keeps a transform in shared memory up to so many complex points of 8 B, the usual 48 KiB less bookkeeping; a
# longer one is factored into two passes (VkFFT, https://doi.org/10.1109/ACCESS.2023.3242240, section on memory layout).
_FFT_ON_CHIP = 4096

# MultiTensorApply.cuh: tensors and 65,536-element chunks that fit one launch of 4 KiB of arguments, by number of tensor
# lists; of 32 KiB in newer builds, which hold `LONG_ARGUMENTS` times as many (`SoftwareStack.list_room`).
_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
_TENSORS_PER_SCALAR_LIST = {1: 96, 3: 48}
_BLOCKS_PER_LAUNCH = 320
_CHUNK = 65_536
_NORMS_PER_CLEANUP = 400  # ForeachReduceOp.cu
_LISTS = {
    "_foreach_mul_.Scalar": 1, "_foreach_mul_.Tensor": 1, "_foreach_add_.Scalar": 1, "_foreach_div_.ScalarList": 1,
    "_foreach_lerp_.Scalar": 2, "_foreach_sqrt": 2, "_foreach_add_.List": 2, "_foreach_norm.Scalar": 1,
    "_foreach_div.Scalar": 2, "_foreach_sqrt_": 1, "_foreach_div_.List": 2, "_foreach_sub_.List": 2,
    "_foreach_addcmul_.Scalar": 3, "_foreach_addcdiv_.ScalarList": 3, "_foreach_addcdiv_.Scalar": 3,
    "_fused_adamw_": 4, "_foreach_copy_": 2,
}  # fmt: skip
# Shape.cu: inputs of one launch; half as many where they are not contiguous, which takes their strides along.
_JOINED = {"cat": 128, "stack": 128}


def kernels(op: Op) -> Dim:
    """CUDA kernels that one call launches; 0 for views, for work on host tensors and for copies over the bus."""
    if op.view:
        return 0
    known, attrs = row(op.name), op.attrs
    if attrs is not PLAIN:
        if attrs.host or attrs.bus or attrs.cores:
            return 0
        if attrs.routing is not None and attrs.sync:  # a product for each expert that is hit
            return sum(product.batch for product in known.products(op)) if known.products else 1
        if known.work == "product":
            return 1 + len(attrs.copied)
        if known.work == "transform":
            return _fft_kernels(op)
        if attrs.accumulate:
            return _KERNELS_OF_ACCUMULATION
    if op.name in _LISTS:
        if op.launches is None:
            op.launches = _kernels_on_lists(op)
        return op.launches
    if op.name in _JOINED:
        return -(-sum(s.copies for s in op.inputs) // (_JOINED[op.name] // (2 if attrs.strided else 1)))
    if op.name == "block_diag":  # zeros, then block by block
        return 1 + sum(s.copies for s in op.inputs)
    return known.launches


def launch_for(op: Op, room: int) -> None:
    """Let a call on lists launch where a launch takes `room` times as much as in 4 KiB; by itself it is in 32 KiB."""
    if op.name in _LISTS:
        op.launches = _kernels_on_lists(op, room)


def _kernels_on_lists(op: Op, room: int = LONG_ARGUMENTS) -> Dim:
    limits = _TENSORS_PER_SCALAR_LIST if op.name.endswith("ScalarList") else _TENSORS_PER_LAUNCH
    if op.name == "_foreach_norm.Scalar":  # partial norms of chunks, then a cleanup
        return _launches(op.inputs, limits[1], room) + -(-sum(s.copies for s in op.inputs) // _NORMS_PER_CLEANUP)
    results = op.outputs[: len(op.outputs) // 4] if op.name == "_fused_adamw_" else op.outputs
    return _launches(results, limits[_LISTS[op.name]], room)


def _fft_kernels(op: Op) -> Dim:
    """Passes of a transform, one scaling if it is normalised, one that mirrors the half spectrum of a real input."""
    out = op.outputs[0].shape
    passes = sum(1 + np.greater(out[dim], _FFT_ON_CHIP) for dim in op.attrs.dims or range(len(out)))
    return passes + op.attrs.scaled + mirrors(op)


def mirrors(op: Op) -> bool:
    """Whether a transform of real numbers is asked for the whole spectrum."""
    return op.name == "_fft_r2c" and not op.attrs.half


def _launches(tensors: tuple[Spec, ...], limit: int, room: int) -> Dim:
    """Launches of `multi_tensor_apply`: a launch is full at `limit` tensors or so many chunks, `room` times over."""
    chunks = [-(-s.numel // _CHUNK) for s in tensors]
    copies = [s.copies for s in tensors]
    varies = next((n for n in chunks if type(n) is Formula), None)
    if varies is not None:
        return varies.of.of_list(lambda at: _packed(tuple(zip(at, copies, strict=True)), limit, room), chunks)
    if not any(isinstance(n, np.ndarray) for n in chunks):
        return _packed(tuple(zip(chunks, copies, strict=True)), limit, room)
    points, where = _distinct({id(n): n for n in chunks if isinstance(n, np.ndarray)}.values())
    columns = np.broadcast_arrays(*(n.reshape(-1)[points] if isinstance(n, np.ndarray) else [n] for n in chunks))
    points_of = np.stack(columns, axis=1).tolist()
    return np.array([_packed(tuple(zip(point, copies, strict=True)), limit, room) for point in points_of])[where]


def _distinct(arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One point of a grid for each combination of values that arrays take over it; which of them a point has."""
    code: Any = 0
    for array in arrays:
        values, index = np.unique(array, return_inverse=True)
        _, code = np.unique(code * len(values) + index, return_inverse=True)
    return np.unique(code, return_index=True)[1], code


@lru_cache(maxsize=4096)
def _packed(tensors: tuple[tuple[int, int], ...], limit: int, room: int) -> int:
    """Launches for tensors given as (chunks, copies): the lists of one step are packed again and again.

    Neighbours of as many copies are those of the layers of a run: they come layer by layer.
    """
    launches = slots = blocks = 0
    for copies, layer in groupby(tensors, itemgetter(1)):
        for chunks, _ in list(layer) * copies:
            filled, blocks = divmod(blocks + chunks, _BLOCKS_PER_LAUNCH * room)
            launches += filled
            # after a launch the tensor in progress keeps a slot, if chunks of it remain
            slots = int(blocks > 0) if filled else slots + 1
            if slots == limit * room:
                launches, slots, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)
