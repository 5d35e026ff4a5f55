"""`perfmodel predict --traced`: the Step of a real program, for what the tape does not know.

The model is built on the meta device, its method applied by peft, and forward and backward are traced on fake tensors:
of the whole model, or of the model with few of its blocks where the rest follows exactly (`growth`). Clipping and
optimizer follow from the list of trainable parameters. The ops are those of the CPU's dispatch; for a GPU, dropout and
attention take CUDA's forms (`cuda_forms`). What the CPU's dispatch does not show is a copy between host and GPU.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from ..architectures import Architecture, Config, load
from ..calls import costs
from ..devices import host as hosts
from ..devices.device import Device, profile_of
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods import Method
from ..prediction.predict import Prediction, of_step
from ..program.op import Op
from ..program.part import Group, Part
from ..recording.record import record_update
from ..recording.step import Step
from ..setup import Setup
from ..tape.core import Tape, recording
from . import programs
from .calls import Calls, Loss, Place, TracedProgram, record_calls
from .growth import Term, Whole, whole
from .parameters import parameters_of
from .programs import adapt as adapters
from .programs.adapt import Adapt
from .programs.choose import in_one_line
from .programs.stacks import stacks
from .trace import to_fake

MakeLoss = Callable[[], Loss]  # makes the inputs, under the fake mode, and what runs the forward pass on them


@dataclass(frozen=True)
class TracedMethod(Method):
    """A method known only by the program that peft makes of it."""

    label: str = "traced"

    def spec(self) -> str:
        """The name of what was traced."""
        return self.label


def predict_traced(
    model: str | Config,
    setup: Setup,
    device: str | DeviceProfile | Device,
    *,
    method: str | Method = "full",
    peft_config: Path | None = None,
    host: str = "default",
) -> Prediction:
    """Predict one training step of the real program of a config.

    Args:
        model: as `perfmodel.prediction.predict` takes it: of any family in `programs`.
        method: any that peft or transformers has a program of, ignored where `peft_config`, an adapter_config.json, is
            given.

    Raises:
        UserError: anything that cannot be satisfied, in one line.
    """
    if setup.compile != "none":
        raise UserError("traced steps are eager: leave out --compile, or the trace")
    on = device_of(device)
    by = hosts.host_of(host, on)
    config = load(model) if isinstance(model, str) else model
    if peft_config is None:
        built, made = of_method(config, method, setup, on)
    else:
        built, made = of_peft(config, adapters.read_peft_config(peft_config), setup, on)
    family, _ = programs.family_of(config)
    notes = [family.note] if family.note else []
    return with_notes(of_step(built, on, by), [*notes, how(made)])


def of_method(
    config: Config, method: str | Method, setup: Setup, on: DeviceProfile | None = None
) -> tuple[Step, Whole]:
    """The Step of a method of the tape on the real model of a config, and how it was traced.

    Args:
        on: the device whose dispatch to follow; None for a GPU of class 8.0.

    Raises:
        UserError: anything that cannot be satisfied, in one line.
    """
    known, adapt = adapters.adapter_of_method(config, method)
    return build_traced(config, setup, adapt, known, *_dispatch(on))


def of_peft(
    config: Config, values: dict[str, Any], setup: Setup, on: DeviceProfile | None = None
) -> tuple[Step, Whole]:
    """As `of_method`, of the values of an adapter_config.json."""
    label = str(values["peft_type"]).lower()
    return build_traced(config, setup, adapters.adapter_of_peft(values), TracedMethod(label=label), *_dispatch(on))


def _dispatch(on: DeviceProfile | None) -> tuple[str, str]:
    return (on.kind, on.compute_capability or "8.0") if on else ("cuda", "8.0")


def device_of(device: str | DeviceProfile | Device) -> DeviceProfile:
    """A device by name, path or as it is."""
    return profile_of(device)


def check_setup(setup: Setup, kind: str) -> None:
    """Raise `UserError` where a setup asks for what a trace on the CPU cannot follow."""
    if setup.amp and kind == "cuda":
        raise UserError(
            "--traced cannot follow --amp on a GPU: the trace runs on the CPU, whose autocast casts other ops"
        )
    if setup.attention == "flash2":
        raise UserError(
            "--traced cannot follow --attention flash2: the flash-attn package runs on a GPU only; use sdpa"
        )
    if setup.engine != "torch":
        raise UserError(f"--traced cannot follow --engine {setup.engine}: it traces the program without an engine")
    if setup.kernels != "torch":
        raise UserError(f"--traced cannot follow --kernels {setup.kernels}; use kernels torch")
    compiled = getattr(setup, "compile", None)
    if compiled not in (None, False, "none"):
        raise UserError("--traced cannot follow --compile: it traces the eager program")


def with_notes(prediction: Prediction, notes: list[str]) -> Prediction:
    """A prediction with more notes."""
    return replace(prediction, notes=[*prediction.notes, *notes])


def how(made: Whole) -> str:
    """In words, of how much of a model a trace was made."""
    if not made.extrapolated:
        return "traced whole"
    return (
        f"traced with up to {made.traced} of its {made.blocks} blocks; that the others add the same was checked call "
        "by call"
    )


def build_traced(
    config: Config, setup: Setup, adapt: Adapt, method: Method, kind: str, capability: str = "8.0"
) -> tuple[Step, Whole]:
    """The Step of the real program of a config, and how it was traced.

    Args:
        kind: "cuda" or "cpu", whose dispatch to follow; on CUDA that of cards of the compute `capability`.

    Raises:
        UserError: peft or transformers cannot build it, or it cannot be traced.
    """
    check_setup(setup, kind)
    family, _ = programs.family_of(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and transformers' remarks on random weights
        base = programs.build_model(config, setup)
        names = frozenset(name for name, _ in base.named_parameters())
        model = adapt(base)
        prepare(model, setup)

        def make() -> Loss:
            inputs = {**family.inputs(base, setup, "cpu"), **adapters.inputs_of(model, int(setup.batch))}
            return lambda: model(**inputs).loss

        made = trace(model, make, setup, capability if kind == "cuda" else None, config.name)
    return assemble(config.name, model, names, method, setup, kind, made), made


def prepare(model: Any, setup: Setup) -> None:
    """Turn on transformers' activation checkpointing, if the setup asks for it.

    Raises:
        UserError: the model has none.
    """
    if setup.checkpoint == "none":
        return
    if not hasattr(model, "activation_checkpointing_enable"):
        raise UserError("this model has no activation checkpointing of transformers; use --checkpoint none")
    reentrant = setup.checkpoint == "block-reentrant"
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    except ValueError as error:  # the class does not support it
        raise UserError(f"--checkpoint {setup.checkpoint}: {in_one_line(error)}; use none") from error


def trace(model: Any, make: MakeLoss, setup: Setup, capability: str | None, name: str) -> Whole:
    """Trace a model on the meta device; its tensors are fake ones afterwards.

    Raises:
        UserError: nothing trains, or the program needs data that a fake tensor does not have.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"nothing trains in {name}")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # some tuners keep plain tensors (indices) beside parameters
    rows = stacks(model)
    blocks = frozenset(id(block) for row in rows for block in row.containers[0].children())
    to_fake(model, mode, "cpu")
    model.train()
    try:
        with mode:
            loss = make()
            program = TracedProgram(model, loss, blocks, capability)
            return whole(rows, lambda warm: record_calls(program, setup, warm=warm))
    except UserError:
        raise
    except Exception as error:  # whatever a foreign program raises on fake tensors
        raise UserError(f"{name} cannot be traced: {in_one_line(error)}") from error


def assemble(name: str, model: Any, base: frozenset[str], method: Method, setup: Setup, kind: str, made: Whole) -> Step:
    """The Step of traced calls: micro-batches, then clipping and the optimizer as the method wants it."""
    architecture = Architecture(
        name=name, model_type="traced", layers=1, hidden=0, heads=0, kv_heads=0, head_dim=0, intermediate=0, vocab=0,
        max_positions=None, tied=False,
    )  # fmt: skip
    step = Step(architecture, method, setup, kind, parameters_of(model, base))
    gradients = sum(p.nbytes * p.count for p in step.parameters if p.used)
    for micro in range(min(setup.grad_accum, 2)):
        parts = [_part(term, made.calls, (micro, "forward")) for term in made.terms]
        parts += [_part(term, made.calls, (micro, "backward")) for term in reversed(made.terms)]
        if micro == 0:
            parts[0].highest = made.activations
            parts[-1].allocate(gradients)  # they wait for the update
        step.groups.append(Group(parts, 1 if micro == 0 else setup.grad_accum - 1))
    tape = Tape(kind)
    with recording(tape):
        record_update(step, tape)
    step.groups.append(Group(list(tape.parts)))
    return step


def spread(ops: list[Op]) -> list[Op]:
    """Calls whose order is not known, with those for which the host waits at even distances among the others."""
    waits = [op for op in ops if costs.synchronises(op)]
    others = [op for op in ops if not costs.synchronises(op)]
    found: list[Op] = []
    for i, op in enumerate(waits):
        found += [*others[i * len(others) // len(waits) : (i + 1) * len(others) // len(waits)], op]
    return found or others


def _part(term: Term, calls: Calls, place: Place) -> Part:
    """The ops of one phase of a term, as one part that repeats."""
    part = Part("traced", place[1], term.times)
    found = [op for key, n in term.counts.items() if key[:2] == place for op in [calls.ops[key]] * n]
    part.ops = spread(found)
    for (where, what), n in term.host.items():
        if where == place:
            setattr(part.host, what, n)
    return part
