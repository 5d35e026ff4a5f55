"""Both sides of a comparison: what the tape records of a case, and the real model, or one rank of it, that does it."""

from typing import Any

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.methods import Method
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.tracing.programs import models
from validate.oracle import parallel
from validate.oracle.cases import Case


def method_of(case: Case) -> Method:
    """The method of a case, bound to its model."""
    return methods.parse(case.method).bind(from_config(case.config))


def tape_of(case: Case, *, view_replay: bool = False) -> Step:
    """The step that the tape records on a CPU."""
    return build(from_config(case.config), method_of(case), case.setup, "cpu", view_replay=view_replay)


def model_of(case: Case, *, device: str = "meta") -> Any:
    """The model of transformers with the method on it."""
    model = models.build_model(case.config, case.setup, device=device)
    return models.apply_method(model, method_of(case), from_config(case.config))


def rank_of(case: Case, step: Step) -> parallel.RankRecorder:
    """What one rank of the real program does, with the optimizer of a recorded step."""
    with parallel.process_group(case.setup.parallel, case.setup.gpus):
        return parallel.traced_rank(case, step.optimizer)


def flat_collectives(rank: parallel.RankRecorder) -> list[parallel.Collective]:
    """Those of a rank under FSDP1 by their names on a GPU: on a CPU it gathers into views of one buffer."""
    return [c._replace(name=c.name.replace("::allgather_", "::_allgather_base_")) for c in rank.collectives]
