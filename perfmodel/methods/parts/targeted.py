"""What adapters of PEFT share: which linear layers get one, and the dtype of its weights."""

import re
import re._parser as _parser  # type: ignore[import-not-found]  # as re.compile uses it
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import numpy as np

from ...architectures.base import WORDS
from ...architectures.stacks import block_path
from ...errors import UserError, nearest
from ...tape.core import tape
from ...tape.tensor import Parameter, Tensor
from .base import Architecture, Linear, Method, option
from .checks import float_dtype

ALL_LINEAR = "all-linear"
LONG = 8  # times: a repeat of no more in another repeat is tried in few ways
SAVED = (*WORDS, "lm_head")  # what can be in modules_to_save
CLASSIFIERS = ("classifier", "score")
T = TypeVar("T", bound="Targeted")


@dataclass(frozen=True, eq=False, repr=False)
class Targeted(Method):
    """Adapters beside frozen linear layers; a subclass writes `adapted`, the forward pass of a targeted layer."""

    targets: tuple[str, ...] = option(
        (), "layer names joined by +, all-linear, or a /regex/ of whole paths; empty: PEFT's default"
    )
    layers_to_transform: tuple[int, ...] | None = option(None, "block numbers such as 0-7+12; default all")
    adapter_dtype: str | None = option(
        None, "bf16, fp16 or fp32; default PEFT's rule: fp32 beside a 16-bit base", float_dtype
    )
    modules_to_save: tuple[str, ...] = option((), "modules of which a full copy trains, such as embed_tokens+lm_head")

    aliases: ClassVar[dict[str, str]] = {"rank": "r", "layers": "layers_to_transform", "target_modules": "targets"}
    family: ClassVar[str] = "lora"  # whose default targets it takes (`architectures.traits.Targets`)
    told_by_where: ClassVar[tuple[str, ...]] = ("targets", "adapter_dtype", "modules_to_save")
    takes_conv1d: ClassVar[bool] = True  # whether PEFT has the adapter for GPT-2's Conv1D layers
    takes_layers: ClassVar[bool] = True  # whether its config has layers_to_transform
    takes_four_dims: ClassVar[bool] = True  # whether PEFT's adapter takes inputs of four dimensions
    told_of_four_dims: ClassVar[str] = ""  # what an answer says where a layer has such an input

    def check(self) -> None:
        assert self.architecture is not None
        if self.architecture.traits.conv1d and not self.takes_conv1d:
            raise UserError(
                f"method {self.name}: PEFT has no {self.name} for the Conv1D layers of {self.architecture.name}; "
                "use lora, dora, ia3 or vera"
            )
        if self.layers_to_transform is not None and not self.takes_layers:
            raise UserError(f"method {self.name}: PEFT's {self.name} has no layers_to_transform; leave it out")
        if self.layers_to_transform is not None and len(self.architecture.stacks) > 1:
            raise UserError(
                f"method {self.name}: PEFT's layers_to_transform takes the last number of a path, which is no block's "
                f"in {self.architecture.name}; name the blocks by targets=/regex/"
            )
        if self.pattern is None:
            check_targets(self.name, self.targets, self.architecture)
        else:
            self._check_pattern()
        self._check_saved()
        self._check_four_dims()
        if "lm_head" in self.targets and self.architecture.tied:
            raise UserError(
                f"method {self.name}: lm_head of {self.architecture.name} shares the embedding's weight; leave it out"
            )
        for layer in self.layers_to_transform or ():
            if not 0 <= layer < self.layers:
                raise UserError(
                    f"method {self.name}: layer {layer} is outside 0-{self.layers - 1} of {self.architecture.name}"
                )

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """The regex that whole paths of layers must match, where the targets are one between slashes.

        Raises:
            UserError: it is no regex.
        """
        alone = len(self.targets) == 1 and is_pattern(self.targets[0])
        return pattern_of(self.name, self.targets[0]) if alone else None

    def _check_pattern(self) -> None:
        assert self.architecture is not None
        if self.layers_to_transform is not None:
            raise UserError(f"method {self.name}: layers_to_transform goes with names of targets, not with a regex")
        if self.finds_nothing():
            name = self.architecture.linear_names()[0]
            path = name if self.architecture.recorded else f"{block_path(self.architecture.stacks, 0)}.{name}"
            raise UserError(
                f"method {self.name}: target {self.targets[0]} matches no linear layer of {self.architecture.name}, "
                f"whose paths are like {path}"
            )

    def finds_nothing(self) -> bool:
        """Whether the regex matches nothing that could have an adapter."""
        return not any(self._matched(layer) for layer in range(self.layers)) and not self.targets_layer("lm_head", None)

    def _check_four_dims(self) -> None:
        assert self.architecture is not None
        refused = () if self.takes_four_dims else self.architecture.traits.four_dims
        for name in self.architecture.linear_names():
            if named(name, refused) and any(self.targets_layer(name, layer) for layer in range(self.layers)):
                raise UserError(
                    f"method {self.name}: the input of {name} has four dimensions in {self.architecture.name}, which "
                    f"PEFT's {self.name} does not take; leave it out of the targets"
                )

    def _matched(self, layer: int) -> tuple[str, ...]:
        """The linear layers of a block that the targets match; a recorded model names all of its own by whole paths."""
        assert self.architecture is not None
        block = None if self.architecture.recorded else layer
        return tuple(name for name in self.architecture.linear_names() if self.targets_layer(name, block))

    def _check_saved(self) -> None:
        assert self.architecture is not None
        for module in self.modules_to_save:
            if module not in SAVED:
                raise UserError(f"method {self.name}: modules_to_save {module!r}: {nearest(module, SAVED)}")
            if module in self.targets:
                raise UserError(f"method {self.name}: {module} cannot be a target and in modules_to_save")
            name, head = self.architecture.name, self.architecture.traits.head
            if head == "seq2seq":
                raise UserError(f"method {self.name}: modules_to_save of an encoder-decoder ({name}) is not modelled")
            if self.architecture.tied and head == "masked":
                raise UserError(
                    f"method {self.name}: modules_to_save is not modelled where a masked model's head shares the "
                    f"embedding's weight ({name})"
                )

    def copies(self, name: str, kind: str) -> bool:
        return saved_whole(name, self.modules_to_save, self.architecture)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The targets, PEFT's default for the architecture filled in."""
        if self.targets:
            return self.targets
        assert self.architecture is not None
        found = self.architecture.traits.targets.of(self.family)
        if found is None:
            first = next(iter(self.architecture.linear_names()), "a layer").rsplit(".", 1)[-1]
            raise UserError(
                f"method {self.name}: PEFT has no default targets for {self.architecture.name}; "
                f"give targets={first} or all-linear"
            )
        return found

    def where(self) -> str:
        adapters = f" with {self.adapter_dtype} adapters" if self.adapter_dtype else ""
        known = self.targets or self.architecture
        saved = f" and copies of {','.join(self.modules_to_save)}" if self.modules_to_save else ""
        return adapters + (on_targets(self._told(), self.architecture) if known else "") + saved

    def _told(self) -> tuple[str, ...]:
        """The targets as words: what a regex matches in any block, once the architecture is known."""
        if self.pattern is None or self.architecture is None:
            return self.target_names
        found = (name.rsplit(".", 1)[-1] for layer in range(self.layers) for name in self._matched(layer))
        return tuple(dict.fromkeys(found))

    def targets_layer(self, name: str, layer: int | None) -> bool:
        """Whether a linear layer gets an adapter."""
        if self.pattern is not None:
            assert self.architecture is not None
            return matches_path(self.pattern, self.architecture, name, layer)
        if layer is None:
            wanted = self.layers_to_transform is None and named(name, self.target_names)
            return wanted and not self._spared(name)
        if self.layers_to_transform is not None and layer not in self.layers_to_transform:
            return False
        return named(name, self.target_names)

    def _spared(self, name: str) -> bool:
        """Whether a target that trains as a whole is left without adapter.

        Raises:
            UserError: PEFT adapts it and then cannot copy it. It spares modules by their whole names, but copies them
                by how their paths end, and knows the classifier of tokens too late.
        """
        if not saved_whole(f"{name}.weight", self.modules_to_save, self.architecture):
            return False
        assert self.architecture is not None
        classifier = self.architecture.classifier
        known = CLASSIFIERS if classifier is not None and classifier.of == "sequence" else ()
        if not any(module in name.split(".") for module in (*self.modules_to_save, *known)):
            raise UserError(
                f"method {self.name}: PEFT cannot adapt {name}, which it also trains whole; "
                "name the targets instead of all-linear"
            )
        return True

    def layer_key(self, layer: int) -> Hashable:
        if self.pattern is not None:
            return self._matched(layer)
        return self.layers_to_transform is None or layer in self.layers_to_transform

    def dtype_beside(self, dtype: str) -> str:
        """The adapter's dtype beside a base of `dtype` (PEFT's `autocast_adapter_dtype`)."""
        return self.adapter_dtype or "fp32"

    def dtype_of_base(self, dtype: str) -> str:
        """`dtype_beside` of adapters that are computed together with the base, in its dtype."""
        if self.adapter_dtype not in (None, dtype):
            raise UserError(f"method {self.name}: adapter_dtype must be the base's, {dtype}; got {self.adapter_dtype}")
        return dtype

    def plain(self: T, dtype: str) -> T:
        default = replace(self, adapter_dtype=None)
        return default if self.adapter_dtype == default.dtype_beside(dtype) else self

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        if not self.targets_layer(layer.name, layer.scope.layer):
            return layer(x)
        tape().part.host.adapters += 1
        return self.adapted(layer, x, self.dtype_beside(layer.scope.dtype))

    def base(self, layer: Linear, x: Tensor) -> Tensor:
        """What a linear layer of a block computes without adapters."""
        return layer(x)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        """The forward pass of a targeted layer whose adapter has `dtype`."""
        raise TypeError(f"{type(self).__name__} must define adapted")

    def check_rank(self, layer: Linear, r: Any) -> None:
        """Raise `UserError` where a rank exceeds what the layer's weight can have."""
        width = min(layer.n_in, layer.n_out)
        if np.any(np.greater(r, width)):
            raise UserError(f"method {self.name}: rank {np.max(r)} exceeds the width {width} of {layer.name}")

    def check_divides(self, layer: Linear, option: str, *sides: str) -> None:
        """Raise `UserError` where a size does not divide a width of the layer: its "input", its "output" or both."""
        size = getattr(self, option)
        for side in sides:
            width = layer.n_in if side == "input" else layer.n_out
            if width % size:
                below = next(d for d in range(size, 0, -1) if width % d == 0)
                raise UserError(
                    f"method {self.name}: {option} {size} does not divide the {side} width {width} of {layer.name}; "
                    f"{below} does"
                )


def is_pattern(target: str) -> bool:
    """Whether a target is a regex: it stands between slashes."""
    return len(target) > 2 and target.startswith("/") and target.endswith("/")


@lru_cache(maxsize=256)
def pattern_of(method: str, target: str) -> re.Pattern[str]:
    """The regex between slashes.

    Raises:
        UserError: it is none, or could take for ever.
    """
    try:
        pattern = re.compile(target[1:-1])
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"method {method}: target {target} is no regex ({error})") from None
    if _repeats(_parser.parse(target[1:-1]), within=False):
        raise UserError(
            f"method {method}: target {target} repeats what has repeats or choices in it: it could take hours"
        )
    return pattern


def _repeats(parsed: Any, *, within: bool) -> bool:
    """Whether a parsed regex has a repeat or a choice inside a long repeat: a path that almost matches is then tried in
    a number of ways that is exponential in its length.
    """
    for code, value in parsed:
        name = str(code)
        long = name in ("MAX_REPEAT", "MIN_REPEAT") and int(value[1]) > LONG
        if within and (long or name == "BRANCH"):
            return True
        inner = value[1] if name == "BRANCH" else value if isinstance(value, (tuple, list)) else ()
        subpatterns = [x for x in inner if isinstance(x, _parser.SubPattern)]
        if any(_repeats(sub, within=within or long) for sub in subpatterns):
            return True
    return False


def matches_path(pattern: re.Pattern[str], architecture: Architecture, name: str, layer: int | None) -> bool:
    """Whether the whole path of a module or parameter matches a regex, in the model or in the larger one that it is of.

    Args:
        name: relative to its block, if it is in one.
    """
    path = name if layer is None else f"{block_path(architecture.stacks, layer)}.{name}"
    inside = architecture.text_path and path.startswith("model.")
    paths = (path, architecture.text_path + path.removeprefix("model")) if inside else (path,)
    return any(map(pattern.fullmatch, paths))


def saved_whole(name: str, modules: Sequence[str], architecture: Architecture | None) -> bool:
    """Whether a parameter is inside one of `modules_to_save`, to which PEFT adds every classifier.

    It compares the ends of paths, so that DistilBERT's `pre_classifier` is one too.
    Source: peft/peft_model.py (`PeftModelForSequenceClassification`), utils/other.py (`_set_trainable`).
    """
    if architecture is not None and architecture.classifier is not None:
        modules = (*modules, *CLASSIFIERS)
    path = name.split(".")[:-1]
    return any(".".join(path[: i + 1]).endswith(tuple(modules)) for i in range(len(path)))


def check_targets(method: str, targets: Sequence[str], architecture: Architecture) -> None:
    """Raise `UserError` where a target matches no linear layer of the architecture; of a recorded one where none does.

    On a recorded model it is peft that finds the layers, and it leaves out names that match none.
    """
    odd = unmatched(targets, architecture)
    if odd and (len(odd) == len(targets) or not architecture.recorded):
        leaves = {name.rsplit(".", 1)[-1] for name in _named_by_targets(architecture)}
        raise UserError(
            f"method {method}: target {odd[0]!r} matches no linear layer of {architecture.name}: "
            f"{nearest(odd[0], leaves)}"
        )


def unmatched(targets: Sequence[str], architecture: Architecture) -> tuple[str, ...]:
    """Names among targets that match no linear layer of an architecture."""
    known, old = _named_by_targets(architecture), [old for old, _ in architecture.traits.stacked]
    return tuple(
        t
        for t in targets
        if t != ALL_LINEAR and not any(matches(name, t) for name in known) and not any(becomes(name, t) for name in old)
    )


def _named_by_targets(architecture: Architecture) -> list[str]:
    return [*architecture.linear_names(), "lm_head", *(old for old, _ in architecture.traits.stacked)]


def on_targets(targets: tuple[str, ...], architecture: Architecture | None) -> str:
    """Targets in words: " on q,v", " on all linear layers"; nothing of none."""
    if not targets:
        return ""
    leaves = {name.rsplit(".", 1)[-1] for name in architecture.linear_names()} if architecture else set()
    if ALL_LINEAR in targets or (leaves and leaves <= set(targets)):
        return " on all linear layers"
    return " on " + ",".join(target.rsplit(".", 1)[-1].removesuffix("_proj") for target in targets)


def base_weight(layer: Linear) -> Parameter:
    """The weight of the base layer, as it lies in memory."""
    shape = (layer.n_in, layer.n_out) if layer.conv1d else (layer.n_out, layer.n_in)
    return layer.scope.parameter(f"{layer.name}.weight", shape, "weight")


def base_bias(layer: Linear) -> Parameter | None:
    """The bias of the base layer, if it has one."""
    return layer.scope.parameter(f"{layer.name}.bias", (layer.n_out,), "bias") if layer.has_bias else None


def matches(name: str, target: str) -> bool:
    """Whether a target names a layer, as PEFT compares them."""
    return name == target or name.endswith("." + target)


def becomes(old: str, target: str) -> bool:
    """Whether PEFT takes a target for a layer of transformers 4 that is in a weight of experts now: by how it ends."""
    return target in (old, ALL_LINEAR) or target.endswith("." + old)


def named(name: str, targets: tuple[str, ...]) -> bool:
    """Whether any target names a layer; all-linear names every layer of a block."""
    return any(matches(name, target) or (target == ALL_LINEAR and name != "lm_head") for target in targets)
