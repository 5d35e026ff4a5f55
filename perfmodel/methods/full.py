"""Full fine-tuning."""

from dataclasses import dataclass, replace

from .parts.base import Method, method, option
from .parts.checks import float_dtype


@method(
    "full",
    title="full fine-tuning",
    source="no paper; the model's own weights",
    trains="every weight",
    adds="nothing",
)
@dataclass(frozen=True, eq=False, repr=False)  # `Compared` has both; most cold starts make this one
class Full(Method):
    """Every weight of the model trains."""

    trained_dtype: str | None = option(None, "dtype of the weights; default the base's", float_dtype)

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return True

    def dtype_of_trained(self, dtype: str) -> str:
        return self.trained_dtype or dtype

    def in_one_dtype(self, dtype: str) -> "Full":
        return replace(self, trained_dtype=None)  # its masters are the engine's
