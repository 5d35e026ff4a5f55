"""The oracle: the real transformers + peft program under FakeTensorMode, every ATen call recorded.

What is real: the modules, their forward code, autograd, clipping and the optimizer of the installed packages. What is
not: the data. Where a read of data steers the program ("is the attention mask all ones?"), it is answered as a dense
batch answers it; of a list of flags that picks rows, every one is set.
"""

import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..setup import Setup
from ..tape.core import ONE_AT_A_TIME
from . import known, sparse
from .fakes import Fakes
from .flops import flops_of
from .picked import as_kernels_have_them, picking_all
from .programs import updates
from .programs.dtypes import DTYPES, TORCH_DTYPES
from .programs.family import packed_inputs
from .watching.graph import graph_nodes

aten = torch.ops.aten

EXCHANGING = ("c10d", "_c10d_functional", "fsdp")  # namespaces of what ranks do with one another
NAMESPACES = {  # of the calls that are recorded
    "aten", "cuda_forms", "flash_attn", "dropout_layer_norm", "flash_rotary", "xentropy", "bitsandbytes", "liger",
    "cce", "trl", "lorafusion", "unsloth", "axolotl", "gptqmodel", "torchao", *EXCHANGING,
}  # fmt: skip

# Autograd asks fake tensors where they lie, several times a call: as calls of their own these took a tenth of a trace.
ASKS_DEVICE = torch.ops.prim.device.default

# Calls that reach the recorder whole where such a tensor makes them, as no autograd has taken them apart.
MADE_INSIDE = (aten.contiguous.default, aten.pad.default, aten.to.dtype)

# Calls that move no data and are no views.
NO_WORK = (
    "aten::_unsafe_view", "aten::detach", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd",
)  # fmt: skip

Signature = tuple[str, tuple[Any, ...], tuple[Any, ...]]


@dataclass
class Trace:
    """What one step dispatched: calls by phase, FLOPs, bytes, and the peak of live bytes."""

    calls: dict[str, Counter[Signature]] = field(default_factory=dict)
    views: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    nodes: int = 0
    trainable: int = 0
    total: int = 0


class CallRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records non-view ATen calls with shapes and dtypes, and replays storage lifetimes by weak reference."""

    def __init__(
        self, *, dense: bool = True, keep: Callable[[str, Any, Any, Any, Any], None] | None = None, knows: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.knows = knows  # whether values of small tensors are followed (`known`)
        self.keep = keep  # called with (phase, function, inputs, outputs, arguments) of every call, views included
        self.trace = Trace()
        self.phase = ""
        self.live = 0
        self.live_after: list[int] = []  # live bytes right after each call
        self.complete: dict[int, int] = {}  # parameters whose gradients are there, with the bytes of each
        self.complete_bytes = 0
        self.highest = 0  # live bytes but for those, at the most since somebody asked
        self.storages: dict[int, int] = {}
        self.recording = False
        self.latest_any: weakref.ref[Any] | None = None  # it asks for infinite values, of which there are none
        self.dense = dense
        self.draws = known.Draws()

    @contextmanager
    def observe(self, phase: str) -> Iterator[None]:
        """Count under a phase."""
        self.phase = phase
        for table in (self.trace.views, self.trace.bytes, self.trace.flops):
            table.setdefault(phase, 0)
        self.trace.calls.setdefault(phase, Counter())
        with self, known.read_by_factories() if self.knows else nullcontext():
            yield

    def hold(self, tensors: Any) -> None:
        """Count tensors that were there before the step."""
        for t in tensors:
            self._watch(t)
        self.trace.peak = max(self.trace.peak, self.live)

    def _watch(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        nbytes = storage.nbytes()
        self.storages[key] = nbytes
        self.live += nbytes
        weakref.finalize(storage, _drop, weakref.ref(self), key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASKS_DEVICE and isinstance(args[0], FakeTensor):
            return fake_device(args[0])
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor of tensors: what it makes of the call is recorded
        if func in MADE_INSIDE:
            with self:
                return func.decompose(*args, **kwargs)
        value = known.result_of(func, args, kwargs) if self.knows else None
        if value is not None:
            out = value if func is aten._local_scalar_dense.default else self._with_value(func, args, kwargs, value)
        elif func is aten._local_scalar_dense.default:
            try:
                out = func(*args, **kwargs)
            except (
                Exception
            ):  # data of a fake tensor: is the attention mask all ones? does a random draw keep a module?
                if args[0].dtype != torch.bool:
                    out = 1
                elif self.latest_any is not None and self.latest_any() is args[0]:
                    out = False
                elif (likelier := self.draws.likelier(args[0])) is not None:
                    out = likelier
                else:
                    out = self.dense if args[0].dim() == 0 else True
        else:
            out = picking_all(func, known.with_places(func, args) if self.knows else args, kwargs)
            out = as_kernels_have_them(func, sparse.with_values(func, args, out))
        if self.knows and value is None:
            known.drop_values(_mutated(func, args, kwargs))
        if func is aten.any.default:
            self.latest_any = weakref.ref(out)
        self.draws.watch(func, args, out)
        if func.namespace not in NAMESPACES or not self.recording:
            return out
        if func.is_view or func._schema.name in NO_WORK:
            self.trace.views[self.phase] += 1
            if self.keep:
                self.keep(self.phase, func, _tensors((args, kwargs)), _tensors(out), (args, kwargs))
            return out
        inputs = _tensors((args, kwargs))
        outputs = _distinct([*_tensors(out), *_mutated(func, args, kwargs)])
        if func.namespace in EXCHANGING:
            inputs, outputs = _given_and_made(func, inputs, outputs)
        name = call_name(func)
        if self.keep:
            self.keep(self.phase, func, inputs, outputs, (args, kwargs))
        self.trace.calls[self.phase][signature(name, [_spec(t) for t in inputs], [_spec(t) for t in outputs])] += 1
        self.trace.bytes[self.phase] += sum(_nbytes(t) for t in [*_distinct(inputs), *outputs])
        self.trace.flops[self.phase] += flops_of(func, args, kwargs, out)
        for t in outputs:
            self._watch(t)
        self.trace.peak = max(self.trace.peak, self.live)
        self.live_after.append(self.live)
        self.highest = max(self.highest, self.live - self.complete_bytes)
        return out

    def passing(self) -> tuple[int, int]:
        """Live bytes that are no complete gradient's, now and at the most since this was asked before."""
        now = self.live - self.complete_bytes
        before, self.highest = max(self.highest, now), now
        return now, before

    def completed(self, p: torch.nn.Parameter) -> None:
        """A parameter's gradient is there, and stays."""
        nbytes = 0 if p.grad is None else p.grad.untyped_storage().nbytes()
        self.complete_bytes += nbytes - self.complete.get(id(p), 0)
        self.complete[id(p)] = nbytes

    def _with_value(self, func: Any, args: Any, kwargs: Any, value: Any) -> Any:
        try:
            out = func(*args, **kwargs)
        except DynamicOutputShapeException:
            out = known.like(value)
        known.note(out, value)
        return out


def _drop(recorder: "weakref.ref[CallRecorder]", key: int) -> None:
    """A block of memory is gone; what waits for that holds no recorder, which would keep a model for good."""
    if (counting := recorder()) is not None:
        counting.live -= counting.storages.pop(key, 0)


def fake_device(t: FakeTensor) -> torch.device:
    """What the fake mode answers to `ASKS_DEVICE`."""
    return torch.device("meta") if t.fake_mode.in_kernel_invocation else t.fake_device


def call_name(func: Any) -> str:
    """An ATen function's name with its overload, as the tape writes it."""
    name = str(func._schema.name.removeprefix("aten::").removeprefix("cuda_forms::"))
    return f"{name}.{func._schema.overload_name}" if func._schema.overload_name else name


def signature(name: str, inputs: list[Any], outputs: list[Any]) -> Signature:
    """Name, input and output (dtype, shape)s; lists of a foreach op in any order."""
    name = name.removesuffix(".default")
    if name.startswith(("_foreach", "_fused", "stack", "fsdp")):
        inputs, outputs = sorted(inputs), sorted(outputs)
    return (name, tuple(inputs), tuple(outputs))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return sparse.parts([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)])


def _mutated(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _given_and_made(func: Any, inputs: list[Any], outputs: list[Any]) -> tuple[list[Any], list[Any]]:
    """What a call between ranks reads and writes: buffers that it only writes are arguments too."""
    if func is torch.ops.c10d.alltoall_base_.default:  # its schema does not say that it writes the first one
        return inputs[1:2], inputs[:1]
    made = outputs[:1] if func is torch.ops.fsdp.all_gather_copy_in.default else outputs  # the rest is gathered later
    return [t for t in inputs if all(t is not out for out in outputs)] or inputs, made


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(t): t for t in tensors}.values())


def _nbytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def _spec(t: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return (DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape))


@contextmanager
def without_remarks() -> Iterator[None]:
    """Without what peft, transformers and the loggers of torch say of random weights and of programs that fail.

    Loggers, warnings and what a trace puts into modules of PyTorch are the process's: one thread at a time.
    """
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "transformers")]
    with ONE_AT_A_TIME:
        before = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


@contextmanager
def eager_program() -> Iterator[None]:
    """Keep transformers on its eager path: it takes a tracing path for fake tensors, which training never sees."""
    import transformers.utils.import_utils as utils

    with ONE_AT_A_TIME:
        original = utils.is_fake_tensor
        utils.is_fake_tensor = lambda x: False
        try:
            yield
        finally:
            utils.is_fake_tensor = original


def with_hooks_of(parameter: torch.Tensor, other: torch.Tensor) -> None:
    """Give a parameter the hooks that run on the gradient of another."""
    for hook in (parameter._backward_hooks or {}).values():
        other.register_hook(hook)  # type: ignore[no-untyped-call]


def to_fake(model: torch.nn.Module, mode: FakeTensorMode, device: str) -> None:
    """Swap every meta parameter and buffer for a fake tensor on a device, keeping ties and hooks on gradients."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in made:
                    with mode:
                        fake: Any = torch.empty(value.shape, dtype=value.dtype, device=device)
                    if isinstance(value, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
                        with_hooks_of(value, fake)
                    made[id(value)] = fake
                table[name] = made[id(value)]
        for container in (module.__dict__, *(v for v in module.__dict__.values() if isinstance(v, dict))):
            for name, value in container.items():
                if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):  # no parameter, no buffer
                    continue
                at = device if value.device.type == "meta" else value.device
                with mode:
                    container[name] = torch.empty(value.shape, dtype=value.dtype, device=at)


def trace_step(
    model: Any,
    setup: Setup,
    optimizer: str,
    *,
    device: str = "cpu",
    forward_only: bool = False,
    keep: Callable[[str, Any, Any, Any, Any], None] | None = None,
    make: Callable[[Any, str], Any] = updates.standard,
    real: bool = False,
    loss_of: Callable[[], torch.Tensor] | None = None,
    after: Callable[[], None] = lambda: None,
    beside: Sequence[torch.Tensor] = (),
) -> Trace:
    """Trace one steady-state training step (the second) of a model built on the meta device, or of a `real` one.

    A real step differs from one on fake tensors in two things: the engine adds gradients in place where nobody else
    holds them (`add_` for `add`), and a view that was changed in place is viewed anew by its strides (`Tape`).

    Args:
        real: the model has data; so has the step.
        optimizer: the resolved form (`perfmodel.optimizers.picked_form`).
        device: "cpu", or "cuda" with a CUDA build of torch (then only the forward pass can be traced).
        forward_only: no backward pass and no optimizer.
        keep: sees every call of the traced step (see `CallRecorder`).
        make: the optimizer of the model in that form.
        loss_of: makes the loss that is differentiated; None: the model's own is taken, under autocast.
        after: what a trainer does once gradients are there.
        beside: tensors that are there besides the model's and the optimizer's.
    """
    # some tuners of peft keep plain tensors (indices, token ids) beside their parameters
    mode: Any = nullcontext() if real else Fakes(allow_non_fake_inputs=keep is not None)
    if not real:
        to_fake(model, mode, device)
    model.train()
    if setup.checkpoint != "none":
        reentrant = setup.checkpoint == "block-reentrant"
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    trained = [p for p in model.parameters() if p.requires_grad]
    with mode:
        inputs = packed_inputs(model, setup, device)
        update = make(model, optimizer)
    recorder = CallRecorder(dense=not (setup.padded or setup.within_documents), keep=keep)
    recorder.trace.trainable = sum(p.numel() for p in trained)
    recorder.trace.total = sum(p.numel() for p in model.parameters())

    def run() -> None:
        for _ in range(setup.grad_accum):
            amp = torch.autocast(device, TORCH_DTYPES[setup.amp]) if setup.amp else nullcontext()
            with recorder.observe("forward"):
                if loss_of is not None:
                    loss: Any = loss_of()
                else:
                    with amp:
                        loss = model(**inputs).loss
                    if setup.grad_accum > 1:
                        loss = loss / setup.grad_accum
            if forward_only:
                return
            if recorder.recording:
                recorder.trace.nodes += graph_nodes(loss.grad_fn)
            with recorder.observe("backward"):
                loss.backward()
                after()
        with recorder.observe("optimizer"):
            if setup.clip_grad:
                # by default too, but a fake tensor is a subclass, for which torch would not choose lists
                torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            update.step()
            update.zero_grad(set_to_none=True)

    with eager_program(), mode:
        run()
        recorder.hold([*model.parameters(), *beside, *updates.held(update)])
        recorder.recording = True
        run()
    return recorder.trace
