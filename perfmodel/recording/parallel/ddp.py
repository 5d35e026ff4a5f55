"""DistributedDataParallel: every rank has the whole model, and gradients are averaged bucket by bucket.

As soon as a gradient is complete it is divided into its bucket; a bucket that is full is all-reduced beside the rest of
backward, buckets in their order. Behind backward all are copied back (`gradient_as_bucket_view` is off). Buckets are
those of all steps but the first, filled in the order in which gradients come; the first one holds 1 MiB, others 25.
Buffers of modules are broadcast before each forward pass behind one whose gradients are exchanged
(`broadcast_buffers`). What DDP does that looks for parameters without a gradient is in `ddp_search`.

Sources: torch 2.13, csrc/distributed/c10d/reducer.cpp (`mark_variable_ready_dense`, `rebuild_buckets`,
`compute_bucket_assignment_by_size`, `finalize_bucket_dense`), nn/parallel/distributed.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ...optimizers.parts.update import existing, runs
from ...program.dims import Dim, decide
from ...program.dtypes import ITEMSIZE
from ...program.op import Attrs, Op, Spec
from ...program.part import Part
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, Run
from ...tape.core import hooked, record, tape
from ...tape.tensor import Flow, Parameter, Tensor
from .collectives import SENT, all_reduce, wait_event
from .ddp_compiled import Place, Uses, behind_regions, gradients
from .form import WholeUnits
from .messages import LayerGradient, ReadyGradient, gradients_in_order, interleaved

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # B (`_DEFAULT_FIRST_BUCKET_BYTES`, `bucket_cap_mb`)
Bucket = tuple[str, Dim]  # dtype, bytes


class Replicated(WholeUnits):
    """The hooks of DDP: around nothing but gradients."""

    shares_norm = False
    inside = False

    def __init__(self, ranks: Ranks, graphs: frozenset[Place] = frozenset()) -> None:
        self.ranks = ranks
        self.graphs = graphs  # where the graph of a compiled model is cut
        self.reduces = True
        self.synchronised = True  # whether the last micro-batch exchanged gradients: then buffers are to be broadcast
        self.ready: list[ReadyGradient] = []
        self.before: tuple[Part, int] | None = None  # where the forward pass begins: a part, and so many of its ops

    def begin(self) -> None:
        """Gradients are followed if they are exchanged, and buffers, which have to be known."""
        current = tape()
        self.ready.clear()
        current.buffers.clear()
        self.before = current.part, len(current.part.ops)
        current.after_gradient = self._divide if self.reduces else None
        if current.flow is not None:
            current.flow.region = 0

    def cuts(self) -> Uses | None:
        """Where the graph of a compiled model is cut, and what is used in which."""
        return Uses(self.graphs)

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block runs as it would alone."""
        return run(x)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Nothing is hooked; the buffers are known now that went out before the pass."""
        current = tape()
        if current.flow is not None:
            current.flow.region = None
        if self.synchronised:
            assert self.before is not None
            part, place = self.before
            part.ops[place:place] = self._broadcast(current.buffers)
        self.synchronised = self.reduces and current.grad_enabled
        return outputs

    def end_of_backward(self) -> None:
        """All-reduces go where their buckets are full; then gradients are copied back."""
        current = tape()
        if not self.reduces:
            return
        current.after_gradient = None
        exchange = current.parts.pop()
        parts = list(current.parts)
        if current.flow is None:
            current.parts[:] = interleaved(
                parts, self.ready, self._sent(gradients_in_order(parts, self.ready)), self._ops_of
            )
        else:
            current.parts[:] = self._behind_regions(parts, current.flow)
        current.parts.append(exchange)
        hooked(wait_event)(COMMUNICATION)
        for count, run in runs([ready.parameter for ready in self.ready]):
            current.begin("exchange", "backward").repeat = count
            self._copy_all(run)

    @hooked
    def _copy_all(self, parameters: Sequence[Parameter]) -> None:
        for p in parameters:
            self._copy_back(p)

    def _behind_regions(self, parts: list[Part], flow: Flow) -> list[Part]:
        """What is done about gradients goes behind the backward of the region that they come from."""
        assert isinstance(flow.cuts, Uses)
        arriving = gradients(flow.cuts)
        order = [gradient for those in arriving.values() for gradient in those]
        sent = self._sent(order)
        number = {gradient: i for i, gradient in enumerate(order)}

        def exchanged(those: Sequence[LayerGradient]) -> None:
            for gradient in those:
                self._into_bucket(gradient.parameter)
                for bucket in sent.get(number[gradient], ()):
                    tape().part.ops += self._ops_of(bucket)

        return behind_regions(parts, flow, arriving, exchanged)

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """Every rank updates all."""
        return parameters

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """The buckets: as many bytes as there are gradients."""
        return sum(p.nbytes * p.count for p in parameters if p.used)

    def _broadcast(self, buffers: list[Spec]) -> list[Op]:
        """`_sync_buffers`: those of one dtype as one message (`_broadcast_coalesced`)."""
        current = tape()
        part, current.part = current.part, Part("buffers", "forward")
        for dtype in dict.fromkeys(spec.dtype for spec in buffers):
            flat = [existing((spec.numel,), dtype) for spec in buffers if spec.dtype == dtype]
            message = existing((sum(t.numel for t in flat),), dtype) if len(flat) > 1 else flat[0]
            if len(flat) > 1:
                record("cat", flat, (message,))
            record("c10d::broadcast_", (message,), (message,), Attrs(ranks=self.ranks), runs=SENT)
            for spec in buffers:
                if spec.dtype == dtype:
                    whole = existing(spec.shape, dtype)
                    record("copy_", (whole, existing(spec.shape, dtype)), (whole,), runs=Run(after=(COMMUNICATION,)))
        current.part, part = part, current.part
        return part.ops

    def _divide(self, p: Parameter) -> None:
        """Into its bucket, in a compiled model once its region is through."""
        if tape().flow is None:
            self._into_bucket(p)
        self.ready.append(ReadyGradient(tape().part, len(tape().part.ops), p))

    def _into_bucket(self, p: Parameter) -> None:
        """`mul_out(bucket_view, grad, 1 / ranks)`."""
        assert p.grad is not None
        current = tape()
        current.part.host.gradients += 1
        with current.belonging_to("accumulation"):
            in_bucket = existing(p.shape, p.grad.dtype)
            record("mul.out", (p.grad, in_bucket), (in_bucket,))

    def _sent(self, order: Sequence[LayerGradient]) -> dict[int, list[Bucket]]:
        """The buckets that go out behind each gradient, by its number in the order in which they come."""
        return launches([c.parameter for c in order])

    def _ops_of(self, bucket: Bucket) -> list[Op]:
        """The message of a bucket."""
        dtype, nbytes = bucket
        return [all_reduce(nbytes // ITEMSIZE[dtype], dtype, self.ranks)]

    def _copy_back(self, p: Parameter) -> None:
        """`copy_bucket_to_grad`."""
        assert p.grad is not None
        record("copy_", (p.grad, existing(p.shape, p.grad.dtype)), (p.grad,))


def launches(gradients: Sequence[Parameter]) -> dict[int, list[Bucket]]:
    """The buckets that are launched behind each gradient, by its number in the order in which they come.

    One is full once it has reached its limit, what is left at the end makes the last ones, of several dtypes that which
    came last first (so a hash map of libstdc++ gives them); one waits for those before.
    """
    filling: dict[str, tuple[Dim, int, int]] = {}  # by dtype: bytes, buckets before it, the last gradient
    full: dict[int, list[Bucket]] = {}
    for i, p in enumerate(gradients):
        nbytes, before, _ = filling.get(p.dtype, (0, 0, 0))
        nbytes = nbytes + p.nbytes
        if decide(nbytes >= (BUCKET if before else FIRST_BUCKET)):
            full.setdefault(i, []).append((p.dtype, nbytes))
            nbytes, before = 0, before + 1
        filling[p.dtype] = nbytes, before, i
    latest = max(full, default=0)
    for dtype, (nbytes, _, last) in reversed(filling.items()):
        if decide(nbytes > 0):
            latest = max(latest, last)
            full.setdefault(latest, []).append((dtype, nbytes))
    return full
