"""What several GPUs do in a step, by its setup: a survey of the forward pass tells what each has of the model."""

from typing import Any

from ..architectures.base import Architecture
from ..errors import UserError
from ..program.dims import decide
from ..program.ranks import Ranks
from ..tape.core import Tape, recording
from ..tape.tensor import Flow
from .collector import no_collector
from .deepspeed import stages, zero3_alone, zero3_reference
from .forward import forward_passes, running
from .parallel import ddp_search, fsdp1_reference, fsdp2_reference, units
from .parallel.context import check_shared_sequences, context_of
from .parallel.ddp import BUCKET, FIRST_BUCKET
from .parallel.ddp_compiled import Uses, cuts_of
from .parallel.form import ParallelForm, check_form
from .step import Step

STAGES = {"zero1": 1, "zero2": 2}  # of DeepSpeed


def check_compiled(architecture: Architecture) -> None:
    """Raise `UserError` where the compiled program of a model on several GPUs was not compared with the real one."""
    if architecture.traits.head != "causal" or architecture.classifier is not None:
        raise UserError(f"compile: {architecture.name} on several GPUs is not modelled; language models are")


def parallel_form(step: Step, capability: str) -> ParallelForm | None:
    """What several GPUs do. The forward pass tells which parameters each block has."""
    alone, offloads = decide(step.setup.gpus == 1), step.setup.offload != "none"
    if step.architecture.of_megatron:
        from .parallel.megatron import main_gradients

        return main_gradients(step.setup)
    check_form(step.setup, step.method)
    if step.setup.compile != "none":
        check_compiled(step.architecture)
    check_shared_sequences(step.setup, step.architecture)
    one = decide(step.setup.replicas * step.setup.cp == 1)
    runs = offloads if alone else step.setup.parallel in STAGES  # DeepSpeed has its masters of one replica, too
    if one and not runs:
        return None
    ranks, setup = Ranks(step.setup.replicas * step.setup.cp, step.setup.tp), running(step)
    late = step.architecture.registers_late if step.replay is None else step.replay.late
    if setup[0].parallel == "ddp":
        graphs = _graphs(step, capability) if setup[0].compile != "none" else frozenset()
        return ddp_search.ddp_of(setup[0], ranks, late, graphs)
    if setup[0].parallel in STAGES:
        return stages.CutStates(
            ranks,
            STAGES[setup[0].parallel],
            zero3_alone.bucket(step),
            late,
            offloaded=offloads,
            wide=setup[0].shares_heads,
        )
    ranks, across = units.sharing(ranks, step.setup)
    survey = units.Survey()
    with no_collector(), recording(Tape(step.device, capability, step.setup.stack, autocast=setup[0].amp)) as tape:
        tape.wrapping, tape.context = survey, context_of(step.setup)
        tape.begin("inputs", "forward")
        if step.replay is not None:
            step.replay.forward(survey)
        else:
            step.parameters = forward_passes(step, *setup, {})[0]
    cut = survey.units(
        step.parameters, ranks.size, step.setup, tied=step.architecture.tied, flat=step.zero,
        classifies=step.architecture.classifier is not None,
    )  # fmt: skip
    if step.zero:
        return zero3_reference.cut_weights(cut, survey, step.parameters, ranks, step.architecture.hidden, step.setup)
    if step.setup.parallel == "fsdp1":
        return fsdp1_reference.flat_shards(cut, survey, step.parameters, ranks, across, step.setup)
    return fsdp2_reference.full_shards(
        cut, survey, step.parameters, ranks, across, step.setup, step.architecture.tied,
        getattr(step.method, "implementation", "peft") != "peft",
    )  # fmt: skip


def _graphs(step: Step, capability: str) -> frozenset[Any]:
    """Where DDP cuts the graph of a compiled model: a forward pass tells which parameters are used in which order."""
    setup, method = running(step)
    with no_collector(), recording(Tape(step.device, capability, step.setup.stack, autocast=setup.amp)) as tape:
        uses = Uses()
        tape.flow = Flow(cuts=uses)
        tape.begin("inputs", "forward")
        step.parameters = forward_passes(step, setup, method, {})[0]
    return cuts_of(uses, FIRST_BUCKET, BUCKET)
