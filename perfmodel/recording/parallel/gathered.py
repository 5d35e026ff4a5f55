"""A unit of FSDP2 as it is on a rank now: its shards gathered, copied out, or neither (see `fsdp2`)."""

from dataclasses import dataclass, field

from ...program.dims import Dim
from ...program.op import STRIDED
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, GATHER_COPY, Run
from ...tape.core import new_tensor, record
from ...tape.tensor import Parameter, Tensor
from .collectives import empty, exchange, in_buffer, set_event, travelling
from .offload import to_device
from .units import ShardedUnit

GATHERED = "gathered"  # the event


@dataclass(eq=False)
class Gathered:
    """A unit as it is on a rank now.

    Attributes:
        offloaded: whether its shards live in the host's memory.
        whole: its parameters' memory while they are gathered.
        coming: what is gathered but not copied out yet.
        event: what its copy waits for.
    """

    unit: ShardedUnit
    offloaded: bool = False
    whole: list[Tensor] = field(default_factory=list)
    coming: Tensor | None = None
    event: str = GATHERED

    @travelling
    def gather(self, ranks: Ranks, like: ShardedUnit | None = None, on: str = GATHER_COPY) -> None:
        """`unshard`: copies into one buffer on a stream, and the all-gather; of a unit that is like this one, if it is
        given.
        """
        unit = like or self.unit
        if self.whole or self.coming is not None or not unit.parameters:
            return
        dtype, numels = unit.dtype, unit.numels
        flat = None if self.offloaded else self._cast(unit, on)
        sent = [
            self._moved(p, shard, n, dtype)
            if self.offloaded
            else in_buffer(shard if p.dtype == shard.dtype else flat, (n,), dtype)
            for (p, shard), n in zip(unit.pairs, numels, strict=True)
        ]
        self.coming = into = empty(sum(numels) * ranks.size, dtype)
        mine = in_buffer(into, (sum(numels),), dtype)
        record("fsdp::all_gather_copy_in", sent, (mine,), runs=Run(on))
        del sent, flat
        exchange("c10d::_allgather_base_", mine, into, ranks, (on,))
        set_event(self.event, COMMUNICATION)

    @travelling
    def copied_out(self, ranks: Ranks) -> Tensor:
        """`foreach_all_gather_copy_out`: whole parameters of what came; returns the buffer that it came in."""
        unit, coming = self.unit, self.coming
        assert coming is not None
        self.coming = None
        self.whole = self.allocated(ranks)
        rows = [in_buffer(w, (ranks.size, n), unit.dtype) for w, n in zip(self.whole, unit.numels, strict=True)]
        buffer = in_buffer(coming, (ranks.size, sum(unit.numels)), unit.dtype)
        record("fsdp::split_with_sizes_copy", (buffer,), rows, STRIDED, runs=Run(after=(self.event,)))
        return coming

    def allocated(self, ranks: Ranks) -> list[Tensor]:
        """Memory of whole parameters."""
        return [new_tensor((ranks.size, shard.numel), p.dtype) for p, shard in self.unit.pairs]

    def _moved(self, p: Parameter, shard: Parameter, n: Dim, dtype: str) -> Tensor:
        """A shard from the host's memory, in the dtype that it is used in."""
        moved = to_device(in_buffer(shard, (shard.numel,), shard.dtype), GATHER_COPY)
        if p.dtype != shard.dtype:
            kept, moved = moved, new_tensor((shard.numel,), p.dtype)
            record("_to_copy", (kept,), (moved,), runs=Run(GATHER_COPY))
        return in_buffer(moved, (n,), dtype)

    def _cast(self, unit: ShardedUnit, on: str) -> Tensor | None:
        """A buffer with what is kept in another dtype, in the one that it is used in."""
        moved = unit.cast
        if not moved:
            return None
        dtype = moved[0][0].dtype
        flat = empty(sum(shard.numel for _, shard in moved), dtype)
        pieces = [in_buffer(flat, (shard.numel,), dtype) for _, shard in moved]
        kept = [in_buffer(shard, (shard.numel,), shard.dtype) for _, shard in moved]
        record("_foreach_copy_", [*pieces, *kept], pieces, runs=Run(on))
        return flat
