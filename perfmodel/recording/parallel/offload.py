"""What lives in the host's memory: copies to and from it over the bus, and the work of the host's cores.

Copies are asynchronous, from and to page-locked memory (`pin_memory`). What the cores work on takes no memory of the
device, and the host waits for them: they are its own.
"""

from collections.abc import Iterable, Sequence

from ...errors import UserError
from ...optimizers.parts.update import existing
from ...program.dims import decide
from ...program.op import ON_CORES, PINNED, Op
from ...program.part import Part
from ...program.streams import MAIN, Run
from ...setup import Setup
from ...tape.core import new_tensor, record
from ...tape.tensor import Parameter, Tensor

ADAMW = ("adamw", "adamw-foreach", "adamw-loop", "adamw-fused")  # what DeepSpeed takes its CPU Adam for
OF_GPUS = ("adamw-8bit", "ao-", "lion", "paged", "rmsprop")  # beginnings of optimizers whose kernels a GPU runs


def to_device(x: Tensor, on: str) -> Tensor:
    """`x.to(device, non_blocking=True)`: a new tensor, copied on the stream `on`."""
    made = new_tensor(x.shape, x.dtype)
    record("_to_copy", (x,), (made,), PINNED, runs=Run(on))
    return made


def to_host(x: Tensor, runs: Run) -> Tensor:
    """`x.to("cpu", non_blocking=True)`: a tensor that takes no memory of the device."""
    made = existing(x.shape, x.dtype)
    record("_to_copy", (x,), (made,), PINNED, runs=runs)
    return made


def on_cores(parts: Iterable[Part]) -> None:
    """All that some parts record is done by the host's cores, on tensors in its memory; scalars stay Python's."""
    for part in parts:
        part.ops = [op if op.view or op.attrs.host or op.attrs.ranks else by_cores(op) for op in part.ops]
        part.delta = part.highest = 0


def by_cores(op: Op) -> Op:
    """The op as the host's cores do it."""
    return Op(
        op.name, op.inputs, op.outputs, op.bytes_read, op.bytes_written,
        attrs=op.attrs._replace(cores=True), owner=op.owner, runs=MAIN,
    )  # fmt: skip


def work(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    """A call of the host's cores."""
    record(name, given, made, ON_CORES)


def keep_on_host(parameters: Iterable[Parameter]) -> None:
    """These live in the host's memory."""
    for p in parameters:
        p.hosted = True


def check_offload(setup: Setup) -> None:
    """Raise `UserError` where a setup asks for what its program does not offload."""
    if setup.offload == "none":
        return
    fsdp, alone = setup.parallel in ("fsdp1", "fsdp2"), decide(setup.gpus == 1)
    others = "zero2 or zero3" if setup.offload == "optimizer" else "zero3" if alone else "zero3 or fsdp2"
    if setup.parallel == "ddp" and setup.engine == "torch":
        raise UserError(f"offload: DDP keeps everything on the GPU; use --parallel {others}")
    if fsdp and alone:
        raise UserError(f"offload: FSDP has nothing to shard on one GPU; use --parallel {others}")
    if setup.tp > 1:
        raise UserError("offload: not modelled with layers that GPUs share; use --tp 1")
    if fsdp and setup.offload == "optimizer":
        raise UserError("offload optimizer: FSDP offloads parameters, gradients and states together: --offload params")
    if setup.parallel in ("zero1", "zero2") and setup.offload == "params":
        raise UserError(f"offload params: {setup.parallel} offloads the optimizer alone: --offload optimizer, or zero3")
    if not updates_on_host(setup.optimizer, fsdp=fsdp):
        what = "a GPU runs" if fsdp else "is not DeepSpeed's CPU Adam, which updates on the host"
        raise UserError(f"offload: optimizer {setup.optimizer} {what}; use adamw")


def updates_on_host(optimizer: str, *, fsdp: bool) -> bool:
    """Whether the host's cores run an optimizer: under FSDP PyTorch's own, under DeepSpeed AdamW as its CPU Adam."""
    return not optimizer.startswith(OF_GPUS) if fsdp else optimizer in ADAMW
