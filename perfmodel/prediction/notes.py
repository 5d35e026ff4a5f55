"""What an answer says beside its figures: what it rests on, and what it assumes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import objectives, passes, units
from ..architectures.base import Architecture
from ..calls.table import row
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..methods.parts.base import Method
from ..methods.parts.targeted import Targeted, unmatched
from ..program.software import CURRENT
from ..recording import converted
from ..recording.deepspeed import zero3_alone
from ..setup import Setup
from . import intervals, memory
from .times import Time
from .work import StepWork

MOST_NAMED = 6  # calls that a note names
MUCH_WAITING = 0.2  # of a step for the host, from where on the answer says which host that is


# (torch 2.13 with peft 0.21: 16 to 25 graphs of two adapted blocks, one of LoRA)
BROKEN = "Dynamo breaks the graph in each layer of {}'s in PEFT's code: expect less of torch.compile than is answered"
FP16_UNSCALED = "--amp fp16: without the pass that unscales gradients and looks for infinities (GradScaler)"


def notes_on(built: StepWork, on: DeviceProfile, by: Host, time: Time, held: memory.Memory) -> list[str]:
    """What a reader should know about a prediction and its time."""
    seconds, total = time.components, time.phases["total"]
    notes = notes_before(built.architecture, built.method, built.setup)
    used = {intervals.priced_by(c, on) for c, s in seconds.items() if np.any(s > 0.01 * total)}
    defaults = [block for block, origin in on.fitted.items() if origin == "class" and block in used]
    if defaults:
        missing = f"no measurements of {', '.join(defaults)} on {on.slug}: defaults of its class, wider interval"
        hint = "; perfmodel calibrate --device cpu measures this machine" if on.kind == "cpu" else ""
        notes.append(missing + hint)
    if built.setup.computes_in == "bf16" and on.hardware.half != "bf16":
        option = "--amp" if built.setup.amp else "--dtype"
        notes.append(
            f"{on.slug} has no bf16 units, PyTorch emulates them: {option} {on.hardware.half} is what it is fast in"
        )
    notes += [FP16_UNSCALED] if built.setup.amp == "fp16" else []
    if on.kind == "cpu":
        notes.append(
            "the step time is that of a malloc that keeps freed memory (jemalloc, tcmalloc, or glibc's with "
            "MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0): page faults of glibc's default add up to a quarter"
        )
    if on.kind == "cuda" and np.any(time.launch_bound_share > MUCH_WAITING):
        notes.append(f"the device waits for the host, which is assumed: {by.name} (--host)")
    notes += _target_notes(built)
    notes += _optimizer_notes(built, seconds, total)
    notes += _unknown_notes(built)
    notes += [zero3_alone.NOTE] if built.zero else []
    notes += _mixture_notes(built)
    notes += _packed_notes(built)
    ran = [kind for kind, calls in time.communication.calls.items() if np.any(calls)]
    notes += on.network.notes_of(ran) if on.network is not None else []
    notes += _room_notes(held, on)
    notes += _offload_notes(built, on)
    notes += _stack_notes(built, on)
    notes += _attention_notes(built, "attention" in seconds, on)
    if built.setup.checkpoint != "none" and built.method.checkpoints(0) and built.freezes_embedding:
        notes.append(
            "with checkpointing transformers makes the embedding's output need a gradient: backward runs through every "
            "block, also below the lowest trainable one"
        )
    return [*notes, *built.notes]


def notes_before(architecture: Architecture, method: Method, setup: Setup) -> list[str]:
    """What is known before a step is recorded: of the model, of how its layers run, of what it is trained for."""
    notes = [architecture.note] if architecture.note else []
    if setup.compile != "none":
        several = {"fsdp2": passes.BETWEEN_HOOKS, "ddp": passes.AT_BUCKETS}
        graphs = several.get(setup.parallel, passes.NOTE) if np.max(setup.gpus) > 1 else passes.NOTE
        notes.append(f"{graphs}, and {passes.OF_SDPA}" if setup.attention == "sdpa" else graphs)
        notes += [BROKEN.format(method.title)] if method.breaks_graphs else []
    notes += converted.product_notes(setup)
    return notes + _head_notes(architecture, method, setup)


def _head_notes(architecture: Architecture, method: Method, setup: Setup) -> list[str]:
    """What the model ends in and what it is trained for, where that is not a language model's own loss."""
    head = architecture.classifier
    if setup.objective == "sft":
        said = "as architectures in its config says"
        return [f"its head classifies {head.of}s ({head.labels} labels), {said}"] if head else []
    objective = objectives.found(setup.objective)
    return objective.told(method, setup)


def _target_notes(built: StepWork) -> list[str]:
    """Layers that a method takes for others, and names of targets that no layer of a recorded model has."""
    method = built.method
    if not isinstance(method, Targeted):
        return []
    told = [method.told_of_four_dims] if method.told_of_four_dims and built.architecture.traits.four_dims else []
    odd = unmatched(method.targets, built.architecture)
    some = 0 < len(odd) < len(method.targets)
    if why := getattr(method, "why_unfused", ""):
        told.append(f"its implementation fuses nothing here, so that PEFT's own forward runs: {why}")
    return [*told, *([f"no linear layer is called {' or '.join(odd)}: no adapters there"] if some else [])]


def _mixture_notes(built: StepWork) -> list[str]:
    """What is assumed of a mixture of experts, whose loads data decides."""
    if np.all(built.active == built.total):
        return []
    setup, (active, total) = built.setup, (units.count(int(np.max(n))) for n in (built.active, built.total))
    looped = "; a loop over those that are hit (--experts eager)" if setup.loops_experts else ""
    told = [
        f"mixture of experts: {active} of {total} parameters are active for a token; load of the experts: "
        f"{setup.routing} (--routing){looped}"
    ]
    if setup.amp and setup.dtype == "fp32" and setup.parallel == "ddp" and not setup.loops_experts:
        told.append("autocast passes torch._grouped_mm by: experts compute in fp32 (not so with --experts eager)")
    return told


def _packed_notes(built: StepWork) -> list[str]:
    """What becomes of weights that are packed in bytes, where GPUs cut weights: only floats can be."""
    setup, method = built.setup, built.method
    if getattr(method, "quant_storage", "") != "u8" or np.all(np.equal(setup.gpus, 1)):
        return []
    floats = f"{method.name}:quant_storage={setup.computes_in}"
    if setup.parallel == "fsdp1":  # "Cannot flatten integer dtype tensors" (torch.distributed.fsdp._flat_param)
        return [f"fsdp1 takes no bytes: 4-bit weights are taken as held in floats ({floats})"]
    whole = setup.parallel in ("fsdp2", "zero3")
    return [f"4-bit weights are held in bytes, so whole on every GPU; {floats} lets {setup.parallel} cut them"] * whole


def _stack_notes(built: StepWork, on: DeviceProfile) -> list[str]:
    """What the versions of the software decide in this step, where others decide otherwise."""
    setup, stack, capability = built.setup, built.setup.stack, on.compute_capability
    by_version = setup.attention == "sdpa" and setup.computes_in != "fp32" and on.kind == "cuda"
    told = []
    if by_version and stack.depends_on_versions(capability):
        told.append(f"sdpa {'tries' if stack.prefers_cudnn(capability) else 'does not try'} cuDNN's kernel first")
    if stack == CURRENT:
        return [f"{told[0]} in the stack that is assumed: {stack.words} (--stack)"] if told else []
    if by_version and stack.torch < (2, 2):
        told.append("its FlashAttention is the first one, priced as the second")
    if on.kind == "cuda" and stack.list_room(capability) != CURRENT.list_room(capability):
        told.append("a launch over a list takes fewer tensors")
    if stack.early_products and on.early is not None:
        told.append("products run cuBLAS's older kernels for Hopper")
    if on.kind == "cuda" and not stack.streams_downcasts:
        told.append("casts of fp32 to 16 bit look at every element")
    if built.architecture.recorded:
        told.append("else the program is that of the installed packages")
    else:
        told += ["grouped keys and values are repeated for sdpa"] if not stack.groups_heads else []
        told += ["the loss copies the logits"] if stack.shifts_logits else []
    if stack.checkpoints_around_blocks and setup.parallel == "fsdp1" and setup.checkpoint == "block-reentrant":
        freezes = np.any(np.greater(setup.gpus, 1)) and np.any(np.less(built.trainable, built.total))
        told += ["FSDP1's hooks hold what goes into frozen blocks"] if freezes else []
    ran = built.method.under(stack, setup.dtype)
    dtype = getattr(ran, "adapter_dtype", setup.dtype)
    return [
        f"--stack {stack.words}: {', '.join(told) or 'all else as in current versions'}",
        *([f"its adapters are in {dtype}, as that peft makes them"] if ran != built.method else []),
    ]


def _attention_notes(built: StepWork, fused: bool, on: DeviceProfile) -> list[str]:
    """Says of sdpa that no kernel of it takes these heads, which costs memory and time that nobody expects of it."""
    architecture, setup = built.architecture, built.setup
    if fused or on.kind != "cuda" or setup.attention != "sdpa" or architecture.kv_heads in (0, architecture.heads):
        return []
    heads, dtype = f"{architecture.heads} heads over {architecture.kv_heads}", setup.computes_in
    told = (
        f"sdpa has no fused kernel for {heads} in {dtype} on {on.slug}: attention goes call by call, and its "
        "scores go through memory"
    )
    return [told + ("" if dtype == "fp32" else f" in fp32; --attention eager has them in {dtype}")]


def _room_notes(held: memory.Memory, on: DeviceProfile) -> list[str]:
    """Says of a step that fits where fragmentation may take more than is there."""
    limit = memory.reservable(on.capacity, on.kind, held.buffers)
    if not np.any(np.less_equal(held.low, limit) & np.greater(held.high, limit)):
        return []
    if np.ndim(held.peak) or np.ndim(limit):  # NCCL's buffers go by the number of GPUs
        return ["where the peak is close to the device's memory, a fragmented allocator may need more than there is"]
    sizes = " to ".join(units.nbytes(float(size)) for size in (held.low, held.high))
    return [f"it fits tightly: the allocator reserves {sizes}, by how fragmented it gets, of {units.nbytes(limit)}"]


def _offload_notes(built: StepWork, on: DeviceProfile) -> list[str]:
    """What is assumed of the host that weights or states live at."""
    if built.setup.offload == "none" or on.network is None:
        return []
    share = units.count(float(np.min(on.network.host_bandwidth)), "B/s")
    return [
        f"offloaded to page-locked memory; the cores that update it are all at work (OMP_NUM_THREADS) and have {share} "
        "of the host's memory for each GPU of the job (--node); a slice of a host has less"
    ]


def _unknown_notes(built: StepWork) -> list[str]:
    """Names the calls that no row of `calls.table` tells of."""
    unknown = built.unknown
    if not unknown:
        return []
    more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
    return [f"unknown calls, priced as streaming in one kernel each: {', '.join(unknown[:MOST_NAMED])}{more}"]


def _optimizer_notes(built: StepWork, seconds: Mapping[str, Any], total: Any) -> list[str]:
    notes = []
    own = built.method.own_optimizer
    if own and built.setup.optimizer != "adamw":
        notes.append(f"{built.method.name} brings {own}: the setup's optimizer {built.setup.optimizer} is not used")
    besides = (op.name for work in built.periodic for part in work.group.parts for op in part.ops)
    in_step = np.any(seconds.get("solver", 0.0) > 0.01 * total)
    if in_step or any(row(name).work == "decomposition" for name in besides):
        notes.append(
            "decompositions (SVD, QR, pseudo-inverse, …) are priced by a rough model of cuSOLVER, right within a "
            "factor of about two"
        )
    if np.any(built.paged_bytes):
        notes.append(
            f"{units.nbytes(np.max(built.paged_bytes))} of optimizer state are paged, outside the peak: what finds no "
            "room beside it crosses the bus twice a step, which the step time leaves out"
        )
    return notes
