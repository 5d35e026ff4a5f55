"""Parameters that travel together, and their shards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...program.dims import Dim, Shape, contiguous_strides, product
from ...program.dtypes import FLOATING, ITEMSIZE
from ...setup import Setup
from ...tape.tensor import Parameter, Tensor
from .form import WholeUnits

ROOT = ""  # the unit of what no block holds


def shard_shape(shape: Shape, ranks: Dim) -> Shape:
    """The largest shard of a tensor that is cut along its first dim, which is padded where it does not divide."""
    return (-(-shape[0] // ranks), *shape[1:]) if shape else (1,)


def shard_of(p: Parameter, ranks: Dim, dtype: str, *, flat: bool = False) -> Parameter:
    """What the first rank keeps of a parameter, along its first dim or, if `flat`, of its elements in a row.

    It stands for as many elements of the model as before.
    """
    shard = p.copy()
    shard.dtype = dtype
    shard.shape = shard_shape((p.numel,) if flat else p.shape, ranks)
    shard.strides = contiguous_strides(shard.shape)
    shard.numel = product(shard.shape)
    shard.nbytes = shard.numel * ITEMSIZE[dtype]
    shard.grad, shard._spec, shard._use, shard.accumulator = None, None, None, None
    return shard


def kept_dtype(p: Parameter, setup: Setup) -> str:
    """What a shard is kept in: with mixed precision masters of what trains (accelerate's `fsdp2_prepare_model`)."""
    if setup.amp is None:
        return p.dtype
    return "fp32" if p.requires_grad else setup.dtype if p.dtype == setup.amp else p.dtype


@dataclass(eq=False)
class ShardedUnit:
    """Parameters that are gathered together: of one block, or of all that is outside of blocks.

    Attributes:
        path: of the block; `ROOT` of the rest.
        parameters: whole, in the dtype that they are used in.
        shards: what the first rank keeps of each.
    """

    path: str
    parameters: list[Parameter]
    shards: list[Parameter]

    @property
    def pairs(self) -> Iterator[tuple[Parameter, Parameter]]:
        """Whole parameters, each with its shard."""
        return zip(self.parameters, self.shards, strict=True)

    @property
    def dtype(self) -> str:
        """The dtype that they are gathered in: bytes where they differ (`_get_all_gather_input_metadatas`)."""
        dtypes = {p.dtype for p in self.parameters}
        return dtypes.pop() if len(dtypes) == 1 else "u8"

    @property
    def numels(self) -> list[Dim]:
        """Elements of each shard of a rank, in that dtype."""
        itemsize = ITEMSIZE[self.dtype]
        return [shard.numel * ITEMSIZE[p.dtype] // itemsize for p, shard in self.pairs]

    @property
    def cast(self) -> list[tuple[Parameter, Parameter]]:
        """Parameters that are kept in another dtype than the one that they are used in, with their shards."""
        return [(p, shard) for p, shard in self.pairs if p.dtype != shard.dtype]


class Survey(WholeUnits):
    """A wrapper of blocks that only notes which parameters each of them makes."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Run it."""
        self.paths.append(path)
        return run(x)

    def units(
        self, parameters: Sequence[Parameter], ranks: Dim, setup: Setup, *, flat: bool = False
    ) -> list[ShardedUnit]:
        """The units of a model in the order of their forward passes, that of the rest last; `flat` as in `shard_of`.


        Scales of packed weights are no parameters of a module, so they stay whole on every rank. What is packed in
        bytes FSDP2 cannot cut (accelerate's `fsdp2_prepare_model` leaves it out); under FSDP1 it is stored as floats
        (bitsandbytes' `quant_storage`).
        """
        bytes_too = setup.parallel == "fsdp1"
        left = [p for p in parameters if p.kind != "scale" and (bytes_too or p.dtype in FLOATING)]
        paths = tuple(dict.fromkeys(self.paths))
        found = {path: [p for p in left if p.name.startswith(path)] for path in paths}
        found[ROOT] = [p for p in left if not p.name.startswith(paths)]
        dtypes = {p.name: p.dtype if flat else kept_dtype(p, setup) for p in left}
        return [
            ShardedUnit(path, those, [shard_of(p, ranks, dtypes[p.name], flat=flat) for p in those])
            for path, those in found.items()
        ]
