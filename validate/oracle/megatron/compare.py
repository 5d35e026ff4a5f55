"""A rank of Megatron-Core's program on the tape against the real one.

| what is not compared | why |
|---|---|
| collectives in a group of one | they send nothing, and the tape has none |
| calls of single numbers: the loss, counters of AdamW, what the host reads | packages differ, and each is one launch |
| `empty` | memory alone, which is compared |
| kernels of the loss on a few figures a token | Inductor's choice; those on whole logits are compared |
| which part of which weight a distributed optimizer's rank has | the tape has one of the mean size: sums are compared |
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice, zip_longest
from math import prod
from typing import Any
from unittest.mock import patch

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.calls import costs
from perfmodel.calls.collectives import KIND_OF
from perfmodel.prediction import memory
from perfmodel.program.part import PHASES
from perfmodel.recording.parallel import megatron
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.tracing.trace import Signature

from .. import counts, parallel
from ..cases import Case
from .program import BUCKET, RealRank, real_rank
from .recorder import Waited

# Kernels that Inductor makes of compiled functions (found out as `oracle.inductor` does, with PyTorch 2.13); of those
# of the loss the kernels over all logits alone, by the dtypes of logits that they read and write.
COMPILED = ("swiglu", "swiglu_back", "bias_dropout_add_fused_train")  # each is one
LOSS: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "calculate_logits_max": (("inductor::rows", ("bf16",), ("fp32",)),),
    "calculate_predicted_logits": (("inductor::rows", ("fp32",), ("fp32",)),),
    "calculate_cross_entropy_loss": (("inductor::pointwise", ("fp32",), ("fp32",)),),
    # the softmax is an input that is changed in two steps, so the first one works on a copy
    "calculate_gradients": (
        ("inductor::pointwise", ("fp32",), ("fp32",)), ("inductor::pointwise", ("fp32",), ("bf16", "fp32")),
    ),
}  # fmt: skip
# Names of the tape beside those of the real program, of calls that are one matter
SAME = {"__or__.Tensor": "bitwise_or.Tensor", "pow_.Scalar": "pow.Tensor_Scalar"}
LEFT_OUT = ("empty.memory_format",)
UNORDERED = ("inductor::", "cat")  # calls of which it does not matter what they read first
PADDING = 0.01  # of a part of the weights, at most

Row = tuple[str, Any, Any]  # name; (dtype, elements) of what is read and of what is written


def compare_megatron(case: Case) -> counts.Result:
    """Run a rank of a case and compare collectives and products in their order, calls, and memory."""
    return judge_megatron(case, tape_of(case), real_rank(case))


def tape_of(case: Case) -> Step:
    """The tape's step of a case, with buckets as small as in the real program."""
    architecture = from_config(case.config)
    method = methods.parse(case.method).bind(architecture)
    with patch.multiple(megatron, LEAST=BUCKET, PER_RANK=0):
        return build(architecture, method, case.setup, "cpu")


def judge_megatron(case: Case, step: Step, real: RealRank) -> counts.Result:
    """What of the tape differs from what a rank did."""
    peak, parts = memory.peak_bytes(step), case.setup.parallel == "zero1" and case.setup.replicas > 1
    result = counts.Result(
        case, sum(sum(c.values()) for c in real.calls.values()), sum(flops for _, flops in real.multiplied), 0,
        peak / real.peak, collectives=len(real.collectives),
    )  # fmt: skip
    result.differences += first_other("collective", _kinds(parallel.collectives(step)), _kinds(real.collectives))
    result.differences += first_other("wait", list(_waits(step)), real.waits)
    result.differences += first_other("product", list(_products(step)), real.multiplied)
    tape, tokens = counts.tape_calls(step), case.setup.batch * case.setup.seq
    for phase in PHASES:
        pair = [
            _rows(of[phase], tokens, tokens * step.architecture.vocab // case.setup.tp) for of in (tape, real.calls)
        ]
        parts_differ = _parts_differ if parts and phase == "optimizer" else partial(counts.differing, phase)
        result.differences += parts_differ(*pair)
    if (step.trainable, step.total) != (real.trainable, real.total):
        result.differences.append(
            f"parameters: {step.trainable} of {step.total} train on the tape, {real.trainable} of {real.total} really"
        )
    if abs(result.peak_ratio - 1) > parallel.PEAK_TOLERANCE:
        result.differences.append(f"peak memory: {peak} B on the tape, {real.peak} B live in the real program")
    return result


def first_other(what: str, tape: list[Any], real: list[Any]) -> list[str]:
    """The first entry of a sequence that differs from the other's, if any does."""
    pairs = enumerate(zip_longest(tape, real))
    differing = ((i, ours, theirs) for i, (ours, theirs) in pairs if ours != theirs)
    return [f"{what} {i}: {ours} on the tape, {theirs} really" for i, ours, theirs in islice(differing, 1)]


def _kinds(found: list[parallel.Collective]) -> list[parallel.Collective]:
    """Collectives by what they do; those in a group of one, which go nowhere, left out."""
    return [c._replace(name=KIND_OF[c.name]) for c in found if c.group > 1]


def _waits(step: Step) -> Iterator[Waited]:
    sent, passed, before = 0, 0, None
    for phase, op in parallel.in_order(step):
        passed += op.name.startswith(parallel.PRODUCTS)
        sent += op.attrs.ranks is not None and op.attrs.ranks.size > 1
        if op.name == "cuda::wait_event" and before != (waited := Waited(phase, sent, passed)):
            before = waited
            yield waited


def _products(step: Step) -> Iterator[tuple[str, int]]:
    for phase, op in parallel.in_order(step):
        if flops := int(costs.flops(op)):
            yield phase, flops


def _rows(calls: Counter[Signature], tokens: int, logits: int) -> Counter[Row]:
    """Calls that do work, by how much they read and write of each dtype.

    Those of single numbers are left out, and so are compiled kernels of a figure or two for each token, the loss's.

    Args:
        tokens: of a micro-batch.
        logits: elements that a rank has of them.
    """
    rows: Counter[Row] = Counter()
    for (name, *specs), n in calls.items():
        function, sizes = name.removeprefix("jit_fuser::"), list(map(_sizes, specs))
        if name in LEFT_OUT or name.startswith("c10d::") or not any(sizes):
            continue
        if function in LOSS:
            for kernel, *dtypes in LOSS[function]:
                read, written = (tuple((dtype, logits) for dtype in some) for some in dtypes)
                rows[kernel, read, written] += n
            continue
        if function in COMPILED:
            name = "inductor::pointwise"
        if name.startswith("inductor::"):
            most = max(size for some in sizes for _, size in some)
            if most <= 2 * tokens:
                continue
            sizes = [tuple(x for x in some if most != logits or x[1] == logits) for some in sizes]
        if name.startswith(UNORDERED):
            sizes = [tuple(sorted(some)) for some in sizes]
        rows[SAME.get(name, name), sizes[0], sizes[1]] += n
    return rows


def _parts_differ(tape: Counter[Row], real: Counter[Row]) -> list[str]:
    """Calls of a distributed optimizer that differ in what they write all together, by more than padding.

    Here a rank has a part of some weights; on the tape it has one part, as large as a rank's is on average.
    """
    written: list[Counter[str]] = [Counter(), Counter()]
    for of, rows in zip(written, (tape, real), strict=True):
        for (name, _, outputs), n in rows.items():
            of[name] += n * sum(size for _, size in outputs)
    ours, theirs = written
    differing = (name for name in ours | theirs if abs(ours[name] - theirs[name]) > PADDING * theirs[name])
    return [f"optimizer, {name}: writes {ours[name]} on the tape, {theirs[name]} really" for name in differing]


def _sizes(specs: Any) -> tuple[tuple[str, int], ...]:
    sizes = ((dtype, prod(map(int, shape))) for dtype, shape in specs)
    return tuple((dtype, n) for dtype, n in sizes if n > 1)
