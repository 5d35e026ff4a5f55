"""What a step asks of any device: what is known of it before a device prices its calls."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..architectures.base import Architecture
from ..calls import costs
from ..calls.collectives import KIND_OF
from ..calls.table import row
from ..devices.host import HostCalls
from ..methods.parts.base import Method
from ..methods.parts.periodic import PeriodicOps
from ..program.dims import Dim, summed
from ..program.op import Op
from ..program.part import PHASES, Group, Part
from ..program.ranks import Ranks
from ..program.streams import Run
from ..recording.reuse import Shared, recalled
from ..recording.step import Step
from ..setup import Setup
from ..values import immutable
from . import intervals
from .memory import Memory

Phases = dict[str, Any]  # forward, backward, optimizer, total


class CallCost(NamedTuple):
    """What one op takes, whatever part it runs in.

    Attributes:
        read, written: bytes.
        component: of `intervals`, what prices it; empty for a view.
        waits: whether the host waits for the device.
    """

    flops: Dim = 0
    read: Dim = 0
    written: Dim = 0
    kernels: Dim = 0
    component: str = ""
    waits: bool = False

    @classmethod
    def of(cls, op: Op) -> "CallCost":
        """Work it out."""
        if op.view:
            return VIEW
        component = intervals.component(costs.kind(op), costs.operand_dtype(op))
        waits = costs.synchronises(op)
        return cls(costs.flops(op), op.bytes_read, op.bytes_written, costs.kernels(op), component, waits)


VIEW = CallCost()


def counts(part: Part, calls: Sequence[CallCost] | None = None) -> dict[str, Dim]:
    """What one run of a part takes.

    Args:
        calls: of its ops, if they are known.
    """
    calls = calls or [CallCost.of(op) for op in part.ops]
    own = [call for call in calls if call.component]
    return {
        "flops": summed([call.flops for call in own]),
        "recomputed": summed([call.flops for op, call in zip(part.ops, calls, strict=True) if op.recompute]),
        "bytes": summed([x for call in own for x in (call.read, call.written)]),
        "kernels": summed([call.kernels for call in own]),
        "dispatches": len(own),
    }


class PartWork(NamedTuple):
    """What is known of one run of a part but for the seconds of its calls.

    Attributes:
        host: what the host sees of it.
        runs: where its ops run, None if all do on the compute stream.
        waits: places of ops that the host waits for.
        cores: which ops the host's cores do, None if none.
        components: of `intervals`, those that price its ops, in the order in which they come.
        component: of each op its place among them; -1 for views.
        together: places of its ops but views, those of a component in a row.
        starts: where among them each component begins.
    """

    host: HostCalls
    runs: list[Run] | None
    waits: tuple[int, ...]
    cores: np.ndarray | None
    components: tuple[str, ...]
    component: np.ndarray
    together: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, part: Part, calls: Sequence[CallCost] | None = None) -> "PartWork":
        """Look at a part; `calls` are of its ops, if they are known."""
        calls = calls or [CallCost.of(op) for op in part.ops]
        places: dict[str, int] = {"": -1}
        component = np.array([places.setdefault(call.component, len(places) - 1) for call in calls], dtype=np.intp)
        waits = tuple([i for i, call in enumerate(calls) if call.waits])
        together = np.argsort(component, kind="stable")[np.count_nonzero(component < 0) :]
        starts = np.searchsorted(component[together], np.arange(len(places) - 1))
        cores = np.array([op.attrs.cores for op in part.ops], dtype=bool)
        of_host = cores if cores.any() else None
        return cls(HostCalls.of(part), part.runs, waits, of_host, tuple(places)[1:], component, together, starts)

    def busy(self, seconds: np.ndarray) -> dict[str, Any]:
        """Seconds of its ops by component."""
        if seconds.ndim > 1:
            added = np.add.reduceat(seconds[self.together], self.starts) if self.components else ()
            return dict(zip(self.components, added, strict=True))
        sums = np.bincount(self.component + 1, seconds, len(self.components) + 1)[1:]
        return dict(zip(self.components, sums.tolist(), strict=True))


@immutable
class StepWork:
    """What a step asks of any device, and the figures that do not depend on one.

    Attributes:
        device: its kind.
        engine: whose Python runs beside the model's.
        groups: its parts with their repeats, parts of which nobody asks for the ops.
        parts: of each part what is known of it.
        total, trainable, active: parameters.
        counted: sums by phase of flops, recomputed flops, bytes, kernels, dispatches.
        dtypes: those that products and attention run in, that of the setup first.
        unknown: names of calls that no row of `calls.table` tells of.
        exchanging: groups of ranks that this GPU exchanges with, and the kinds of collectives that they run.
        freezes_embedding: whether it has embeddings of words, and none of them trains.
        zero, paged_bytes, periodic, notes: as of `Step`.
    """

    architecture: Architecture
    method: Method
    setup: Setup
    device: str
    engine: str
    groups: list[Group]
    parts: list[PartWork]
    total: Dim
    trainable: Dim
    active: Dim
    counted: dict[str, Phases]
    memory: Memory
    choices: list[dict[str, Any]]
    dtypes: list[str]
    unknown: list[str]
    exchanging: list[tuple[Ranks, set[str]]]
    freezes_embedding: bool
    zero: bool
    paged_bytes: Dim
    periodic: list[PeriodicOps]
    notes: list[str]

    __eq__, __hash__ = object.__eq__, object.__hash__

    @classmethod
    def of(cls, built: Step, shared: Shared | None = None) -> "StepWork":
        """Look at a step; what is shared of its parts is used, and added to."""
        shared = shared or Shared()
        embeddings = [p for p in built.parameters if p.kind == "embedding"]  # an image model has none
        return cls(
            architecture=built.architecture,
            method=built.method,
            setup=built.setup,
            device=built.device,
            engine=built.engine,
            groups=built.groups,
            parts=[_part_work(part, shared) for part, _ in built.parts()],
            total=built.total,
            trainable=built.trainable,
            active=built.active,
            counted=_counted(built, shared),
            memory=Memory.of(built),
            choices=[asdict(choice) for choice in built.method.choices(built)],
            dtypes=_product_dtypes(built),
            unknown=sorted({op.name for _, op, _ in built.ops() if not op.view and row(op.name).work == "unknown"}),
            exchanging=_exchanging(built) if np.any(np.greater(built.setup.gpus, 1)) else [],
            freezes_embedding=bool(embeddings) and not any(p.requires_grad for p in embeddings),
            zero=built.zero,
            paged_bytes=built.paged_bytes,
            periodic=built.periodic,
            notes=[*built.notes, *(built.form.notes if built.form is not None else ())],
        )

    @property
    def of_model(self) -> Dim:
        """FLOPs of forward and backward that a checkpoint does not repeat; an optimizer's products are none of them."""
        flops, again = (self.counted[name] for name in ("flops", "recomputed"))
        return sum(flops[phase] - again[phase] for phase in ("forward", "backward"))

    @property
    def repeats(self) -> list[int]:
        """How often each part runs in the step."""
        return [part.repeat * group.repeat for group in self.groups for part in group.parts]

    def without_ops(self) -> "StepWork":
        """The same, which holds on to no op of the step."""
        groups = [
            Group([replace(part, ops=[], later=None) for part in group.parts], group.repeat) for group in self.groups
        ]
        return replace(self, groups=groups)


def _part_work(part: Part, shared: Shared) -> PartWork:
    found: PartWork = recalled(shared.works, part, lambda: PartWork.of(part, shared.calls.get(part)))
    return found


def _product_dtypes(built: Step) -> list[str]:
    """The dtypes that matrix products and attention run in, that of the setup first: it names the peak among equals."""
    ops = (op for part, _ in built.parts() for op in part.ops if costs.kind(op) in ("gemm", "attention"))
    return list(dict.fromkeys([built.setup.computes_in, *map(costs.operand_dtype, ops)]))


def _exchanging(built: Step) -> list[tuple[Ranks, set[str]]]:
    """Groups of ranks, each a communicator, with the kinds of collectives that they run."""
    found: dict[bytes, tuple[Ranks, set[str]]] = {}
    for _, op, _ in built.ops():
        if (ranks := op.attrs.ranks) is not None:
            key = b"|".join(np.asarray(of).tobytes() for of in ranks)
            found.setdefault(key, (ranks, set()))[1].add(KIND_OF[op.name])
    return list(found.values())


def _counted(built: Step, shared: Shared) -> dict[str, Phases]:
    """Sums over the step by phase, for each thing that `counts` counts."""
    sums: dict[str, Phases] = {}
    for part, times in built.parts():
        for name, of_part in recalled(shared.counts, part, partial(counts, part, shared.calls.get(part))).items():
            phases = sums.setdefault(name, dict.fromkeys(PHASES, 0))
            phases[part.phase] = phases[part.phase] + times * of_part
    for phases in sums.values():
        phases["total"] = sum(phases[phase] for phase in PHASES)
    return sums
