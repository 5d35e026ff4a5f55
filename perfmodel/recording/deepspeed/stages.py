"""DeepSpeed's ZeRO-1 and ZeRO-2: every rank has all weights, but only its part of the masters and optimizer states.

What trains lies in one flat buffer, cut into as many parts as there are ranks. A gradient that is complete is copied
into a bucket (`reduce_bucket_size`: transformers' "auto" is the hidden size squared); before one that does not fit, the
bucket is all-reduced, and every rank keeps what is of its part. A gradient larger than a bucket is a message of its
own, or several where it lies in the parts of several ranks. ZeRO-2 exchanges the gradients of every micro-batch, ZeRO-1
those of the last one. Behind the step the updated weights are gathered.

With its states in the host's memory (`zero_offload.py`) it runs on one GPU, too, which exchanges nothing.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (`reduce_independent_p_g_buckets_and_remove_grads`,
`average_tensor`, `allreduce_and_scatter`, `step`), runtime/utils.py (`all_gather_into_tensor_dp_groups`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

from ...optimizers import Update
from ...optimizers.parts.ops import in_place, new
from ...optimizers.parts.update import existing, runs
from ...program.dims import Dim, decide, larger
from ...program.op import Attrs, Op, Spec
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, REDUCE, Run
from ...tape.core import new_tensor, record, tape
from ...tape.tensor import Parameter, Tensor
from ..parallel.collectives import all_reduce, cast_gradient, exchange
from ..parallel.form import WholeUnits
from ..parallel.messages import LayerGradient, ReadyGradient, gradients_in_order, interleaved
from . import zero_offload
from .flat import bytes_of, elements_of, flattened, update_of_all

ALIGNMENT = 2  # elements that every rank's part is a multiple of (`nccl_start_alignment_factor`)
BESIDE = Run(COMMUNICATION)  # the stream that reduces gradients under `overlap_comm`, as most configs have it
COPY = " (trained copy)"  # how copies of modules are named (`Scope.parameter`)
IN_BLOCK = re.compile(r".*?\.(\d+)\.")  # a block's number in the name of a parameter


class Bucket(NamedTuple):
    """Gradients that are reduced together.

    Attributes:
        messages: elements of the messages that they go out in.
        mine: of each gradient that the first rank keeps some of: elements, and those that it keeps.
    """

    messages: tuple[Dim, ...]
    mine: tuple[tuple[Dim, Dim], ...] = ()


class CutStates(WholeUnits):
    """The hooks of ZeRO-1 and ZeRO-2: around nothing but gradients.

    Args:
        stage: 1 or 2.
        limit: elements of a bucket.
        late: `Architecture.registers_late`, for the order in the flat buffer.
        offloaded: whether masters, states and gradients live in the host's memory.
        wide: whether gradients are summed in fp32, as where ranks share sequences (`allreduce_bucket`).
    """

    shares_norm = False
    inside = False

    def __init__(
        self, ranks: Ranks, stage: int, limit: Dim, late: Sequence[str], *, offloaded: bool = False, wide: bool = False
    ) -> None:
        self.ranks, self.stage, self.limit, self.late = ranks, stage, limit, late
        self.offloaded, self.wide = offloaded, wide
        self.mine: list[tuple[Dim, Dim]] = []  # as of `Bucket`, of all gradients of a backward pass
        self.reduces = True
        self.ready: list[ReadyGradient] = []
        self.large: Tensor | None = None  # a gradient that fits no bucket, on its way
        self.exchanged = 0  # micro-batches that were; behind the first one a rank's part of the sum stays

    @property
    def _exchanges(self) -> bool:
        return self.reduces or self.stage == 2

    def begin(self) -> None:
        """Gradients are followed if they are exchanged."""
        self.ready.clear()
        tape().after_gradient = self._copy if self._exchanges else None

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block runs as it would alone."""
        return run(x)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Nothing is hooked."""
        return outputs

    def end_of_backward(self) -> None:
        """Buckets go out where the next gradient does not fit, the last one here."""
        current = tape()
        if not self._exchanges:
            return
        current.after_gradient = None
        exchanging, parts = current.parts.pop(), list(current.parts)
        order = gradients_in_order(parts, self.ready)
        places, total = flat_places([r.parameter for r in reversed(self.ready)], self.late)
        found = buckets(order, places, self.part_of(total), self.limit)
        self.mine = [kept for _, bucket in found for kept in bucket.mine]
        *sent, (_, last) = found
        dtype = self.ready[0].parameter.dtype
        at = {i: [bucket] for i, bucket in sent}
        current.parts[:] = interleaved(
            parts, self.ready, at, lambda b: self._reduced(b, dtype), self._room, lambda b: self._left(b, dtype)
        )
        current.parts.append(exchanging)
        exchanging.ops += self._reduced(last, dtype)
        exchanging.highest = larger(exchanging.peak, exchanging.delta + self._room(last))
        waited = zero_offload.BESIDE if self.offloaded else BESIDE
        record("deepspeed::synchronize", (), (), Attrs(host=True, sync=True), runs=waited)
        exchanging.free(sum(self._left(bucket, dtype) for _, bucket in sent))
        self.large, self.exchanged = None, self.exchanged + 1
        for r in self.ready:
            r.parameter.grad = None

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """Every rank has all weights."""
        return parameters

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """Two buckets, and a rank's part of the gradients where they are summed over micro-batches."""
        trained = flattened(parameters)
        if self.offloaded:
            return existing((2 * self.limit + largest(trained),), trained[0].dtype).nbytes
        part = self.part_of(elements_of(trained)) if self.exchanged > 1 else 0
        return existing((2 * self.limit + part,), trained[0].dtype).nbytes

    def gradient_bytes(self, parameters: Sequence[Parameter]) -> Dim:
        """A rank's part of all, with zeros where none arrived."""
        return -(-bytes_of(parameters) // self.ranks.size)

    def part_of(self, elements: Dim) -> Dim:
        """Elements of a rank's part of a flat buffer."""
        return -(-elements // (ALIGNMENT * self.ranks.size)) * ALIGNMENT

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update:
        """The optimizer on a rank's part, and the gathering of all parts."""
        update = update_of_all(parameters, optimizer)
        trained = update.parameters
        dtype, part = trained[0].dtype, self.part_of(elements_of(trained))
        mine, whole = existing((part,), dtype), existing((part * self.ranks.size,), dtype)
        if self.offloaded:
            tape().begin("clip", "optimizer").ops += self._reduced_scalar("u8")
            zero_offload.read_norms(len(self.mine))
            tape().begin("clip", "optimizer").ops += self._reduced_scalar("fp32")
            zero_offload.updated_on_host(update, part, dtype, clips=clips, back=mine)
            sums = sum(whole for whole, _ in self.mine) if self.exchanged > 1 else 0
            update.hosted = update.hosted + existing((sums + largest(trained),), dtype).nbytes
            self._gather(mine, whole)
            return update
        averaged = new_tensor((part,), dtype) if self.exchanged == 1 else None
        tape().begin("clip", "optimizer").ops += [*self._reduced_scalar("u8"), *self._reduced_scalar("fp32")]
        update.part()
        flat = Parameter("flat", (part,), "fp32", kind="weight", trainable=True)
        flat.used = True
        master = update.state(flat)
        together = new("cat", existing((part,), dtype))
        flat.grad = new("_to_copy", together, dtype="fp32")
        del together, averaged
        if clips:
            in_place("mul_.Tensor", flat.grad)
        update.group([flat])
        update.part()
        in_place("copy_", mine, master)
        flat.grad = None
        self._gather(mine, whole)
        return update

    def _reduced_scalar(self, dtype: str) -> list[Op]:
        return [all_reduce(1, dtype, self.ranks)] if decide(self.ranks.size > 1) else []

    def _gather(self, mine: Tensor, whole: Tensor) -> None:
        if decide(self.ranks.size > 1):
            exchange("c10d::_allgather_base_", mine, whole, self.ranks)

    def _copy(self, p: Parameter) -> None:
        """Into the bucket, whose memory it has from then on; what is larger stays until the next gradient comes."""
        current = tape()
        live = current.part.delta
        assert p.grad is not None
        large = decide(p.numel > self.limit)
        if not large or self.stage == 2:  # ZeRO-1 lets large ones go at the end
            p.grad.storage.copies = 1
            self.large = p.grad if large else None
            p.grad = None
        current.part.host.gradients += 1
        self.ready.append(ReadyGradient(current.part, len(current.part.ops), p, live))
        if large and self.offloaded:  # memory of its own, until it is copied
            copied = new_tensor(p.shape, p.dtype)
            given = existing(p.shape, p.dtype)
            record("clone", (given,), (copied,))
            if self.large is not None:
                self.large = copied
        if decide(p.numel <= self.limit):
            in_bucket, flat = existing((p.numel,), p.dtype), existing((p.numel,), p.dtype)
            with current.belonging_to("accumulation"):
                record("copy_", (in_bucket, flat), (in_bucket,))

    def _reduced(self, bucket: Bucket, dtype: str) -> list[Op]:
        """A bucket is divided, and its messages are all-reduced; offloaded, a rank's part of them goes to the host."""
        whole = (Spec(dtype, (sum(bucket.messages),)),)
        nbytes = whole[0].nbytes
        after = Run(COMMUNICATION, after=(REDUCE,)) if self.offloaded else BESIDE
        ops = [Op("div_.Tensor", whole, whole, nbytes, nbytes, owner="accumulation", runs=after)]
        if decide(self.ranks.size > 1):
            ops += [op for elements in bucket.messages for op in self._summed(elements, dtype)]
        for elements, kept in bucket.mine if self.offloaded else ():
            ops += self._offloaded(Spec(dtype, (elements,)), Spec(dtype, (kept,)))
        return ops

    def _summed(self, elements: Dim, dtype: str) -> list[Op]:
        """A message is all-reduced, where gradients are summed in fp32 with a copy there and back."""
        if not self.wide or dtype == "fp32":
            return [all_reduce(elements, dtype, self.ranks)]
        low, high = Spec(dtype, (elements,)), Spec("fp32", (elements,))
        return [
            cast_gradient(elements, dtype, "fp32"),
            all_reduce(elements, "fp32", self.ranks),
            Op("copy_", (low, high), (low,), low.nbytes + high.nbytes, low.nbytes, owner="accumulation", runs=BESIDE),
        ]

    def _room(self, bucket: Bucket) -> Dim:
        """Bytes that the norm of its largest gradient takes, in fp64, or its largest message in fp32."""
        if self.wide:
            return existing((reduce(larger, bucket.messages),), "fp32").nbytes
        kept = [kept for _, kept in bucket.mine] if self.offloaded and self.reduces else []
        return existing((reduce(larger, kept),), "fp64").nbytes if kept else 0

    def _left(self, bucket: Bucket, dtype: str) -> Dim:
        """Bytes of a large gradient of this rank: but in the last micro-batch it stays up to the end of backward."""
        if not self.offloaded or self.reduces:
            return 0
        large = [whole for whole, _ in bucket.mine if decide(whole > self.limit)]
        return existing((sum(large),), dtype).nbytes if large else 0

    def _offloaded(self, whole: Spec, mine: Spec) -> list[Op]:
        """What becomes of a gradient that this rank keeps some of."""
        several = self.stage == 2 and (self.exchanged > 0 or not self.reduces)
        ops = zero_offload.sum_of_micro_batches(whole, first=self.exchanged == 0) if several else []
        if self.reduces:
            ops += [*zero_offload.norm_of(mine), *zero_offload.is_finite(whole), *zero_offload.to_master(mine)]
        return ops


def largest(trained: Sequence[Parameter]) -> Dim:
    """Elements of the largest of some parameters."""
    return reduce(larger, [p.numel for p in trained])


def flat_places(trained: Sequence[Parameter], late: Sequence[str]) -> tuple[dict[LayerGradient, Dim], Dim]:
    """Where each layer's parameters begin in the flat buffer, as their modules were made, and how long that is."""

    def made(p: Parameter, modules: list[str]) -> tuple[int, int, int, int, int, bool]:
        layer, module = layer_and_module(p)
        parent = module.partition(".")[0]
        behind, within = (1 + late.index(name) if name in late else 0 for name in (parent, module))
        first = next(i for i, other in enumerate(modules) if other.partition(".")[0] == parent)
        return int(layer or 0), behind, first, within, modules.index(module), p.name.endswith(".bias")

    places, at = {}, 0
    for count, run in runs(trained):
        modules = [layer_and_module(p)[1] for p in run]
        for layer in range(count):
            for p in sorted(run, key=partial(made, modules=modules)):
                places[LayerGradient(p, layer)] = at
                at = at + p.numel
    return places, at


def layer_and_module(p: Parameter) -> tuple[str, str]:
    """The number of a parameter's block, if it is in one, and the path of its module, in a block from there."""
    layer, _, name = IN_BLOCK.sub(r"\1 ", p.name.removesuffix(COPY), count=1).rpartition(" ")
    return layer, name.rpartition(".")[0]


def buckets(
    order: Sequence[LayerGradient], places: Mapping[LayerGradient, Dim], part: Dim, limit: Dim
) -> list[tuple[int, Bucket]]:
    """The buckets in their order, each with the number of the gradient that it goes out before; the last one too."""
    found: list[tuple[int, Bucket]] = []

    def bucket() -> Bucket:
        return Bucket(messages_of(held, places, part, limit), kept_of(held, places, part))

    held: list[LayerGradient] = []
    elements: Dim = 0
    for i, gradient in enumerate(order):
        if held and decide(elements + gradient.parameter.numel > limit):
            found.append((i, bucket()))
            held, elements = [], 0
        held.append(gradient)
        elements = elements + gradient.parameter.numel
    return [*found, (len(order), bucket())]


def messages_of(
    held: Sequence[LayerGradient], places: Mapping[LayerGradient, Dim], part: Dim, limit: Dim
) -> tuple[Dim, ...]:
    """The messages of a bucket: what is of one rank's part stays together, and one goes once it is over the limit."""
    slices: list[tuple[Dim, Dim]] = []  # whose part, elements
    for gradient in held:
        begin, end = places[gradient], places[gradient] + gradient.parameter.numel
        while decide(begin < end):
            rank = begin // part
            until = end if decide(end <= (rank + 1) * part) else (rank + 1) * part
            same = bool(slices) and decide(slices[-1][0] == rank)
            before = slices.pop()[1] if same else 0
            slices.append((rank, before + until - begin))
            begin = until
    sent: list[Dim] = []
    filling: Dim = 0
    for _, elements in slices:
        filling = filling + elements
        if decide(filling > limit):
            sent.append(filling)
            filling = 0
    return (*sent, filling) if decide(filling > 0) else tuple(sent)


def kept_of(
    held: Sequence[LayerGradient], places: Mapping[LayerGradient, Dim], part: Dim
) -> tuple[tuple[Dim, Dim], ...]:
    """Elements of each gradient that lies in the first rank's part, and how many of them do."""
    kept = []
    for gradient in held:
        begin, elements = places[gradient], gradient.parameter.numel
        if decide(begin < part):
            whole = decide(begin + elements <= part)
            kept.append((elements, elements if whole else part - begin))
    return tuple(kept)
