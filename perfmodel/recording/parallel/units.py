"""Parameters that travel together, and their shards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ...architectures.base import WORDS
from ...objectives.parts.base import OF_REFERENCE, found
from ...program.dims import Dim, Shape, contiguous_strides, decide, product
from ...program.dtypes import FLOATING, ITEMSIZE
from ...program.part import Part
from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.tensor import Parameter, Tensor
from .form import WholeUnits

ROOT = ""  # the unit of what no other holds
HEAD = "lm_head."
HALVES = (".lora_A.", ".lora_B.")
BESIDE = "prompt_encoder."  # PEFT wraps no layers of the model for it


def sharing(ranks: Ranks, setup: Setup) -> tuple[Ranks, Ranks | None]:
    """Those of all data-parallel ranks that shards lie over, and the replicas of one, None where there are none."""
    group = setup.shard_group
    if group is None or decide(ranks.size <= group):
        return ranks, None
    return Ranks(group, ranks.stride), Ranks(ranks.size // group, group * ranks.stride)


def predivided(ranks: Dim) -> Dim:
    """What gradients are divided by before they are reduced (`_get_gradient_predivide_factor`): about the root."""
    factor: Dim = 1
    while decide((ranks % factor == 0) & (ranks / factor > factor)):
        factor *= 2
    return factor


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
    shard.placement, shard.arrived = p.placement and p.placement.in_shards(), None
    return shard


def of_all_layers(held: Iterable[Tensor]) -> None:
    """Where one of these dies next, so do those of all layers of the part that made it."""
    for t in held:
        if t.storage.home is not None:
            t.storage.copies = t.storage.home.repeat


def drop_gradient(p: Parameter) -> None:
    """That of one layer goes, where a part stands for several."""
    if p.grad is not None:
        p.grad.storage.copies = 1
        p.grad = None


def redistribute(p: Parameter) -> None:
    """A gradient that does not lie as its parameter does is brought there (`_get_grad_inner_tensor`)."""
    if p.placement is not None and p.placement.moves and p.grad is not None:
        grad = p.grad
        p.grad = p.placement.redistributed(grad, p.shape)
        grad.storage.copies, p.grad.storage.copies = 1, grad.storage.copies


def kept_dtype(p: Parameter, setup: Setup) -> str:
    """What a shard is kept in: with mixed precision masters of what trains (accelerate's `fsdp2_prepare_model`)."""
    if setup.amp is None:
        return p.dtype
    if p.name.startswith(OF_REFERENCE) and found(setup.objective).reference_in_amp:
        return setup.amp
    return "fp32" if p.requires_grad else setup.dtype if p.dtype == setup.amp else p.dtype


def run_of(unit: "ShardedUnit") -> Part | None:
    """The part of the forward pass that a unit runs in."""
    return unit.parameters[0].part if unit.parameters else None


def halves(block: str, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Paths of the modules of LoRA's in a block, by the names of all parameters."""
    inside = (name.removesuffix("weight") for name in names if name.startswith(block))
    return [(path,) for path in dict.fromkeys(inside) if path.endswith(HALVES)]


@dataclass(eq=False)
class ShardedUnit:
    """Parameters that are gathered together: of one block, of some modules, or of all the rest.

    Attributes:
        path: of the block, or the first of the modules; `ROOT` of the rest.
        parameters: whole, in the dtype that they are used in.
        shards: what the first rank keeps of each.
        last: of the modules, if there are several.
        stays: whether what is gathered stays behind the forward pass, as under accelerate the root does.
    """

    path: str
    parameters: list[Parameter]
    shards: list[Parameter]
    last: str = ""
    stays: bool = False

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


def whole_reference(parameters: Sequence[Parameter], ranks: Dim, setup: Setup) -> ShardedUnit:
    """The unit of a frozen model beside the one that trains: all of it, as TRL shards it."""
    shards = {p: shard_of(p, ranks, kept_dtype(p, setup)) for p in parameters if p.name.startswith(OF_REFERENCE)}
    those = [p for p in shards for _ in range(p.count)]
    return ShardedUnit(ROOT, those, [shards[p] for p in those], stays=not setup.reshard)


class Survey(WholeUnits):
    """A wrapper that only notes the blocks, and the modules beside them, in the order of their calls.

    Attributes:
        passes: of the calls of the model in a micro-batch, what runs in each.
        of: how the names of the model's parameters begin.
        frozen: that of a reference model, if there was one.
    """

    frozen: "Survey | None" = None

    @property
    def everyone(self) -> Ranks | None:
        """Nobody."""
        return None

    @property
    def reference(self) -> "Survey":
        """Blocks of a frozen model are parts of their own, too."""
        if self.frozen is None:
            self.frozen = Survey(OF_REFERENCE)
        return self.frozen

    def __init__(self, of: str = "") -> None:
        self.of = of
        self.paths: list[str] = []
        self.modules: list[str] = []
        self.passes: list[list[str]] = []

    def begin(self) -> None:
        """Nothing is hooked."""
        self.passes.append([])

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Nothing is hooked."""
        return outputs

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Run it."""
        self.paths.append(path)
        self.passes[-1].append(path)
        return run(x)

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run it; halves of LoRAs are found by their weights."""
        if not path.endswith(HALVES):
            self.modules.append(path)
            self.passes[-1].append(path)
        return run(x)

    def weight(self, p: Parameter) -> Tensor:
        """It is used now."""
        self.passes[-1].append(p.name)
        return p

    def units(
        self,
        parameters: Sequence[Parameter],
        ranks: Dim,
        setup: Setup,
        *,
        tied: bool,
        flat: bool = False,
        classifies: bool = False,
        staged: bool = False,
    ) -> list[ShardedUnit]:
        """The units of a model as its modules are found, that of the rest last; `flat` as in `shard_of`.

        Of a stage of a pipeline (`staged`) they are torchtitan's.

        Scales of packed weights are no parameters of a module, so they stay whole on every rank. What is packed in
        bytes FSDP2 cannot cut (accelerate's `fsdp2_prepare_model` leaves it out); under FSDP1 it is stored as floats
        (bitsandbytes' `quant_storage`).
        """
        bytes_too = setup.parallel == "fsdp1"
        left = {
            p: p.name.removeprefix(self.of)
            for p in parameters
            if p.kind != "scale"
            and (bytes_too or p.dtype in FLOATING)
            and p.name.startswith(OF_REFERENCE) is bool(self.of)
        }
        groups: list[tuple[str, ...]] = [(path,) for path in dict.fromkeys(self.paths)]
        tail: list[tuple[str, ...]] = []
        if setup.parallel == "fsdp2" and setup.fsdp_units == "accelerate":
            adapted = not setup.sequence_parallel and any(
                p.kind == "adapter" and not p.name.startswith(BESIDE) for p in parameters
            )
            headed = not classifies and (tied or any(name.startswith(HEAD) for name in left.values()))
            first, tail = self._of_stage() if staged else self._beside(tied=tied, adapted=adapted, headed=headed)
            groups = [*first, *groups, *tail]
        if setup.fsdp_units == "adapters":
            groups = [one for path, *_ in groups for one in ((path,), *halves(path, left.values()))]
        within = tuple(chain(*(group for group in groups if group[0].endswith(HALVES))))
        found = {
            group: [p for p, name in left.items() if name.startswith(group) and not name.startswith(inner)]
            for group in groups
            for inner in [() if group[0] in within else within]
        }
        found[(ROOT,)] = [p for p, name in left.items() if not name.startswith(tuple(chain(*groups)))]
        dtypes = {p.name: p.dtype if flat else kept_dtype(p, setup) for p in left}
        stay = set() if staged else {*tail, *(group for group in groups if HEAD in group)}
        if setup.fsdp_units == "accelerate" and not staged:  # `reshard_after_forward` of the root is None there
            stay.add((ROOT,))
        return [
            ShardedUnit(
                group[0], those, [shard_of(p, ranks, dtypes[p.name], flat=flat) for p in those], group[-1],
                stays=group in stay or not setup.reshard,
            )
            for group, those in found.items()
        ]  # fmt: skip

    def _of_stage(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """The same of a stage, of what it has of them (torchtitan, distributed/fsdp.py: `apply_fsdp_to_decoder`)."""
        words = [path for path in self.modules if path[:-1].endswith(WORDS)]
        behind = tuple(path for path in self.modules if path not in words)
        return [(path,) for path in words], [behind] if behind else []

    def _beside(
        self, *, tied: bool, adapted: bool, headed: bool
    ) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Units of modules before and behind the blocks: the embedding's; the last norm's and the head's together.

        They are one where they share a weight. The last norm is looked for among the children of what the model's class
        calls its base, which under PEFT's wrapper is another module where that is called "model", one without norms.
        Source: accelerate 1.15, utils/fsdp_utils.py (`fsdp2_prepare_model`, `_find_final_norm`).
        """
        words = next((path for path in self.modules if path[:-1].endswith(WORDS)), None)
        if words is None:
            return [], []
        base = words.split(".")[0]
        norms = [path for path in self.modules if path.split(".")[0] == base and path.count(".") == 2]
        norm = () if adapted and base == "model" else tuple(path for path in norms[-1:] if path != words)
        if not headed:  # a classifier's is no output embedding
            return [(words,)], [norm] if norm else []
        return ([(words, *norm, HEAD)], []) if tied else ([(words,)], [(*norm, HEAD)])
