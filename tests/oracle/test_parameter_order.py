"""Where gradients lie in DeepSpeed's flat buffer follows from the order in which a model's modules are made."""

from unittest.mock import patch

import pytest

pytest.importorskip("peft")

from both_sides import model_of, tape_of

from perfmodel.architectures import Config, from_config
from perfmodel.recording.deepspeed import stages
from perfmodel.setup import Setup
from validate.oracle.cases import SMALL, Case, fitting

# Made in another order than they are used in, beyond what `Architecture.registers_late` says: a few parameters at the
# edges of ranks' parts then count for a neighbour.
OTHERWISE = ("gpt_neo", "opt", "bert", "phi3", "glm4", "gpt_neox", "phi", "falcon", "roberta")


@pytest.mark.parametrize("name", [name for name in SMALL if name not in OTHERWISE])
def test_parameters_lie_as_their_modules_were_made(name: str) -> None:
    """`named_parameters` of the real model."""
    config = Config(SMALL[name], name, name)
    case = Case(config, "full", fitting(Setup(batch=1, seq=8, gpus=2, parallel="zero1"), from_config(config).traits))
    found: list[str] = []
    known = stages.flat_places

    def noted(*args):  # type: ignore[no-untyped-def]
        places, total = known(*args)
        for place in places:
            block = stages.layer_and_module(place.parameter)[0]
            at = f".{int(block) + place.layer}." if block else ""
            found.append(place.parameter.name.replace(f".{block}.", at, 1) if block else place.parameter.name)
        return places, total

    with patch.object(stages, "flat_places", noted):
        tape_of(case)
    assert found == [name for name, p in model_of(case).named_parameters() if p.requires_grad]
