"""FSDP1 (`torch.distributed.fsdp.FullyShardedDataParallel`), block by block and the whole around them.

The parameters of a unit are views of one flat parameter, of which every rank keeps a part: gathering copies nothing,
but the gradients of the views are joined before they are reduced. The host is at most two gathered units ahead of the
device (`limit_all_gathers`): it waits until the unit before the last one is free.

What peft trains in a block are units of their own (its `fsdp_auto_wrap_policy` wraps every leaf module with a weight
that trains), since a flat parameter cannot be frozen in part: two tiny gathers forward and backward for an adapter, and
two tiny reductions. With the host so close behind the device, the gather of the next block can hardly start before the
last adapter of this one: this is what makes LoRA slow under FSDP1.

What SHARD_GRAD_OP gathers stays until gradients are reduced, over all micro-batches of a step. Under HYBRID_SHARD
groups of ranks do all this, and reduced gradients are summed across groups.

With mixed precision (accelerate's `set_mixed_precision`) what trains is kept in fp32 and cast to be gathered, and
gradients are reduced in 16 bits, or in `reduce_dtype`, and cast back, all under autocast. An adapter still casts its
input to the dtype that its weight is kept in; the casts of the weight itself and of its gradient, which FSDP makes of a
rank's part, are autocast's here.

Offloaded (`CPUOffload`), a unit's part comes from the host's memory before it is gathered, its gradient goes there, and
the host updates.

Not call by call like FSDP2: an adapter's unit is gathered where its weight is used and freed at once, and its backward
is where its gradient is complete.

Sources: torch 2.13, distributed/fsdp/_runtime_utils.py (`_unshard`, `_pre_backward_hook`, `_reduce_grad`),
_limiter_utils.py; peft 0.21, utils/other.py (`fsdp_auto_wrap_policy`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...optimizers.parts.update import existing
from ...program.dims import Dim, decide
from ...program.dtypes import ITEMSIZE
from ...program.op import STRIDED, Attrs
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, COMPUTE, GATHER_COPY, REDUCE, Run
from ...tape.autograd import differentiate
from ...tape.core import new_tensor, record, tape
from ...tape.tensor import Grads, Node, Parameter, Tensor
from .collectives import ACROSS, exchange, set_event, travelling, wait_event
from .offload import keep_on_host, to_device, to_host
from .sharded import Sharded
from .units import ROOT, ShardedUnit, of_all_layers, predivided

GATHERED, REDUCED = "gathered", "reduced"  # events
FREED = ("freed", "freed before that")  # when the last units were free, the latest first


@dataclass(eq=False)
class FlatUnit:
    """A flat parameter: those of a block, of one adapter's module, or of what is outside of blocks.

    Attributes:
        dtype: what is gathered.
        kept: a rank's part; in fp32 with mixed precision if it trains, and cast to be gathered.
        trained: whether it has a gradient, which is of the whole.
        shards: what a rank keeps: its part of what trains, and of what does not.
        whole: its memory while it is gathered.
        prefetched: whether that was done for the backward pass that comes.
        offloaded: whether a rank's part lives in the host's memory.
    """

    path: str
    parameters: list[Parameter]
    ranks: Ranks
    dtype: str
    kept: str
    shards: list[Parameter] = field(default_factory=list)
    whole: Tensor | None = None
    prefetched: bool = False
    offloaded: bool = False

    def __post_init__(self) -> None:
        for trains in (True, False):
            those = [p for p in self.parameters if p.requires_grad is trains]
            if those:
                self.shards.append(flat_shard(self.path, those, self.ranks.size, self.kept))
        keep_on_host(shard for shard in self.shards if self.offloaded)

    @property
    def trained(self) -> bool:
        """Whether any of it trains."""
        return any(p.requires_grad for p in self.parameters)

    @property
    def by_autocast(self) -> bool:
        """Whether autocast's calls stand for FSDP's casts: of an adapter, which looks at its own dtype."""
        return self.dtype != self.parameters[0].dtype

    @property
    def casts(self) -> bool:
        """Whether FSDP casts what is gathered."""
        return self.kept != self.dtype and not self.by_autocast

    @property
    def part(self) -> Dim:
        """Elements of a rank's part, padding included; all its parameters have one dtype."""
        return -(-sum(p.nbytes for p in self.parameters) // (ITEMSIZE[self.parameters[0].dtype] * self.ranks.size))

    @travelling
    def gather(self) -> None:
        """`_unshard`: the host waits for the limiter, then all parts are gathered, unless they still are.

        What is offloaded comes from the host in any case (`pre_unshard`).
        """
        record("fsdp::limit_all_gathers", (), (), Attrs(host=True, sync=True), runs=Run(FREED[1]))
        mine = existing((self.part,), self.kept if self.casts else self.dtype)
        if self.offloaded:
            mine = to_device(mine, GATHER_COPY)
        if self.whole is not None:
            return
        if self.casts:  # `_use_low_precision_shard`
            kept, mine = mine, new_tensor((self.part,), self.dtype)
            record("copy_", (mine, kept), (mine,), runs=Run(GATHER_COPY))
        self.whole = new_tensor((self.part * self.ranks.size,), self.dtype)
        after = (GATHER_COPY,) if self.offloaded or self.casts else ()
        exchange("c10d::_allgather_base_", mine, self.whole, self.ranks, after=after)
        set_event(GATHERED, COMMUNICATION)

    def leave(self, *, frees: bool) -> None:
        """`_reshard`: its memory may be used for the unit after the next one, once what was queued is done."""
        self.prefetched = False
        if not frees or self.whole is None:
            return
        self.whole = None
        set_event(FREED[1], FREED[0])
        set_event(FREED[0], COMPUTE)


class FlatShard(Sharded):
    """The hooks of FSDP1 around the blocks of a model, its adapters and the whole.

    Attributes:
        keeps: whether what is gathered stays up to the backward pass that reduces gradients (SHARD_GRAD_OP).
        holds: whether what goes into a frozen block, and its gradient, stay to the end of the backward pass: where
            reentrant checkpoints lie around units, the hook that frees one in its recomputation holds both
            (`_register_post_backward_reshard_only_hook`).
        held: those.

    Args:
        amp: the dtype of mixed precision.
    """

    def __init__(
        self, units: Sequence[ShardedUnit], ranks: Ranks, across: Ranks | None = None, *,
        offloads: bool = False, keeps: bool = False, holds: bool = False, frozen: "FlatShard | None" = None,
        amp: str | None = None, reduce_dtype: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(ranks, across, frozen, offloads=offloads, reduce_dtype=reduce_dtype)
        self.holds = holds
        self.held: list[Tensor] = []
        self.keeps = keeps
        self.units: dict[str, FlatUnit] = {}
        self.of_adapter: dict[int, FlatUnit] = {}
        self.idle: list[FlatUnit] = []  # blocks that no pass runs, as an encoder's of images beside text alone
        for unit in units:
            nested = [p for p in unit.parameters if p.requires_grad and p.kind == "adapter" and unit.path != ROOT]
            if len(nested) == len(unit.parameters):
                nested = []
            kept = {id(p): shard.dtype for p, shard in unit.pairs}
            for p in nested:
                sent = amp or p.dtype
                self.of_adapter[id(p)] = FlatUnit(p.name, [p], ranks, sent, kept[id(p)], offloaded=offloads)
            idle = [p for p in unit.parameters if unit.path == ROOT and p.count > 1]  # like others, so in blocks
            for key in dict.fromkeys((p.count, p.requires_grad) for p in idle):
                those = [p for p in idle if (p.count, p.requires_grad) == key]
                own = (those[0].dtype, kept[id(those[0])])
                self.idle.append(FlatUnit(those[0].name, those, ranks, *own, offloaded=offloads))
            left = [p for p in unit.parameters if p not in nested and p not in idle]
            # if any trains, all are kept so
            first = next((p for p in left if p.requires_grad), left[0] if left else None)
            dtypes = (first.dtype, kept[id(first)]) if first is not None else ("", "")
            self.units[unit.path] = FlatUnit(unit.path, left, ranks, *dtypes, offloaded=offloads)

    @property
    def kept_bytes(self) -> Dim:
        """Bytes of a frozen model that are there from step to step beside its parts."""
        staying = (unit for path, unit in self.units.items() if unit.parameters and (self.keeps or path == ROOT))
        return sum(u.part * ITEMSIZE[u.dtype] * self.ranks.size * u.parameters[0].count for u in staying)

    def begin(self) -> None:
        """The root is gathered, unless it still is; hooks follow adapters and gradients."""
        if tape().grad_enabled:
            self.ran.clear()
            self.done.clear()
        tape().after_gradient = self._reduce_adapter
        wait_event(COMPUTE, COMMUNICATION)
        self._unshard(self.units[ROOT])

    def weight(self, p: Parameter) -> Tensor:
        """An adapter's module is about to run."""
        unit = self.of_adapter.get(id(p))
        if unit is not None:
            self._unshard(unit)
            unit.leave(frees=not self.keeps)
        return p

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block between its hooks."""
        unit, part = self.units[path], tape().part
        self._unshard(unit)
        node = differentiate("post_backward", (x,), self._post_backward, (path,))
        if node is not None:
            self._hold(unit, x)
            x = x.alias()
            node.produces(x)
        out = run(x)
        unit.leave(frees=not self.keeps)
        if tape().grad_enabled:
            self.ran.append((path, part))
        if isinstance(out, tuple):
            return (self._before_backward(path, out[0]), *out[1:])
        return self._before_backward(path, out)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The root stays gathered until its backward is done."""
        if tape().grad_enabled:
            self.ran.append((ROOT, tape().part))
        return [self._before_backward(ROOT, output) for output in outputs]

    def end_of_backward(self) -> None:
        """Units whose input needed no gradient, the root, and the wait for all that is reduced."""
        kept = [*self.units.values(), *self.of_adapter.values()]  # of blocks and adapters that no gradient reached
        of_all_layers(unit.whole for unit in kept if unit.whole is not None and self.reduces)
        for path in (*self.units,):
            if path not in self.done:
                self._reduce(path, self.units[path])
        for unit in (*self.of_adapter.values(), *filter(self._waits, self.units.values())):
            self._free(unit)
        tape().after_gradient = None
        of_all_layers(self.held)
        self.held.clear()
        wait_event(REDUCED)
        if self.offloads:  # `_post_backward_final_callback`
            record("cuda::synchronize_stream", (), (), Attrs(host=True, sync=True), runs=Run(COMPUTE))

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """Flat parts in the place of parameters; scales of packed weights stay on every rank."""
        of_reference = self.frozen.units.values() if self.frozen is not None else ()
        units = (*self.units.values(), *self.of_adapter.values(), *self.idle, *of_reference)
        known = {id(p) for unit in units for p in unit.parameters}
        shards = [s for unit in units for s in unit.shards]
        return [*shards, *(p for p in parameters if id(p) not in known)]

    def _unshard(self, unit: FlatUnit) -> None:
        if unit.parameters:
            tape().part.host.units += 1
            if not unit.prefetched:
                unit.gather()
            wait_event(GATHERED)

    def _free(self, unit: FlatUnit) -> None:
        """`_post_backward_reshard`: what was kept stays for the next micro-batch (`_should_free_in_backward`)."""
        unit.leave(frees=self.reduces or not self.keeps)

    def _pre_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        """Its unit, and then the one whose backward follows (`BackwardPrefetch.BACKWARD_PRE`)."""
        (path,) = node.attrs
        place = next(i for i, (name, _) in enumerate(self.ran) if name == path)
        self._unshard(self.units[path])
        below = self.units[self.ran[place - 1][0]] if place else None
        if below is not None and below.parameters:
            below.gather()
            below.prefetched = True
        return tuple(grads)

    def _post_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        (path,) = node.attrs
        self._reduce(path, self.units[path])
        self._hold(self.units[path], *grads)
        return tuple(grads)

    def _waits(self, unit: FlatUnit) -> bool:
        """Whether it is freed at the end of the backward pass alone (`_catch_all_reshard`)."""
        return self.holds and self.keeps and not unit.trained

    def _hold(self, unit: FlatUnit, *those: Tensor | None) -> None:
        if self.holds and not unit.trained:
            self.held += [t for t in those if t is not None]

    @travelling
    def _reduce(self, path: str, unit: FlatUnit) -> None:
        """`_post_backward_hook`: the unit is freed, its gradients are joined, reduced and scattered."""
        self.done.add(path)
        if not self._waits(unit):
            self._free(unit)
        grads = [p.grad for p in unit.parameters if p.grad is not None]
        if not (self.reduces and grads):
            return
        flat = new_tensor((unit.part * self.ranks.size,), unit.dtype)
        record("cat", grads, (flat,), STRIDED)
        del grads
        tape().part.host.gradients += len(unit.parameters)
        for p in unit.parameters:
            if p.grad is not None:
                p.grad.storage.copies = 1
                p.grad = None
        self._scattered(unit, flat)

    def _reduce_adapter(self, p: Parameter) -> None:
        """The gradient of an adapter is complete: its unit is gathered and freed again, and reduced."""
        unit = self.of_adapter.get(id(p))
        if unit is None:
            return
        self._unshard(unit)
        self._free(unit)
        if not self.reduces:
            return
        assert p.grad is not None
        flat, p.grad.storage.copies = p.grad, 1
        p.grad = None
        self._scattered(unit, flat)

    @travelling
    def _scattered(self, unit: FlatUnit, flat: Tensor) -> None:
        """`_reduce_grad`: divided by one half of the ranks before, by the other behind the reduction."""
        everyone = self.ranks.size * (1 if self.across is None else self.across.size)
        before = predivided(everyone)
        on_reduce = Run(REDUCE, after=(COMPUTE,))
        dtype = self.reduce_dtype or unit.dtype
        if flat.dtype != dtype and unit.by_autocast:
            flat = existing((flat.numel,), dtype)
        elif flat.dtype != dtype:  # `_post_backward_hook`
            computed, flat = flat, new_tensor((flat.numel,), dtype)
            record("_to_copy", (computed,), (flat,), runs=on_reduce)
            del computed
        if decide(before > 1):
            record("div_.Tensor", (flat,), (flat,), runs=on_reduce)
        mine = new_tensor((unit.part,), flat.dtype)
        exchange("c10d::_reduce_scatter_base_", flat, mine, self.ranks, after=(COMPUTE, REDUCE))
        summed = COMMUNICATION
        if self.across is not None:
            exchange("c10d::allreduce_", mine, mine, self.across, after=(COMMUNICATION,), on=ACROSS)
            summed = ACROSS
        if decide(everyone > before):
            record("div_.Tensor", (mine,), (mine,), runs=Run(REDUCE, after=(summed,)))
        casts = unit.kept != dtype and not unit.by_autocast
        if casts:  # `_cast_grad_to_param_dtype`
            low, mine = mine, new_tensor((unit.part,), unit.kept)
            record("_to_copy", (low,), (mine,), runs=Run(REDUCE, after=(summed,)))
            del low
        elif unit.kept != dtype:
            mine = new_tensor((unit.part,), unit.kept)
        if self.offloads:
            shard = unit.shards[0]
            shard.used, shard.grad = True, to_host(mine, Run(REDUCE, after=(summed,)))
            set_event(REDUCED, REDUCE)
            return
        shard = unit.shards[0]
        shard.used = True
        if shard.grad is not None:  # of micro-batches before (`_accumulate_sharded_grad`)
            record("add_.Tensor", (shard.grad, mine), (shard.grad,), runs=Run(REDUCE, after=(summed,)))
            set_event(REDUCED, REDUCE)
            return
        set_event(REDUCED, REDUCE if casts else summed)
        mine.storage.copies = unit.parameters[0].count
        shard.grad = Tensor(shard.shape, shard.dtype, shard.strides, shard.numel, mine.storage)


def flat_shard(path: str, parameters: list[Parameter], ranks: Dim, kept: str) -> Parameter:
    """A rank's part of some parameters behind one another, in the dtype that it is kept in."""
    first = parameters[0]
    nbytes = sum(p.nbytes for p in parameters)
    shape = (-(-nbytes // (ITEMSIZE[first.dtype] * ranks)),)
    shard = Parameter(path or "root", shape, kept, kind=first.kind, trainable=first.requires_grad)
    shard.elements = sum(p.elements for p in parameters)
    shard.count, shard.part = first.count, first.part
    return shard
