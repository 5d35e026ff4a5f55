"""The reference of ZeRO's messages is DeepSpeed itself, as one rank of so many; without it these are skipped."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("deepspeed")

from validate.oracle import parallel_cases, zero
from validate.oracle.cases import Case

GRID = [c for c in parallel_cases.zero_grid("quick") if c.setup.offload == "none" or c.config.name.startswith("llama")]


@pytest.mark.parametrize(
    "case", GRID[::5], ids=lambda c: f"{c.config.name} {c.method} {c.setup.parallel} {c.setup.offload}"
)
def test_the_tape_has_the_messages_of_deepspeed(case: Case) -> None:
    """Buckets, their order among the products, and what is gathered decide what of a step the network hides."""
    result = zero.compare_collectives(case)
    assert result.collectives > 0
    assert result.differences == []
