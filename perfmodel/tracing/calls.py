"""The calls of one traced step, as `Op`s that can be counted and priced."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from .. import objectives
from ..errors import UserError
from ..program.marks import BEFORE, BEHIND, END, GRADIENT, IN, OUTPUTS, marking, read_mark
from ..program.op import OVER_BUS, PLAIN, STRIDED, Attrs, Op, Spec
from ..setup import Setup
from .cuda_forms import cuda_forms
from .packages.flash_attn import NO_WINDOW, flash_attn_in_place
from .packages.zero3 import linear_of_zero3
from .programs.diffusion import of_diffusers
from .programs.dtypes import DTYPES, TORCH_DTYPES
from .trace import CallRecorder, call_name, eager_program
from .watching.graph import graph_nodes
from .watching.marks import NOWHERE, Marked, marked
from .watching.owners import Owners

MODULES_OF_A_BLOCK = 4  # as `perfmodel.architectures.base` counts them
_NUMBER = re.compile(r"\.\d+(?=\.)")
Place = tuple[int, str]  # micro-batch (0 the first, 1 a further one) and phase
Key = tuple[int, str, Any]
Loss = Callable[[], torch.Tensor]


@dataclass
class Calls:
    """What a traced step dispatched, for one of each kind of micro-batch.

    Attributes:
        counts: how often each call was made in a phase of a micro-batch.
        host: what costs host time besides calls, by place and by the name that a `HostWork` gives it.
        order: the calls of forward and backward, one after another.
        turns: the calls of those keys that stand for several, a loop's turn (`scans`).
        live: bytes that were live above weights and buffers after each call, up to the middle of a backward pass and
            after it: there saved activations prevail, here gradients.
        passing: at each mark, without gradients that are complete: live bytes, and the most since the mark before; with
            the number of a block that begins.
        place: the micro-batch and phase that run now.
        cuda: whether the calls stand for those on a GPU.
        owners: tells whose they are.
        reached: parameters that got a gradient, by their names without the numbers of blocks (`unnumbered`).
    """

    cuda: bool = False
    owners: Owners | None = None
    counts: Counter[Key] = field(default_factory=Counter)
    ops: dict[Key, Op] = field(default_factory=dict)
    host: Counter[tuple[Place, str]] = field(default_factory=Counter)
    order: list[Key] = field(default_factory=list)
    turns: dict[Key, tuple[Op, ...]] = field(default_factory=dict)
    live: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))
    passing: list[tuple[Any, Any, int | None]] = field(default_factory=list)
    place: Place = (0, "forward")
    reached: set[str] = field(default_factory=set)

    def keep(self, phase: str, func: Any, inputs: Any, outputs: Any, arguments: Any) -> None:
        """Note one call."""
        op = op_of(func, inputs, outputs, arguments, cuda=self.cuda)
        if self.owners is not None:
            op.owner, op.recompute = self.owners.of(phase, op.name, inputs, outputs)
        self.add(key_of(self.place, op), op)

    def add(self, key: Key, op: Op) -> None:
        """Note one more call of a key."""
        self.order.append(key)
        self.counts[key] += 1
        self.ops.setdefault(key, op)

    def mark(self, passing: tuple[int, int, int | None], what: str, of: str, specs: tuple[Spec, ...] = ()) -> None:
        """Note a mark. Of a tensor between two modules the hooks of the lower one run first, which it then is not."""
        op = marking(what, of, specs)
        self.passing.append(passing)
        key = key_of(self.place, op)
        last = self.ops[self.order[-1]] if self.order and self.order[-1][:2] == self.place else None
        self.add(key, op)
        if what == BEHIND and last is not None and (before := read_mark(last)) and before.what == BEFORE:
            self.order[-2:] = self.order[:-3:-1]

    def count(self, what: str, n: int = 1) -> None:
        """Note work of the host."""
        self.host[self.place, what] += n


def key_of(place: Place, op: Op) -> Key:
    """What tells a call from others: all but the bytes that it moves."""
    return (*place, (op.name, op.inputs, op.outputs, op.attrs, op.view, op.owner, op.recompute))


@dataclass(frozen=True)
class TracedProgram:
    """A module on fake tensors and how to run it.

    Attributes:
        bare: the module without what peft puts around it.
        loss: runs the forward pass.
        blocks: the identities of its repeated blocks.
        places: what is marked of it.
        capability: CUDA compute capability whose forms of calls to dispatch; None for the CPU's.
    """

    module: torch.nn.Module
    bare: torch.nn.Module
    loss: Loss
    blocks: frozenset[int] = frozenset()
    places: Marked = NOWHERE
    capability: str | None = None


def record_calls(program: TracedProgram, setup: Setup, *, warm: bool = False) -> Calls:
    """Trace forward and backward of a module on fake tensors, under the caller's fake mode.

    A further micro-batch differs from the first in what it adds to gradients, so two of them stand for any number.

    Args:
        warm: whether the program ran before; else it runs forward once unrecorded, which makes what it makes only once
            (tables of positions).
    """
    module, capability = program.module, program.capability
    owners = Owners(module, program.bare)
    calls = Calls(cuda=capability is not None, owners=owners)
    recorder = CallRecorder(dense=not setup.padded, keep=calls.keep, knows=setup.images > 0)
    forms = cuda_forms(capability, setup.stack) if capability else nullcontext()
    package = flash_attn_in_place() if setup.attention == "flash2" else nullcontext()
    linear = linear_of_zero3() if setup.engine != "torch" else nullcontext()

    held = 0

    def note(what: str, of: str = "", given: Any = ()) -> None:
        if what == GRADIENT:
            recorder.completed(given)
        if recorder.recording:
            now, most = recorder.passing()
            number, specs = given if what == IN else None, given if what == OUTPUTS else ()
            calls.mark((now - held, most - held, number), what, of, specs)

    marks = marked(
        program.places, module, note, reentrant=setup.checkpoint == "block-reentrant", phase=lambda: calls.place[1]
    )
    with eager_program(), forms, package, linear, owners.followed(), _host_work(program, calls), marks:
        if not warm:
            _warm_up(program, recorder)
        recorder.recording = True
        recorder.hold([*module.parameters(), *module.buffers()])
        held = recorder.live
        recorder.passing()
        calls.host.clear()
        for micro in range(min(setup.grad_accum, 2)):
            halves = _micro_batch(program.loss, setup, recorder, calls, micro, partial(note, END))
            for live, half in zip(calls.live, halves, strict=True):
                live += [nbytes - held for nbytes in half]
        calls.reached |= {unnumbered(name) for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad(set_to_none=True)
    return calls


def unnumbered(name: str) -> str:
    """A parameter's name without the numbers of blocks: what holds for those that are traced holds for the others."""
    return _NUMBER.sub("", name)


def _warm_up(program: TracedProgram, recorder: CallRecorder) -> None:
    with recorder.observe("forward"):
        program.loss()


def _micro_batch(
    loss: Loss, setup: Setup, recorder: CallRecorder, calls: Calls, micro: int, end: Callable[[], None]
) -> tuple[list[int], list[int]]:
    """Record a micro-batch; returns the live bytes after each call, up to the middle of its backward pass and after.

    Args:
        end: notes that a pass has ended.
    """
    amp = torch.autocast("cpu", TORCH_DTYPES[setup.amp]) if setup.amp else nullcontext()
    calls.place = (micro, "forward")
    with recorder.observe("forward"):
        with amp:
            value = loss()
        if setup.grad_accum > 1 and objectives.found(setup.objective).scaled:
            value = value / setup.grad_accum
    end()
    calls.place = (micro, "backward")
    first = len(recorder.live_after)
    with recorder.observe("backward"):
        value.backward()  # type: ignore[no-untyped-call]
    end()
    middle = (first + len(recorder.live_after)) // 2
    early, late = recorder.live_after[:middle], recorder.live_after[middle:]
    recorder.live_after.clear()
    return early, late


@contextmanager
def _host_work(program: TracedProgram, calls: Calls) -> Iterator[None]:
    """Count Python's work: calls of modules, adapters and checkpoints, hooks on saved tensors, autograd nodes.

    Modules count as on the tape, whose host costs are fitted to that: those with parameters of their own, and of a
    block four (itself, attention, MLP, activation). An adapter counts as such and as the layer that it wraps; its inner
    modules are part of it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.modeling_layers import GradientCheckpointingLayer

    module = program.module
    adapters = {id(m) for m in module.modules() if isinstance(m, BaseTunerLayer)}
    checkpointed = of_diffusers(program.bare) and getattr(program.bare, "gradient_checkpointing", False)
    inner = {id(m) for a in module.modules() if id(a) in adapters for m in a.modules() if id(m) not in adapters}

    def called(m: torch.nn.Module, *_: Any) -> None:
        if id(m) not in inner:
            adapted = id(m) in adapters
            calls.count("modules", int(adapted or bool(m._parameters)) + MODULES_OF_A_BLOCK * (id(m) in program.blocks))
            calls.count("adapters", int(adapted))
            if checkpointed and id(m) in program.blocks and calls.place[1] == "forward":
                calls.count("checkpoints")  # of diffusers: its recompute calls the block as a module once more
            elif isinstance(m, GradientCheckpointingLayer) and calls.place[1] == "forward":
                calls.count("checkpoints", int(m.gradient_checkpointing))
                calls.host[(calls.place[0], "backward"), "modules"] += MODULES_OF_A_BLOCK * m.gradient_checkpointing

    backward, init = torch.autograd.backward, torch.autograd.graph.saved_tensors_hooks.__init__

    def counted_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        roots = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        calls.count("nodes", sum(graph_nodes(t.grad_fn) for t in roots))
        backward(tensors, *args, **kwargs)

    def counted_hooks(self: Any, pack: Any, unpack: Any) -> None:
        init(self, *(_counted(hook, calls) for hook in (pack, unpack)))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(called)
    try:
        with (
            patch.object(torch.autograd, "backward", counted_backward),
            patch.object(torch.autograd.graph.saved_tensors_hooks, "__init__", counted_hooks),
        ):
            yield
    finally:
        handle.remove()


def _counted(hook: Callable[[Any], Any], calls: Calls) -> Callable[[Any], Any]:
    def counted(value: Any) -> Any:
        calls.count("hooks")
        return hook(value)

    return counted


def op_of(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], arguments: Any, *, cuda: bool) -> Op:
    """An ATen call as an op of the model; attention with the operands that the tape gives it."""
    name = call_name(func).removesuffix(".default")
    if name == "_sparse_addmm":
        raise UserError("products of sparse matrices (in fp32 alone) are not modelled; use --dtype bf16")
    view = bool(func.is_view) or name in ("_unsafe_view", "detach")
    attrs = PLAIN if view else _attrs(name, func, inputs, outputs, arguments)
    if "scaled_dot_product" in name and "_attention" in name:
        return _attention_op(name, func, outputs, arguments, attrs)
    read, written = [_spec(t) for t in inputs], [_spec(t) for t in outputs]
    if cuda and name in STATISTICS:
        _in_fp32(read, STATISTICS[name][0])
        _in_fp32(written, STATISTICS[name][1])
    distinct = {id(t): s for t, s in zip(inputs, read, strict=True)}.values()
    return Op(
        name,
        tuple(read),
        tuple(written),
        0 if view else sum(s.nbytes for s in distinct),
        0 if view else sum(s.nbytes for s in written),
        view=view,
        attrs=attrs,
    )


# Inputs and outputs that hold means and deviations: CUDA keeps them in fp32, the CPU in the dtype of the input.
STATISTICS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "native_layer_norm": ((), (1, 2)), "native_layer_norm_backward": ((2, 3), ()),
    "native_group_norm": ((), (1, 2)), "native_group_norm_backward": ((2, 3), ()),
}  # fmt: skip


def _in_fp32(specs: list[Spec], places: tuple[int, ...]) -> None:
    for i in places:
        specs[i] = specs[i]._replace(dtype="fp32")


def _attention_op(name: str, func: Any, outputs: list[torch.Tensor], arguments: Any, attrs: Attrs) -> Op:
    """Fused attention without seeds and lengths, the statistics one fp32 value a row."""
    given = _by_name(func, arguments)
    backward = name.endswith("_backward")
    q = given["query"]
    statistics = Spec("fp32", tuple(q.shape[:3]))
    inputs = [_spec(given[key]) for key in ("query", "key", "value")]
    mask = given.get("attn_bias", given.get("attn_mask"))
    if backward:
        grad = given.get("grad_out", given.get("grad_out_"))
        inputs = [_spec(grad), *inputs, _spec(given["out"]), statistics]
        made = [_spec(t) for t in outputs[:3]]
    else:
        made = [_spec(outputs[0]), statistics]
    if mask is not None:
        inputs.append(_spec(mask))
    return Op(name, tuple(inputs), tuple(made), sum(s.nbytes for s in inputs), sum(s.nbytes for s in made), attrs=attrs)


def _by_name(func: Any, arguments: Any) -> dict[str, Any]:
    args, kwargs = arguments
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _spec(t: Any) -> Spec:
    return Spec(DTYPES.get(t.dtype, "fp32"), tuple(t.shape))


SUMS = ("sum", "mean", "linalg_vector_norm", "amax", "argmax", "any", "all")  # calls that run over dims


def _places(rank: int, dims: Any) -> tuple[int, ...] | None:
    """Dims counted from the front; None for all."""
    given = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(dim % rank for dim in given)) if given and rank else None


def _attrs(name: str, func: Any, inputs: Any, outputs: Any, arguments: Any) -> Attrs:
    """What prices need to know besides shapes: a GEMM's layout, a causal flag, operands that do not stream."""
    if name == "_to_copy" and inputs[0].device.type == "meta":  # where what stays on the host stands (`OnHost`)
        return OVER_BUS
    if name in ("mm", "addmm", "bmm"):
        a, b = (t.stride(0) == 1 and t.stride(1) == t.shape[0] for t in inputs[-2:])
        copied = tuple(i for i, t in enumerate(inputs) if t.dim() > 1 and 1 not in t.stride()[-2:])
        return Attrs("" if name == "bmm" else "nt" if a else "tn" if b else "nn", copied)
    if name == "_grouped_mm":
        b = inputs[1]
        return Attrs("nt" if b.dim() == 2 else "tn" if b.stride(1) == 1 else "nn")
    if name.startswith("flash_attn::"):
        given = _by_name(func, arguments)
        return Attrs(causal=given["causal"], window=None if given["window"] == NO_WINDOW else given["window"])
    if "scaled_dot_product" in name:
        return Attrs(causal=bool(_by_name(func, arguments).get("is_causal", False)))
    if name.startswith("convolution"):
        return Attrs(transposed=True) if _by_name(func, arguments)["transposed"] else PLAIN
    if name.startswith("_fft"):
        given = _by_name(func, arguments)
        dims = _places(inputs[0].dim(), given["dim"])
        return Attrs(dims=dims, scaled=bool(given["normalization"]), half=bool(given.get("onesided")))
    if name.startswith("index_put"):
        return Attrs(accumulate=True) if _by_name(func, arguments).get("accumulate") else PLAIN
    if name.startswith(SUMS):
        return Attrs(dims=_places(inputs[0].dim(), _by_name(func, arguments).get("dim")))
    if name == "clone" or (torch.Tag.pointwise not in func.tags and name != "copy_"):
        return PLAIN
    shape = outputs[0].shape if outputs else None
    streams = all(t.dim() == 0 or (t.shape == shape and t.is_contiguous()) for t in inputs)
    return PLAIN if streams else STRIDED
