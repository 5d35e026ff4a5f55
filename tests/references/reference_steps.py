"""Steps of small models with an objective, the tape's and a program's in torch, on one GPU and as one of several."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from helpers import architecture_of, config_of
from reference_critic import PolicyAndValue, of_values
from reference_objectives import Loss, Run
from torch.distributed.fsdp import FullyShardedDataParallel

from perfmodel import methods, objectives
from perfmodel.architectures import Architecture, Config
from perfmodel.methods import Method
from perfmodel.methods.parts.targeted import Targeted
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models, updates
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts, parallel
from validate.oracle.cases import Case


@dataclass
class Prepared:
    """A step on the tape, and models as their trainer has them; `lying`: what is in memory beside."""

    case: Case
    step: Step
    architecture: Architecture
    method: Method
    objective: Any
    model: Any
    reference: Any
    lying: list[Any]


def prepared(name: str, spec: str, **options: Any) -> Prepared:
    """Models and a tape of them."""
    setup = Setup(**{"batch": 2, "seq": 17, **options})
    config, architecture = config_of(name), architecture_of(name)
    objective = objectives.found(setup.objective)
    headed = objective.on(architecture)
    if headed is not architecture:
        classes = {"reward": "SequenceClassification", "prm": "TokenClassification"}[setup.objective]
        config = config_of(name, architectures=[f"{name.title()}For{classes}"], num_labels=headed.classifier.labels)
    method = methods.parse(spec).bind(headed)
    step = build(architecture, methods.parse(spec).bind(architecture), setup, "cpu")
    torch.manual_seed(0)
    model = models.apply_method(models.build_model(config, setup, device="cpu"), method, headed)
    reference = _reference(objective, method, setup, config)
    lying = [] if reference is None else [*reference.parameters()]
    if setup.objective == "ppo":
        critic, scorer = (of_values(name, setup) for _ in range(2))
        model = PolicyAndValue(model, critic)
        lying += scorer.parameters()
        setup = replace(setup, clip_grad=False)
    _quieten(objective, model, reference)
    return Prepared(Case(config, spec, setup), step, headed, method, objective, model, reference, lying)


def _reference(objective: Any, method: Method, setup: Setup, config: Config) -> Any:
    """A second, frozen model, if the objective compares with one."""
    compares = objective.compares == "always" or (objective.compares and setup.reference != "auto")
    own = setup.reference == "model" or not isinstance(method, Targeted)
    if not (compares and own) or setup.reference == "precomputed":
        return None
    lies = replace(setup, dtype=setup.amp) if objective.reference_in_amp and setup.amp else setup
    return models.build_model(config, lies, device="cpu").requires_grad_(False).eval()


def _quieten(objective: Any, *trained: Any) -> None:
    """As TRL's `disable_dropout_in_model`."""
    for m in filter(None, trained if objective.quiet else ()):
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0


def _autocast(setup: Setup, *trained: Any) -> None:
    """As accelerate prepares models for mixed precision."""
    for m in filter(None, trained if setup.amp else ()):
        m.forward = convert_outputs_to_fp32(torch.autocast("cpu", TORCH_DTYPES[setup.amp])(m.forward))


def judged(name: str, spec: str, losses: dict[str, Loss], **options: Any) -> counts.Result:
    """A step of a small model with an objective, compared with the same of a program in torch."""
    found = prepared(name, spec, **options)
    setup, model = found.case.setup, found.model
    _autocast(setup, model, found.reference)
    run = Run(model, found.reference, setup)
    lying = _lying(found, run)
    make = partial(updates.make, method=found.method)
    trace = trace_step(
        model, setup, found.step.optimizer, make=make, real=True, loss_of=lambda: scaled_loss(found, run, losses),
        after=lambda: run.after(), beside=lying,
    )  # fmt: skip
    return counts.judge_step(found.case, found.step, trace, real=True)


def _lying(found: Prepared, run: Run) -> list[torch.Tensor]:
    """What is in memory beside the model."""
    return [*found.lying, *([run.drawn_by] if run.setup.objective == "ppo" else [])]


def scaled_loss(found: Prepared, run: Run, losses: dict[str, Loss]) -> torch.Tensor:
    """The loss of a micro-batch as it goes backward."""
    setup = found.case.setup
    made = losses[setup.objective](run)
    return made / setup.grad_accum if setup.grad_accum > 1 and found.objective.scaled else made


def judged_rank(name: str, spec: str, losses: dict[str, Loss], **options: Any) -> counts.Result:
    """The same of one of several GPUs, with its collectives in their order."""
    found, real = traced_rank(name, spec, losses, **options)
    return parallel.judge_rank(found.case, found.step, real)


def traced_rank(
    name: str, spec: str, losses: dict[str, Loss], **options: Any
) -> tuple[Prepared, parallel.RankRecorder]:
    """A step on the tape, and what one of several GPUs does in it."""
    found = prepared(name, spec, **options)
    setup, model, reference = found.case.setup, found.model, found.reference
    with parallel.process_group(setup.parallel, setup.gpus):
        total, trainable = parallel.elements(model)
        model.train()
        parallel.checkpointed(model, setup)
        if setup.parallel in ("ddp", "fsdp1"):
            _autocast(setup, model, reference if setup.parallel == "ddp" else None)
        inner, wrapped = model, parallel.wrapped_for_ranks(model, setup, found.architecture)
        by_blocks = setup.parallel == "fsdp1" or (setup.parallel == "fsdp2" and setup.objective == "asft")
        if reference is not None and setup.parallel == "fsdp2" and not by_blocks:
            _cut_whole(reference, setup)
        elif reference is not None and by_blocks:
            reference = parallel.wrapped_for_ranks(reference, setup, found.architecture)
        shards = [] if reference is None else list(reference.parameters())
        update = updates.make(wrapped, found.step.optimizer, found.method)
        run = Run(wrapped, reference, setup, inner, gathered)
        real = parallel.trace_rank(
            wrapped, setup, update, lambda: scaled_loss(found, run, losses),
            chain(_lying(found, run) if setup.parallel == "ddp" else shards, _left_whole(reference, setup)),
            lambda: run.after(),
        )  # fmt: skip
        real.trace.total, real.trace.trainable = total, trainable
        return found, real


def gathered(x: torch.Tensor) -> torch.Tensor:
    """What all ranks have, as accelerate puts it together on GPUs."""
    x = x.contiguous() if x.ndim else x.clone()[None]
    whole = torch.empty(dist.get_world_size() * x.numel(), dtype=x.dtype)
    dist.all_gather_into_tensor(whole, x.view(-1))  # one dim, as the fake group wants it
    return whole.view(-1, *x.size()[1:])


def _left_whole(reference: Any, setup: Setup) -> Iterator[torch.Tensor]:
    """What stays gathered of a frozen model behind its passes; its shards are other tensors."""
    if reference is None:
        return
    if setup.parallel == "fsdp1":
        for unit in FullyShardedDataParallel.fsdp_modules(reference):
            whole = unit._handle.flat_param._full_param_padded
            if whole.untyped_storage().size():
                yield whole
    elif not setup.reshard or setup.objective == "asft":
        yield from reference.parameters()


def _cut_whole(reference: Any, setup: Setup) -> None:
    """As TRL's `prepare_fsdp`: no block is wrapped by itself."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    amp = TORCH_DTYPES[setup.amp] if setup.amp else None
    policy = MixedPrecisionPolicy(param_dtype=amp, reduce_dtype=amp, output_dtype=amp)
    mesh = parallel.mesh_of_ranks(setup)
    fully_shard(reference, reshard_after_forward=setup.reshard, mp_policy=policy, mesh=mesh)
