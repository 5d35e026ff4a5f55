"""`perfmodel validate counts`: the tape against the real program, call by call."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.architectures.moe import Mixture
from perfmodel.calls import costs
from perfmodel.prediction import memory
from perfmodel.program.part import PHASES
from perfmodel.program.routing import Routing, exponent_of
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models, updates
from perfmodel.tracing.trace import Signature, Trace, signature, trace_step

from .cases import Case

MIRRORED = ("transformers", "peft")  # whose minor versions decide a program's calls
TINY = 3_000_000  # parameters of a model that takes a step on real tensors
IN_PLACE = {"add_.Tensor": "add.Tensor", "scatter_add_": "scatter_add", "index_add_": "index_add"}
PEAK_TOLERANCE = 0.02  # local variables of Python code outlive their use now and then


@dataclass
class Result:
    """What the comparison found."""

    case: Case
    calls: int
    flops: int
    bytes: int
    peak_ratio: float
    differences: list[str] = field(default_factory=list)
    collectives: int = 0


def has_cuda_build() -> bool:
    """Whether the installed torch was built with CUDA; only then can fake CUDA tensors run a forward pass."""
    return torch.version.cuda is not None


def tape_calls(step: Step) -> dict[str, Counter[Signature]]:
    """The tape's non-view calls by phase, as the recorder counts the real ones."""
    calls: dict[str, Counter[Signature]] = {phase: Counter() for phase in PHASES}
    for part, op, count in step.ops():
        if not (op.view or op.name.startswith("cuda::")):  # what is no call of ATen
            calls[part.phase][signature(op.name, _expand(op.inputs), _expand(op.outputs))] += count
    return calls


def _expand(specs: Any) -> list[Any]:
    return [(s.dtype, tuple(s.shape)) for s in specs for _ in range(s.copies)]


def compare_case(case: Case, *, cuda_forward: bool = False, fakes: bool = False) -> Result:
    """Trace the real program of a case and compare calls, FLOPs, bytes, parameters and peak memory.

    On real tensors if the model is tiny, else on fake ones. On fake ones alone of padded batches: whether their mask is
    needed is data, and here no token is padding. On real ones alone where experts are looped over: which are hit is
    data, and their routers are made to load them as the setup says.

    Args:
        cuda_forward: compare the CUDA form of the forward instead, on fake CUDA tensors; it needs a CUDA build.
        fakes: on fake tensors also where real ones are traced; they take four times as long.
    """
    device = "cuda" if cuda_forward else "cpu"
    architecture = from_config(case.config)
    method = methods.parse(case.method).bind(architecture)
    make = partial(updates.make, method=method)

    phases = ("forward",) if cuda_forward else PHASES

    def traced(step: Step, *, real: bool) -> Trace:
        base = models.build_model(case.config, case.setup, device="cpu" if real else "meta")
        if case.setup.experts == "eager" and isinstance(architecture, Mixture):
            _load(base, Routing(architecture.experts, architecture.top_k, exponent_of(case.setup.routing)), case.setup)
        model = models.apply_method(base, method.under(case.setup.stack, case.setup.dtype), architecture)
        if device == "cpu" and case.setup.dtype == "fp32":
            _unmoved(model)
        options: dict[str, Any] = {"device": device, "forward_only": cuda_forward, "make": make, "real": real}
        return trace_step(model, case.setup, step.optimizer, **options)

    step = build(architecture, method, case.setup, device)
    found = None
    if case.setup.experts == "eager" or not (cuda_forward or step.total > TINY or case.setup.padded):
        found = judge_step(case, step, traced(step, real=True), real=True)
        if case.setup.experts == "eager" or not fakes:
            return found
    replayed = build(architecture, method, case.setup, device, view_replay=True)
    result = judge_step(case, replayed, traced(replayed, real=False), phases)
    if found is not None:
        result.differences += [f"real tensors: {line}" for line in found.differences]
    return result


def _load(model: Any, routing: Routing, setup: Setup) -> None:
    """Load the experts of a model that loops over them as the setup says, whatever its routers find."""
    tokens = setup.batch * setup.seq
    loads = routing.counts(tokens * routing.top_k)
    # an expert gets no more rows than there are tokens, so no token twice
    chosen = torch.arange(routing.experts).repeat_interleave(torch.tensor(loads)).view(routing.top_k, tokens).t()

    def route(module: Any, args: Any, kwargs: Any) -> Any:
        if "router_indices" in kwargs:
            return args, {**kwargs, "router_indices": chosen}
        return (args[0], chosen, *args[2:]), kwargs

    for module in model.modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            module.register_forward_pre_hook(route, with_kwargs=True)


def _unmoved(model: Any) -> None:
    """AdaLoRA's `ranknum` stays frozen on a CPU in fp32; that peft moves it to the meta device makes it train."""
    for name, p in model.named_parameters():
        if "ranknum" in name:
            p.requires_grad_(False)


def without_underscore(calls: Counter[Signature]) -> Counter[Signature]:
    """Calls with in-place additions counted as additions.

    The engine adds real gradients in place where it may; those of `gather` and `index_select` are added to zeros in
    place, but not while a recorder watches (`areAnyTensorSubclassLike`).
    """
    merged: Counter[Signature] = Counter()
    for (name, inputs, outputs), n in calls.items():
        merged[IN_PLACE.get(name, name), inputs, outputs] += n
    return merged


def differing(phase: str, tape: Counter[Signature], calls: Counter[Signature]) -> list[str]:
    """Calls of a phase that the tape or the real program has more of."""
    both = (("tape only", tape - calls), ("real only", calls - tape))
    return [f"{phase}, {title}: {n} x {call}" for title, more in both for call, n in more.items()]


def judge_step(case: Case, step: Step, trace: Trace, phases: tuple[str, ...] = PHASES, *, real: bool = False) -> Result:
    """Compare a step with a trace, phase by phase; in one on real tensors gradients are added in place."""
    tape, calls = tape_calls(step), trace.calls
    if real:
        tape, calls = ({p: without_underscore(c) for p, c in found.items()} for found in (tape, calls))
    flops, nbytes = dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
    for part, op, count in step.ops():
        flops[part.phase] += count * costs.flops(op)
        nbytes[part.phase] += count * (op.bytes_read + op.bytes_written)
    peak = memory.peak_bytes(step)
    result = Result(
        case,
        calls=sum(sum(trace.calls[p].values()) for p in phases),
        flops=sum(trace.flops.get(p, 0) for p in phases),
        bytes=sum(trace.bytes[p] for p in phases),
        peak_ratio=peak / trace.peak if trace.peak else 1.0,
    )
    for phase in phases:
        result.differences += differing(phase, tape[phase], calls[phase])
        if flops[phase] != trace.flops.get(phase, 0):
            result.differences.append(f"{phase}: FLOPs {flops[phase]} on the tape, {trace.flops.get(phase, 0)} counted")
        if nbytes[phase] != trace.bytes[phase]:
            result.differences.append(f"{phase}: bytes {nbytes[phase]} on the tape, {trace.bytes[phase]} in the trace")
    if (step.trainable, step.total) != (trace.trainable, trace.total):
        result.differences.append(
            f"parameters: {step.trainable} of {step.total} train on the tape, {trace.trainable} of {trace.total} really"
        )
    if phases == PHASES and abs(result.peak_ratio - 1) > PEAK_TOLERANCE:
        result.differences.append(f"peak memory: {peak} B on the tape, {trace.peak} B live in the trace")
    return result
