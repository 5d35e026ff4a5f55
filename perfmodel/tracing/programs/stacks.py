"""Repeated blocks of a model: which run the same program, and the model cut to some of them.

Two blocks are of one kind when they have the same modules, parameters (shape, dtype, trained or not), buffers and plain
settings, when the config says the same of them (`layer_types` and other lists with an entry a block), and when both or
neither lie above something that trains: then autograd treats them alike too.
"""

import inspect
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Module = torch.nn.Module
_NUMBERED = re.compile(r"idx|index|layer_id|layer_num|depth|position|seed")  # settings that only say which block it is
_COUNTS = re.compile(r"layer|depth|block|stage")  # settings that say how many blocks there are
_PLACE = re.compile(r"\.\d+\.")  # a block's number in the path of a module
# Packages whose models were compared with whole traces (tests/tracing); what in other code may look at a block's number
COMPARED = frozenset(("torch", "transformers", "diffusers", "peft", "trl", "perfmodel"))
COUNTING = re.compile(r"\b(enumerate|range|zip|len|islice|reversed)\b|\bif \w+ %|\bfor\b.*\[\w*:")
_PLAIN = (bool, int, type(None))


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another: one container, or several side by side that share their length.

    Attributes:
        path: of the module that holds the containers.
        containers: `ModuleList` or `Sequential`; block i is the i-th child of each.
        holders: what else speaks of the blocks: the module around them, and the config that it was made from.
        kinds: of each block.
    """

    path: str
    containers: tuple[Module, ...]
    holders: tuple[Any, ...]
    kinds: tuple[Hashable, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def alike_anywhere(self) -> bool:
        """Whether the module around the blocks runs them without a look at their number.

        Of packages whose models were compared with whole traces; of other modules where no method of theirs counts.
        """
        own = [c for c in type(self.holders[0]).__mro__[:-1] if c.__module__.partition(".")[0] not in COMPARED]
        methods = [f for c in own for name, f in vars(c).items() if callable(f) and not name.startswith("__init")]
        try:
            return not any(COUNTING.search(inspect.getsource(method)) for method in methods)
        except (OSError, TypeError):  # its source is nowhere
            return False

    @contextmanager
    def cut(self, keep: Sequence[int]) -> Iterator[None]:
        """The model with only some of the blocks, in their order."""
        with ExitStack() as undo:
            for container in self.containers:
                blocks = list(container._modules.values())
                undo.callback(_restore, container._modules, dict(container._modules))
                container._modules.clear()
                container._modules.update({str(i): blocks[j] for i, j in enumerate(keep)})
                for i, j in enumerate(keep):
                    _renumber(blocks[j], j, i, undo)
            for holder in self.holders:
                undo.callback(_restore, holder.__dict__, dict(holder.__dict__))
                holder.__dict__.update(_shortened(holder.__dict__, len(self), keep))
            yield


def _renumber(block: Module | None, old: int, new: int, undo: ExitStack) -> None:
    """Tell a block and what is in it that it comes `new`-th: it may look itself up in a cache or in the config."""
    for module in block.modules() if block is not None else ():
        for name, value in list(module.__dict__.items()):
            if type(value) is int and value == old and _NUMBERED.search(name):
                undo.callback(setattr, module, name, old)
                setattr(module, name, new)


def _restore(table: dict[str, Any], before: dict[str, Any]) -> None:
    table.clear()
    table.update(before)


def _shortened(table: dict[str, Any], length: int, keep: Sequence[int]) -> dict[str, Any]:
    """The entries that speak of `length` blocks, for those that are kept."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, (list, tuple)) and len(value) == length:
            found[name] = type(value)([value[i] for i in keep])
        elif type(value) is int and value == length and _COUNTS.search(name):
            found[name] = len(keep)
    return found


def stacks(model: Module) -> list[Stack]:
    """The outermost repeated blocks of a model, in the order of its modules."""
    trained_above = _first_trained(model)
    found: list[Stack] = []
    _visit(model, "", None, _order(model), trained_above, found)
    return found


def _order(model: Module) -> dict[int, int]:
    """Modules, by identity, in the order in which they were made: that of the forward pass, as models are written."""
    return {id(module): i for i, module in enumerate(model.modules())}


def _first_trained(model: Module) -> int:
    """Place of the first module that has a trained parameter of its own."""
    for i, module in enumerate(model.modules()):
        if any(p is not None and p.requires_grad for p in module._parameters.values()):
            return i
    return -1


def _visit(module: Module, path: str, config: Any, order: dict[int, int], first: int, found: list[Stack]) -> None:
    config = module.__dict__.get("config", config)
    groups: dict[int, list[Module]] = {}
    for child in module._modules.values():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) > 2:
            groups.setdefault(len(child), []).append(child)
    if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and not path:
        groups = {len(module): [module]}  # the model itself is a row of blocks
    taken: set[int] = set()
    for length, containers in groups.items():
        holders = tuple(h for h in (module, config) if h is not None)
        kinds = tuple(_kind(containers, holders, i, length, order, first) for i in range(length))
        if len(set(kinds)) < length - 1:
            found.append(Stack(path, tuple(containers), holders, kinds))
            taken |= {id(c) for c in containers}
    if id(module) in taken:
        return
    for name, child in module._modules.items():
        if child is not None and id(child) not in taken:
            _visit(child, f"{path}.{name}" if path else name, config, order, first, found)


def _kind(
    containers: list[Module], holders: tuple[Any, ...], i: int, length: int, order: dict[int, int], first: int
) -> Hashable:
    blocks = [list(c._modules.values())[i] for c in containers]
    said = tuple(
        (name, _plain(value[i]))
        for holder in holders
        for name, value in sorted(holder.__dict__.items())
        if isinstance(value, (list, tuple)) and len(value) == length and not _NUMBERED.search(name)
        if list(value) != list(range(length))  # Llama 4's `moe_layers`: it only numbers the blocks
    )
    above = any(0 <= first < order[id(block)] for block in blocks if block is not None)
    return (tuple(_program(block) for block in blocks if block is not None), said, above)


def _program(block: Module) -> Hashable:
    """Everything about a block that decides which ops it runs."""
    found: list[Hashable] = []
    for name, module in block.named_modules():
        settings = tuple(
            (key, _plain(value))
            for key, value in sorted(module.__dict__.items())
            if not key.startswith("_") and not _NUMBERED.search(key)
        )
        tensors = tuple(
            (key, str(t.dtype), tuple(t.shape), t.requires_grad)
            for table in (module._parameters, module._buffers)
            for key, t in table.items()
            if t is not None
        )
        found.append((name, type(module).__module__, type(module).__qualname__, settings, tensors))
    return tuple(found)


def _plain(value: Any) -> Hashable:
    """A setting as far as it can decide which ops run: of a float only whether it is 0 or 1."""
    if isinstance(value, float):
        return value if value in (0.0, 1.0) else "float"
    if isinstance(value, str):
        return _PLACE.sub(".*.", value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((str(k), _plain(v)) for k, v in value.items())
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return type(value).__qualname__
