"""`perfmodel validate counts --parallel`: the tape of a rank against the real program of a rank.

The real program is transformers + peft with real tensors, wrapped as accelerate does it, in a process group whose
collectives do nothing (torch's fake one). DDP, whose reducer waits for them, gets gloo's of one process: the buckets
and their sizes do not depend on how many there are.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice, zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from perfmodel import methods
from perfmodel.architectures import Architecture, Config, from_config
from perfmodel.methods import Method
from perfmodel.methods.parts.quantised import QuantisedLora
from perfmodel.prediction import memory
from perfmodel.program.op import Op
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing.packages.cut_loss import LinearCrossEntropy
from perfmodel.tracing.packages.fused_head import with_own_loss
from perfmodel.tracing.programs import models, updates
from perfmodel.tracing.programs.dtypes import DTYPES, TORCH_DTYPES
from perfmodel.tracing.programs.low_bit import apply_low_bit
from perfmodel.tracing.trace import NO_WORK, CallRecorder, Trace, call_name, eager_program

from . import counts
from .by_blocks import sharded_by_blocks
from .cases import Case
from .flat import flat_units
from .offloaded import HostMemory, copies_across
from .shared.context_parallel import on_ring, own_tokens
from .shared.sequence_parallel import share_tokens
from .shared.tensor_parallel import cut_model, mend_adapters

PEAK_TOLERANCE = 0.03
META = torch.device("meta")
MESH = ("dp_replicate", "dp_shard_cp")  # dims of accelerate's mesh that FSDP's shards and replicas lie over
COLLECTIVE = ("c10d", "_c10d_functional")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product")


class Collective(NamedTuple):
    """One of a sequence: `products` is how many matrix products were called before it."""

    phase: str
    name: str
    dtype: str
    elements: int
    group: int
    products: int


class RankRecorder(CallRecorder):  # type: ignore[no-untyped-call]
    """Also notes collectives in their order, and follows memory that a program frees and fills again in place.

    Attributes:
        host: what lives in the host's memory, and so is no matter of the peak.
    """

    def __init__(self) -> None:
        super().__init__(keep=self._note)
        self.host = HostMemory()
        self.collectives: list[Collective] = []
        self.products = 0
        self.resized: dict[int, weakref.ref[Any]] = {}

    def begin(self) -> None:
        """Count anew from here; memory that is there stays known."""
        self.trace, self.collectives, self.products = Trace(peak=self.live), [], 0

    def _watch(self, t: torch.Tensor) -> None:
        if not self.host.has(t):
            super()._watch(t)

    def _note(self, phase: str, func: Any, inputs: Any, outputs: Any, arguments: Any) -> None:
        name = call_name(func)
        self.host.note(func, inputs, outputs, arguments)
        self.products += name.startswith(PRODUCTS)
        if func.namespace in COLLECTIVE and func._schema.name not in NO_WORK:
            message = max(sum(t.numel() for t in tensors) for tensors in (inputs, outputs))
            group = group_size(arguments)
            self.collectives.append(Collective(phase, name, DTYPES[inputs[0].dtype], message, group, self.products))
        if func is torch.ops.fsdp.split_with_sizes_copy.default:
            for t in outputs:
                storage = t.untyped_storage()
                self.resized[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for key, reference in self.resized.items():
            storage = reference()
            if storage is not None:
                self.live += storage.nbytes() - self.storages[key]
                self.storages[key] = storage.nbytes()
        if (kwargs or {}).get("device") == META:  # a shape is looked up
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


def group_size(arguments: Any) -> int:
    """How many take part, by the process group among the arguments of a collective, or its name."""
    args, _ = arguments
    for value in reversed(args):
        if isinstance(value, str):
            return dist.distributed_c10d._resolve_process_group(value).size()  # type: ignore[attr-defined,arg-type]
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).size()
    raise AssertionError("a collective has a group")


@contextmanager
def process_group(kind: str, ranks: int) -> Iterator[None]:
    """The default group of this process as one of so many ranks; of DDP another group of one process is made."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    store = torch._C._distributed_c10d.HashStore() if kind == "ddp" else FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wrapped_for_ranks(model: Any, setup: Setup, architecture: Architecture, mesh: Any = None) -> Any:
    """The model as accelerate prepares it: for DDP and FSDP1 with its defaults, for FSDP2 by itself."""
    if setup.parallel == "ddp":
        fake = dist.get_backend() == "fake"
        return torch.nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=setup.ddp == "find-unused", static_graph=setup.ddp == "static-graph",
            process_group=dist.new_group([0], backend="gloo") if fake else None,
        )  # fmt: skip
    mesh = mesh_of_ranks(setup) if mesh is None else mesh
    rows = [model.get_submodule(path) for path in stacks_in(model, architecture)]
    amp, reduce = (TORCH_DTYPES[dtype] if dtype else None for dtype in (setup.amp, setup.reduce_dtype))
    if setup.parallel == "fsdp1":
        return flat_units(model, type(rows[0][0]), reshard=setup.reshard, mesh=mesh, amp=amp, reduce=reduce)
    names = [name for name in MESH if name in (mesh.mesh_dim_names if mesh is not None else ())]
    if setup.fsdp_units != "accelerate":
        shards = mesh[tuple(names)] if names else None
        return sharded_by_blocks(model, chain.from_iterable(rows), setup, shards, set(packed_apart(model)))
    from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=setup.reshard,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(block).__name__ for row in rows for block in row}),
        cpu_ram_efficient_loading=False,
        cpu_offload=CPUOffloadPolicy(pin_memory=False) if setup.offload == "params" else False,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=amp, reduce_dtype=reduce or amp, output_dtype=amp),
        ignored_modules=[torch.nn.ParameterList(packed_apart(model))],
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=setup.amp or "no", is_main_process=False,
        device="cpu", torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=names),
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def mesh_of_ranks(setup: Setup) -> Any:
    """Replicas by shards by ranks that share layers, those that there are; None where all are shards alone."""
    ranks = setup.replicas * setup.cp
    group = ranks if setup.shard_group is None else min(ranks, setup.shard_group)
    sizes = {MESH[0]: ranks // group, MESH[1]: group, "tp": setup.tp}
    if group == ranks and setup.tp == 1:
        return None
    there = {name: n for name, n in sizes.items() if n > 1}
    return init_device_mesh("cpu", tuple(there.values()), mesh_dim_names=tuple(there))


def packed_apart(model: Any) -> Iterator[torch.nn.Parameter]:
    """What is not cut of 4-bit layers: bytes, and scales, parameters of the stand-in for bitsandbytes alone."""
    for module in model.modules():
        for name, count in getattr(module, "stands_for", {}).items():
            p = getattr(module, name)
            if count == 0 or not p.is_floating_point():
                yield p


def stacks_in(model: Any, architecture: Architecture) -> list[str]:
    """Paths of the lists of blocks, wherever peft has put them."""
    rows = re.compile(rf"(.*\.)?({'|'.join(re.escape(path) for path, _ in architecture.stacks)})")
    return [name for name, module in model.named_modules() if rows.fullmatch(name)]


@contextmanager
def not_reducing(model: Any, setup: Setup) -> Iterator[None]:
    """accelerate's `no_sync`."""
    if setup.replicas * setup.cp == 1:
        yield
        return
    if setup.parallel in ("ddp", "fsdp1"):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def trace_rank(
    model: Any, setup: Setup, update: Any, loss_of: Callable[[], Any] | None = None,
    beside: Iterable[torch.Tensor] = (), after: Callable[[], None] = lambda: None, recorder: RankRecorder | None = None,
) -> RankRecorder:  # fmt: skip
    """The fourth step of a rank: in the second DDP fills other buckets than in the first, of a static graph in the
    third.

    Args:
        loss_of: the loss of a micro-batch as it goes backward, in the place of the model's own.
        beside: what is in memory beside the model.
        after: what a trainer does once gradients are there.
        recorder: what records; None: a new one.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros(setup.shape, dtype=torch.long)
    attention, more = torch.ones_like(ids), own_tokens(setup, ids)
    recorder = RankRecorder() if recorder is None else recorder
    autocast = setup.parallel in ("ddp", "fsdp1")  # FSDP2 casts what it gathers instead

    def own_loss() -> Any:
        with torch.autocast("cpu", TORCH_DTYPES[setup.amp]) if setup.amp and autocast else nullcontext():
            loss = model(input_ids=ids, labels=ids, attention_mask=attention, **more).loss
        return loss / setup.grad_accum if setup.grad_accum > 1 else loss

    def micro_batch() -> None:
        with recorder.observe("forward"):
            loss = own_loss() if loss_of is None else loss_of()
        with recorder.observe("backward"):
            loss.backward()
            after()

    def run() -> None:
        for _ in range(setup.grad_accum - 1):
            with nullcontext() if setup.sync_each_batch else not_reducing(model, setup):
                micro_batch()
        micro_batch()
        recorder.host.makes = setup.offload == "params"
        with recorder.observe("optimizer"):
            if setup.clip_grad:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
            update.step()
            update.zero_grad(set_to_none=True)
        recorder.host.makes = False

    offloads = setup.offload == "params"
    with eager_program(), copies_across(model) if offloads else nullcontext(), on_ring(setup):
        run()
        held = [*model.parameters(), *beside, *updates.held(update)]
        if offloads:  # shards; what is packed in bytes, which FSDP2 cannot cut, stays
            recorder.host.hold(local(t) for t in held if isinstance(t, DTensor))
        recorder.hold(map(local, held))
        recorder.recording = True
        for _ in range(2):
            run()
            recorder.begin()
        run()
    return recorder


def local(t: torch.Tensor) -> torch.Tensor:
    """What a rank has of a tensor."""
    return t._local_tensor if isinstance(t, DTensor) else t


def compare_rank(case: Case) -> counts.Result:
    """Trace a rank of the real program of a case and compare calls, bytes, collectives in their order, and memory."""
    architecture = from_config(case.config)
    step = build(architecture, methods.parse(case.method).bind(architecture), case.setup, "cpu")
    with process_group(case.setup.parallel if case.setup.replicas * case.setup.cp > 1 else "tp", case.setup.gpus):
        return judge_rank(case, step, traced_rank(case, step.optimizer))


def traced_rank(case: Case, optimizer: str, model: Architecture | None = None) -> RankRecorder:
    """What this process of the current group does in a step of a case; the model is its config's unless it is given."""
    setup, architecture = case.setup, from_config(case.config) if model is None else model
    method = methods.parse(case.method).bind(architecture)
    mesh = mesh_of_ranks(setup)
    module = alone(case.config, setup, architecture, method, mesh)
    total, trainable = elements(module)
    module.train()
    checkpointed(module, setup)
    if setup.replicas * setup.cp > 1:
        module = wrapped_for_ranks(module, setup, architecture, mesh)
    with patch.object(LinearCrossEntropy, "rows_of_a_lock", 128):  # as its package has them
        real = trace_rank(module, setup, updates.make(module, optimizer, method))
    real.trace.total, real.trace.trainable = total, trainable
    return real


def checkpointed(model: Any, setup: Setup) -> None:
    """Switch checkpoints on as the setup has them."""
    if setup.checkpoint != "none":
        reentrant = setup.checkpoint == "block-reentrant"
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})


def alone(config: Config, setup: Setup, architecture: Architecture, method: Method, mesh: Any = None) -> Any:
    """The model with the method on it, as one GPU alone would have it, or one of those that share its layers."""
    base = with_own_loss(models.build_model(config, setup, device="cpu"), setup)
    method = method.under(setup.stack, setup.dtype)
    if setup.sequence_parallel:
        return share_tokens(base, method, architecture, mesh["tp"])
    if setup.tp > 1:
        return mend_adapters(models.apply_method(cut_model(base, setup, mesh["tp"]), method, architecture), setup)
    if isinstance(method, QuantisedLora):
        return apply_low_bit(base, method, architecture, setup)
    return models.apply_method(base, method, architecture)


def elements(model: Any) -> tuple[int, int]:
    """Of all parameters, and of those that train; a packed weight stands for what it was packed from."""
    stands_for = {
        id(getattr(module, name)): count
        for module in model.modules()
        for name, count in getattr(module, "stands_for", {}).items()
    }
    numels = [(stands_for.get(id(p), p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in numels), sum(n for n, trains in numels if trains)


def judge_rank(case: Case, step: Step, real: RankRecorder) -> counts.Result:
    """What of the tape differs from what a rank did."""
    peak = memory.peak_bytes(step)
    trace, tape = real.trace, counts.tape_calls(step)
    calls, nbytes = sum(sum(c.values()) for c in trace.calls.values()), sum(trace.bytes.values())
    result = counts.Result(case, calls, 0, nbytes, peak / trace.peak, collectives=len(real.collectives))
    for phase in PHASES:
        pair = (counts.without_underscore(of[phase]) for of in (tape, trace.calls))
        result.differences += counts.differing(phase, *pair)
    on_tape = sum(count * (op.bytes_read + op.bytes_written) for _, op, count in step.ops())
    if on_tape != nbytes:
        result.differences.append(f"bytes: {on_tape} on the tape, {nbytes} in the real program")
    expected, found = collectives(step), real.collectives
    found = [c._replace(group=case.setup.gpus) if c.group == 1 else c for c in found]  # DDP's, of one process
    result.differences += in_another_order(expected, found)
    if (step.trainable, step.total) != (trace.trainable, trace.total):
        result.differences.append(
            f"parameters: {step.trainable} of {step.total} train on the tape, {trace.trainable} of {trace.total} really"
        )
    if abs(result.peak_ratio - 1) > PEAK_TOLERANCE:
        result.differences.append(f"peak memory: {peak} B on the tape, {trace.peak} B live in the real program")
    return result


def in_another_order(tape: list[Collective], real: list[Collective]) -> list[str]:
    """The first collective of a sequence that differs from the other's, if any does."""
    pairs = enumerate(zip_longest(tape, real))
    differing = ((i, ours, theirs) for i, (ours, theirs) in pairs if ours != theirs)
    return [f"collective {i}: {ours} on the tape, {theirs} really" for i, ours, theirs in islice(differing, 1)]


def collectives(step: Step) -> list[Collective]:
    """Those of the tape."""
    found, passed = [], 0
    for phase, op in in_order(step):
        passed += op.name.startswith(PRODUCTS)
        if op.attrs.ranks is not None:
            message = max(sum(s.numel * s.copies for s in specs) for specs in (op.inputs, op.outputs))
            found.append(Collective(phase, op.name, op.inputs[0].dtype, message, op.attrs.ranks.size, passed))
    return found


def in_order(step: Step) -> Iterator[tuple[str, Op]]:
    """Every op of a step as often as it runs, with its phase."""
    for group in step.groups:
        for part in chain.from_iterable([group.parts] * group.repeat):
            for op in chain.from_iterable([part.ops] * part.repeat):
                yield part.phase, op
