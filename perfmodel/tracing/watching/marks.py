"""Where modules of a traced program begin and end, forward and backward, and where gradients are complete.

What several GPUs do hooks in there (`program.marks`): around blocks, around the embedding of the words, the last norm
and the head, where weights of blocks are used, at gradients, and behind the call of the whole model.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ...program.marks import BEFORE, BEHIND, GRADIENT, IN, OUT, OUTPUTS, USED
from ...program.op import Spec
from ..programs.dtypes import DTYPES
from ..programs.stacks import Stack

Module = torch.nn.Module
_IN_BLOCK = re.compile(r"\.(\*|\d+)\.")
_WRAPPERS = re.compile(r"\.base_layer(?=\.)|\.default(?=\.weight$|$)")
Note = Callable[..., None]  # of what there is to say, of which module or parameter, and of which tensors


@dataclass(frozen=True)
class Marked:
    """What is marked of a model, found while it has all its blocks.

    Attributes:
        regions: modules whose beginning and end is, with their paths, and of blocks in a row their numbers.
        users: modules of blocks that have parameters of their own, each with their names.
        parameters: what trains, with its name.
    """

    regions: tuple[tuple[Module, str, int | None], ...]
    users: tuple[tuple[Module, tuple[str, ...]], ...]
    parameters: tuple[tuple[torch.nn.Parameter, str], ...]


NOWHERE = Marked((), (), ())


def path_of_bare(model: Module, bare: Module) -> str:
    """How names in a model begin that another one has without what peft puts around it."""
    return next((f"{name}." for name, module in model.named_modules() if module is bare and name), "")


def own_name(name: str, start: str, names: Set[str]) -> str:
    """A parameter's name without peft's wrappers; `names` are those of the bare model's."""
    name = name.removeprefix(start)
    return name if name in names else _WRAPPERS.sub("", name)


def lists_of_blocks(model: Module, bare: Module, rows: Sequence[Stack]) -> list[tuple[str, ...]]:
    """Paths of the lists of blocks that run side by side, of each stack."""
    paths, start = {id(module): name for name, module in model.named_modules()}, path_of_bare(model, bare)
    return [tuple(paths[id(each)].removeprefix(start) for each in row.containers) for row in rows]


def places_of(model: Module, bare: Any, rows: Sequence[Stack], names: frozenset[str]) -> Marked:
    """What to mark of a model; `names` are those of the bare one's parameters."""
    rows = [row for row in rows if not _is_layer(next(row.containers[0].children()))]
    start = path_of_bare(model, bare)
    lists = [path for side in lists_of_blocks(model, bare, rows) for path in side]

    def called(name: str) -> str:
        name = own_name(name, start, names)
        for path in lists:
            number, dot, rest = name.removeprefix(f"{path}.").partition(".")
            if name.startswith(f"{path}.") and number.isdigit():
                return f"{path}.*{dot}{rest}"
        return name

    numbers = {id(block): i for row in rows for i, block in enumerate(row.containers[0].children())}
    found = {
        id(module): (module, f"{called(name)}.", numbers.get(id(module))) for name, module in model.named_modules()
    }
    blocks = [found[id(block)] for row in rows for block in row.containers[0].children()]
    whole = set(getattr(bare, "_no_split_modules", None) or ())  # what transformers and accelerate take for blocks
    inside = {id(m) for block, *_ in blocks for m in block.modules()}
    blocks += [place for place in found.values() if type(place[0]).__name__ in whole and id(place[0]) not in inside]
    owned = (
        (module, tuple(called(f"{name}.{p}") for p, t in module._parameters.items() if t is not None))
        for name, module in model.named_modules()
    )
    users = tuple((module, own) for module, own in owned if own and _IN_BLOCK.search(own[0]))
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    trained = [  # of what blocks share the one name tells the block that it is listed with
        (p, called(name) if owners[id(p)] == 1 else own_name(name, start, names))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    beside = (found[id(module)] for module in _beside(bare) if id(module) in found)
    return Marked((*blocks, *beside), users, tuple(trained))


def _is_layer(module: Module) -> bool:
    """Whether it is a layer, peft's or not: several in a list are no blocks that run one after another."""
    return hasattr(module, "base_layer") or not any(True for _ in module.children())


def _beside(bare: Any) -> list[Module]:
    """Modules beside the blocks that accelerate makes units of: the words', the base's last norm, the head."""
    found = [_asked(bare, "get_input_embeddings"), _asked(bare, "get_output_embeddings")]
    base = getattr(bare, getattr(bare, "base_model_prefix", "") or "", None)
    if isinstance(base, Module):
        found += [module for module in base.children() if "Norm" in type(module).__name__][-1:]
    return list({id(module): module for module in found if isinstance(module, Module)}.values())


def _asked(bare: Any, how: str) -> Any:
    try:
        return getattr(bare, how)()
    except (AttributeError, NotImplementedError):  # not of transformers, or of images
        return None


@contextmanager
def marked(places: Marked, model: Module, note: Note, *, reentrant: bool, phase: Callable[[], str]) -> Iterator[None]:
    """Note what is marked while the model runs.

    Args:
        reentrant: whether what a checkpoint runs again makes the graph that is gone back through: then that is where
            the backward pass of a block begins.
        phase: forward or backward, as it is now.
    """
    given = WeakTensorKeyDictionary()  # tensors that modules had from outside, this pass

    def begins(path: str, number: int | None) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            if phase() != "forward":
                if reentrant:
                    note(BEFORE, path)
                return
            note(IN, path, number)
            news = [x for x in _needing(args, kwargs) if x not in given]  # what blocks share is complete behind all
            given.update(dict.fromkeys(news))
            _on_gradients(news, partial(note, BEHIND, path))

        return hook

    def ends(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, out: Any) -> None:
            if phase() != "forward":
                return
            note(OUT, path)
            _on_gradients(_needing(out), partial(note, BEFORE, path))  # of what a reentrant checkpoint runs none does

        return hook

    def uses(names: Sequence[str]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for name in names:
                note(USED, name)

        return hook

    def gives(_: Any, args: Any, out: Any) -> None:
        note(OUTPUTS, "", tuple(Spec(DTYPES.get(t.dtype, "fp32"), tuple(t.shape)) for t in _tensors(out)))
        given.clear()
        _on_gradients(_needing(out)[:1], partial(note, BEFORE, ""))

    with ExitStack() as undo:
        handles = [model.register_forward_hook(gives)]
        for module, path, number in places.regions:
            handles.append(module.register_forward_pre_hook(begins(path, number), with_kwargs=True))
            handles.append(module.register_forward_hook(ends(path)))
        handles += [module.register_forward_pre_hook(uses(names)) for module, names in places.users]
        for p, name in places.parameters:
            handles.append(_on_complete(p, partial(note, GRADIENT, name)))
        for handle in handles:
            undo.callback(handle.remove)
        yield


def _on_gradients(tensors: Sequence[torch.Tensor], run: Callable[[], None]) -> None:
    """Run once the gradients of all that a pass reaches of them are complete."""
    if tensors:
        torch.autograd.graph.register_multi_grad_hook(tensors, lambda _: run())


def _on_complete(p: torch.nn.Parameter, run: Callable[[torch.Tensor], None]) -> Any:
    return p.register_post_accumulate_grad_hook(run)  # type: ignore[no-untyped-call]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _needing(*trees: Any) -> list[torch.Tensor]:
    return [t for t in _tensors(trees) if t.requires_grad]
