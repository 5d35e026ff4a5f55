"""A config.json that leaves a key out, or that transformers has written anew, is the model that transformers makes."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import AutoConfig

from perfmodel import UserError
from perfmodel.architectures import Config, from_config
from validate.oracle.cases import MIXTURES, SMALL, STACKS

KNOWN = {name: values for name, values in {**SMALL, **MIXTURES}.items() if values["model_type"] != "qwen"}  # own code
KNOWN |= {f"{name} in windows": {**KNOWN[name], "use_sliding_window": True} for name in ("qwen2", "qwen3", "qwen3_moe")}
KNOWN["t5"] = STACKS["t5"]
NO_MODEL = {("gpt_neo", "attention_types")}  # transformers' default lists 24 blocks


def read(values: dict[str, Any], name: str) -> Any:
    return from_config(Config(values, name, name))


@pytest.mark.parametrize("name", KNOWN)
def test_a_config_is_read_as_transformers_reads_it(name: str) -> None:
    """With all keys, and without each of those that may be missing."""
    values, compared = KNOWN[name], 0
    for without in (None, *(key for key in values if key != "model_type")):
        given = {key: value for key, value in values.items() if key != without}
        try:
            ours = read(given, name)
        except UserError:  # a width, for which there is no default
            continue
        if (name, without) not in NO_MODEL:
            assert ours == read(AutoConfig.for_model(**given).to_dict(), name), without
            compared += 1
    assert compared
