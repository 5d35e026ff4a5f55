"""One optimizer step as a value: its parts of ops, the parameters it trains, and what it keeps."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .. import optimizers
from ..architectures.base import Architecture
from ..methods.parts.base import Method
from ..methods.parts.periodic import PeriodicOps
from ..program.dims import Dim, decide
from ..program.op import Op
from ..program.part import Group, Part
from ..program.ranks import Ranks
from ..setup import Setup
from ..tape.tensor import Parameter
from .parallel.form import ParallelForm

if TYPE_CHECKING:
    from .replay import Replay


@dataclass(eq=False, repr=False)
class Step:
    """One optimizer step as ordered parts of ops, with the parameters it trains.

    `groups` holds the first micro-batch, the further ones (if any), and clipping with the optimizer. `state_bytes` is
    what the optimizer keeps between steps, `paged_bytes` what it keeps in memory shared with the host, `host_bytes`
    what the host's own memory keeps: offloaded weights, masters, states, gradients. `periodic` is what the method does
    besides steps, which counts in none of them. `notes` say how a recorded program was made.
    `whole` is the model where `architecture` is what one of its tensor-parallel ranks has.
    `form` is what several GPUs do; parameters are then those of one rank, its shards. `replay` is a recorded program as
    such a rank runs it. `received_bytes` are kept for what a stage of a pipeline receives. `active_unsharded` is
    `active` of parameters that went into shards, of which flat ones have no names of experts.
    """

    architecture: Architecture
    method: Method
    setup: Setup
    device: str
    parameters: list[Parameter]
    groups: list[Group] = field(default_factory=list)
    state_bytes: Dim = 0
    paged_bytes: Dim = 0
    host_bytes: Dim = 0
    periodic: list[PeriodicOps] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replay: "Replay | None" = None
    form: ParallelForm | None = None
    received_bytes: Dim = 0
    whole: Architecture | None = None
    active_unsharded: Dim | None = None

    @property
    def model(self) -> Architecture:
        """What was asked about, to be asked about again."""
        return self.architecture if self.whole is None else self.whole

    def parts(self) -> Iterator[tuple[Part, int]]:
        """Every part with how often it runs in the step."""
        for group in self.groups:
            for part in group.parts:
                yield part, part.repeat * group.repeat

    def ops(self) -> Iterator[tuple[Part, Op, int]]:
        """Every op with its part and how often it runs."""
        for part, count in self.parts():
            for op in part.ops:
                yield part, op, count

    @property
    def trainable(self) -> Dim:
        """Elements that train."""
        return sum(p.elements * p.count for p in self.parameters if p.requires_grad)

    @property
    def total(self) -> Dim:
        """Parameters of the model."""
        return sum(p.elements * p.count for p in self.parameters)

    @property
    def active(self) -> Dim:
        """Parameters that a token meets: of a mixture's experts those that it goes to."""
        if self.active_unsharded is not None:
            return self.active_unsharded
        shares = ((p, *self.architecture.active_share(p.name)) for p in self.parameters)
        return sum(p.elements * p.count * part // whole for p, part, whole in shares)

    @property
    def weight_bytes(self) -> Dim:
        """Bytes of all parameters on the device, scales of quantised ones included."""
        return sum(p.nbytes * p.count for p in self.parameters if not p.hosted)

    @property
    def optimizer(self) -> str:
        """The optimizer form that runs."""
        deepspeed = self.zero or (self.form is not None and self.setup.parallel.startswith("zero"))
        if deepspeed and self.setup.optimizer == "adamw":
            return "adamw-fused"  # DeepSpeed's FusedAdam: one pass over flat tensors
        of_host = self.form is not None and self.form.offloads
        return optimizers.picked_form(self.setup.optimizer, "cpu" if of_host else self.device)

    @property
    def engine(self) -> str:
        """Whose Python runs beside the model's: a training engine's, or that of what several GPUs do."""
        exchanges = self.form is not None and not decide(self.setup.gpus == 1)
        return self.setup.parallel if exchanges and not self.zero else self.setup.engine

    @property
    def stages(self) -> Ranks | None:
        """The ranks of its pipeline; None where there is none."""
        return Ranks(self.setup.pp, self.setup.gpus // self.setup.pp) if self.setup.pp > 1 else None

    @property
    def head(self) -> int:
        """Weights of one head of an attention layer."""
        return self.architecture.hidden**2 // max(1, self.architecture.heads)

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed's ZeRO-3 runs the step."""
        return self.setup.engine == "deepspeed-zero3"

    @property
    def zero_alone(self) -> bool:
        """Whether it does so on one GPU, which exchanges nothing."""
        return self.zero and self.form is None
