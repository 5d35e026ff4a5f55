"""The kernels behind one call: how many, how many bytes each moves, and what that costs, recomputed by hand."""

from typing import Any

import pytest

from perfmodel.calls import costs
from perfmodel.devices import kernels, price, profile
from perfmodel.prediction.predict import predict
from perfmodel.program.op import STRIDED, Attrs, Op, Spec
from perfmodel.setup import Setup
from perfmodel.tape.core import Tape, new_tensor, recording
from perfmodel.tape.gather import top_values
from perfmodel.tape.linalg import bmm, matmul
from perfmodel.tape.shape import transpose
from perfmodel.tape.spectrum import fft_of_real, inverse_fft2, inverse_fft_of_real
from perfmodel.tape.tensor import Tensor

L40S = profile.load("l40s")
FLOOR = L40S.pointwise.launch_floor + L40S.pointwise.kernel_gap


def recorded(*shape: int, dtype: str, call: object) -> Op:
    """The last op that a call records on a tensor of some shape."""
    tape = Tape("cuda", "8.9", autocast=None)
    with recording(tape), tape.no_grad():
        part = tape.begin("test", "forward")
        call(new_tensor(shape, dtype))  # type: ignore[operator]
    return next(op for op in reversed(part.ops) if not op.view)


def seconds(op: Op) -> float:
    return float(price.durations([op], L40S)[0])


@pytest.mark.parametrize(
    "method", ["lora", "vblora", "fourierft", "c3a:block_size=64", "paca", "ia3", "trainable_tokens"]
)
def test_the_bytes_of_a_call_are_divided_among_as_many_kernels_as_it_launches(method: str) -> None:
    """Two places count kernels, one for the total and one for the price: they must not drift apart."""
    step = predict("llama-3.2-1b", method, Setup(batch=2, seq=64), "l40s").step
    assert step is not None
    for _, op, _ in step.ops():
        if op.view or costs.kind(op) in ("gemm", "attention", "solver"):
            continue
        launched = sum(k.launches for k in kernels.memory_bound(op))
        assert launched == costs.kernels(op), op


@pytest.mark.parametrize(("length", "again"), [(1024, 0), (1025, 1)])
def test_softmax_backward_multiplies_in_a_kernel_of_its_own(length: int, again: int) -> None:
    """SoftMax.cu: the gradient times the result goes through memory; an RTX 2080 Ti's profile shows both kernels.

    Rows of at most 1,024 elements are read once, longer ones again after their sum.
    """
    x = Spec("fp32", (8, length))
    op = Op("_softmax_backward_data", (x, x), (x,), 2 * x.nbytes, x.nbytes)
    assert costs.kernels(op) == 2
    found = [(k.launches, k.read, k.written) for k in kernels.memory_bound(op)]
    assert found == [(1, 2 * x.nbytes, x.nbytes), (1, (2 + again) * x.nbytes, x.nbytes)]
    log = kernels.memory_bound(Op("_log_softmax_backward_data", (x, x), (x,), 2 * x.nbytes, x.nbytes))
    assert [(k.launches, k.read, k.written) for k in log] == [(1, (2 + again) * x.nbytes, x.nbytes)]


def test_logsumexp_passes_over_whole_rows() -> None:
    """Its result has one number a row: taken for the row, all rows fell to one thread block: 281 ms, not 8.6.

    1,023 x 256,000 numbers: read for the largest, read and written for differences and for exponentials, read for the
    sums: 6 passes over 1.05 GB, at no less than half and no more than all of 864 GB/s.
    """
    x, out = Spec("fp32", (1023, 256_000)), Spec("fp32", (1023,))
    op = Op("logsumexp", (x,), (out,), x.nbytes, out.nbytes, attrs=Attrs(dims=(1,)))
    assert sum(k.launches for k in kernels.memory_bound(op)) == costs.kernels(op)
    assert 6 * x.nbytes / 864e9 < seconds(op) < 2 * 6 * x.nbytes / 864e9


def test_a_transform_passes_over_its_array_once_a_dim_and_once_to_scale() -> None:
    """ifft2 of 3072 x 3072 complex numbers: three kernels that read and write 75.5 MB, too much for 96 MiB of L2.

    From DRAM at stream · 864 GB/s: 3 · 151 MB / 0.735 TB/s = 616 µs; a part of it still hits L2.
    """
    op = recorded(3072, 3072, dtype="c64", call=inverse_fft2)
    assert costs.kernels(op) == 3
    dram = 3 * 2 * 3072**2 * 8 / (L40S.pointwise.stream * 864e9)
    assert 0.7 * dram < seconds(op) < dram + 3 * FLOOR


def test_a_real_transform_is_mirrored() -> None:
    """cuFFT gives half the spectrum of a real input; PyTorch scales the half and fills in the conjugates."""
    assert costs.kernels(recorded(8, 64, dtype="fp32", call=fft_of_real)) == 2
    assert costs.kernels(recorded(8, 64, dtype="fp32", call=inverse_fft_of_real)) == 3
    long = recorded(8, 2**20, dtype="fp32", call=fft_of_real)
    assert costs.kernels(long) == 3  # too long for shared memory: two passes


def test_operands_without_a_contiguous_dim_are_copied_before_cublas() -> None:
    """x[b, n, k] read with k, its last dim, as the batch, as C³A's einsum does: cuBLAS takes no such strides."""

    def product(x: Tensor) -> Tensor:
        frequency_first = transpose(transpose(x, 1, 2), 0, 1)  # (k, b, n), n at stride k
        return bmm(frequency_first, new_tensor((64, 48, 48), "c64"))

    copied = recorded(876, 48, 64, dtype="c64", call=product)
    plain = recorded(64, 876, 48, dtype="c64", call=lambda x: bmm(x, new_tensor((64, 48, 48), "c64")))
    assert (costs.kernels(copied), costs.kernels(plain)) == (2, 1)
    nbytes = 876 * 48 * 64 * 8
    (copy,) = kernels.operand_copies(copied)
    assert (copy.read, copy.written) == (nbytes, nbytes)
    assert copy.spread == (32 / 8 + 1) / 2  # a sector of 32 B is read for every 8 B, and written densely
    assert seconds(copied) - seconds(plain) > 2 * nbytes / (L40S.pointwise.l2_ratio * L40S.pointwise.stream * 864e9)


@pytest.mark.parametrize(("sizes", "batch"), [((5, 2, 3), (2, 5, 3)), ((5, 2, 6, 3), (10, 6, 3))])
def test_scattered_rows_meet_a_frozen_matrix_once_for_each_batch(
    sizes: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    """ATen folds a batch into the rows of one product only where that copies nothing (`should_fold`)."""
    op = recorded(*sizes, dtype="fp32", call=lambda x: matmul(transpose(x, 0, 1), new_tensor((3, 4), "fp32")))
    assert (op.name, [spec.shape for spec in op.inputs]) == ("bmm", [batch, (batch[0], 3, 4)])


def test_a_batch_of_fp32_products_is_not_split() -> None:
    """GraLoRA's (2, 876, 1536)·(2, 1536, 32): 14 tiles of 128 x 128 on 142 SMs, each summing 1536 elements of k alone.

    2 · 128 · 128 · 1536 FLOPs at 91.6 TFLOP/s / 142 = 78 µs, where a single product may split k and take a third.
    """
    op = recorded(2, 876, 1536, dtype="fp32", call=lambda x: bmm(x, new_tensor((2, 1536, 32), "fp32")))
    assert 78e-6 < seconds(op) < 2 * 78e-6


def test_single_elements_drag_sectors_and_rows_do_not() -> None:
    """A gather of fp32 elements moves 32 B for each; a gather of rows of 1 KiB moves what it reads."""
    table, indices = Spec("fp32", (4096, 4096)), Spec("i64", (1000,))
    rows = Op("index_select", (table, indices), (Spec("fp32", (1000, 4096)),), 0, 0)
    elements = Op("index.Tensor", (table, indices, indices), (Spec("fp32", (1000,)),), 0, 0)
    small = Op("index.Tensor", (Spec("fp32", (256,)), indices), (Spec("fp32", (1000,)),), 0, 0)
    assert kernels.memory_bound(rows)[0].spread == 1
    assert kernels.memory_bound(elements)[0].spread == (8 + 1) / 2
    assert kernels.memory_bound(small)[0].spread == 1  # all of it lies in cache


def test_calls_on_many_tensors_launch_as_often_as_they_have_to() -> None:
    """`cat` takes 128 contiguous tensors into a launch and 64 others; `block_diag` copies block by block."""
    number, matrix = Spec("fp32", ()), Spec("fp32", (8, 8))

    def launched(name: str, one: Spec, count: int, **options: Any) -> Any:
        return costs.kernels(Op(name, (one._replace(copies=count),), (Spec("fp32", (1,)),), 0, 0, **options))

    assert [launched("stack", number, n) for n in (1, 128, 129, 300)] == [1, 1, 2, 3]
    assert [launched("cat", matrix, n, attrs=STRIDED) for n in (64, 65)] == [1, 2]
    assert launched("block_diag", matrix, 12) == 13
    assert costs.kernels(Op("cat", (number, number), (Spec("fp32", (2,)),), 0, 0)) == 1


def test_a_padded_tensor_is_filled_before_it_is_copied() -> None:
    """ATen's `constant_pad_nd`: `empty`, `fill_` with the value, then a copy into the inner part."""
    x, padded = Spec("bf16", (4, 512)), Spec("bf16", (4, 513))
    assert costs.kernels(Op("constant_pad_nd", (x,), (padded,), x.nbytes, padded.nbytes)) == 2


def test_selection_and_accumulation_are_chains_of_small_kernels() -> None:
    """VB-LoRA's topk: 16 digits of 2 bits and 2 collections, one after the other; its gradient sorts the indices."""
    top = recorded(48, 256, dtype="fp32", call=lambda x: top_values(x, 2))
    assert costs.kernels(top) == 2
    assert seconds(top) > 18 * L40S.pointwise.serial_latency
    zeros, indices, values = Spec("fp32", (256, 256)), Spec("i64", (48, 2)), Spec("fp32", (48, 2, 256))
    put = Op("index_put", (zeros, indices, values), (zeros,), 0, 0, attrs=Attrs(accumulate=True))
    assert costs.kernels(put) == 6
    assert seconds(put) > 6 * FLOOR
    summed = kernels.memory_bound(put)[-1]  # values are read and added to the places that they fall on
    assert (summed.read, summed.written) == (values.nbytes + zeros.nbytes, zeros.nbytes)
    assert costs.kernels(Op("index_put", (zeros, indices, values), (zeros,), 0, 0)) == 2


def test_the_tape_says_which_gradients_accumulate() -> None:
    """Rows taken twice get the sum of both gradients, which needs the sort; plain assignments do not."""
    step = predict("llama-3.2-1b", "vblora", Setup(batch=2, seq=64), "l40s").step
    assert step is not None
    puts = [op for _, op, _ in step.ops() if op.name == "index_put"]
    assert puts
    assert all(op.attrs.accumulate for op in puts)
