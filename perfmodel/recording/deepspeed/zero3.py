"""DeepSpeed's ZeRO-3 over several ranks: every rank keeps a part of each weight, its master, its states, its gradient.

Weights are gathered one by one as modules come, frozen ones too; small ones (`stage3_param_persistence_threshold`:
transformers' "auto" is ten times the hidden size) stay whole, and are gathered again once they are updated. A weight
that is used again within `stage3_max_reuse_distance` elements stays gathered. Both need a trace of modules that holds
(`module_trace.py`). Gradients are copied into a bucket, and before one that does not fit the bucket is reduced and
scattered, in every micro-batch.

Here the weights of a block are gathered as it begins: DeepSpeed asks for each a few modules before it is used, by a
queue that it keeps filled (`fetch_sub_module`), so messages and bytes are the same but come a little earlier there.

Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py, parameter_offload.py, stage3.py,
runtime/comm/coalesced_collectives.py (`reduce_scatter_coalesced`). One rank alone: `zero3_alone.py`, or here
where something is offloaded (`zero_offload.py`): then weights come from the host's memory one by one, for each of which
the host waits.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ...architectures.base import WORDS
from ...optimizers import Update
from ...optimizers.parts.update import existing, runs
from ...program.dims import Dim, decide
from ...program.op import PINNED, Attrs, Op, Spec
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, COMPUTE, GATHER_COPY, MAIN, REDUCE, Run
from ...tape.autograd import differentiate
from ...tape.core import new_tensor, record, tape
from ...tape.tensor import Grads, Node, Parameter, Tensor
from ..parallel.collectives import SENT, cast_gradient, empty, exchange, travelling, wait_event
from ..parallel.form import WholeUnits
from ..parallel.messages import ReadyGradient, gradients_in_order, interleaved
from ..parallel.offload import keep_on_host, to_device
from ..parallel.units import HEAD, ROOT, ShardedUnit, of_all_layers
from . import zero3_alone, zero_offload
from .flat import bytes_of, flattened, update_of_all
from .module_trace import TraceCoverage

LOOKED_AT = ".lora_A."  # so that DeepSpeed takes it for a weight of the layer (`register_external_parameter`)
UNTRACED = (
    "DeepSpeed's trace of modules does not hold where a model is called twice before its backward pass: each pass "
    "gathers all weights again, and none ahead; --reference precomputed takes a pass away"
)
REUSE = 10**9  # elements within which a weight that comes again stays (`stage3_max_reuse_distance`)
PERSISTENT = 10  # hidden sizes that a weight has at most if it stays whole


class CutWeights(WholeUnits):
    """The hooks of ZeRO-3 around the blocks of a model.

    Args:
        units: the blocks and the rest, with a rank's part of each parameter.
        hidden: hidden size of the model.
        checkpoint: `Setup.checkpoint`.
        offload: `Setup.offload`.
        passes: what DeepSpeed's trace of modules has of the calls of the model in a micro-batch.
        frozen: the hooks around a reference model, if there is one.
        small: elements of a weight that stays whole; None: as of transformers' "auto".
        wide: whether gradients are summed in fp32, as where ranks share sequences.
    """

    shares_norm = False

    def __init__(
        self, units: Sequence[ShardedUnit], ranks: Ranks, hidden: int, checkpoint: str, offload: str = "none", *,
        passes: Sequence[TraceCoverage], frozen: "CutWeights | None" = None, small: int | None = None,
        wide: bool = False,
    ) -> None:  # fmt: skip
        self.ranks, self.limit, self.wide = ranks, hidden**2, wide
        self.small = PERSISTENT * hidden if small is None else small
        self.passes, self.place, self.frozen = passes, -1, frozen
        self.gone: set[str] = set()  # units whose small weights are not there
        self.units = {unit.path: unit for unit in units}
        self.offloaded, self.from_host = offload != "none", offload == "params"
        self.alone = decide(ranks.size == 1)
        keep_on_host(shard for unit in units for shard in unit.shards if self.from_host)
        self.paths = [unit.path for unit in units]
        self.reduces = True
        self.first = True  # whether this micro-batch starts the sum of gradients
        self.ready: list[ReadyGradient] = []
        self.whole: dict[str, dict[str, Tensor]] = {}  # what is gathered of each unit, by name of the parameter
        elements = sum(p.numel * p.count for unit in units for p in unit.parameters if self._is_cut(p))
        self.stays = decide(2 * elements <= REUSE)  # from its forward pass until its backward pass
        self.checkpoint = checkpoint

    @property
    def reference(self) -> "CutWeights | None":
        """A frozen model is cut as well."""
        return self.frozen

    @property
    def notes(self) -> Sequence[str]:
        """That the trace of modules does not hold."""
        return () if self.passes[-1].backward else (UNTRACED,)

    @property
    def seen(self) -> TraceCoverage:
        """What DeepSpeed's trace has of the pass that runs, or ran last."""
        return self.passes[self.place]

    # What the recording of a step calls

    def begin(self) -> None:
        """What is outside of blocks is gathered."""
        self.ready.clear()
        self.place = (self.place + 1) % len(self.passes)
        tape().on_gradient = self._copy
        self._gather(ROOT)

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block between its hooks."""
        self._gather(path)
        node = differentiate("PostBackwardFunctionModuleBackward", (x,), self._behind_backward, (path,))
        if node is not None:
            x = x.alias()
            node.produces(x)
        out = run(x)
        self._free(path)
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = self._hooked(first, path)
        return (first, *rest) if isinstance(out, tuple) else first

    def _hooked(self, out: Tensor, path: str) -> Tensor:
        node = differentiate("PreBackwardFunctionForModuleBackward", (out,), self._before_backward, (path,))
        if node is None:
            return out
        hooked = out.alias()
        node.produces(hooked)
        return hooked

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The head gathers again what was the embedding's, unless the trace says that it comes."""
        if path == HEAD and self._tied and not self.seen.forward:
            self._gather_again(ROOT, self._words)
        return run(x)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is outside of blocks stays to the end of the backward pass that was foreseen, or is gathered again."""
        if self.seen.backward:
            return outputs
        self._free(ROOT)
        return [self._hooked(output, ROOT) for output in outputs]

    def end_of_backward(self) -> None:
        """Buckets go out where the next gradient does not fit, the last one here; all weights go."""
        current = tape()
        current.on_gradient = None
        self._free_behind_backward(ROOT)
        of_all_layers([t for unit in self.whole.values() for t in unit.values()])  # frozen blocks below all that trains
        self.whole.clear()
        exchanging, parts = current.parts.pop(), list(current.parts)
        order = [c.parameter for c in gradients_in_order(parts, self.ready)]
        *sent, (_, last) = self._buckets(order)
        dtype = self.ready[0].parameter.dtype
        current.parts[:] = interleaved(parts, self.ready, {i: [b] for i, b in sent}, lambda b: self._reduced(b, dtype))
        current.parts.append(exchanging)
        exchanging.ops += self._reduced(last, dtype)
        if self.offloaded:
            record("deepspeed::synchronize", (), (), Attrs(host=True, sync=True), runs=zero_offload.BESIDE)
        else:
            zero3_alone.end_of_backward()
        self.first = False

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """A rank's parts in the place of whole parameters."""
        of_reference = self.frozen.units.values() if self.frozen is not None else ()
        shards = {id(p): s for unit in (*self.units.values(), *of_reference) for p, s in unit.pairs}
        for unit in self.units.values():
            for p, shard in unit.pairs:
                shard.used = p.used
        return [shards.get(id(p), p) for p in parameters]

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """A rank's part of the gradients, the bucket, and what stays whole."""
        trained = flattened(parameters)
        small = self.whole_bytes + (self.frozen.whole_bytes if self.frozen is not None else 0)
        if self.offloaded:
            return existing((self.limit,), trained[0].dtype).nbytes + small
        return zero3_alone.buffer_bytes(trained, self.limit) + small

    def gradient_bytes(self, parameters: Sequence[Parameter]) -> Dim:
        """A rank's part of all, with zeros where none arrived."""
        return bytes_of(parameters)

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update:
        """The optimizer on a rank's parts; what stays whole is gathered again."""
        if self.offloaded:
            update = self._updated_on_host(parameters, optimizer, clips=clips)
        else:
            update = zero3_alone.recorded_update(
                parameters, optimizer, clips=clips, between=lambda: self._sum(existing((), "fp64"))
            )
        for count, run in runs(self._small()):
            update.part(count)
            for p in run:
                self._gathered(p)
        return update

    def _updated_on_host(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update:
        update = update_of_all(parameters, optimizer)
        trained = update.parameters
        part, dtype = sum(p.numel * p.count for p in trained), trained[0].dtype
        zero3_alone.norms_together([p for p in trained if p.used], between=lambda: self._sum(existing((1,), "fp32")))
        back = None if self.from_host else existing((part,), dtype)
        zero_offload.updated_on_host(update, part, dtype, clips=clips, back=back)
        update.hosted = update.hosted + existing((part,), dtype).nbytes  # gradients in 16 bits
        return update

    def _sum(self, norm: Tensor) -> None:
        if decide(self.ranks.size > 1):
            record("c10d::allreduce_", (norm,), (norm,), Attrs(ranks=self.ranks), runs=SENT)

    # Weights

    def _is_cut(self, p: Parameter) -> bool:
        return decide(p.numel > self.small)

    def _small(self) -> list[Parameter]:
        if self.alone and not self.from_host:  # all weights are there, whole
            return []
        return [p for unit in self.units.values() for p in unit.parameters if not self._is_cut(p)]

    def _part(self, p: Parameter) -> Dim:
        return -(-p.numel // self.ranks.size)

    @property
    def whole_bytes(self) -> Dim:
        """Bytes of what stays whole."""
        return sum(p.nbytes * p.count for p in self._small())

    def _gather(self, path: str, parameters: Sequence[Parameter] | None = None) -> None:
        """One message a weight of a unit, or of some of it, which is a view of what it is gathered in."""
        whole, gone = self.whole.setdefault(path, {}), path in self.gone
        wanted = self._used(path) if parameters is None else parameters
        missing = [p for p in wanted if p.name not in whole and (gone or self._is_cut(p))]
        if self.alone and not self.from_host:
            return
        for p in missing:
            whole[p.name] = self._gathered(p)
        self.gone.discard(path)
        if missing:
            wait_event(GATHER_COPY if self.alone else COMMUNICATION)

    def _gather_again(self, path: str, parameters: Sequence[Parameter]) -> None:
        """Of a unit without a trace, what was freed meanwhile."""
        for p in parameters:
            self.whole[path].pop(p.name, None)
        if parameters:
            self.gone.add(path)
            self._gather(path, parameters)

    def _gather_behind_recomputation(self, path: str) -> None:
        """Frozen weights go as the first module is through (`update_recompute_parameters`), and come again one by one.

        The first one backward, whose saved tensors have the block run again, needs its own no more. What the block
        saved as it ran again holds the memory of the others all the while, so that one more is there at a time.
        """
        parameters = self.units[path].parameters
        first = parameters[-1].name.rpartition(".")[0]
        again = [p for p in parameters if self._is_cut(p) and not (p.requires_grad or p.name.startswith(first))]
        for p in again:
            self._gathered(p)
        if again:
            wait_event(COMMUNICATION)

    @property
    def _words(self) -> list[Parameter]:
        """The weight of the embedding of the words."""
        return [p for p in self.units[ROOT].parameters if p.name.removesuffix(".weight").endswith(WORDS)]

    @property
    def _tied(self) -> bool:
        """Whether it is the head's, too."""
        return not any(p.name.startswith(HEAD) for p in self.units[ROOT].parameters)

    def _used(self, path: str) -> list[Parameter]:
        """What a forward pass uses of a unit; of an adapter that is off its layer looks at the first weight's dtype."""
        return [p for p in self.units[path].parameters if p.name not in self.seen.off or LOOKED_AT in p.name]

    def _free(self, path: str) -> None:
        """Behind a forward pass: what the trace says is not used again soon goes; without one all does."""
        for p in self.units[path].parameters:
            if not (self.stays and self.seen.backward):
                self.whole[path].pop(p.name, None)
        if not self.seen.forward:
            self.gone.add(path)

    @travelling
    def _gathered(self, p: Parameter) -> Tensor:
        part = self._part(p)
        if self.alone:  # `NoGatherHandle`
            return to_device(existing((part,), p.dtype), GATHER_COPY)
        whole, mine = empty(part * self.ranks.size, p.dtype), existing((part,), p.dtype)
        given = self._fetched(part, p.dtype) if self.from_host else existing((part,), p.dtype)
        record("cat.out", (given, mine), (mine,), runs=Run(GATHER_COPY) if self.from_host else MAIN)
        behind = (COMPUTE, GATHER_COPY) if self.from_host else (COMPUTE,)
        exchange("c10d::_allgather_base_", mine, whole, self.ranks, after=behind)
        return whole

    def _fetched(self, elements: Dim, dtype: str) -> Tensor:
        """From the host's memory; the host waits."""
        made = new_tensor((elements,), dtype)
        record("_to_copy", (existing((elements,), dtype),), (made,), zero_offload.BLOCKING, runs=Run(GATHER_COPY))
        return made

    def _before_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        (path,) = node.attrs
        if self.seen.backward:
            self._gather(path)
            if self.checkpoint == "block" and path != ROOT:
                self._gather_behind_recomputation(path)
            return tuple(grads)
        once, again = self._for_backward(path)
        self._gather(path, once)
        self._gather_again(path, again)
        return tuple(grads)

    def _for_backward(self, path: str) -> tuple[list[Parameter], list[Parameter]]:
        """What a unit needs backward that was not foreseen, and what of it is freed in between and gathered again.

        That is what a block has run again with, and the words that are the head's weight as well.
        """
        parameters, recomputes = self.units[path].parameters, self.checkpoint != "none"
        if path != ROOT:
            reentrant = self.checkpoint == "block-reentrant"
            first = "" if reentrant else parameters[-1].name.rpartition(".")[0]  # its backward has the block run again
            again = [p for p in parameters if (p.requires_grad if reentrant else not p.name.startswith(first))]
            return parameters, again if recomputes else []
        reached = [p for p in self._words if p.requires_grad or recomputes]
        if self._tied:
            return parameters, reached
        return [p for p in parameters if p not in self._words or p in reached], []

    def _behind_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        (path,) = node.attrs
        self._free_behind_backward(path)
        return tuple(grads)

    def _free_behind_backward(self, path: str) -> None:
        self.whole.pop(path, None)
        if not self.seen.backward:
            self.gone.add(path)

    # Gradients

    def _copy(self, p: Parameter, grad: Tensor) -> None:
        current = tape()
        current.part.host.gradients += 1
        self.ready.append(ReadyGradient(current.part, len(current.part.ops), p))
        with current.belonging_to("accumulation"):
            if decide(p.numel <= self.limit):
                in_bucket = existing(p.shape, grad.dtype)
                record("copy_", (in_bucket, grad), (in_bucket,), runs=Run(COMMUNICATION, (COMPUTE,)))
            if self.offloaded:
                return
            part = existing((self._part(p),), grad.dtype)
            total = existing((self._part(p),), grad.dtype)
            record("copy_" if self.first else "add_.Tensor", (total, part), (total,), runs=Run(COMMUNICATION))

    def _buckets(self, order: Sequence[Parameter]) -> list[tuple[int, tuple[Dim, ...]]]:
        """Buckets in their order, each with the number of the gradient that it goes out before; the last one too."""
        found: list[tuple[int, tuple[Dim, ...]]] = []
        held: list[Parameter] = []
        for i, p in enumerate(order):
            if held and decide(sum(h.numel for h in held) + p.numel > self.limit):
                found.append((i, tuple(self._part(h) for h in held)))
                held = []
            held.append(p)
        return [*found, (len(order), tuple(self._part(h) for h in held))]

    def _reduced(self, bucket: tuple[Dim, ...], dtype: str) -> list[Op]:
        """`reduce_scatter_coalesced`: the parts of each rank side by side, divided, reduced and scattered."""
        own, dtype = dtype, "fp32" if self.wide else dtype
        mine = (Spec(dtype, (sum(bucket),)),)
        whole = (Spec(dtype, (sum(bucket) * self.ranks.size,)),)
        size, part = whole[0].nbytes, mine[0].nbytes
        beside = Run(COMMUNICATION, (REDUCE,)) if self.offloaded else Run(COMMUNICATION)
        ops = []
        if own != dtype:
            ops += [cast_gradient(n * self.ranks.size, own, dtype) for n in bucket]
        ops += [Op("cat", whole, whole, size, size, owner="accumulation", runs=beside)] if len(bucket) > 1 else []
        ops.append(Op("div_.Tensor", whole, whole, size, size, owner="accumulation", runs=beside))
        if decide(self.ranks.size > 1):
            scattered = Attrs(ranks=self.ranks)
            ops.append(Op("c10d::_reduce_scatter_base_", whole, mine, size, part, attrs=scattered, runs=beside))
        if own != dtype:
            ops += [cast_gradient(n, dtype, own) for n in bucket]
        for elements in bucket if self.offloaded else ():
            ops += self._offloaded(Spec(dtype, (elements,)))
        return ops

    def _offloaded(self, mine: Spec) -> list[Op]:
        """A gradient's part joins the sum in the host's memory, and comes back at once; the last one's goes on."""
        ops = zero_offload.sum_of_micro_batches(mine, first=self.first)
        if self.first:
            ops.append(zero_offload.call("_to_copy", mine, mine, PINNED))
        if self.reduces:
            ops += [*zero_offload.norm_of(mine), *zero_offload.to_master(mine)]
        return ops
