"""DeepSpeed's ZeRO with optimizer states in the host's memory: what goes there, and the step of the host's cores.

Of each gradient that is reduced a rank takes its part's norm in fp64, casts it to fp32, and copies that into the
gradient of the fp32 master; with several micro-batches sums lie in the host's memory in 16 bits, and are added to on
the device. ZeRO-1 and ZeRO-2 also read, gradient by gradient, whether one is infinite: the host waits for all copies
before. DeepSpeed's CPU Adam updates the masters in one pass, and what it makes goes back in 16 bits.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (`copy_grads_in_partition`, `step`), stage3.py
(`partition_grads`, `_offload_grad_partition_at_boundary`), ops/adam/cpu_adam.py.
"""

from ...optimizers import Update
from ...optimizers.parts.update import existing
from ...program.dims import Dim
from ...program.op import PINNED, PLAIN, Attrs, Op, Spec
from ...program.streams import COMMUNICATION, REDUCE, Run
from ...tape.core import record, tape
from ...tape.tensor import Tensor
from ..parallel.offload import work

BESIDE = Run(REDUCE, after=(COMMUNICATION,))  # what follows a reduction on its stream, ahead of later collectives
FINITE = (  # of the largest and the smallest element (`has_inf_or_nan`), both in one
    *("abs", "ne.Scalar", "eq.Tensor", "mul.Tensor") * 2, "logical_and", "logical_not",
)  # fmt: skip
KEPT = 4  # fp32 tensors of a part: master, its gradient, two moments
BLOCKING = PINNED._replace(sync=True)


def call(name: str, given: Spec, made: Spec, attrs: Attrs = PLAIN, *, more: tuple[Spec, ...] = ()) -> Op:
    """A call on the stream that reduces gradients."""
    inputs = (given, *more)
    return Op(
        name, inputs, (made,), sum(s.nbytes for s in inputs), made.nbytes, attrs=attrs, owner="accumulation",
        runs=BESIDE,
    )  # fmt: skip


def sum_of_micro_batches(flat: Spec, *, first: bool) -> list[Op]:
    """The sum of micro-batches, which the host's memory keeps: it comes, is added to, and goes."""
    away = call("copy_", flat, flat, PINNED)
    if first:
        return [away]
    return [call("copy_", flat, flat, PINNED), call("add_.Tensor", flat, flat, more=(flat,)), away]


def to_master(mine: Spec) -> list[Op]:
    """A gradient's part into the gradient of the fp32 master."""
    low = Spec("fp32", mine.shape)
    return [call("_to_copy", mine, low), call("copy_", low, low, PINNED)]


def norm_of(mine: Spec) -> list[Op]:
    """Its norm in fp64."""
    high = Spec("fp64", mine.shape)
    return [call("_to_copy", mine, high), call("linalg_vector_norm", high, Spec("fp64", ()))]


def is_finite(whole: Spec) -> list[Op]:
    """Whether a gradient is finite; the host waits for the answer."""
    scalar = Spec(whole.dtype, ())
    extremes = [call(name, whole, scalar) for name in ("amax", "amin")]
    tests = [call(name, scalar, scalar) for name in FINITE]
    return [*extremes, *tests, call("_local_scalar_dense", scalar, scalar)]


def updated_on_host(update: Update, part: Dim, dtype: str, *, clips: bool, back: Tensor | None) -> None:
    """The step of the host's cores on a rank's part.

    Args:
        back: the weights that it makes, on the device; None if those live in the host's memory.
    """
    update.part()
    master, low = existing((part,), "fp32"), existing((part,), dtype)
    if clips:
        work("mul_.Tensor", (master,), (master,))
    work("deepspeed::adam_update", [existing((part,), "fp32") for _ in range(4)], [master, master, master])
    work("copy_", (low, master), (low,))
    if back is not None:
        record("copy_", (back, low), (back,), PINNED)
    update.hosted = KEPT * master.nbytes + low.nbytes


def read_norms(count: Dim) -> None:
    """The host reads the norm of each gradient, one after another."""
    part = tape().begin("clip", "optimizer")
    part.repeat = int(count)
    record("_local_scalar_dense", (existing((), "fp64"),), ())
