"""Steps that several processes shared: how their records tell it, and when the tape can be held against them."""

from dataclasses import dataclass, field, replace
from typing import Any

from perfmodel.errors import UserError
from perfmodel.setup import Setup

from ..measuring.records import Record
from .counted import Counts
from .machine import Machine

# gloo scatters what it reduces by reducing a clone of all of it, and copies the rank's part out behind the wait
# (`reduce_scatter_tensor_coalesced` of torch/csrc/distributed/c10d/ProcessGroupGloo.cpp).
COPIED_OUT, COPY = "c10d::_reduce_scatter_base_", "copy_"


@dataclass(frozen=True)
class Sharing:
    """How several processes shared a step.

    Attributes:
        kind: ddp or fsdp2.
        nodes: that they were on; None: of a record from before calls were counted.
        cores: that they might run on, all together; 0: not told.
        messages: collectives of a step, phase -> plain name -> [number, bytes]; empty if no visit counted them.
        communication: share of the step in which a collective was under way; None if no visit was profiled.
    """

    kind: str
    processes: int
    backend: str
    nodes: int | None = None
    cores: int = 0
    messages: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    communication: float | None = None

    @classmethod
    def of(cls, visits: list[Record]) -> "Sharing | None":
        """What the visits of a cell tell; None if each was of one process."""
        if "parallel" not in visits[0]:
            return None
        told: dict[str, Any] = {name: visits[0]["parallel"].get(name) for name in ("kind", "processes", "backend")}
        done = [r.get("profile", {}) for r in visits if r["status"] == "ok"]
        shares = [profile["communication_share"] for profile in done if "communication_share" in profile]
        return cls(
            **told,
            nodes=visits[0]["parallel"].get("nodes"),
            cores=visits[0]["parallel"].get("cores", 0),
            messages=next((r["messages"] for r in visits if "messages" in r), {}),
            communication=shares[0] if shares else None,
        )

    @property
    def name(self) -> str:
        """In words, as records name it."""
        return f"{self.kind} x{self.processes}"

    def setup(self, alone: Setup, machine: Machine) -> Setup:
        """A cell's setup as these processes shared it.

        Raises:
            UserError: the tape says nothing of such a program, or the price of a rank nothing of its time.
        """
        if self.processes < 2:
            raise UserError(f"{self.kind} of {self.processes} process shares nothing: measure without --parallel")
        if machine.others:
            raise UserError(f"measured under {', '.join(machine.others)}: what ranks call there is not modelled")
        if alone.compile != "none":
            raise UserError("calls of compiled ranks are not counted as they run: measure without compile")
        if self.nodes is None:
            raise UserError("measured before calls of ranks were counted: measure again")
        if 0 < self.cores < self.processes * machine.threads:
            each = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
            have = f"{self.cores} core{'s' if self.cores > 1 else ''}"
            raise UserError(f"{self.processes} processes of {each} shared {have}: measure again with cores for all")
        return replace(alone, gpus=self.processes, parallel=self.kind, nodes=self.nodes, node=machine.node)

    def calls(self, on_tape: Counts) -> Counts:
        """The calls of the tape, and those of the backend."""
        if self.backend != "gloo":
            return on_tape
        copies = {phase: names.get(COPIED_OUT, 0) for phase, names in on_tape.items()}
        return {phase: {**names, COPY: names.get(COPY, 0) + copies[phase]} for phase, names in on_tape.items()}
