"""FSDP2 (`torch.distributed.fsdp.fully_shard`), block by block, with units of what is before, behind and around them.

Every rank keeps a shard of each parameter, cut along its first dim. Before a block runs, forward and backward, its
parameters are gathered; behind it they are freed. Behind its backward its gradients are reduced and scattered. In
backward the block below is gathered while one computes. What a method freezes is gathered like all else, but has no
gradient to be reduced.

With `reshard_after_forward=False` what is gathered forward stays for the block's backward. On a mesh of replicas and
shards (HSDP) groups of ranks do all this, and a reduced shard of gradients goes across the groups, too, on another
communicator, which runs beside the next reduction.

Where the model is called several times before a backward pass (KTO), the lowest unit's backward gathers the last unit
of the call before, which nothing needs: the order of all calls is one (`post_forward_order`).

Streams as PyTorch has them: copies into what is gathered on one of their own, collectives behind one another (NCCL
keeps those of one communicator in order), all else on the compute stream.

With mixed precision what trains is kept in fp32, cast as it is gathered, and its gradients are reduced in 16 bits and
cast back; there is no autocast, and the loss is cast too (accelerate's policy). Where `reduce_dtype` is another dtype
than that of the gradients, they are cast as they are laid out to be reduced, or, where that waits for further
micro-batches, as they are summed. 4-bit weights that are stored in bytes stay whole on every rank. Since accelerate
1.15 the embedding has a unit of its own, the last norm and the head another, which stays gathered (not `fsdp2_blocks`).

Sources: torch 2.13, distributed/fsdp/_fully_shard/ (`_fsdp_param_group.py`, `_fsdp_collectives.py`, `_fsdp_state.py`).
Without synchronisation in all micro-batches but the last: accelerate's `no_sync`. Offloaded, shards come from the
host's memory one by one before each gathering, gradients go there one by one, and the host updates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ...program.dims import Dim, decide
from ...program.dtypes import ITEMSIZE
from ...program.op import STRIDED, Attrs
from ...program.part import Part
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, COMPUTE, GATHER_COPY, REDUCE, Run
from ...tape.autograd import differentiate
from ...tape.core import hooked, new_tensor, record, region, tape
from ...tape.pointwise import cast
from ...tape.shape import narrow
from ...tape.tensor import Grads, Node, Parameter, Tensor
from ...tape.transfers import functional_collective
from .collectives import ACROSS, empty, exchange, in_buffer, set_event, travelling, wait_event
from .gathered import Gathered
from .offload import keep_on_host, to_host
from .sharded import Sharded
from .units import HEAD, ROOT, ShardedUnit, drop_gradient, of_all_layers, predivided, redistribute

MUCH_PADDED = 1.2
PADDED = (
    "FSDP2 cuts weights along their first dim, of stacked experts their number, and pads what more ranks than these "
    "get: a layer is gathered as {:.1f} times its weights (--shard-group of as many GPUs as experts)"
)
COPIED, SCATTERED, REDUCED = "copied out", "scattered", "reduced"  # events


class FullyShard(Sharded):
    """The hooks of FSDP2 around the blocks of a model and around the whole.

    Attributes:
        output: the dtype that the model's output is cast to (`output_dtype`), None: it stays as it is.
        waiting: sums of gradients in `reduce_dtype`, which wait whole.
    """

    def __init__(
        self,
        units: Sequence[ShardedUnit],
        ranks: Ranks,
        output: str | None,
        frozen: "FullyShard | None" = None,
        across: Ranks | None = None,
        *,
        offloads: bool = False,
        reduce_dtype: str | None = None,
    ) -> None:
        super().__init__(ranks, across, frozen, offloads=offloads, reduce_dtype=reduce_dtype)
        self.output = output
        self.waiting: dict[Parameter, Tensor] = {}
        self.units = {unit.path: Gathered(unit, offloads) for unit in units}
        keep_on_host(shard for unit in units for shard in unit.shards if offloads)
        self.ends = {unit.last: unit.path for unit in units}
        self.copied: Tensor | None = None  # what was copied out last, until the next one is
        self.reducing: Tensor | None = None  # what is being reduced, until the next one is
        self.summed: list[Tensor] = []  # what was reduced across groups and is no gradient, to the end
        self.within: list[str] = []  # units whose last module has not run yet
        self.last: str | None = None  # the unit whose forward pass was the last one
        self.before: str | None = None  # that of the pass before, if there are several before a backward pass

    @property
    def kept_bytes(self) -> Dim:
        """Bytes of a frozen model that are there from step to step beside its shards: what no backward pass frees."""
        staying = (state.unit for state in self.units.values() if state.unit.stays and state.unit.parameters)
        alike = ((unit, 1 if unit.path == ROOT else unit.parameters[0].count) for unit in staying)
        return sum(count * sum(unit.numels) * ITEMSIZE[unit.dtype] * self.ranks.size for unit, count in alike)

    @property
    def notes(self) -> Sequence[str]:
        """That shards are padded by much: stacked experts are cut by experts, and of fewer than ranks some get none."""
        units = [state.unit for state in self.units.values()]
        gathered = sum(sum(unit.numels) * ITEMSIZE[unit.dtype] for unit in units) * self.ranks.size
        held = sum(p.nbytes for unit in units for p in unit.parameters)
        most = np.max(gathered / held) if units else 1.0
        return [PADDED.format(most)] if most > MUCH_PADDED else []

    # What the recording of a step calls

    @hooked
    def begin(self) -> None:
        """Before the forward pass: the root's parameters are gathered (`_root_pre_forward`, `pre_forward`)."""
        if tape().grad_enabled:
            self.ran.clear()
            self.done.clear()
        self.before = self.last
        wait_event(COMPUTE, GATHER_COPY)
        self._unshard(self.units[ROOT], forward=True)

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block between its hooks."""
        part = tape().part
        out = region(run)(self._enter(path, x))
        if isinstance(out, tuple):
            return (self._leave(path, out[0], part), *out[1:])
        return self._leave(path, out, part)

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The embedding, the last norm or the head; of those that are one unit the first enters, the last leaves."""
        out = run(self._enter(path, x) if path in self.units else x)
        return self._leave(self.ends[path], out, tape().part) if path in self.ends else out

    def weight(self, p: Parameter) -> Tensor:
        """What a fused loss reads of the head's weight: where no module has gathered it, `full_tensor` of its shard."""
        unit = self.units[HEAD].unit if HEAD in self.units else None
        if unit is None or p not in unit.parameters:
            return p
        if p.requires_grad or self.offloads:
            raise UserError(
                "kernels: a fused loss that gathers a head that trains, or is the host's, is not modelled; use torch"
            )
        shard, ranks = dict(unit.pairs)[p], self.ranks
        rows = (shard.shape[0] * ranks.size, *shard.shape[1:])
        name = "_c10d_functional::all_gather_into_tensor"
        whole = functional_collective(name, shard, rows, ranks, on=COMMUNICATION)
        return narrow(whole, 0, p.shape[0]) if decide(rows[0] > p.shape[0]) else whole

    def _enter(self, path: str, x: Tensor) -> Tensor:
        self._unshard(self.units[path], forward=True)
        if not tape().recomputing:
            self.within.append(path)
        node = differentiate("RegisterPostBackwardFunctionBackward", (x,), self._post_backward, (path,))
        if node is None:
            return x
        x = x.alias()
        node.produces(x)
        return x

    def _leave(self, path: str, out: Tensor, part: Part) -> Tensor:
        self._behind(path, part)
        return self._before_backward(path, out)

    def _behind(self, path: str, part: Part) -> None:
        """`post_forward`: the parameters go or stay; in a recomputation they stay, and the order of units is known."""
        if tape().recomputing:
            return
        self._reshard(self.units[path])
        self.last = path
        self.within = [name for name in self.within if name != path]
        if tape().grad_enabled:
            self.ran.append((path, part))

    @hooked
    def _reshard(self, state: Gathered) -> None:
        if not state.unit.stays:
            state.whole.clear()

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Behind the forward pass: the root's parameters go or stay; its hook before backward.

        A unit ends here, too, whose last module never runs: a head whose weight a fused loss reads
        (`_force_complete_incomplete_states`).
        """
        self._forget_copied()
        left_open = self.within[::-1]
        for path in (ROOT, *left_open):
            if self.units[path].unit.parameters:
                self._behind(path, tape().part)
        for path in (*left_open, ROOT):  # the root's hook is the first to run
            outputs = [self._before_backward(path, output) for output in outputs]
        return [cast(output, self.output) for output in outputs] if self.output else outputs

    @hooked
    def end_of_backward(self) -> None:
        """Units whose input needed no gradient, the root, and the wait for all that is reduced."""
        self._reduce_rest((ROOT, *self.units))  # as modules are found
        wait_event(REDUCED)
        if self.offloads and self.reduces:
            record("cuda::synchronize_event", (), (), Attrs(host=True, sync=True), runs=Run(REDUCE))
        self.reducing = None
        of_all_layers(self.summed)
        self.summed.clear()
        self.before = self.last = None
        for state in self.units.values():
            state.coming = None  # what was gathered for a block that no gradient reaches

    def _reduce_rest(self, paths: Sequence[str]) -> None:
        for path in paths:
            if path not in self.done:
                of_all_layers(self.units[path].whole)
                self._reduce(path, self.units[path])

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """Shards in the place of whole parameters."""
        of_reference = self.frozen.units.values() if self.frozen is not None else ()
        shards = {id(p): s for state in (*self.units.values(), *of_reference) for p, s in state.unit.pairs}
        return [shards.get(id(p), p) for p in parameters]

    # Forward and before backward

    @hooked
    def _pre_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        (path,) = node.attrs
        place = next((i for i, (name, _) in enumerate(self.ran) if name == path), 0)
        self._unshard(self.units[path], forward=False)
        if place:
            self.units[self.ran[place - 1][0]].gather(self.ranks, self._next(place))
        elif self.before is not None:  # the unit before in the order of all passes, which nothing needs any more
            self.units[self.before].gather(self.ranks)
        return tuple(grads)

    def _next(self, place: int) -> ShardedUnit:
        """The unit whose backward follows: in a part that repeats, the highest one of the same part is next."""
        path, part = self.ran[place]
        (below, lower) = self.ran[place - 1]
        if path == ROOT or lower is part or part.repeat == 1:
            return self.units[below].unit
        return self.units[next(name for name, of in reversed(self.ran) if of is part)].unit

    @hooked
    def _unshard(self, state: Gathered, *, forward: bool) -> None:
        """`unshard` unless it was prefetched, and `wait_for_unshard`: copies out into whole parameters."""
        if state.whole or not state.unit.parameters:
            return
        tape().part.host.units += 1
        state.gather(self.ranks)
        before = self.copied  # a local variable holds it up to the end (`prev_all_gather_state`)
        if forward:
            self._forget_copied()
        coming = state.copied_out(self.ranks)
        if forward:
            self.copied = coming
            set_event(COPIED, COMPUTE)
        else:
            wait_event(COMPUTE, GATHER_COPY)
        del before, coming

    @hooked
    def _forget_copied(self) -> None:
        """What was copied out before may be overwritten once that is done."""
        if self.copied is not None:
            wait_event(COPIED, GATHER_COPY)
            self.copied = None

    # Behind backward

    @hooked
    def _post_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        (path,) = node.attrs
        self._reduce(path, self.units[path])
        return tuple(grads)

    @travelling
    def _reduce(self, path: str, state: Gathered) -> None:
        """`post_backward`: the parameters go, the gradients become shards."""
        self.done.add(path)
        unit = state.unit
        self._accumulate(unit.parameters)
        state.whole.clear()
        if not self.reduces:
            self._cast_to_wait(unit.parameters)
            return
        trained = [(p, s) for p, s in unit.pairs if p.grad is not None or p in self.waiting]
        if not trained:
            return
        for p, _ in trained:
            redistribute(p)
        wait_event(REDUCED if self.across is None else SCATTERED)
        self.reducing = None
        dtype = self.reduce_dtype or trained[0][0].dtype
        numel = sum(shard.numel for _, shard in trained)
        given = empty(numel * self.ranks.size, dtype)
        grads = [self._whole_gradient(p) for p, _ in trained]
        record("fsdp::chunk_cat", grads, (in_buffer(given, (self.ranks.size, numel), dtype),), STRIDED)
        del grads
        tape().part.host.gradients += len(trained)
        for p, _ in trained:
            drop_gradient(p)
        self.reducing = given
        reduced = empty(numel, dtype)
        everyone = self.ranks.size * (1 if self.across is None else self.across.size)
        small = dtype == "fp16"  # of a small range, so half is divided before (`_get_gradient_divide_factors`)
        if small:
            record("div_.Tensor", (given,), (given,), runs=Run(REDUCE, after=(COMPUTE,)))
        copies = self.offloads and self.across is None
        after = (COMPUTE, REDUCE) if copies or small else (COMPUTE,)  # NCCL waits for the stream that it is called on
        exchange("c10d::_reduce_scatter_base_", given, reduced, self.ranks, after)
        summed, kept = COMMUNICATION, trained[0][1].dtype
        adds = trained[0][1].grad is not None  # to that of micro-batches before
        if self.across is not None:
            set_event(SCATTERED, COMMUNICATION)
            exchange("c10d::allreduce_", reduced, reduced, self.across, (COMMUNICATION,), on=ACROSS)
            summed = ACROSS
            if self.offloads or adds or kept != dtype:  # `_all_reduce_state`
                self.summed.append(reduced)
        divides = small and decide(everyone > predivided(everyone))
        if divides:
            record("div_.Tensor", (reduced,), (reduced,), runs=Run(REDUCE, after=(summed,)))
        if kept != dtype:
            low, reduced = reduced, new_tensor((numel,), kept)
            record("_to_copy", (low,), (reduced,), runs=Run(REDUCE, after=(summed,)))
            del low
        behind = Run(REDUCE, after=(summed,))
        for _, shard in trained:
            shard.used = True
            grad = Tensor(shard.shape, kept, shard.strides, shard.numel, reduced.storage)
            if shard.grad is not None:
                record("add_.Tensor", (shard.grad, grad), (shard.grad,), runs=behind)
            else:
                shard.grad = to_host(grad, behind) if self.offloads else grad
        set_event(REDUCED, REDUCE if self.offloads or divides or adds or kept != dtype else summed)
        if not (self.offloads or adds):
            reduced.storage.copies = trained[0][0].count

    def _whole_gradient(self, p: Parameter) -> Tensor:
        grad = self.waiting.pop(p, p.grad)
        assert grad is not None
        return grad

    def _accumulate(self, parameters: Sequence[Parameter]) -> None:
        """`accumulate_unsharded_grad_if_needed`: onto what waits."""
        for p in parameters:
            if p in self.waiting and p.grad is not None:
                record("add_.Tensor", (self.waiting[p], p.grad), (self.waiting[p],))
                drop_gradient(p)

    def _cast_to_wait(self, parameters: Sequence[Parameter]) -> None:
        """`to_accumulated_grad_if_needed`: a first gradient that waits does so in the dtype that it is reduced in."""
        for p in parameters:
            if self.reduce_dtype is not None and p.grad is not None and p.grad.dtype != self.reduce_dtype:
                self.waiting[p] = waits = new_tensor(p.grad.shape, self.reduce_dtype)
                record("_to_copy", (p.grad,), (waits,))
                del waits
                drop_gradient(p)
