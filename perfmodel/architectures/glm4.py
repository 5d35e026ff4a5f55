"""GLM-4 of 2025 (0414, 9B and 32B; Z1): GLM with norms after attention and MLP too.

Source: transformers/models/glm4/modeling_glm4.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from .glm import Glm
from .registered import architecture
from .traits import Traits


@architecture("glm4")
@dataclass(frozen=True)
class Glm4(Glm):
    """Dims of a GLM-4."""

    traits: ClassVar[Traits] = replace(
        Glm.traits, norms=(*Glm.traits.norms, "post_self_attn_layernorm", "post_mlp_layernorm")
    )
    around: ClassVar[tuple[str | None, ...]] = (
        "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm",
    )  # fmt: skip
