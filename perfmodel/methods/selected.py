"""Some of the weights train, chosen by their names: Axolotl's `unfrozen_parameters`, Spectrum's choice of layers."""

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from ..errors import UserError
from .parts.base import Method, method, option
from .parts.targeted import is_pattern, matches_path, pattern_of


@method(
    "selected",
    title="selected weights",
    source="https://arxiv.org/abs/2406.06623; axolotl/utils/freeze.py (`freeze_layers_except`)",
    trains="weights by name",
    adds="nothing",
)
@dataclass(frozen=True)
class Selected(Method):
    """The weights train whose whole paths match a regex; the others are frozen."""

    parameters: tuple[str, ...] = option(("/.*att.*/",), "a /regex/ of whole paths: /model.layers.[0-3].*/")

    def sizes(self) -> tuple[str, ...]:
        return ("parameters",)

    def check(self) -> None:
        if len(self.parameters) != 1 or not is_pattern(self.parameters[0]):
            raise UserError(f"method {self.name}: parameters must be one regex between slashes, such as /.*mlp.*/")
        _ = self.pattern

    @property
    def pattern(self) -> re.Pattern[str]:
        """The regex.

        Raises:
            UserError: it is none.
        """
        return pattern_of(self.name, self.parameters[0])

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        assert self.architecture is not None
        return matches_path(self.pattern, self.architecture, name, layer)

    def layer_key(self, layer: int) -> Hashable:
        return tuple(self.trains(name, "", layer) for name in self._names())

    def _names(self) -> Iterator[str]:
        """What a block's parameters may be called."""
        assert self.architecture is not None
        modules = [*self.architecture.linear_names(), *self.architecture.stacked_names()]
        parents = dict.fromkeys(("", *(name.rpartition(".")[0] + "." for name in modules if "." in name)))
        modules += [parent + norm for parent in parents for norm in self.architecture.traits.norms]
        for name in modules:
            yield from (name, f"{name}.weight", f"{name}.bias", f"{name}_bias", f"{name.removesuffix('.weight')}.bias")
        yield from (f"{parent}{name}" for parent in parents for name in ("sinks", ""))
