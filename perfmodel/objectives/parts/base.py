"""What an objective is: a loss made of passes through the model, and through a reference that does not train."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeGuard, TypeVar

import numpy as np

from ...architectures.base import Architecture, Build, Scope
from ...architectures.masks import model_buffer
from ...architectures.rewrites import Rewrites
from ...errors import UserError
from ...methods.parts.base import Method
from ...methods.parts.targeted import Targeted
from ...program.dims import Dim
from ...registry import Registry
from ...setup import GENERATED, PAIRS, Setup
from ...tape.core import release, tape
from ...tape.nn import causal_lm_loss
from ...tape.pointwise import cast
from ...tape.tensor import Parameter, Tensor

_REGISTRY: Registry["Objective"] = Registry("perfmodel.objectives", Path(__file__).parents[1])
OF_REFERENCE = "reference "  # how the names of its parameters begin
OF_CRITIC = "value_model."
C = TypeVar("C", bound="type[Objective]")
B = TypeVar("B")


def objective(name: str, *, title: str, source: str, quiet: bool = True) -> Callable[[C], C]:
    """Register an objective under a name of `perfmodel.setup.OBJECTIVES`.

    Args:
        title: how one writes it.
        source: the code that runs it.
        quiet: whether its trainer switches dropout off.
    """

    def register(cls: C) -> C:
        made = cls()
        made.name, made.title, made.source, made.quiet = name, title, source, quiet
        _REGISTRY.add(name, made)
        return cls

    return register


def found(name: str) -> "Objective":
    """The objective of a name."""
    known = _REGISTRY.get(name)
    assert known is not None, name
    return known


def known_objectives() -> dict[str, "Objective"]:
    """All objectives by name."""
    return _REGISTRY.all()


class Objective:
    """Base: a loss on log-probabilities of a causal language model.

    Attributes:
        compares: whether it needs the log-probabilities of a reference: "" never, "always", or "if named" in the setup.
        reference_in_amp: whether a reference of its own lies in memory in the dtype of autocast, if there is one.
        reference_by_blocks: whether FSDP2 cuts such a reference as it cuts the model, not as one unit.
        labelled: whether the model gets labels and gives its own loss alone.
        scaled: whether the loss is divided by the number of micro-batches.
        clips: whether its trainer clips gradients where the setup says so.
        of: what it trains, where that is no language model.
        beside: what its trainer does besides the step.
    """

    name: str
    title: str
    source: str
    quiet: bool
    compares: ClassVar[str] = ""
    reference_in_amp: ClassVar[bool] = False
    reference_by_blocks: ClassVar[bool] = False
    labelled: ClassVar[bool] = False
    scaled: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    of: ClassVar[str] = ""
    beside: ClassVar[str] = ""

    def on(self, architecture: Architecture) -> Architecture:
        """The model with the head that the objective trains.

        Raises:
            UserError: it has no such head.
        """
        if architecture.traits.head != "causal" or architecture.classifier is not None:
            raise UserError(f"objective {self.name} trains a causal language model, which {architecture.name} is not")
        return architecture

    def loss(self, passes: "Passes") -> Tensor:
        """Record the passes of a micro-batch; returns the loss, a scalar."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def held_bytes(self, architecture: Architecture, setup: Setup) -> Dim:
        """Bytes that its trainer keeps while steps are made, beside models and optimizer state."""
        return 0

    def told(self, method: Method, setup: Setup) -> list[str]:
        """What an answer has to say: of the objective, and of its reference."""
        what = f"{self.title} as {self.source} runs it on a full batch"
        what += f", a head of {self.of}" if self.of else ""
        what += f"; {self.beside}" if self.beside else ""
        what += ", a sample is a pair of sequences" if setup.objective in PAIRS else ""
        if not self.compares or (self.compares == "if named" and setup.reference == "auto"):
            return [what]
        reference = (
            "the model without its adapters"
            if compares_by_adapters(method, setup)
            else "a second, frozen model in memory"
        )
        reference = "log-probabilities made before" if setup.reference == "precomputed" else reference
        return [what, f"its reference is {reference}"]

    def check(self, method: Method, setup: Setup) -> None:
        """Raise `UserError` for what is not modelled together with the objective."""
        if setup.reference != "auto" and not self.compares:
            raise UserError(f"reference {setup.reference}: {self.name} compares with none; leave it out")
        if setup.reference == "precomputed" and self.reference_in_amp:
            raise UserError(f"reference precomputed: {self.name} takes more of it than log-probabilities; leave it out")
        if setup.prompt is not None and self.name not in GENERATED:
            raise UserError(f"prompt {setup.prompt}: {self.name} has logits of prompts too; leave it out")
        if self.name == "sft":
            return
        if np.min(setup.seq) < 2:
            raise UserError(f"objective {self.name}: no token of seq 1 is predicted by another; use --seq 2 or more")
        several = bool(np.all(np.greater(setup.gpus, 1)))  # then ZeRO-3 is what they do (`recording.parallel.form`)
        for name, usual in (("compile", "none"), ("engine", "torch"), ("cuda_graphs", False)):
            if getattr(setup, name) != usual and not (name == "engine" and several):
                raise UserError(
                    f"objective {self.name} with {name} {getattr(setup, name)} is not modelled; leave it out"
                )
        if type(method).inputs is not Method.inputs:
            raise UserError(f"objective {self.name} with virtual tokens ({method.name}) is not modelled; use lora")
        if setup.reference == "adapter-off" and not isinstance(method, Targeted):
            raise UserError(f"reference adapter-off: {method.name} has no adapters; use --reference model")


def compares_by_adapters(method: Method, setup: Setup) -> TypeGuard[Targeted]:
    """Whether a reference is the model with its adapters off, and not one of its own."""
    return isinstance(method, Targeted) and setup.reference != "model"


@dataclass(eq=False, repr=False)
class Passes:
    """A micro-batch as an objective sees it: inputs, and ways through the model and its reference.

    Attributes:
        model: the scope of the model that trains.
        method: its method, with dropout as its trainer has it.
        setup: of the step.
        frozen: parameters by name of models that do not train: the reference, where it is one of its own.
        critic: those of a second model that trains.
        after: what is left to do once gradients are there.
    """

    model: Scope
    method: Method
    setup: Setup
    frozen: dict[str, Parameter] = field(default_factory=dict)
    critic: dict[str, Parameter] = field(default_factory=dict)
    after: Callable[[], None] | None = None

    def tensor(self, *shape: Dim, dtype: str = "i64") -> Tensor:
        """An input of the step; rows and tokens of a row if no shape is given."""
        return model_buffer(shape or self.setup.shape, dtype)

    @property
    def precomputed(self) -> bool:
        """Whether the log-probabilities of the reference come with the batch."""
        return self.setup.reference == "precomputed"

    def scalar(self) -> Tensor:
        """An integer that comes with the batch."""
        return model_buffer(())

    def called(self, run: Callable[[], tuple[Tensor, ...]]) -> Sequence[Tensor]:
        """What a call of the model gives, between the hooks of what several GPUs do."""
        wrapping, build = tape().wrapping, self.model.build
        if wrapping is None:
            return run()
        wrapping.begin()
        outputs = [*run(), *build.outputs]
        build.outputs.clear()
        return wrapping.end(outputs)

    def logits(self, ids: Tensor, attention: Tensor, keep: Dim | None = None) -> Tensor:
        """Logits of the model, of the last `keep` tokens, in fp32 under autocast (accelerate converts them so)."""
        self.model.build.logits_to_keep = keep
        return self.called(lambda: (_logits(self.model, ids, attention),))[0]

    def logits_and_loss(self, ids: Tensor, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same logits, with the loss that the model computes itself where it is given labels."""
        build = self.model.build

        def run() -> tuple[Tensor, ...]:
            with tape().autocasting():
                logits = build.architecture.forward(self.model, ids, attention, labels)
                loss = causal_lm_loss(logits, labels)
            release(build.held)
            return cast(logits, "fp32") if self.setup.amp else logits, loss

        logits, loss = self.called(run)
        return logits, loss

    def reference_logits(self, ids: Tensor, attention: Tensor, keep: Dim | None = None) -> Tensor:
        """The same of the reference, without a graph and without checkpoints."""
        from .reference import AdaptersOff, Frozen  # most objectives compare with none

        setup, runs = replace(self.setup, checkpoint="none"), self.model.build.architecture
        how: Rewrites
        if compares_by_adapters(self.method, self.setup):
            how, parameters = AdaptersOff(inner=self.method, architecture=runs), dict[str, Parameter]()
        else:
            runs = without_dropout(runs)  # `eval()`, which one that trains beside it is not in
            how, parameters = Frozen(architecture=runs), self.frozen
            if found(self.setup.objective).reference_in_amp and setup.amp:
                setup = replace(setup, dtype=setup.amp)
            if tape().wrapping is not None and setup.parallel == "fsdp1":
                setup = replace(setup, amp=None)  # `prepare_fsdp` puts no autocast around it

        def run() -> tuple[Tensor]:
            build = Build(runs, how, setup, parameters, labelled=False, logits_to_keep=keep)
            return (_logits(Scope(build), ids, attention),)

        current = tape()
        trained = current.wrapping
        if trained is not None:  # what PEFT disables adapters of is the model that is not wrapped
            own = trained if trained.inside else None
            current.wrapping = own if isinstance(how, AdaptersOff) else trained.reference
        with current.no_grad():
            (logits,) = self.called(run)
        current.wrapping = trained
        return logits


def _logits(model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
    with tape().autocasting():
        logits = model.build.architecture.forward(model, ids, attention, ids)
    release(model.build.held)
    return cast(logits, "fp32") if model.build.setup.amp else logits


def without_dropout(value: B) -> B:
    """A method or an architecture with every dropout at 0."""
    off: dict[str, Any] = {f.name: 0.0 for f in fields(value) if f.name.endswith("dropout")}  # type: ignore[arg-type]
    return replace(value, **off)  # type: ignore[type-var]


def with_modules_off(architecture: Architecture) -> Architecture:
    """A model with the dropout of its modules at 0: TRL's `disable_dropout_in_model` reaches no other."""
    off: dict[str, Any] = dict.fromkeys(architecture.traits.dropout_modules, 0.0)
    return replace(architecture, **off)
