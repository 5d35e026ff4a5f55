"""Parameters that travel together, and their shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...program.dims import Dim, Shape, contiguous_strides, product
from ...program.dtypes import ITEMSIZE
from ...tape.tensor import Parameter, Tensor

ROOT = ""  # the unit of what no block holds


def shard_shape(shape: Shape, ranks: Dim) -> Shape:
    """The largest shard of a tensor that is cut along its first dim, which is padded where it does not divide."""
    return (-(-shape[0] // ranks), *shape[1:]) if shape else (1,)


def shard_of(p: Parameter, ranks: Dim) -> Parameter:
    """What the first rank keeps of a parameter; it stands for as many elements of the model as before."""
    shard = p.copy()
    shard.shape = shard_shape(p.shape, ranks)
    shard.strides = contiguous_strides(shard.shape)
    shard.numel = product(shard.shape)
    shard.nbytes = shard.numel * ITEMSIZE[p.dtype]
    shard.grad, shard._spec, shard._use, shard.accumulator = None, None, None, None
    return shard


@dataclass(eq=False)
class ShardedUnit:
    """Parameters that are gathered together: of one block, or of all that is outside of blocks.

    Attributes:
        path: of the block; `ROOT` of the rest.
        parameters: whole; those that are no parameters of a module (scales of packed weights) stay as they are.
        ranks: over how many ranks they are cut.
    """

    path: str
    parameters: list[Parameter]
    ranks: Dim
    shards: list[Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shards = [shard_of(p, self.ranks) for p in self.parameters]

    @property
    def pairs(self) -> tuple[list[Parameter], list[Parameter]]:
        """Whole parameters and, in their order, their shards."""
        return self.parameters, self.shards

    @property
    def dtype(self) -> str:
        """The dtype that they are gathered in: bytes where they differ (`_get_all_gather_input_metadatas`)."""
        dtypes = {p.dtype for p in self.parameters}
        return dtypes.pop() if len(dtypes) == 1 else "u8"

    @property
    def numel(self) -> Dim:
        """Elements of all shards of a rank, in that dtype."""
        return sum(shard.nbytes for shard in self.shards) // ITEMSIZE[self.dtype]

    @property
    def sent(self) -> list[Tensor]:
        """The shards of a rank as rows of that dtype."""
        dtype = self.dtype
        numels = [(shard, shard.nbytes // ITEMSIZE[dtype]) for shard in self.shards]
        return [Tensor((numel,), dtype, (1,), numel, shard.storage) for shard, numel in numels]


class Survey:
    """A wrapper of blocks that only notes which parameters each of them makes."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Run it."""
        self.paths.append(path)
        return run(x)

    def weight(self, p: Parameter) -> None:
        """Nothing to note: its name tells its block."""

    def units(self, parameters: Sequence[Parameter], ranks: Dim) -> list[ShardedUnit]:
        """The units of a model in the order of their forward passes, that of the rest last."""
        left = [p for p in parameters if p.kind != "scale"]
        paths = dict.fromkeys(self.paths)
        found = [ShardedUnit(path, [p for p in left if p.name.startswith(path)], ranks) for path in paths]
        of_blocks = tuple(unit.path for unit in found)
        return [*found, ShardedUnit(ROOT, [p for p in left if not p.name.startswith(of_blocks)], ranks)]
