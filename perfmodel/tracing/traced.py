"""Programs from real models: what `--traced` takes its steps from, for what the tape does not know.

The model is built on the meta device, its method applied by peft, and forward and backward are traced on fake tensors:
of the whole model, or of the model with few of its blocks where the rest follows exactly (`growth`); at one size, or at
a few from which all others of a region follow (`sizes`). Clipping and optimizer follow from the list of trainable
parameters. The ops are those of the CPU's dispatch; for a GPU, dropout and attention take CUDA's forms (`cuda_forms`).
What the CPU's dispatch does not show is a copy between host and GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

from ..architectures import Config, model_names
from ..calls import costs
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods import Method, parse
from ..methods.parts.peft_adapter import PeftAdapter
from ..program.op import Op
from ..program.part import Part
from ..program.polynomials import NoPolynomial, Size
from ..recording import record as recording
from ..recording.program import Program, RecordedModel
from ..recording.step import Step
from ..setup import Setup
from . import programs
from .calls import Calls, Key, Loss, Place, TracedProgram, record_calls
from .fakes import Fakes
from .growth import Term, Whole, whole
from .kernels import BY_TOKEN
from .packages.fused_head import with_own_loss
from .parameters import parameters_of
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
    return step_of(model, bound, setup, kind, program), program


def of_peft(
    config: Config, values: dict[str, Any], setup: Setup, on: DeviceProfile | None = None
) -> tuple[Step, Program]:
    """As `of_method`, of the values of an adapter_config.json."""
    return of_method(config, PeftAdapter.of(values), setup, on)


def step_of(model: RecordedModel, method: Method, setup: Setup, kind: str, program: Program) -> Step:
    """The Step of a program: its micro-batches, then clipping and the optimizer as the method wants it."""
    return recording.build(replace(model, recorder=lambda *_: program), method, setup, kind)


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
    rows = stacks(model)
    blocks = frozenset(id(block) for row in rows for block in row.containers[0].children())
    to_fake(model, mode, "cpu")
    model.train()
    try:
        with mode:
            at = _At(model, bare, make, setup, blocks, capability)
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
    return program_of(made, parameters_of(model, names, at.reached), min(setup.grad_accum, 2), size)


@dataclass
class _At:
    """A program at one size or several, under the caller's fake mode."""

    model: Any
    bare: Any
    make: MakeLoss
    setup: Setup
    blocks: frozenset[int]
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
        traced = TracedProgram(self.model, self.bare, self.losses[size], self.blocks, self.capability)
        calls = record_calls(traced, setup, warm=warm)
        self.reached |= calls.reached
        return calls


def program_of(made: Whole, parameters: list[Any], micro_batches: int, size: Size | None) -> Program:
    """The traced calls as parts: of each micro-batch forward, and backward."""
    first, *later = (
        tuple(part for phase in ("forward", "backward") for part in _in_order(made, (micro, phase)))
        for micro in range(micro_batches)
    )
    return Program(
        first=first, later=later[0] if later else (), parameters=tuple(parameters), live=made.live, traced=made.traced,
        blocks=made.blocks, at=size,
    )  # fmt: skip


def _in_order(made: Whole, place: Place) -> list[Part]:
    """The parts of one phase as they run: further blocks among the calls of the first term, if that is known."""
    first, *blocks = made.terms
    if first.order is None or any(term.order is None for term in blocks):
        terms = made.terms if place[1] == "forward" else made.terms[::-1]
        return [part for term in terms for part in _parts(term, made.calls, place)]
    cuts = sorted({term.behind.get(place, 0) for term in blocks})
    found: list[Part] = []
    for cut, piece in zip([*cuts, None], _pieces(first, made.calls, place, cuts), strict=True):
        found += piece
        for term in blocks:
            if term.behind.get(place, 0) == cut:
                found += _parts(term, made.calls, place)
    return found


def spread(ops: list[Op]) -> list[Op]:
    """Calls whose order is not known, with those for which the host waits at even distances among the others."""
    waits = [op for op in ops if costs.synchronises(op)]
    others = [op for op in ops if not costs.synchronises(op)]
    found: list[Op] = []
    for i, op in enumerate(waits):
        found += [*others[i * len(others) // len(waits) : (i + 1) * len(others) // len(waits)], op]
    return found or others


def _parts(term: Term, calls: Calls, place: Place) -> list[Part]:
    """The ops of one phase of a term, as a part that repeats; what turns in a loop is a part of its own."""
    if term.order is not None:
        return _pieces(term, calls, place, ())[0]
    counted = [(key, n) for key, n in term.counts.items() if key[:2] == place]
    ops = spread([op for key, n in counted if key not in calls.turns for op in [calls.ops[key]] * n])
    straight = Part("traced", place[1], term.times, ops)
    turning = [_turning(calls, key, n * term.times) for key, n in counted if key in calls.turns]
    _share(term, place, [straight], turning)
    return [straight, *turning]


def _pieces(term: Term, calls: Calls, place: Place, cuts: Sequence[int]) -> list[list[Part]]:
    """The same, in pieces: up to each of `cuts`, as many calls of the phase, and what is left."""
    assert term.order is not None
    keys = [key for key in term.order if key[:2] == place]
    pieces: list[list[Part]] = []
    straight: list[Part] = []
    turning: list[Part] = []
    for start, end in pairwise([0, *cuts, len(keys)]):
        piece = [Part("traced", place[1], term.times)]
        for key, alike in groupby(keys[start:end]):
            n = len(list(alike))
            if key in calls.turns:
                turning.append(_turning(calls, key, n * term.times))
                piece += [turning[-1], Part("traced", place[1], term.times)]
            else:
                piece[-1].ops += [calls.ops[key]] * n
        straight += piece[::2]
        pieces.append(piece)
    _share(term, place, straight, turning)
    return [[part for part in piece if part.ops or part is straight[0]] for piece in pieces]


def _turning(calls: Calls, key: Key, times: int) -> Part:
    return Part("traced", key[1], times, list(calls.turns[key]))


def _share(term: Term, place: Place, straight: list[Part], turning: list[Part]) -> None:
    """Give parts their shares of a term's host work, by their calls; of modules and adapters loops' turns have none."""
    outside = sum(len(part.ops) for part in straight)
    calls = outside * term.times + sum(len(part.ops) * part.repeat for part in turning)
    for (where, what), n in term.host.items():
        if where != place:
            continue
        if what in ("nodes", "hooks"):
            for part in turning:
                each = n * term.times * len(part.ops) // max(1, calls)
                setattr(part.host, what, each)
                n -= each * part.repeat // term.times
        done = given = 0
        for part in straight:
            done += len(part.ops)
            until = n * done // outside if outside else n
            setattr(part.host, what, until - given)
            given = until
