"""Steps of small models with an objective under DeepSpeed's ZeRO, the tape's and the real engine's; needs deepspeed."""

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from reference_objectives import Loss, Run
from reference_steps import Prepared, gathered, prepared

from perfmodel.prediction import memory
from perfmodel.recording.deepspeed import zero3_reference
from validate.oracle import parallel, zero

CHECKED = "c10d::broadcast_"  # traces of modules are compared among ranks: left out of the tape
HIDDEN_SIZED = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
THRESHOLD = "stage3_param_persistence_threshold"


class Compared(NamedTuple):
    """What of a step's collectives differs.

    Attributes:
        differences: of those but gathered weights, in their order.
        tape, real: elements that are gathered, by phase, dtype and group.
        thrown: of the real ones, those that were gathered ahead, forward, and freed unused.
        peak_ratio: the tape's peak memory over the real program's.
    """

    differences: list[str]
    tape: dict[tuple[str, str, int], int]
    real: dict[tuple[str, str, int], int]
    thrown: int
    peak_ratio: float


def judged_zero3(name: str, spec: str, losses: dict[str, Loss], small: int | None = None, **options: Any) -> Compared:
    """A step under ZeRO-3, in a process of its own, as DeepSpeed keeps its groups.

    Args:
        small: elements of the reference's weights that stay whole; None: as a config with "auto" has them.
    """
    with ProcessPoolExecutor(1, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(_judged, name, spec, losses, small, options).result()


def _judged(name: str, spec: str, losses: dict[str, Loss], small: int | None, options: dict[str, Any]) -> Compared:
    zero3_reference.SMALL = small or zero3_reference.SMALL
    found = prepared(name, spec, **options, parallel="zero3")
    setup, thrown = found.case.setup, list[int]()
    with parallel.process_group(setup.parallel, setup.gpus), _noting(thrown):
        real = _traced(found, losses, thrown, small)
    tape = parallel.collectives(found.step)
    ours, theirs = ([c for c in of if c.name not in (zero.GATHER, CHECKED)] for of in (tape, real.collectives))
    ratio = memory.peak_bytes(found.step) / real.trace.peak
    return Compared(
        parallel.in_another_order(ours, theirs),
        zero.gathered(tape),
        zero.gathered(real.collectives),
        sum(thrown),
        ratio,
    )


def _traced(found: Prepared, losses: dict[str, Loss], thrown: list[int], small: int | None) -> parallel.RankRecorder:
    """What a rank does in a step, behind the first ones."""
    setup, model = found.case.setup, found.model
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(setup.gpus)}
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model.train()
    parallel.checkpointed(model, setup)
    trained = [p for p in model.parameters() if p.requires_grad]
    config = zero.deepspeed_config(setup, found.architecture.hidden)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.AdamW(trained, fused=True))
    run = Run(engine, _engine_of(found.reference, config, small), setup, model, gathered)
    real = parallel.RankRecorder()
    for step in range(zero.WARM_UP + 1):
        if step == zero.WARM_UP:
            there = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
            real.hold(t for t in there if t.device.type == "cpu")  # some have no memory ("meta")
            thrown.clear()
            real.recording = True
        for _ in range(setup.grad_accum):
            with real.observe("forward"):
                loss = losses[setup.objective](run)
            with real.observe("backward"):
                engine.backward(loss)
            with real.observe("optimizer"):
                engine.step()
    return real


def _engine_of(reference: Any, config: dict[str, Any], small: int | None) -> Any:
    """A frozen model as TRL's `prepare_deepspeed` has it: with the config as the user wrote it, "auto" and all."""
    if reference is None:
        return None
    import deepspeed

    own = {**config["zero_optimization"], **dict.fromkeys(HIDDEN_SIZED, "auto"), THRESHOLD: small or "auto"}
    written = {**config, "zero_optimization": own}
    engine, *_ = deepspeed.initialize(model=reference, config=written)
    engine.eval()
    return engine


@contextmanager
def _noting(thrown: list[int]) -> Iterator[None]:
    """Note the elements of what is in flight as DeepSpeed forgets its trace."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    clean = Coordinator._clean_inflight_param_registry

    def noted(self: Any) -> None:
        thrown.extend(p.ds_numel for p in self._PartitionedParameterCoordinator__inflight_param_registry)
        clean(self)

    Coordinator._clean_inflight_param_registry = noted
    try:
        yield
    finally:
        Coordinator._clean_inflight_param_registry = clean
