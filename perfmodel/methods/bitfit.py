"""BitFit: only biases train."""

from dataclasses import dataclass

from ..errors import UserError
from .parts.base import Method, method


@method(
    "bitfit",
    title="BitFit",
    source="https://arxiv.org/abs/2106.10199",
    trains="biases",
    adds="nothing",
)
@dataclass(frozen=True)
class BitFit(Method):
    """Only bias terms train (of linear layers and of LayerNorms)."""

    def check(self) -> None:
        arch = self.architecture
        assert arch is not None
        has_bias = (
            getattr(arch, "qkv_bias", True) or getattr(arch, "output_bias", True) or getattr(arch, "mlp_bias", True)
        )
        if not has_bias:
            raise UserError(f"method bitfit: {arch.name} has no bias terms, nothing would train; try norm or lora")

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return name.endswith("bias")
