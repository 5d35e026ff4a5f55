"""`perfmodel predict --traced`: the Step of a real transformers + peft program, for what the tape does not know.

The model is built with two, three and four layers on the meta device and one training step of each is traced on fake
tensors. What the third layer adds is what every further layer adds: the fourth checks it, and so do the parameters of
the whole model. Where layers are not alike, all of them are traced. Clipping and optimizer follow from the list of
trainable parameters. The ops are those of the CPU's dispatch; for a GPU attention's are renamed and dropout takes
CUDA's form.
"""

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from perfmodel import optimizers
from perfmodel.architectures import Architecture, Config, load
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.errors import UserError, nearest
from perfmodel.methods import Method
from perfmodel.predict import Prediction, of_step, resolve
from perfmodel.setup import Setup
from perfmodel.step import Group, Step, record_update
from perfmodel.tape.core import Op, Parameter, Part, Spec, Tape, recording

from . import models
from .trace import DTYPES, call_name, trace_step

FEWEST = 2  # layers of the smallest traced model
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_STARTS = ("pissa", "olora", "orthogonal", "corda", "loftq", "mica")  # need real weights and change no op of a step
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_backward",
}

K = TypeVar("K")
Key = tuple[str, Hashable]
Parameters = Counter[tuple[str, tuple[int, ...], bool]]  # dtype, shape, whether it trains
Adapt = Callable[[Any], Any]  # the model to train from the bare one


@dataclass(frozen=True)
class TracedMethod(Method):
    """A method known only by the program that peft makes of it."""

    label: str = "traced"

    def spec(self) -> str:
        """The name of what was traced."""
        return self.label


@dataclass
class Calls:
    """The calls of one traced step of a model with some number of layers."""

    layers: int
    counts: Counter[Key] = field(default_factory=Counter)
    ops: dict[Key, Op] = field(default_factory=dict)
    modules: Counter[str] = field(default_factory=Counter)
    parameters: Parameters = field(default_factory=Counter)
    nodes: int = 0
    activations: int = 0

    def keep(self, phase: str, func: Any, inputs: Any, outputs: Any, arguments: Any) -> None:
        """Note one call."""
        if phase == "optimizer":
            return
        op = _op(func, inputs, outputs, arguments)
        key = (phase, (op.name, op.inputs, op.outputs, op.attrs, op.view))
        self.counts[key] += 1
        self.ops.setdefault(key, op)


def _op(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], arguments: Any) -> Op:
    name = call_name(func)
    view = bool(func.is_view) or name in ("_unsafe_view", "detach")
    distinct = {id(t): t for t in inputs}.values()
    return Op(
        name.removesuffix(".default"),
        tuple(_spec(t) for t in inputs),
        tuple(_spec(t) for t in outputs),
        0 if view else sum(t.numel() * t.element_size() for t in distinct),
        0 if view else sum(t.numel() * t.element_size() for t in outputs),
        view=view,
        attrs=() if view else _attrs(name, func, inputs, outputs, arguments),
    )


def _spec(t: torch.Tensor) -> Spec:
    return Spec(DTYPES.get(t.dtype, "fp32"), tuple(t.shape))


def _attrs(name: str, func: Any, inputs: Any, outputs: Any, arguments: Any) -> tuple[Any, ...]:
    """What prices need to know besides shapes: a GEMM's layout, a causal flag, operands that do not stream."""
    if name in ("mm", "addmm"):
        a, b = (t.stride(0) == 1 and t.stride(1) == t.shape[0] for t in inputs[-2:])
        return ("nt" if a else "tn" if b else "nn",)
    if "attention" in name:
        args, kwargs = arguments
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        return (bool(given.get("is_causal", False)),)
    if name == "clone" or (torch.Tag.pointwise not in func.tags and name != "copy_"):
        return ()
    shape = outputs[0].shape if outputs else None
    streams = all(t.dim() == 0 or (t.shape == shape and t.is_contiguous()) for t in inputs)
    return () if streams else ("strided",)


def trace_layers(config: Config, setup: Setup, adapt: Adapt, layers: int, *, gpu: bool) -> Calls:
    """Trace one training step of the model cut to some layers.

    Raises:
        UserError: transformers or peft cannot build it, or it needs data that a fake tensor does not have.
    """
    calls = Calls(layers)
    handle = None
    try:
        cut = _cut(config, layers)
        if gpu and setup.attention == "sdpa":  # drawn inside CUDA's kernel; the CPU's would fall back to plain ops
            cut.values.update(dict.fromkeys(_ATTENTION_DROPOUT, 0.0))
        model = adapt(models.build(cut, setup))
        calls.parameters = _parameters_of(model)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.modules.update(["module"]))
        with _native_dropout() if gpu else nullcontext():
            trace = trace_step(model, setup, "adamw-foreach", keep=calls.keep)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign program raises on fake tensors
        why = next(iter(str(error).strip().splitlines()), "no message")
        raise UserError(f"{config.name} cannot be traced: {type(error).__name__}: {why}") from error
    finally:
        if handle:
            handle.remove()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = optimizers.state_bytes(_parameters(calls.parameters), "adamw-foreach")
    calls.nodes = trace.nodes
    calls.activations = trace.peak_before_update - weights - int(states)
    return calls


@contextmanager
def _native_dropout() -> Iterator[None]:
    """Dropout as CUDA dispatches it: one fused kernel with a bool mask."""
    original = torch.nn.functional.dropout

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return (
            original(input, p, training, inplace) if p == 0 or not training else torch.native_dropout(input, p, True)[0]
        )

    torch.nn.functional.dropout = dropout
    try:
        yield
    finally:
        torch.nn.functional.dropout = original


def _parameters_of(model: Any) -> Parameters:
    return Counter((DTYPES.get(p.dtype, "fp32"), tuple(p.shape), p.requires_grad) for p in model.parameters())


def _cut(config: Config, layers: int) -> Config:
    values = copy.deepcopy(config.values)
    key = next((k for k in LAYER_KEYS if k in values), None)
    if key is None:
        raise UserError(
            f"{config.origin}: no number of layers ({', '.join(LAYER_KEYS)}), so a trace cannot be extended"
        )
    for name, value in values.items():
        if isinstance(value, list) and len(value) == values[key]:
            values[name] = value[:layers]  # one entry a layer
    values[key] = layers
    return Config(values, config.origin, config.name)


def peft_adapter(peft_config: dict[str, Any]) -> Adapt:
    """What peft makes of an adapter_config.json's values.

    Raises:
        UserError: the installed peft does not know its `peft_type`.
    """
    import peft

    values = {k: v for k, v in peft_config.items() if v is not None}
    kind = str(values.pop("peft_type", "")).upper()
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [str(getattr(t, "value", t)) for t in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise UserError(f"peft_type {kind!r} is unknown to the installed peft: {nearest(kind, known)}")
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
    if str(options.get("init_lora_weights")).startswith(_STARTS):
        options["init_lora_weights"] = True

    def adapt(model: Any) -> Any:
        try:
            return peft.get_peft_model(model, cls(**options))
        except Exception as error:  # each tuner checks its config in its own way
            raise UserError(f"peft cannot apply {kind} to this model: {' '.join(str(error).split())}") from error

    return adapt


def predict(
    model: str,
    setup: Setup,
    device: str,
    *,
    method: str = "full",
    peft_config: Path | None = None,
    host: str = "default",
) -> Prediction:
    """Predict one training step of the real program.

    Args:
        method: any that the tape knows, ignored where `peft_config`, an adapter_config.json, is given.

    Raises:
        UserError: anything that cannot be satisfied, in one line.
    """
    on = profile.load(device)
    by = hosts.resolve(host, on)
    adapt: Adapt
    if setup.amp and on.kind == "cuda":
        raise UserError(
            "--traced cannot follow --amp on a GPU: the trace runs on the CPU, whose autocast casts other ops"
        )
    if peft_config is None:
        architecture, parsed = resolve(model, method)
        label = parsed.spec()
        adapt = partial(models.apply, method=parsed, architecture=architecture)
    else:
        values = read_peft_config(peft_config)
        label, adapt = str(values["peft_type"]).lower(), peft_adapter(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and transformers' remarks on random weights
        built = build(load(model), setup, adapt, label, on.kind)
    return of_step(built, on, by)


def build(config: Config, setup: Setup, adapt: Adapt, label: str, device: str) -> Step:
    """The Step of a real program, all its layers.

    Raises:
        UserError: peft or transformers cannot build it, or it cannot be traced.
    """
    key = next((k for k in LAYER_KEYS if k in config.values), None)
    if key is None:
        raise UserError(f"{config.origin}: no number of layers ({', '.join(LAYER_KEYS)})")
    total = int(config.values[key])
    architecture = Architecture(
        name=config.name, model_type=config.text("model_type"), layers=total, hidden=0, heads=0, kv_heads=0, head_dim=0,
        intermediate=0, vocab=0, max_positions=None, tied=False,
    )  # fmt: skip
    parameters = _parameters_of(adapt(models.build(config, setup)))
    step = Step(architecture, TracedMethod(label=label), setup, device, _parameters(parameters))
    gpu = device == "cuda"
    few = _few(config, setup, adapt, total, parameters, gpu)
    if few:
        first, second, layer = few
        more = total - FEWEST
        modules, nodes = second.modules["module"] - first.modules["module"], second.nodes - first.nodes
        parts = [_part(first, first.counts, "forward", 1, first.modules["module"], gpu)]
        parts += [_part(second, layer, "forward", more, modules, gpu)]
        parts += [_part(first, first.counts, "backward", 1, first.nodes, gpu)]
        parts += [_part(second, layer, "backward", more, nodes, gpu)]
        activations = first.activations + more * (second.activations - first.activations)
    else:
        every = trace_layers(config, setup, adapt, total, gpu=gpu)
        parts = [_part(every, every.counts, "forward", 1, every.modules["module"], gpu)]
        parts += [_part(every, every.counts, "backward", 1, every.nodes, gpu)]
        activations = every.activations
    parts[0].peak = max(0, activations)
    parts[-1].allocate(sum(p.nbytes * p.count for p in step.parameters if p.used))  # gradients wait for the update
    step.groups.append(Group([p for p in parts if p.ops]))  # the trace holds every micro-batch
    _update(step)
    return step


def _few(
    config: Config, setup: Setup, adapt: Adapt, total: int, parameters: Parameters, gpu: bool
) -> tuple[Calls, Calls, Counter[Key]] | None:
    """Two traces of a few layers and what a layer adds; None if the whole model is not made of such layers."""
    if total <= FEWEST + 2:
        return None
    try:
        first, second, third = (trace_layers(config, setup, adapt, FEWEST + i, gpu=gpu) for i in range(3))
    except UserError:
        return None  # its options may name layers that the cut model lacks
    layer = _difference(second.counts, first.counts)
    alike = min(layer.values(), default=0) > 0 and _difference(third.counts, second.counts) == layer
    grown = Counter(first.parameters)
    for key, n in _difference(second.parameters, first.parameters).items():
        grown[key] += n * (total - FEWEST)
    return (first, second, layer) if alike and not _difference(grown, parameters) else None


def _difference(a: Counter[K], b: Counter[K]) -> Counter[K]:
    """a - b with negative counts kept: a model that loses calls with a layer is not made of like layers."""
    found = Counter({k: n - b.get(k, 0) for k, n in a.items()})
    found.update({k: -n for k, n in b.items() if k not in a})
    return Counter({k: n for k, n in found.items() if n})


def _part(calls: Calls, counts: Counter[Key], phase: str, repeat: int, host: int, gpu: bool) -> Part:
    part = Part("traced", phase, repeat)
    for key, n in counts.items():
        op = calls.ops[key]
        if key[0] != phase:
            continue
        if gpu:
            op.name = _ATTENTION.get(op.name, op.name)
        part.ops += [op] * n
    if phase == "forward":
        part.modules = host // 2  # the hook sees both steps of a trace, the counted and the recorded one
    else:
        part.nodes = host
    return part


def _parameters(counts: Parameters) -> list[Parameter]:
    made = []
    for i, ((dtype, shape, trains), count) in enumerate(counts.items()):
        p = Parameter(f"traced.{i}", shape, dtype, kind="adapter" if trains else "weight", trainable=trains)
        p.count, p.used = count, trains
        made.append(p)
    return made


def _update(step: Step) -> None:
    tape = Tape(step.device)
    with recording(tape):
        record_update(step, tape)
    step.groups.append(Group(list(tape.parts)))


def read_peft_config(path: Path) -> dict[str, Any]:
    """A PEFT adapter_config.json.

    Raises:
        UserError: it cannot be read or holds no `peft_type`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable adapter_config.json ({error})") from None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise UserError(f"{path}: an adapter_config.json holds an object with a peft_type")
    return values
