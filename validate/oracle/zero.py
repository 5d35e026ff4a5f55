"""The collectives of DeepSpeed's ZeRO against those of the tape; needs deepspeed.

The real program runs on this CPU as one of so many ranks, in torch's fake process group.
"""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.prediction import memory
from perfmodel.recording.deepspeed.zero3_alone import under_zero
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing.programs.dtypes import DTYPES

from . import counts, parallel
from .cases import Case
from .shared import ulysses

GATHER = "c10d::_allgather_base_"
OFFLOADED = ("offload_optimizer", "offload_param")
OF_MICRO_BATCH = ("div.Tensor", (("fp32", ()),), (("fp32", ()),))  # of the loss; DeepSpeed's is a part of backward
WARM_UP = 3  # DeepSpeed traces the order of modules in its first steps


def deepspeed_config(setup: Setup, hidden: int) -> dict[str, Any]:
    """What transformers makes of "auto" (integrations/deepspeed.py); the optimizer is PyTorch's, or the CPU Adam."""
    offloads = {"optimizer": OFFLOADED[:1], "params": OFFLOADED}.get(setup.offload, ())
    return {
        "train_micro_batch_size_per_gpu": setup.batch,
        "gradient_accumulation_steps": setup.grad_accum,
        "gradient_clipping": 1.0 if setup.clip_grad else 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": int(setup.parallel.removeprefix("zero")),
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 10**9,
            "reduce_bucket_size": hidden**2,
            "stage3_prefetch_bucket_size": hidden**2 * 9 // 10,
            "stage3_param_persistence_threshold": 10 * hidden,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            **{name: {"device": "cpu"} for name in offloads},
        },
    }


def _adamw(trained: list[torch.nn.Parameter], setup: Setup) -> Any:
    if setup.offload == "none":
        return torch.optim.AdamW(trained, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(trained)  # as accelerate does (`map_pytorch_optim_to_deepspeed`)


def traced_by_deepspeed(case: Case) -> parallel.RankRecorder:
    """What a rank of the real program does in a step of a case, behind the first ones.

    Raises:
        ImportError: deepspeed is not installed.
    """
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(case.setup.gpus),
    }  # fmt: skip
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    architecture = from_config(case.config)
    setup, method = under_zero(case.setup, methods.parse(case.method).bind(architecture))
    model = parallel.alone(case.config, setup, architecture, method)
    real = parallel.RankRecorder()
    real.trace.total, real.trace.trainable = parallel.elements(model)
    model.train()
    if setup.checkpoint != "none":
        reentrant = setup.checkpoint == "block-reentrant"
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    trained = [p for p in model.parameters() if p.requires_grad]
    config = deepspeed_config(setup, architecture.hidden)
    groups = ulysses.groups_of(model, setup)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=_adamw(trained, setup), mpu=groups)
    loss_of = ulysses.trainer_loss(engine, setup)
    with ulysses.exchanging(setup):
        _steps(engine, loss_of, setup, real)
    return real


def _steps(engine: Any, loss_of: Callable[[], Any], setup: Setup, real: parallel.RankRecorder) -> None:
    """The first steps, and one that is recorded."""
    for step in range(WARM_UP + 1):
        if step == WARM_UP:
            if setup.offload != "none":
                real.host.hold(in_host_memory(engine.optimizer, setup))
            there = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
            real.hold(t for t in there if t.device.type == "cpu")  # some have no memory ("meta")
            real.recording = True
        for _ in range(setup.grad_accum):
            with real.observe("forward"):
                loss = loss_of()
            with real.observe("backward"):
                engine.backward(loss)
            with real.observe("optimizer"):
                engine.step()


def in_host_memory(optimizer: Any, setup: Setup) -> Iterator[torch.Tensor]:
    """What DeepSpeed's optimizer keeps in the host's memory, by its names."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for master in getattr(optimizer, name, ()):
            yield from (master, master.grad)
    for state in optimizer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    yield from getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", ())
    yield from getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    for name in ("temp_grad_buffer_for_cpu_offload", "grad_partitions_flat_buffer"):
        if hasattr(optimizer, name):
            yield getattr(optimizer, name)
    if setup.offload == "params":
        yield from optimizer.param_groups_fp16_flat_cpu_memory
        yield from (p.ds_tensor for p in optimizer.module.parameters())


def compare_collectives(case: Case) -> counts.Result:
    """Trace a rank of a case and compare its collectives in their order, and its memory.

    ZeRO-3 gathers weights long before they are used: how much is gathered is compared, by phase and dtype, and its
    memory, which was up to 5 % off on the quick grid, is only shown. In a process of its own, as DeepSpeed keeps its
    groups.

    Raises:
        ImportError: deepspeed is not installed.
    """
    with ProcessPoolExecutor(1, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(_compared, case).result()


def _compared(case: Case) -> counts.Result:
    architecture = from_config(case.config)
    step = build(architecture, methods.parse(case.method).bind(architecture), case.setup, "cpu")
    with parallel.process_group(case.setup.parallel, case.setup.gpus):
        rank = traced_by_deepspeed(case)
    tape, real = parallel.collectives(step), rank.collectives
    result = counts.Result(case, 0, 0, 0, memory.peak_bytes(step) / rank.trace.peak, collectives=len(real))
    if case.setup.parallel == "zero3":
        ours, theirs = gathered(tape), gathered(real)
        if ours != theirs:
            result.differences.append(f"gathered: {ours} on the tape, {theirs} really")
        tape, real = ([c for c in found if c.name != GATHER] for found in (tape, real))
    elif abs(result.peak_ratio - 1) > parallel.PEAK_TOLERANCE:
        result.differences.append(f"peak memory: {result.peak_ratio:.3f} of the real program's on the tape")
    result.differences += parallel.in_another_order(tape, real)
    if case.setup.shares_heads and case.setup.parallel != "zero3":  # whose hooks lie around every module
        calls = [counts.without_underscore(x["forward"]) for x in (counts.tape_calls(step), rank.trace.calls)]
        del calls[0][OF_MICRO_BATCH]
        result.differences += counts.differing("forward", *calls)
    if case.setup.offload != "none" and (case.setup.parallel != "zero3" or case.setup.grad_accum == 1):
        result.differences += copied_otherwise(step, rank)
    return result


def copied_otherwise(step: Step, rank: parallel.RankRecorder) -> list[str]:
    """Copies between the host's memory and the device's that differ.

    Here DeepSpeed adds to the sums of ZeRO-3's micro-batches where they are, as both memories are the CPU's.
    """
    ours: Counter[tuple[str, int]] = Counter()
    for _, op, count in step.ops():
        if op.name == "copy_" and op.attrs.pinned:
            ours[op.outputs[0].dtype, op.outputs[0].numel] += count
    theirs = Counter((DTYPES[dtype], numel) for dtype, numel in rank.host.crossed)
    both = (("tape only", ours - theirs), ("real only", theirs - ours))
    return [f"copied, {title}: {n} x {copy}" for title, more in both for copy, n in more.items()]


def gathered(collectives: list[parallel.Collective]) -> dict[tuple[str, str, int], int]:
    """Elements that are gathered, by phase, dtype and group."""
    found: Counter[tuple[str, str, int]] = Counter()
    for c in collectives:
        if c.name == GATHER:
            found[c.phase, c.dtype, c.group] += c.elements
    return dict(found)
