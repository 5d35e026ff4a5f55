"""Full fine-tuning."""

from dataclasses import dataclass

from .parts.base import Method, method


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

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return True
