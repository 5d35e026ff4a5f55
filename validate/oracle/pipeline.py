"""`perfmodel validate counts --parallel`: ranks of a pipeline against those of `torch.distributed.pipelining`.

The rank of each stage is a process of its own on gloo, forked from this one: shapes, and whether a gradient comes back,
go from stage to stage as in any run. What its replicas exchange goes nowhere, as in `parallel`. Gradients are clipped
to a norm that is summed over stages (torchtitan, distributed/utils.py).
"""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice, zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers.loss.loss_utils import ForCausalLMLoss

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.prediction import memory
from perfmodel.program.part import PHASES
from perfmodel.recording import pipeline
from perfmodel.recording.parallel.schedules import Pass, Post, Schedule
from perfmodel.recording.pipeline import RankStep
from perfmodel.tracing.programs import updates
from perfmodel.tracing.programs.dtypes import DTYPES
from perfmodel.tracing.trace import eager_program

from ..quiet import without_warnings_of_packages
from . import counts
from .cases import Case
from .parallel import PEAK_TOLERANCE, PRODUCTS, RankRecorder, collectives, in_another_order, local
from .shared.context_parallel import on_ring, own_tokens
from .stages import mesh_of_stages, shard_stages, stage_module

PATIENCE = 300  # s for all ranks of a case
SCHEDULES = {"1f1b": schedules.Schedule1F1B, "gpipe": schedules.ScheduleGPipe}


class Transfer(NamedTuple):
    """A message to or from another rank; `products` is how many matrix products were called before it."""

    name: str
    peer: int
    dtype: str
    elements: int
    products: int


class StageRecorder(RankRecorder):  # type: ignore[no-untyped-call]
    """Also notes messages, with whom they are exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []

    def _note(self, phase: str, func: Any, inputs: Any, outputs: Any, arguments: Any) -> None:
        if func._schema.name not in ("c10d::send", "c10d::recv_"):
            super()._note(phase, func, inputs, outputs, arguments)
            return
        (tensors, _, peer, _), _ = arguments
        (t,) = tensors
        name = func._schema.name
        self.transfers.append(Transfer(name, peer, DTYPES[t.dtype], t.numel(), self.products))


def compare_pipeline(case: Case) -> counts.Result:
    """Run the ranks of a case and compare what each of them calls, sends, reduces and holds with the tape."""
    architecture = from_config(case.config)
    method = methods.parse(case.method).bind(architecture)
    ranks = pipeline.build_ranks(architecture, method, case.setup, "cpu")
    total = counts.Result(case, 0, 0, 0, 1.0)
    for ours, real in zip(ranks, _traced(case, ranks), strict=True):
        found = _judged(case, ours, real)
        total.calls, total.bytes = total.calls + found.calls, total.bytes + found.bytes
        total.collectives += found.collectives
        total.differences += [f"rank {ours.rank}: {line}" for line in found.differences]
        if abs(found.peak_ratio - 1) > abs(total.peak_ratio - 1):
            total.peak_ratio = found.peak_ratio
    return total


def _traced(case: Case, ranks: list[RankStep]) -> list[dict[str, Any]]:
    """What each rank does, in a process each; of several replicas those of the first."""
    fork = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder:
        pairs = [fork.Pipe(duplex=False) for _ in ranks]
        processes = [
            fork.Process(target=_rank, args=(case, ours, Path(folder), out), daemon=True)
            for ours, (_, out) in zip(ranks, pairs, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            return [_answer(end) for end, _ in pairs]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(end: Connection) -> dict[str, Any]:
    if not end.poll(PATIENCE):
        raise TimeoutError("a rank of the pipeline does not answer")
    found: dict[str, Any] = end.recv()
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


def _rank(case: Case, ours: RankStep, folder: Path, out: Connection) -> None:
    """A rank's process: a step of the real program, sent back as plain values."""
    without_warnings_of_packages()
    try:
        count = case.setup.gpus
        line = list(range(0, count, count // case.setup.pp))
        store = torch._C._distributed_c10d.FileStore(str(folder / "store"))
        dist.init_process_group("fake", store=store, rank=line[ours.rank], world_size=count)
        stages = dist.new_group(line, backend="gloo", use_local_synchronization=True)
        recorder, elements = _step(case, ours, stages)
        dist.barrier(group=stages)  # who ends closes connections
        out.send(
            {"trace": recorder.trace, "transfers": recorder.transfers, "collectives": recorder.collectives,
             "elements": elements}
        )  # fmt: skip
    except Exception as error:  # told in the process that asks
        out.send({"error": f"rank {ours.rank}: {error!r}, because of {error.__cause__!r}"})
        raise


def _step(case: Case, ours: RankStep, line: Any) -> tuple[StageRecorder, tuple[int, int]]:
    """A later step of a rank: in the first one shapes are exchanged, in the next ones DDP fills other buckets.

    DDP comes once shapes are known: their exchange runs a forward pass behind which its reducer waits for gradients,
    and torch 2.13 then breaks off where two backward passes follow without a forward one between them.
    """
    setup, mesh = case.setup, mesh_of_stages(case.setup)
    modules = [stage_module(case, stage, mesh) for stage in ours.stages]
    base_dtype = next(modules[0].parameters()).dtype
    if setup.parallel == "fsdp2" and setup.replicas * setup.cp > 1:
        base_dtype = torch.float32 if setup.amp else base_dtype
        shard_stages(modules, setup, mesh)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    elements = sum(p.numel() for m in modules for p in m.parameters()), sum(p.numel() for p in trained)
    recorder = StageRecorder()
    of_line: dict[str, Any] = {"group": line, "get_mesh": lambda names, _: mesh[names]}
    stages = [
        PipelineStage(module, s.number, s.stages, torch.device("cpu"), **of_line)
        for module, s in zip(modules, ours.stages, strict=True)
    ]
    schedule = _schedule(setup, stages, case)
    rows, tokens = setup.shape
    ids = torch.zeros((rows * setup.grad_accum, tokens), dtype=torch.long)
    given_to_all = {"attention_mask": torch.ones_like(ids), **own_tokens(setup, ids)}
    given_to_all.pop("shift_labels", None)
    method = methods.parse(case.method).bind(from_config(case.config))
    update = updates.make(torch.nn.ModuleList(modules), ours.step.optimizer, method) if trained else None

    def run() -> None:
        given = (ids,) if stages[0].is_first else ()
        target = {"target": ids} if stages[-1].is_last else {}
        schedule.step(*given, **given_to_all, return_outputs=False, **target)
        nothing = torch.zeros((), dtype=base_dtype)
        with recorder.observe("optimizer"):
            if setup.clip_grad:
                clip(trained, line, nothing)
            if update is not None:
                update.step()
                update.zero_grad(set_to_none=True)

    with eager_program(), on_ring(setup), _observed(recorder, stages, schedule):
        run()
        if setup.replicas > 1 and setup.parallel == "ddp":
            here = [dist.get_rank()]
            alone_in_line = dist.new_group(here, backend="gloo", use_local_synchronization=True)
            for stage in stages:
                if any(p.requires_grad for p in stage.submod.parameters()):
                    stage.submod = torch.nn.parallel.DistributedDataParallel(stage.submod, process_group=alone_in_line)
            run()
        buffers = [info.buffer for stage in stages for info in _received(stage) if info.buffer is not None]
        held = updates.held(update) if update is not None else ()
        recorder.hold(map(local, (*(p for m in modules for p in m.parameters()), *held, *buffers)))
        del buffers
        recorder.recording = True
        run()
        recorder.begin()
        recorder.transfers.clear()
        run()
    return recorder, elements


def _received(stage: Any) -> Iterator[Any]:
    """What a stage keeps to receive into."""
    return chain.from_iterable((*stage.args_recv_info.values(), *stage.grad_recv_info.values()))


def _schedule(setup: Any, stages: list[Any], case: Case) -> Any:
    vocabulary = case.config.values["vocab_size"]

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shifted = {"shift_labels": labels} if setup.cp > 1 else {}
        found: torch.Tensor = ForCausalLMLoss(logits, labels, vocabulary, **shifted)
        return found

    name = Schedule.parse(setup.pp_schedule).name
    if name == "interleaved":
        return schedules.ScheduleInterleaved1F1B(stages, setup.grad_accum, loss_fn=loss)
    return SCHEDULES[name](stages[0], setup.grad_accum, loss_fn=loss)


@contextmanager
def _observed(recorder: StageRecorder, stages: list[Any], schedule: Any) -> Iterator[None]:
    """Passes, losses and messages are seen, each in its phase; a message in that of what is received with it.

    What is gathered ahead of passes counts as forward.

    gloo holds on to what is sent as long as somebody has the handle, as NCCL does not: it gets a copy.
    """

    def seen(phase: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with recorder.observe(phase):
                return function(*args, **kwargs)

        return run

    def tagged(phase: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            ops = function(*args)
            for op in ops:
                op.phase = phase
            return ops

        return run

    for stage in stages:
        stage.forward_one_chunk = seen("forward", stage.forward_one_chunk)
        stage.backward_one_chunk = seen("backward", stage.backward_one_chunk)
        stage.perform_reduce_grad = seen("backward", stage.perform_reduce_grad)
        for way, phase in (("fwd", "forward"), ("bwd", "backward")):
            for what in ("recv", "send"):
                name = f"get_{way}_{what}_ops"
                setattr(stage, name, tagged(phase, getattr(stage, name)))
        for module in stage.submod.modules():
            if isinstance(module, FSDPModule):
                module.unshard = seen("forward", module.unshard)  # type: ignore[method-assign]
    if hasattr(schedule, "_assert_unsharded"):
        schedule._assert_unsharded = seen("forward", schedule._assert_unsharded)
    home: Any = schedules
    begin, of_loss = home._batch_p2p, home._PipelineSchedule._compute_loss

    def batch(ops: list[Any], desc: str | None = None) -> Any:
        if not ops:
            return []
        ways = sorted(ops, key=lambda op: op.op is dist.isend)
        with recorder.observe(ways[0].phase):
            return begin([_copied(op) for op in ops], desc)

    home._batch_p2p, home._PipelineSchedule._compute_loss = batch, seen("forward", of_loss)
    try:
        yield
    finally:
        home._batch_p2p, home._PipelineSchedule._compute_loss = begin, of_loss


def _copied(op: Any) -> Any:
    if op.op is not dist.isend:
        return op
    with _disable_current_modes():
        return dist.P2POp(op.op, op.tensor.detach().clone(), op.peer, op.group, op.tag)


def clip(trained: list[Any], stages: Any, nothing: torch.Tensor) -> None:
    """To a norm of 1 over all stages; of one in which nothing trains it is `nothing`, a zero."""
    grads = [p.grad for p in trained if p.grad is not None]
    total = torch.nn.utils.get_total_norm(grads) if grads else nothing
    total = total.full_tensor() if isinstance(total, DTensor) else total
    total **= 2
    dist.all_reduce(total, group=stages)
    total **= 0.5
    torch.nn.utils.clip_grads_with_norm_(trained, 1.0, total)


def _judged(case: Case, ours: RankStep, real: dict[str, Any]) -> counts.Result:
    """What of a rank's tape differs from what it did."""
    step, trace = ours.step, real["trace"]
    peak, tape = memory.peak_bytes(step), counts.tape_calls(step)
    calls, nbytes = sum(sum(c.values()) for c in trace.calls.values()), sum(trace.bytes.values())
    sent = transfers(ours)
    of_one = {1: int(case.setup.replicas)}  # DDP's group is of one process
    found = [c._replace(group=of_one.get(c.group, c.group)) for c in real["collectives"]]
    reduced = [c for c in collectives(step) if c.name not in ("c10d::send", "c10d::recv_")]
    count = len(real["transfers"]) + len(real["collectives"])
    result = counts.Result(case, calls, 0, nbytes, peak / trace.peak, collectives=count)
    for phase in PHASES:
        of_real = trace.calls.get(phase, Counter())
        pair = (counts.without_underscore(of) for of in (tape[phase], of_real))
        result.differences += counts.differing(phase, *pair)
    on_tape = sum(count * (op.bytes_read + op.bytes_written) for _, op, count in step.ops())
    if on_tape != nbytes:
        result.differences.append(f"bytes: {on_tape} on the tape, {nbytes} in the real program")
    pairs = enumerate(zip_longest(sent, real["transfers"]))
    differing = ((i, a, b) for i, (a, b) in pairs if a != b)
    result.differences += [f"message {i}: {a} on the tape, {b} really" for i, a, b in islice(differing, 1)]
    result.differences += in_another_order(reduced, found)
    if (step.total, step.trainable) != real["elements"]:
        result.differences.append(f"parameters: {step.total, step.trainable} on the tape, {real['elements']} really")
    if abs(result.peak_ratio - 1) > PEAK_TOLERANCE:
        result.differences.append(f"peak memory: {peak} B on the tape, {trace.peak} B live in the real program")
    return result


def transfers(ours: RankStep) -> list[Transfer]:
    """The messages of a rank in their order."""
    found: list[Transfer] = []
    passed = 0
    message = ours.message
    for action, parts in ours.actions:
        if isinstance(action, Post):
            for name, done in (
                *(("c10d::send", d) for d in action.sends), *(("c10d::recv_", d) for d in action.receives)
            ):  # fmt: skip
                other = action_end(done) if name == "c10d::send" else done.stage
                peer = other % ours.step.setup.pp
                found.append(Transfer(name, peer, message.dtype, int(message.numel), passed))
        passed += sum(p.repeat * sum(op.name.startswith(PRODUCTS) for op in p.ops) for p in parts)
    return found


def action_end(done: Pass) -> int:
    """The stage that the result of a pass goes to."""
    return done.stage + (1 if done.way == "forward" else -1)
