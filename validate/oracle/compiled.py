"""A rank of a compiled program against the tape: graphs that are entered, collectives in their order, what is kept.

The real program is compiled as transformers' `torch_compile` has accelerate do it: the model as a whole, before FSDP2
wraps its units and behind DDP's wrapper; where ranks share layers, behind all. Dynamo and AOTAutograd run as on a GPU,
with Inductor's decompositions and its partitioner; its graphs are run as they are, call by call. So products stand
where they would, and what a graph hands to its backward is what Inductor's would; how calls share kernels is another
oracle's (`inductor`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch._inductor import compile_fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build, held_bytes
from perfmodel.recording.step import Step
from perfmodel.tracing.programs import updates

from . import counts, parallel
from .cases import Case


class GraphRecorder(parallel.RankRecorder):  # type: ignore[no-untyped-call]
    """Also notes graphs. To Dynamo it is one of PyTorch's own modes: under others nothing is compiled."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.graphs: dict[str, int] = {}
        self.kept = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether Dynamo compiles under it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, torch._ops.HigherOrderOperator):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not self.recording:
            return func(*args, **(kwargs or {}))
        if func is run_and_save_rng_state:  # a call that a checkpoint runs again, and the state of random numbers
            return torch.get_rng_state(), super().__torch_dispatch__(args[0], types, args[1:], kwargs)
        assert func is run_with_rng_state, func
        return super().__torch_dispatch__(args[1], types, args[2:], kwargs)

    def begin(self) -> None:
        """Count anew."""
        super().begin()
        self.graphs = dict.fromkeys(PHASES, 0)

    @contextmanager
    def observe(self, phase: str) -> Iterator[None]:
        """Count under a phase; before backward what lives is what forward has kept."""
        if phase == "backward":
            self.kept = max(self.kept, self.live)
        with super().observe(phase):
            yield

    def compiled(self, gm: Any, inputs: Any) -> Any:
        """A backend of `torch.compile` that runs each graph as Inductor would get it."""

        def inner(gm: Any, inputs: Any, **options: Any) -> Any:
            def run(args: list[Any]) -> Any:
                if self.recording and any(node.op == "call_function" for node in gm.graph.nodes):
                    self.graphs[self.phase] = self.graphs.get(self.phase, 0) + 1
                out = gm.forward(*args)
                args.clear()
                for t in out if self.recording else ():
                    # also of Inductor's own calls, which are none of ATen's; not the state of random numbers, which
                    # is a CPU's
                    if isinstance(t, torch.Tensor) and t.dtype != torch.uint8:
                        self._watch(t)
                return out

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compile_fx.compile_fx(gm, inputs, inner_compile=inner)


def compare_compiled(case: Case) -> counts.Result:
    """Trace a rank of a compiled program and compare it with the tape."""
    return judge_compiled(case, *trace_compiled(case))


def trace_compiled(case: Case) -> tuple[Step, GraphRecorder]:
    """The tape of a case, and what a rank of the real program did."""
    setup = replace(case.setup, compile="default")
    architecture = from_config(case.config)
    method = methods.parse(case.method).bind(architecture)
    step = build(architecture, method, setup, "cpu")
    recorder = GraphRecorder()
    torch._dynamo.reset()
    several = setup.replicas > 1
    group = parallel.process_group(setup.parallel if several else "tp", setup.gpus)
    with group, functorch_config.patch(enable_autograd_cache=False):
        mesh = parallel.mesh_of_ranks(setup)
        model = parallel.alone(case.config, setup, architecture, method, mesh).train()
        total, trainable = parallel.elements(model)
        parallel.checkpointed(model, setup)
        if setup.parallel == "fsdp2" and setup.tp == 1:
            model = torch.compile(model, backend=recorder.compiled)
        if several:
            model = parallel.wrapped_for_ranks(model, setup, architecture, mesh)
        if setup.parallel == "ddp" or setup.tp > 1:
            model = torch.compile(model, backend=recorder.compiled)
        parallel.trace_rank(model, setup, updates.make(model, step.optimizer, method), recorder=recorder)
    recorder.trace.total, recorder.trace.trainable = total, trainable
    return step, recorder


def judge_compiled(case: Case, step: Step, real: GraphRecorder) -> counts.Result:
    """What of the tape differs from what a rank did."""
    kept = kept_bytes(step)
    result = counts.Result(
        case, sum(sum(c.values()) for c in real.trace.calls.values()), 0, sum(real.trace.bytes.values()),
        kept / real.kept, collectives=len(real.collectives),
    )  # fmt: skip
    found = [c._replace(group=case.setup.gpus) if c.group == 1 else c for c in real.collectives]  # DDP's
    result.differences += parallel.in_another_order(parallel.collectives(step), found)
    graphs = dict.fromkeys(PHASES, 0)
    for part, count in step.parts():
        graphs[part.phase] += part.host.graphs * count
    if graphs != real.graphs:
        result.differences.append(f"graphs: {graphs} on the tape, {real.graphs} really")
    if abs(result.peak_ratio - 1) > parallel.PEAK_TOLERANCE:
        result.differences.append(f"kept for backward: {kept} B on the tape, {real.kept} B really")
    if (step.trainable, step.total) != (real.trace.trainable, real.trace.total):
        result.differences.append("parameters differ")
    return result


def kept_bytes(step: Step) -> int:
    """Most live bytes where a forward pass has ended and its backward begins."""
    live, most, before = 0, 0, ""
    for group in step.groups:
        for part in group.parts * group.repeat:
            if (before, part.phase) == ("forward", "backward"):
                most = max(most, live)
            live, before = live + part.delta * part.repeat, part.phase
    return int(step.weight_bytes + step.state_bytes + held_bytes(step) + most)
