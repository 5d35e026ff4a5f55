"""Programs from real models: what `--traced` takes its steps from, for what the tape does not know.

The model is built on the meta device, its method applied by peft, and forward and backward are traced on fake tensors:
of the whole model, or of the model with few of its blocks where the rest follows exactly (`growth`); at one size, or at
a few from which all others of a region follow (`sizes`). Clipping and optimizer follow from the list of trainable
parameters. The ops are those of the CPU's dispatch; for a GPU, dropout and attention take CUDA's forms (`cuda_forms`).
What the CPU's dispatch does not show is a copy between host and GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..architectures import Config, model_names
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods import Method, parse
from ..methods.parts.peft_adapter import PeftAdapter
from ..program.polynomials import NoPolynomial, Size
from ..recording import record as recording
from ..recording.program import Program, RecordedModel
from ..recording.step import Step
from ..setup import Setup
from . import programs
from .calls import Calls, Loss, TracedProgram, record_calls
from .fakes import Fakes
from .growth import stack_name, whole
from .kernels import BY_TOKEN
from .packages.fused_head import with_own_loss
from .parameters import buffers_of, parameters_of
from .parts import program_of
from .programs import adapt as adapters
from .programs import diffusion
from .programs.choose import in_one_line
from .programs.objectives import asked_loss, quietened
from .programs.stacks import stacks
from .regions import Region
from .scans import LONGEST, NOTE, Scans
from .setups import check_setup
from .sizes import check_alike, check_at, solved
from .trace import to_fake, without_remarks
from .watching.marks import Marked, lists_of_blocks, places_of

MakeLoss = Callable[[Setup], Loss]  # makes the inputs, under the fake mode, and what runs the forward pass on them


def of_method(
    config: Config, method: str | Method, setup: Setup, on: DeviceProfile | None = None
) -> tuple[Step, Program]:
    """The Step of a method on the real model of a config, traced at this one size, and its program.

    Args:
        on: the device whose dispatch to follow; None for a GPU of class 8.0.

    Raises:
        UserError: anything that cannot be satisfied, in one line.
    """
    parsed = parse(method) if isinstance(method, str) else method
    kind, capability = (on.kind, on.compute_capability or "8.0") if on else ("cuda", "8.0")
    model, bound, program = trace_model(config, parsed, setup, kind, capability)
    return step_of(model, bound, setup, kind, capability, program), program


def of_peft(config: Config, values: dict[str, Any], setup: Setup) -> tuple[Step, Program]:
    """As `of_method`, of the values of an adapter_config.json."""
    return of_method(config, PeftAdapter.of(values), setup)


def step_of(model: RecordedModel, method: Method, setup: Setup, kind: str, capability: str, program: Program) -> Step:
    """The Step of a program: its micro-batches, then clipping and the optimizer as the method wants it."""
    return recording.build(replace(model, recorder=lambda *_: program), method, setup, kind, capability)


def trace_model(
    config: Config, method: Method, setup: Setup, kind: str, capability: str, region: Region | None = None
) -> tuple[RecordedModel, Method, Program]:
    """The program of a method on the real model of a config, with what methods must know of the model.

    Args:
        method: not bound yet; it runs as the setup's stack has it, all else as the installed packages do.
        kind: "cuda" or "cpu", whose dispatch to follow; on CUDA that of cards of the compute `capability`.
        region: the sizes that the program shall hold for, that of the setup among them; None: for that alone.

    Raises:
        UserError: peft or transformers cannot build it, or it cannot be traced.
        NoPolynomial: its program at other sizes of the region does not follow from a few.
    """
    check_setup(setup)
    method = method.under(setup.stack, setup.dtype)
    by_token = config.values.get("model_type") in BY_TOKEN and int(setup.seq) > LONGEST
    sizes_of_model = {n for n in config.values.values() if isinstance(n, int)} | {int(setup.batch)}
    scans = Scans((int(setup.batch), int(setup.seq)), sizes_of_model) if by_token else None
    family, name = programs.family_of(config)
    if setup.images and not family.takes_images:
        seeing = f"{config.name}-vision"
        raise UserError(f"--images: {name} takes no images" + (f"; {seeing} does" if seeing in model_names() else ""))
    with without_remarks():
        base = with_own_loss(programs.build_model(config, setup), setup)
        names = frozenset(name for name, _ in base.named_parameters())
        facts = adapters.layers_of(base, config.name)
        model, bound = adapters.adapted(base, method, facts, setup)
        prepare(model, setup)
        quietened(setup, model)

        def make(here: Setup) -> Loss:
            rows = replace(here, batch=here.sequences)
            inputs = {**family.inputs(base, rows, "cpu"), **adapters.inputs_of(model, int(rows.batch))}
            loss = asked_loss(here, model, family.loss)
            return lambda: loss(inputs)

        sizes = region.sizes(lengths=family.reads_length) if region and not scans else None
        here = capability if kind == "cuda" else None
        program = trace(model, make, setup, here, config.name, bare=base, names=names, sizes=sizes, scans=scans)
    notes = (*programs.notes_of(config, setup), *((NOTE,) if scans else ()))
    notes += ("the trace leaves out what the objective's trainer logs",) if setup.objective != "sft" else ()
    return facts, bound, replace(program, notes=notes)


def prepare(model: Any, setup: Setup) -> None:
    """Turn on activation checkpointing, as transformers or diffusers has it, if the setup asks for it.

    Raises:
        UserError: the model has none.
    """
    if setup.checkpoint == "none":
        return
    if diffusion.of_diffusers(model):
        return diffusion.turn_on_checkpoints(model, setup)
    if not hasattr(model, "activation_checkpointing_enable"):
        raise UserError("this model has no activation checkpointing of transformers; use --checkpoint none")
    reentrant = setup.checkpoint == "block-reentrant"
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    except ValueError as error:  # the class does not support it
        raise UserError(f"--checkpoint {setup.checkpoint}: {in_one_line(error)}; use none") from error


def capture_outputs(model: Any) -> None:
    """Let transformers hook all blocks whose outputs it captures, which it does once, at the first call.

    That would be of a model that some blocks have been left out of. One that has run has them already, on the module
    whose forward pass captures.
    """
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # of before it, or no model of transformers
        return
    for module in model.modules():
        hooked = any(getattr(part, "_output_capturing_hooks_installed", False) for part in module.modules())
        if hasattr(module, "_can_record_outputs") and not hooked:
            maybe_install_capturing_hooks(module)


@contextmanager
def _without_onednn(on_gpu: bool) -> Iterator[None]:
    """oneDNN's own layers (an LSTM's) are a CPU's, and say nothing of the products that a GPU runs in their place."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(before and not on_gpu)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def trace(
    model: Any,
    make: MakeLoss,
    setup: Setup,
    capability: str | None,
    name: str,
    *,
    bare: Any,
    names: frozenset[str],
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    scans: Scans | None = None,
) -> Program:
    """Trace a model on the meta device; its tensors are fake ones afterwards.

    Args:
        bare: the model without what peft puts around it.
        names: of the bare model's parameters; what else there is belongs to an adapter.
        sizes: batches and lengths to solve other sizes from; None: for the setup's size alone.
        scans: what solves it from short samples, if it goes over a sample token by token.

    Raises:
        UserError: nothing trains, or the program needs data that a fake tensor does not have.
        NoPolynomial: the program at other sizes does not follow from those.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"nothing trains in {name}")
    mode = Fakes(allow_non_fake_inputs=True)  # some tuners keep plain tensors (indices) beside parameters
    capture_outputs(model)
    rows = [row for row in stacks(model) if row.alike_anywhere]
    paths = {stack_name(row): lists for row, lists in zip(rows, lists_of_blocks(model, bare, rows), strict=True)}
    blocks = frozenset(id(block) for row in rows for block in row.containers[0].children())
    to_fake(model, mode, "cpu")
    model.train()
    places = places_of(model, bare, rows, names)
    try:
        with mode, _without_onednn(capability is not None):
            at = _At(model, bare, make, setup, blocks, places, capability)
            made = whole(
                rows, partial(at.several, *sizes) if sizes else partial(at.scanned, scans) if scans else at.once
            )
    except UserError:
        raise
    except NoPolynomial as error:
        if scans is None:
            raise
        raise UserError(f"{name} cannot be traced at {scans.size[1]} tokens: {error}") from error
    except Exception as error:  # whatever a foreign program raises on fake tensors
        raise UserError(f"{name} cannot be traced: {in_one_line(error)}") from error
    size = None if sizes else (int(setup.batch), int(setup.seq))
    parameters = parameters_of(model, bare, names, at.reached)
    return program_of(made, parameters, buffers_of(model), paths, min(setup.grad_accum, 2), size)


@dataclass
class _At:
    """A program at one size or several, under the caller's fake mode."""

    model: Any
    bare: Any
    make: MakeLoss
    setup: Setup
    blocks: frozenset[int]
    places: Marked
    capability: str | None

    def __post_init__(self) -> None:
        self.losses: dict[Size, Loss] = {}
        self.reached: set[str] = set()  # parameters that got a gradient (`Calls.reached`)
        self.asked: Size = int(self.setup.batch), int(self.setup.seq)

    def once(self, warm: bool) -> Calls:
        """Its calls at the size that was asked for."""
        return self._calls(self.asked, warm)

    def scanned(self, scans: Scans, warm: bool) -> Calls:
        """Its calls at that size, solved from short samples, as it goes over a sample token by token."""
        return scans.solved(partial(self._calls, warm=warm))

    def several(self, batches: tuple[int, ...], lengths: tuple[int, ...], warm: bool) -> Calls:
        """Its calls as polynomials, solved from some sizes and checked at the one that was asked for.

        The smallest comes first: a program that goes over the sample token by token is known before it gets long.
        """
        tried = [(b, s) for b in batches for s in lengths or (self.asked[1],)]
        asked = self._calls(self.asked, warm)
        traces = [self._calls(tried[0], warm)]
        check_alike((asked, traces[0]))
        traces += [self._calls(size, warm) for size in tried[1:]]
        made = solved(traces, batches, lengths or (self.asked[1],))
        check_at(made, self.asked, asked)
        return made

    def _calls(self, size: Size, warm: bool) -> Calls:
        setup = replace(self.setup, batch=size[0], seq=size[1])
        if size not in self.losses:
            self.losses[size] = self.make(setup)
        traced = TracedProgram(self.model, self.bare, self.losses[size], self.blocks, self.places, self.capability)
        calls = record_calls(traced, setup, warm=warm)
        self.reached |= calls.reached
        return calls
