"""Steps that several processes share: DDP or FSDP2 under torchrun (NCCL between GPUs, gloo between CPU processes).

    torchrun --nproc-per-node 2 -m perfmodel validate measure --device cuda --parallel fsdp2 ...

Every process trains on a batch of its own, of the cell's size.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perfmodel.architectures import Architecture
from perfmodel.errors import UserError
from perfmodel.program.part import PHASES

KINDS = ("ddp", "fsdp2")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # set by torchrun
NAMESPACES = ("c10d", "_c10d_functional")
COLLECTIVES = ("allreduce", "allgather", "reducescatter", "broadcast", "alltoall", "reduce", "gather", "scatter")
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a measurement, seen by one of them."""

    kind: str
    rank: int
    size: int
    backend: str

    @property
    def first(self) -> bool:
        """Whether this process keeps the records."""
        return self.rank == 0

    def name(self, cell: str) -> str:
        """The id of a cell that this team runs."""
        return f"{cell} {self.kind} x{self.size}"

    def agree(self, value: T | None) -> T:
        """What the first process says."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def gather(self, value: T) -> list[T]:
        """What each process says, by rank."""
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def first_to(self, what: str) -> bool:
        """Whether no other process asked the same before, whatever state it is in."""
        store = dist.distributed_c10d._get_default_store()
        return bool(store.add(f"perfmodel {what}", 1) == 1)


def join(kind: str, device: str) -> Team:
    """Join the processes that torchrun started.

    Raises:
        UserError: not started by torchrun.
    """
    if not under_torchrun():
        started = f"torchrun --nproc-per-node 2 -m perfmodel validate measure --parallel {kind} ..."
        raise UserError(f"--parallel {kind} needs several processes: {started}")
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    return Team(kind, dist.get_rank(), dist.get_world_size(), backend)


def leave() -> None:
    """End the group, so that the processes may."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(failed: bool) -> NoReturn:
    """End this process at once: in an orderly end gloo's threads may free their last tensor, which aborts Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in LAUNCHED)


def wrap_for_team(model: Any, team: Team, architecture: Architecture, device: str) -> Any:
    """The model as the team trains it: copies kept alike (DDP), or parameters spread, block by block (FSDP2)."""
    if team.kind == "ddp":
        where = [torch.cuda.current_device()] if device == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=where)
    from torch.distributed.fsdp import fully_shard

    rows = "|".join(re.escape(path) for path, _ in architecture.stacks)
    block = re.compile(rf"(.*\.)?({rows})\.\d+")
    for name, module in model.named_modules():
        if block.fullmatch(name):
            fully_shard(module)
    return fully_shard(model)


class Messages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives and their bytes by phase.

    Bytes are those of the whole message: of a gathered or reduced tensor as all processes together have it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.found: dict[str, dict[str, list[int]]] = {phase: {} for phase in PHASES}

    @contextmanager
    def observe(self, phase: str) -> Iterator[None]:
        """Count under a phase."""
        self.phase = phase
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, torch.distributed.tensor.DTensor) for t in types):
            return NotImplemented  # spread tensors become plain ones and collectives first
        if func.namespace in NAMESPACES and (name := collective(func)) in COLLECTIVES:
            row = self.found[self.phase].setdefault(name, [0, 0])
            row[0] += 1
            row[1] += _message(name, args)
        return func(*args, **(kwargs or {}))


def collective(func: Any) -> str:
    """The plain name of a collective: `c10d::_allgather_base_` is allgather."""
    name = func._schema.name.partition("::")[2].strip("_").replace("_base", "").replace("_into_tensor", "")
    return str(name.replace("_tensor", "").replace("_coalesced", "").replace("_", ""))


def _message(name: str, args: Any) -> int:
    """Bytes of a collective's message: what is gathered or scattered contains what a process has of it."""
    sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    return max(sizes) if name in ("allgather", "reducescatter") else sum(sizes)
