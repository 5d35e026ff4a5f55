"""OLMo 3: OLMo 2 of whose layers three in four slide.

Source: transformers/models/olmo3/modeling_olmo3.py.
"""

from dataclasses import dataclass
from typing import Any

from .config import Config
from .olmo2 import Olmo2
from .registered import architecture
from .windows import TwoTables, alternating


@architecture("olmo3")
@dataclass(frozen=True)
class Olmo3(TwoTables, Olmo2):
    """Dims of an OLMo 3."""

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        return alternating(config, 4, 4096)
