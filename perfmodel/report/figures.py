"""The rows of a comparison, for whatever shows them: text of each method's figure, and which one is best."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .. import units
from ..prediction.predict import Prediction
from ..program.part import PHASES
from ..questions.anatomy import BUBBLE, Phase
from ..questions.comparison import Comparison
from ..setup import GENERATED, PAIRS, Setup

Figure = Callable[[Prediction], Any]


class FigureCell(NamedTuple):
    """One method's figure."""

    text: str
    best: bool = False


WORTH_A_ROW = 0.005  # of a step, on average: work that comes every so many


class FigureRow(NamedTuple):
    """One figure of every method."""

    name: str
    cells: list[FigureCell]


def figures(c: Comparison) -> list[FigureRow]:
    """Time by phase, rates, work, memory and parameters of every method, the first the baseline.

    The best value is marked among the methods that fit, where they differ.
    """
    p = c.predictions
    rated = [bool(x.fits) for x in p]

    def row(
        name: str, figure: Figure, text: Callable[[Any], str], better: Callable[..., Any] | None = None
    ) -> FigureRow:
        values = [figure(x) for x in p]
        return FigureRow(name, _marked(values, [text(v) for v in values], rated, better))

    several = np.any(np.greater(p[0].setup.gpus, 1))
    ratios = ["1.00", *(f"{s.ratio:.2f} {s.verdict}" for s in c.speedups)]
    return [
        row("step", lambda x: x.time.phases["total"], units.seconds, min),
        *(row(f"  {phase}", _phase(phase), units.seconds, min) for phase in PHASES),
        *([row("step on average", lambda x: x.mean_step, units.seconds, min)] if any(map(_goes_beyond, p)) else []),
        FigureRow("speed-up", [FigureCell(text) for text in ratios]),
        *([row("exposed communication", _exposed, units.seconds, min)] if several else []),
        *([row("bubble", _bubble, units.percent, min)] if p[0].setup.pp > 1 else []),
        row("launch-bound", lambda x: x.time.launch_bound_share, units.percent, min),
        row("tokens/s", lambda x: x.tokens_per_second, lambda v: f"{v:,.0f}", max),
        row("MFU", lambda x: x.mfu, lambda v: f"{100 * v:.1f} %", max),
        row("FLOPs", lambda x: x.flops["total"], units.count),
        row("memory traffic", lambda x: x.bytes["total"], units.nbytes),
        row("kernels", lambda x: x.kernels["total"], lambda v: f"{v:,}"),
        row("peak memory", lambda x: x.memory.peak, units.nbytes, min),
        *([row("host's memory", lambda x: x.memory.host, units.nbytes, min)] if p[0].setup.offload != "none" else []),
        row("fits", lambda x: x.fits, lambda v: "yes" if v else "no"),
        row("trainable", lambda x: x.trainable_params, units.count),
    ]


def any_best(rows: Sequence[FigureRow]) -> bool:
    """Whether a mark stands anywhere, so that it has to be explained."""
    return any(cell.best for row in rows for cell in row.cells)


def _goes_beyond(p: Prediction) -> bool:
    """Whether what comes every so many steps is worth a row."""
    return bool(p.beside > WORTH_A_ROW * p.time.phases["total"])


def _exposed(p: Prediction) -> Any:
    return p.time.communication.exposed["total"]


def _bubble(p: Prediction) -> Any:
    return p.time.components[BUBBLE] / p.time.phases["total"]


def _phase(name: str) -> Figure:
    return lambda p: p.time.phases[name]


def _marked(
    values: Sequence[Any], texts: list[str], rated: list[bool], better: Callable[..., Any] | None
) -> list[FigureCell]:
    """Cells with the best marked; figures that read alike are equally good, and no mark says that all are."""
    if better is None or not any(rated):
        return [FigureCell(text) for text in texts]
    best = better(v for v, counts in zip(values, rated, strict=True) if counts)
    shown = texts[list(values).index(best)]
    good = [counts and text == shown for text, counts in zip(texts, rated, strict=True)]
    return [FigureCell(text, mark and sum(good) < sum(rated)) for text, mark in zip(texts, good, strict=True)]


OUTSIDE = {  # limits that few steps have, and what the time in them is
    "network": "communication that nothing hides",
    "bus": "copies over the bus and the host's cores that nothing hides",
}


def phase_table(phases: Sequence[Phase]) -> tuple[str, list[str], list[list[str]]]:
    """A unit, and in it for each phase: time, what limits it, waiting, FLOPs at peak, bytes, host.

    The names of the limits stand between: compute and memory, then those of `OUTSIDE` that any phase has. With the
    waiting they add up to the time.
    """
    limits = ["compute", "memory", *(limit for limit in OUTSIDE if any(p.limited[limit] > 0 for p in phases))]
    rows = [
        [p.seconds, *(p.limited[limit] for limit in limits), p.waiting, p.at_peak, p.at_bandwidth, p.host]
        for p in phases
    ]
    *told, unit = units.alike([v for row in rows for v in row], digits=4)
    width = len(rows[0])
    return unit, limits, [told[i * width : (i + 1) * width] for i in range(len(rows))]


def outside_told(limits: Sequence[str]) -> str:
    """What the columns of a phase table mean that few have; empty without them."""
    return "; ".join(f"{limit}: {OUTSIDE[limit]}" for limit in limits if limit in OUTSIDE)


def headline(p: Prediction) -> str:
    """Model, device and setup in a line."""
    return f"{p.model} on {gpus_of(p.setup, p.device)}, {shared_setup(p)}"


def gpus_of(s: Setup, device: str) -> str:
    """The GPUs of a job in words: `16 x h100-sxm on 2 nodes`."""
    nodes = {None: "", 1: " on 1 node"}.get(s.nodes, f" on {s.nodes} nodes")
    return job_of(int(np.max(s.gpus)), device) + nodes


def job_of(gpus: int, device: str) -> str:
    """So many GPUs of a device."""
    return device if gpus == 1 else f"{gpus} x {device}"


def shared_setup(p: Prediction) -> str:
    """The setup of a comparison in a line: an engine that the method brings is told by its name."""
    alone = p.step is not None and p.step.method.engine is not None
    return setup_line(replace(p.setup, engine="torch") if alone else p.setup)


UNITS = {"blocks": "units of blocks alone", "adapters": "units of blocks and of adapters' halves"}
OFFLOADED = {"optimizer": "optimizer", "params": "weights and optimizer"}


def setup_line(s: Setup, *, precision: bool = True) -> str:
    """The setup in a line: its size, precision (or not) and optimizer, then whatever is not as usual."""
    usual = Setup()
    of = (" pair" if s.batch == 1 else " pairs") if s.objective in PAIRS else ""
    told = [f"batch {s.batch}{of} x {s.seq} tokens"]
    told += [f"{s.dtype}{f' amp {s.amp}' if s.amp else ''}"] if precision else []
    told += [s.optimizer]
    trained_for = s.objective + (" without generation" if s.objective in GENERATED else "")
    told += [trained_for] if s.objective != "sft" else []
    told += [f"reference {s.reference}"] if s.reference != usual.reference else []
    told += [f"{s.grad_accum} micro-batches"] if s.grad_accum > 1 else []
    told += [f"checkpoint {s.checkpoint}"] if s.checkpoint != usual.checkpoint else []
    told += [f"{s.attention} attention"] if s.attention != usual.attention else []
    told += [f"{s.experts} experts"] if s.experts != usual.experts else []
    told += ["liger kernels"] if s.uses("liger") else []
    told += ["cut cross entropy"] if s.uses("cce") else []
    told += ["TRL's fused head"] if s.uses("trl") else []
    told += [{"default": "torch.compile"}.get(s.compile, f"torch.compile {s.compile}")] if s.compile != "none" else []
    told += [f"fp8 {s.fp8}"] if s.fp8 != usual.fp8 else []
    told += [f"int8 {s.int8}"] if s.int8 != usual.int8 else []
    told += [f"QAT {s.qat}"] if s.qat != usual.qat else []
    several = np.any(np.greater(s.gpus, 1))
    told += [s.parallel] if np.any(np.greater(s.replicas * s.cp, 1)) or s.offload != "none" else []
    told += ["weights kept gathered"] if several and s.reshard != usual.reshard else []
    told += [UNITS[s.fsdp_units]] if several and s.fsdp_units in UNITS else []
    told += [f"gradients reduced in {s.reduce_dtype}"] if several and s.reduce_dtype is not None else []
    told += ["exchanged each micro-batch"] if several and s.sync_each_batch and s.grad_accum > 1 else []
    told += ["messages beside compute"] if several and s.overlap else []
    in_groups = s.shard_group is not None and np.any(s.replicas * s.cp > s.shard_group)
    told += [f"shards in groups of {s.shard_group}"] if in_groups else []
    told += [f"{OFFLOADED[s.offload]} offloaded"] if s.offload != usual.offload else []
    told += [f"DDP {s.ddp}"] if several and s.ddp != usual.ddp else []
    told += [f"tensor parallel {s.tp}" + ", sequence parallel" * s.sequence_parallel] if s.tp > 1 else []
    told += [f"pipeline of {s.pp}, {s.pp_schedule}"] if s.pp > 1 else []
    told += [f"context parallel {s.cp}, {s.cp_rotate}"] if s.cp > 1 else []
    told += [f"in {s.node}"] if several and s.node else []
    told += [s.engine] if s.engine != usual.engine else []
    told += ["padded"] if s.padded else []
    told += [f"packing {s.packing}"] if s.packing != usual.packing else []
    told += [f"lengths {s.lengths.spec}"] if s.lengths else []
    told += [s.images_in_words] if s.images else []
    told += ["grouped by length"] if s.group_by_length else []
    told += ["no clipping"] if not s.clip_grad else []
    told += ["optimizer in backward"] if s.in_backward else []
    told += [s.stack.other_words] if s.stack != usual.stack else []
    return ", ".join([*told, *(["CUDA graphs"] if s.cuda_graphs else [])])


IN_EIGHT_BITS = {"e4m3": "fp8", "e5m2": "fp8", "i8": "int8"}


def mfu_of(*predictions: Prediction) -> str:
    """What the MFU is the share of."""
    dtypes = " or ".join(dict.fromkeys(IN_EIGHT_BITS.get(p.peak_dtype, p.peak_dtype) for p in predictions))
    return f"MFU: FLOPs of matrix products and attention without recompute, over step time and the dense {dtypes} peak"
