"""An adapter_config.json as a method: any tuner of peft, for models whose real program is traced."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...optimizers import Update
from ...program.software import SoftwareStack
from ...resources import read_json
from ..adalora import AdaLora
from .base import Method

AUTOCAST = "autocast_adapter_dtype"  # of `get_peft_model`, kept beside the values: fp32 adapters beside a 16-bit base
# Tuners of which the training loop calls more than the optimizer's step, as methods of their values.
AFTER_THE_STEP: dict[str, Callable[[dict[str, Any]], Method]] = {
    "ADALORA": lambda values: AdaLora(delta_t=values.get("deltaT") or 1),
}


@dataclass(frozen=True)
class PeftAdapter(Method):
    """What peft makes of the values of an adapter_config.json.

    Attributes:
        label: what it is called.
        text: the values as JSON, keys sorted.
    """

    label: str = "peft"
    text: str = "{}"

    name, title, source = "peft", "peft", "https://github.com/huggingface/peft"
    what_trains, what_it_adds = "what its config says", "what peft makes of it"

    @classmethod
    def of(cls, values: Mapping[str, Any], label: str | None = None) -> "PeftAdapter":
        """The method of an adapter_config.json's values.

        Args:
            label: default: its `peft_type`, in small letters.
        """
        text = json.dumps(values, sort_keys=True, default=str)
        return cls(label=label or str(values.get("peft_type", "")).lower(), text=text)

    @classmethod
    def read(cls, path: Path, label: str | None = None) -> "PeftAdapter":
        """The method of an adapter_config.json.

        Raises:
            UserError: it cannot be read or holds no `peft_type`.
        """
        values = read_json(path)
        if not isinstance(values.get("peft_type"), str):
            raise UserError(f"{path}: an adapter_config.json holds an object with a peft_type")
        return cls.of(values, label)

    @property
    def values(self) -> dict[str, Any]:
        """The values of the adapter_config.json."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    def check(self) -> None:
        assert self.architecture is not None
        if not self.architecture.recorded:
            raise UserError(f"{self.label} is a config of peft, which is traced: add --traced")

    def under(self, stack: SoftwareStack, dtype: str) -> "PeftAdapter":
        return self if stack.upcasts_adapters else replace(self, text=self.of({**self.values, AUTOCAST: False}).text)

    def spec(self) -> str:
        return self.label

    def in_words(self) -> str:
        return self.label

    def sizes(self) -> tuple[str, ...]:
        return ()

    def update(self, update: Update) -> None:
        own = AFTER_THE_STEP.get(str(self.values.get("peft_type")).upper())
        if own:
            own(self.values).update(update)
        else:
            super().update(update)
