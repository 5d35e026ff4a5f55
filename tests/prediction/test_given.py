"""What a setup has where nobody says: what the model's program and the GPU have."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel import Setup, advise, compare, explain, predict, sweep
from perfmodel.architectures import from_config, load
from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.prediction.given import setup_given


def answered(*args: str) -> Any:
    result = CliRunner().invoke(main, [*args, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(("device", "dtype"), [("t4", "fp16"), ("l40s", "bf16"), ("cpu-epyc-genoa-1t", "bf16")])
def test_a_gpu_without_units_for_bf16_is_asked_for_fp16(device: str, dtype: str) -> None:
    """Nobody trains in a dtype that PyTorch emulates: its answer was of a step three times as long."""
    assert predict("gpt2", device=device).setup.dtype == dtype
    assert compare("gpt2", ("full", "lora"), device=device).predictions[1].setup.dtype == dtype
    assert answered("predict", "--model", "gpt2", "--device", device)["setup"]["dtype"] == dtype


def test_what_is_said_stays() -> None:
    """A typed dtype, autocast or a whole setup is what is asked for."""
    assert predict("gpt2", device="t4", dtype="bf16").setup.dtype == "bf16"
    assert predict("gpt2", setup=Setup(), device="t4").setup.dtype == "bf16"
    typed = answered("predict", "--model", "gpt2", "--device", "t4", "--amp", "bf16", "--dtype", "fp32")["setup"]
    assert (typed["dtype"], typed["amp"]) == ("fp32", "bf16")
    with pytest.raises(UserError, match="eager or flash2"):
        predict("gemma-2-2b", attention="sdpa")
    assert (
        CliRunner()
        .invoke(main, ["predict", "--model", "gemma-2-2b", "--device", "l40s", "--attention", "sdpa"])
        .exit_code
    )


@pytest.mark.parametrize(("model", "attention"), [("gemma-2-2b", "eager"), ("gpt2", "sdpa")])
def test_a_program_without_sdpa_falls_back_as_transformers_does(model: str, attention: str) -> None:
    """`attn_implementation` that nobody sets is eager where a model has no SDPA."""
    assert predict(model).setup.attention == attention
    assert explain(model, axes=()).a.setup.attention == attention
    assert advise(model).start.prediction.setup.attention == attention
    assert (
        answered("compare", "--model", model, "--device", "l40s")["predictions"][0]["setup"]["attention"] == attention
    )


def test_devices_of_a_grid_share_a_dtype_that_all_have() -> None:
    """A grid over devices is one setup: fp16 where none of them has bf16, else the usual one, with its note."""
    assert sweep("gpt2", device=["t4", "v100"]).setup.dtype == "fp16"
    assert sweep("gpt2", device=["t4", "l40s"]).setup.dtype == "bf16"


def test_no_setup_is_the_usual_one() -> None:
    model = from_config(load("gpt2"))
    assert setup_given(None, {}, model, [profile.load("l40s")]) == Setup()
    assert setup_given(None, {"batch": 4}) == Setup(batch=4)
