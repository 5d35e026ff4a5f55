"""One account of a call: every name has one row, and what has none is said aloud."""

from typing import Any

import numpy as np
import pytest
from helpers import METHODS, NAMES, step_of

from perfmodel import predict
from perfmodel.calls import costs
from perfmodel.calls.products import Product, convolution
from perfmodel.calls.table import ROWS, WORKS, row, rows
from perfmodel.devices import cpu_work, kernels, profile
from perfmodel.devices import host as hosts
from perfmodel.passes import lowering
from perfmodel.prediction.predict import of_step
from perfmodel.program.lengths import Documents, lengths_of
from perfmodel.program.op import Attrs, Op, Spec


@pytest.mark.parametrize("name", NAMES)
def test_every_call_of_the_tape_has_a_row(name: str) -> None:
    """A call without one would be priced as streaming in silence."""
    for method in METHODS:
        for _, op, _ in step_of(name, method).ops():
            assert costs.is_known(op), op


def test_rows_and_those_who_read_them_speak_of_the_same_works() -> None:
    """A map that names a work which no row has prices nothing."""
    assert {known.work for known in ROWS.values()} <= set(WORKS)
    for told in (cpu_work.KIND_OF, kernels._RULES, costs.KINDS, kernels.MOVING):
        assert set(told) <= set(WORKS)
    assert set(WORKS) >= lowering.POINTWISE | lowering.ARRANGING
    assert all(known.why for known in ROWS.values() if known.launches != 1)


def test_a_second_row_of_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="duplicate registrations for 'mm'"):
        rows("stream", "mm")


@pytest.mark.parametrize(
    ("name", "work"),
    [("mul_.Tensor", "stream"), ("add_", "stream"), ("scatter.src", "put"), ("sum.dim_IntList", "reduction"),
     ("_foreach_mul_.Scalar", "list"), ("liger::rms_norm", "package"), ("no_such_call", "unknown")],
)  # fmt: skip
def test_a_name_is_found_with_or_without_its_overload(name: str, work: str) -> None:
    assert row(name).work == work


@pytest.mark.parametrize(
    ("dims", "along", "kind"),
    [
        ((1,), True, "reduction"),
        ((0,), False, "column_reduction"),
        ((0, 1), True, "reduction"),
        (None, True, "pointwise"),
    ],
)
@pytest.mark.parametrize("shape", [(8192, 14336), (512, 512)])
def test_what_a_sum_runs_over_is_said_by_its_dims_alone(
    shape: tuple[int, int], dims: tuple[int, ...] | None, along: bool, kind: str
) -> None:
    """`x.sum(-1)` drops a dim, and of a square matrix no shape tells which: GPU, CPU and compiler read one account."""
    kept = tuple(n for i, n in enumerate(shape) if dims is not None and i not in dims)
    x, out = Spec("fp32", shape), Spec("fp32", kept)
    op = Op("sum.dim_IntList", (x,), (out,), x.nbytes, out.nbytes, attrs=Attrs(dims=dims))
    assert costs.along_rows(op) is along
    assert kernels.memory_bound(op)[0].kind == kind
    assert cpu_work.kind_of(op) == ("reduction" if along else "column_reduction")


def test_a_call_without_a_row_is_named_in_the_notes() -> None:
    """It is priced as one streaming kernel, and whoever reads the answer knows."""
    p = predict("gpt2", "lora", device="l40s", seq=16)
    assert p.step is not None
    assert not any("unknown calls" in note for note in p.notes)
    part = p.step.groups[0].parts[1]
    x = Spec("bf16", (64, 64))
    part.ops.append(Op("brand_new_call", (x,), (x,), x.nbytes, x.nbytes))
    on = profile.load("l40s")
    again = of_step(p.step, on, hosts.host_of("default", on))
    assert [note for note in again.notes if "brand_new_call" in note]
    assert again.kernels["total"] == p.kernels["total"] + 1


def test_a_convolution_over_a_grid_of_sizes_is_those_of_its_sizes() -> None:
    """A model with convolutions had no crossover: its sizes were made one number."""
    lengths = np.array([16, 64])

    def found(seq: Any) -> Product:
        x, w = Spec("bf16", (2, 64, seq)), Spec("bf16", (64, 1, 3))
        return convolution(Op("convolution", (x, w), (x,), 0, 0))[0]

    together = found(lengths)
    for i, seq in enumerate(lengths):
        alone = found(int(seq))
        assert [int(np.broadcast_to(v, 2)[i]) for v in together[1:]] == list(alone[1:])


@pytest.mark.parametrize("backward", [False, True])
def test_a_window_counts_the_band_that_it_sees(backward: bool) -> None:
    """A step in windows of 4,096 had the FLOPs of the whole square: 126 % of the peak of a B200 at 131,072 tokens."""
    name = "flash_attn::_flash_attn" + ("_backward" if backward else "_forward")
    products, size = (5 if backward else 2), (1, 13, 2, 8)

    def counted(**attrs: Any) -> Any:
        given = tuple(Spec("bf16", size) for _ in range(4 if backward else 3))
        return costs.flops(Op(name, given, given[:1], 1, 1, attrs=Attrs(causal=True, **attrs)))

    def pairs(window: int) -> int:
        return sum(abs(i - j) < window for i in range(13) for j in range(13))

    for window in (1, 5, 13, 4096):  # windows longer than a sequence made it negative
        assert counted(window=window) == products * 2 * 2 * 8 * pairs(window)
    assert counted(window=13) == counted()


def test_packed_documents_have_windows_of_their_own() -> None:
    """Those shorter than it are whole."""
    documents = Documents(lengths_of([3, 13]), 16)
    assert documents.pairs(32) == 2 * (3**2 + 13**2)
    assert documents.pairs(32, 5) == 2 * (3**2 + sum(abs(i - j) < 5 for i in range(13) for j in range(13)))
    assert documents.pairs(32, 16) == documents.pairs(32)
