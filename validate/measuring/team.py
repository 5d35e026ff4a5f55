"""Steps that several processes share: DDP or FSDP2 under torchrun (NCCL between GPUs, gloo between CPU processes).

    torchrun --nproc-per-node 2 -m perfmodel validate measure --device cuda --parallel fsdp2 ...

Every process trains on a batch of its own, of the cell's size.
"""

import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from perfmodel.architectures import Architecture
from perfmodel.errors import UserError
from perfmodel.program.dtypes import ITEMSIZE
from perfmodel.program.part import PHASES
from perfmodel.setup import Setup

from ..oracle.parallel import Collective, wrapped_for_ranks
from .names import plain_collective

KINDS = ("ddp", "fsdp2")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # set by torchrun
STARTED = "torchrun --nproc-per-node 2 -m perfmodel validate measure --parallel"
SETTLED = 2  # steps until a program repeats itself: in the second DDP fills its buckets anew
PAUSE = 2e-3  # s
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a measurement, seen by one of them.

    Attributes:
        nodes: that they are on.
        cores: that they may run on, all together; 0: nobody asked.
    """

    kind: str
    rank: int
    size: int
    backend: str
    nodes: int = 1
    cores: int = 0

    @property
    def first(self) -> bool:
        """Whether this process keeps the records."""
        return self.rank == 0

    def name(self, cell: str) -> str:
        """The id of a cell that this team runs."""
        return f"{cell} {self.kind} x{self.size}"

    def as_dict(self) -> dict[str, Any]:
        """How a record tells that it is of a team."""
        told = {"kind": self.kind, "processes": self.size, "nodes": self.nodes, "backend": self.backend}
        return {**told, "cores": self.cores} if self.cores else told

    def setup(self, alone: Setup) -> Setup:
        """A cell's setup as the team shares it."""
        return replace(alone, gpus=self.size, parallel=self.kind)

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
        raise UserError(f"--parallel {kind} needs several processes: {STARTED} {kind} ...")
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    size = dist.get_world_size()
    found = Team(kind, dist.get_rank(), size, backend, size // int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    return replace(found, cores=len(set().union(*found.gather(_cores())))) if device == "cpu" else found


def _cores() -> set[tuple[str, int]]:
    """Machine and number of each core that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return {(platform.node(), core) for core in os.sched_getaffinity(0)}
    return {(platform.node(), core) for core in range(os.cpu_count() or 1)}


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


def wrap_for_team(model: Any, setup: Setup, architecture: Architecture, device: str) -> Any:
    """The model as ranks train it: copies kept alike (DDP), or parameters spread, block by block (FSDP2)."""
    if setup.parallel == "ddp" and device == "cuda":
        return DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()], find_unused_parameters=setup.ddp == "find-unused",
            static_graph=setup.ddp == "static-graph",
        )  # fmt: skip
    return wrapped_for_ranks(model, setup, architecture)


def bucket_bytes(model: Any) -> int:
    """Bytes of the buckets that DDP keeps beside the gradients."""
    if not isinstance(model, DistributedDataParallel):
        return 0
    told: dict[str, Any] = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    sizes = told.get("rebuilt_bucket_sizes") or told["bucket_sizes"]
    return sum(map(int, str(sizes).split(",")))


class DelayAfterCollective(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Waits a moment before what follows a collective: then gloo's threads have dropped what they hold of it.

    How soon they do is the scheduler's choice: on a busy machine a gathered unit more was live in one step of two.
    """

    behind_collective = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor of tensors: what it makes of the call is a call, too
        if self.behind_collective:
            time.sleep(PAUSE)
        self.behind_collective = func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def messages(collectives: Iterable[Collective]) -> dict[str, dict[str, list[int]]]:
    """Collectives of a step: phase -> plain name -> [number, bytes].

    Bytes are those of the whole message: of a gathered or reduced tensor as all processes together have it.
    """
    found: dict[str, dict[str, list[int]]] = {phase: {} for phase in PHASES}
    for c in collectives:
        row = found[c.phase].setdefault(plain_collective(c.name), [0, 0])
        row[0] += 1
        row[1] += c.elements * ITEMSIZE[c.dtype]
    return found
