"""DeepSpeed's ZeRO-1 and ZeRO-2: every rank has all weights, but only its part of the masters and optimizer states.

What trains lies in one flat buffer, cut into as many parts as there are ranks. A gradient that is complete is copied
into a bucket (`reduce_bucket_size`: transformers' "auto" is the hidden size squared); before one that does not fit, the
bucket is all-reduced, and every rank keeps what is of its part. A gradient larger than a bucket is a message of its
own, or several where it lies in the parts of several ranks. ZeRO-2 exchanges the gradients of every micro-batch, ZeRO-1
those of the last one. Behind the step the updated weights are gathered.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (`reduce_independent_p_g_buckets_and_remove_grads`,
`average_tensor`, `allreduce_and_scatter`, `step`), runtime/utils.py (`all_gather_into_tensor_dp_groups`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...optimizers import Update
from ...optimizers.parts.ops import in_place, new
from ...optimizers.parts.update import existing, runs
from ...program.dims import Dim, decide
from ...program.op import Attrs, Op, Spec
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, Run
from ...tape.core import new_tensor, record, tape
from ...tape.tensor import Parameter, Tensor
from .collectives import all_reduce, exchange
from .form import WholeUnits
from .messages import Coming, Ready, coming, interleaved

ALIGNMENT = 2  # elements that every rank's part is a multiple of (`nccl_start_alignment_factor`)
BESIDE = Run(COMMUNICATION)  # the stream that reduces gradients under `overlap_comm`, as most configs have it
COPY = " (trained copy)"  # how copies of modules are named (`Scope.parameter`)
IN_BLOCK = re.compile(r".*?\.(\d+)\.")  # a block's number in the name of a parameter
Bucket = tuple[Dim, ...]  # elements of the messages that it goes out in


class CutStates(WholeUnits):
    """The hooks of ZeRO-1 and ZeRO-2: around nothing but gradients.

    Args:
        stage: 1 or 2.
        limit: elements of a bucket.
        late: `Architecture.registers_late`, for the order in the flat buffer.
    """

    shares_norm = False

    def __init__(self, ranks: Ranks, stage: int, limit: Dim, late: Sequence[str]) -> None:
        self.ranks, self.stage, self.limit, self.late = ranks, stage, limit, late
        self.reduces = True
        self.ready: list[Ready] = []
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

    def end(self, loss: Tensor) -> Tensor:
        """Nothing is hooked."""
        return loss

    def end_of_backward(self) -> None:
        """Buckets go out where the next gradient does not fit, the last one here."""
        current = tape()
        if not self._exchanges:
            return
        current.after_gradient = None
        exchanging, parts = current.parts.pop(), list(current.parts)
        order = coming(parts, self.ready)
        places, total = flat_places([r.parameter for r in reversed(self.ready)], self.late)
        *sent, (_, last) = buckets(order, places, self.part_of(total), self.limit)
        dtype = self.ready[0].parameter.dtype
        current.parts[:] = interleaved(parts, self.ready, {i: [b] for i, b in sent}, lambda b: self._reduced(b, dtype))
        current.parts.append(exchanging)
        exchanging.ops += self._reduced(last, dtype)
        record("deepspeed::synchronize", (), (), Attrs(host=True, sync=True), runs=BESIDE)
        self.large, self.exchanged = None, self.exchanged + 1
        for r in self.ready:
            r.parameter.grad = None

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """Every rank has all weights."""
        return parameters

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """Two buckets, and a rank's part of the gradients where they are summed over micro-batches."""
        trained = [p for p in parameters if p.used]
        part = self.part_of(sum(p.numel * p.count for p in trained)) if self.exchanged > 1 else 0
        return existing((2 * self.limit + part,), trained[0].dtype).nbytes

    def part_of(self, elements: Dim) -> Dim:
        """Elements of a rank's part of a flat buffer."""
        return -(-elements // (ALIGNMENT * self.ranks.size)) * ALIGNMENT

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update:
        """The optimizer on a rank's part, and the gathering of all parts."""
        update = Update(tape(), optimizer, parameters)
        trained = update.parameters
        dtype, part = trained[0].dtype, self.part_of(sum(p.numel * p.count for p in trained))
        averaged = new_tensor((part,), dtype) if self.exchanged == 1 else None
        tape().begin("clip", "optimizer").ops += [all_reduce(1, "u8", self.ranks), all_reduce(1, "fp32", self.ranks)]
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
        mine, whole = existing((part,), dtype), existing((part * self.ranks.size,), dtype)
        in_place("copy_", mine, master)
        flat.grad = None
        exchange("c10d::_allgather_base_", mine, whole, self.ranks)
        return update

    def _copy(self, p: Parameter) -> None:
        """Into the bucket, whose memory it has from then on; what is larger stays until the next gradient comes."""
        current = tape()
        assert p.grad is not None
        large = decide(p.numel > self.limit)
        if not large or self.stage == 2:  # ZeRO-1 lets large ones go at the end
            p.grad.storage.copies = 1
            self.large = p.grad if large else None
            p.grad = None
        current.part.host.gradients += 1
        self.ready.append(Ready(current.part, len(current.part.ops), p))
        if decide(p.numel <= self.limit):
            in_bucket, flat = existing((p.numel,), p.dtype), existing((p.numel,), p.dtype)
            with current.belonging_to("accumulation"):
                record("copy_", (in_bucket, flat), (in_bucket,))

    def _reduced(self, bucket: Bucket, dtype: str) -> list[Op]:
        """A bucket is divided, and its messages are all-reduced."""
        whole = (Spec(dtype, (sum(bucket),)),)
        nbytes = whole[0].nbytes
        divided = Op("div_.Tensor", whole, whole, nbytes, nbytes, owner="accumulation", runs=BESIDE)
        return [divided, *(all_reduce(elements, dtype, self.ranks) for elements in bucket)]


def flat_places(trained: Sequence[Parameter], late: Sequence[str]) -> tuple[dict[Coming, Dim], Dim]:
    """Where each layer's parameters begin in the flat buffer, as their modules were made, and how long that is."""

    def made(p: Parameter) -> tuple[int, int]:
        layer, _, name = IN_BLOCK.sub(r"\1 ", p.name.removesuffix(COPY), count=1).rpartition(" ")
        module = name.rpartition(".")[0]
        return int(layer or 0), 1 + late.index(module) if module in late else 0

    places, at = {}, 0
    for count, run in runs(trained):
        for layer in range(count):
            for p in sorted(run, key=made):
                places[Coming(p, layer)] = at
                at = at + p.numel
    return places, at


def buckets(order: Sequence[Coming], places: Mapping[Coming, Dim], part: Dim, limit: Dim) -> list[tuple[int, Bucket]]:
    """The buckets in their order, each with the number of the gradient that it goes out before; the last one too."""
    found: list[tuple[int, Bucket]] = []
    held: list[Coming] = []
    elements: Dim = 0
    for i, gradient in enumerate(order):
        if held and decide(elements + gradient.parameter.numel > limit):
            found.append((i, messages_of(held, places, part, limit)))
            held, elements = [], 0
        held.append(gradient)
        elements = elements + gradient.parameter.numel
    return [*found, (len(order), messages_of(held, places, part, limit))]


def messages_of(held: Sequence[Coming], places: Mapping[Coming, Dim], part: Dim, limit: Dim) -> Bucket:
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
