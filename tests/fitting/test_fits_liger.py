"""How Liger's benchmark rows are read: kernels with their bytes, against closed forms and against the tape."""

from collections.abc import Callable
from typing import Any

import pytest

from perfmodel.architectures.rotary import rotate, rotate_half
from perfmodel.tape import nn, pointwise
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.tensor import Parameter, Tensor

liger = pytest.importorskip("validate.fitting.liger", exc_type=ImportError)
sequences = pytest.importorskip("validate.fitting.sequences", exc_type=ImportError)

ROWS, WIDTH = 512, 1024
N = ROWS * WIDTH
NORM = {"M": ROWS, "dtype": "torch.bfloat16"}
MEGATRON = {"S": ROWS // 2, "B": 2}
ROPE = {"hidden_size": 1, "seq_len": ROWS, "num_kv_heads": 1, "num_q_heads": 4}
LOSS = {"B": 2, "T": ROWS // 2}
TABLE = {"B": 2, "T": ROWS // 2, "D": WIDTH}
DISTINCT = WIDTH * (1 - (1 - 1 / WIDTH) ** ROWS) / ROWS  # of ROWS tokens of a vocabulary of WIDTH, on the average


@pytest.mark.parametrize(
    ("kernel", "provider", "mode", "x_name", "config", "an_element"),
    [
        ("rms_norm", "liger", "forward", "H", NORM, 2 + 2),
        # the norm's gradient 6 + 8 + 6, the weight's 10 + 4; x and its product 6 + 8, gradients 12 + 4 + 4 + 16 + 12;
        # their sum 12, cast 6
        ("rms_norm", "torch", "backward", "H", NORM, 20 + 14 + 14 + 48 + 18),
        ("fused_add_rms_norm", "liger_fused_add_rms_norm", "forward", "H", NORM, 4 + 4),  # x, residual; both results
        ("fused_add_rms_norm", "liger_fused_add_rms_norm", "backward", "H", NORM, 6 + 2),
        ("megatron_rms_norm", "liger", "forward", "H", MEGATRON, 2 + 2),
        ("megatron_rms_norm", "liger", "full", "H", MEGATRON, 4 + 2 + 2 + 6 + 6),  # sum, its gradient, norm's, grad +=
        ("megatron_rms_norm", "torch", "full", "H", MEGATRON, 4 + 2 + 2 + 10 + 4 + 6),
        ("layer_norm", "liger", "full", "N", {"M": ROWS}, 8 + 12),
        ("layer_norm", "torch", "forward", "N", {"M": ROWS}, 8),
        ("rope", "liger", "full", "H", ROPE, 2 * 4 * 5 / 4),  # q, and k a quarter of it
        ("llama4_rope", "liger", "forward", "H", ROPE, 2 * 4 * 5 / 4),
        ("llama4_rope", "torch", "forward", "H", ROPE, (6 + 8 + 6) * 5 / 4),
        ("cross_entropy", "liger", "full", "V", LOSS, 8 + 8),
        ("megatron_cross_entropy", "liger", "forward", "V", MEGATRON, 4),
        ("embedding", "liger", "forward", "V", TABLE, 4 * DISTINCT + 4),
        # of what repeats, the part that other tokens pushed out of L2: the table has 8 B an element
        ("embedding", "torch_compile", "forward", "V", TABLE, 4 * (DISTINCT + (1 - DISTINCT) * 8 / (8 + 18e6 / N)) + 4),
        # a gradient made 4, a table of zeros 8, the gradient read 4, distinct rows five times, added to the table 24
        ("embedding", "torch", "backward", "V", TABLE, 4 + 8 + 4 + 5 * 4 * DISTINCT + 24),
        ("relu_squared", "liger", "full", "N", {"M": ROWS}, 4 + 6),
        ("relu_squared", "torch", "full", "N", {"M": ROWS}, 8 + 8 + 12),
    ],
)
def test_a_row_moves_what_its_kernels_read_and_write(
    kernel: str, provider: str, mode: str, x_name: str, config: dict[str, Any], an_element: float
) -> None:
    """Bytes an element decide the fitted bandwidth: one forgotten operand would make a card a third faster."""
    eager, forward, backward = provider == "torch", mode != "backward", mode != "forward"
    row = liger.LigerRow(eager, provider, forward, backward, x_name, float(WIDTH), config)
    family, kernels = liger.FAMILIES[kernel](row)
    assert family.endswith("fused") == (not eager)
    moved = sum(k.read + k.written for k in kernels)
    assert -1e-9 <= moved / N - an_element < 0.11  # statistics of rows and columns, and indices, come on top


def test_the_backward_of_cross_entropy_by_hand() -> None:
    """Zeros and one -1 a row; a sum along each row; exp(y) times it, taken from the gradient."""
    kernels = sequences.cross_entropy_backward(ROWS, WIDTH)
    assert sum(k.read for k in kernels) == 4 * ROWS + 4 * N + 8 * N
    assert sum(k.written for k in kernels) == 4 * N + 4 * ROWS + 4 * ROWS + 4 * N


def parameter(*shape: int, dtype: str = "bf16") -> Parameter:
    return Parameter("x", shape, dtype, kind="weight", trainable=False)


def norm() -> Tensor:
    """transformers' RMSNorm, as `architectures.base` has it."""
    x = pointwise.cast(parameter(ROWS, WIDTH), "fp32")
    scale = pointwise.rsqrt(pointwise.add(pointwise.mean_last(pointwise.power(x)), 1e-6))
    return pointwise.mul(parameter(WIDTH), pointwise.cast(pointwise.mul(x, scale), "bf16"))


def rotated() -> Tensor:
    q, k, cos, sin = (parameter(1, heads, ROWS, 64) for heads in (64, 64, 1, 1))
    return rotate(q, k, cos, sin, rotate_half)[0]


FORWARDS: dict[str, tuple[Callable[[], Tensor], Callable[[], Any]]] = {
    "rms norm": (norm, lambda: sequences.rms_norm_forward(ROWS, WIDTH)),
    "rope": (rotated, lambda: 2 * sequences.rope_forward(64 * ROWS * 64)),
    "layer norm": (
        lambda: nn.layer_norm(
            parameter(ROWS, WIDTH, dtype="fp32"), parameter(WIDTH, dtype="fp32"), parameter(WIDTH, dtype="fp32")
        ),
        lambda: sequences.layer_norm_forward(ROWS, WIDTH),
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_eager_ops_are_the_kernels_that_the_tape_records(name: str) -> None:
    """Fits read eager rows by hand-written lists, predictions by the tape: the same program, kernel by kernel."""
    program, kernels = FORWARDS[name]
    with recording(Tape()) as tape:
        part = tape.begin(name, "forward")
        program()
    ops = [op for op in part.ops if not op.view]
    assert len(ops) == len(kernels())
    for op, k in zip(ops, kernels(), strict=True):
        assert (k.read, k.written) == pytest.approx((op.bytes_read, op.bytes_written), rel=0.04), op.name


@pytest.mark.parametrize(
    ("kernel", "eager", "mode", "ms", "host"),
    [
        ("llama4_rope", False, "forward", 0.15, True), ("llama4_rope", False, "forward", 0.17, False),
        ("llama4_rope", True, "forward", 0.05, False), ("rope", False, "forward", 0.05, False),
        ("rope", False, "backward", 0.12, True), ("rope", False, "backward", 0.14, False),
        ("rope", False, "full", 0.30, True), ("rope", False, "full", 0.32, False),
        ("megatron_rms_norm", False, "backward", 0.30, True), ("megatron_rms_norm", False, "forward", 0.02, False),
        ("rope", True, "full", 0.01, False), ("megatron_rms_norm", True, "full", 0.07, True),
        ("megatron_rms_norm", True, "full", 0.09, False), ("llama4_rope", True, "backward", 0.13, True),
    ],
)  # fmt: skip
def test_rows_that_time_the_host_are_left_aside(kernel: str, eager: bool, mode: str, ms: float, host: bool) -> None:
    """Their flat series say how long Python takes, nothing about a kernel."""
    assert liger._host_bound(kernel, eager, mode, ms) == host
