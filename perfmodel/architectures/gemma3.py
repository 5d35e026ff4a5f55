"""Gemma 3 that sees images too (4B, 12B, 27B): its text model, which is what training on text runs.

Source: transformers/models/gemma3/configuration_gemma3.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from .config import Config
from .gemma3_text import Gemma3Text
from .registered import architecture

# of `Gemma3TextConfig`: what the hub's files leave out of their text_config
DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208}


@architecture("gemma3")
@dataclass(frozen=True)
class Gemma3(Gemma3Text):
    """Dims of a Gemma 3's text model."""

    caveat: ClassVar[str] = (
        "only the text model of this Gemma 3 is answered: no image tokens, and neither memory nor adapters of the "
        "vision tower"
    )

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        text = config.table("text_config")
        if not text:
            raise UserError(f"{config.origin}: key 'text_config' is missing; the config.json of a gemma3 has it")
        return super().dims(Config({**DEFAULTS, **text}, config.origin, config.name))
