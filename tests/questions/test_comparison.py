"""What is compared where not all of it is modelled: what can be answered is, and the rest has its reason."""

import json

import pytest
from click.testing import CliRunner, Result

from perfmodel import compare
from perfmodel.cli import main
from perfmodel.errors import UserError

SETUP = {"device": "l40s", "batch": 2, "seq": 64, "gpus": 2, "parallel": "fsdp1"}  # keeps weights in flat pieces


def call(*methods: str) -> Result:
    options = [word for name, value in SETUP.items() for word in (f"--{name}", str(value))]
    return CliRunner().invoke(main, ["compare", "--model", "gpt2", *options, "--methods", *methods])


def test_a_method_that_is_not_modelled_in_a_setup_leaves_the_others_their_answers() -> None:
    """GaLore updates whole weights: what is asked for beside it is answered."""
    value = json.loads(call("full", "galore", "lora", "--json").stdout)
    assert [p["method"] for p in value["predictions"]] == ["full", "lora:r=8"]
    assert set(value["refused"]) == {"galore:r=128"}
    said = f"galore:r=128 is not answered: {value['refused']['galore:r=128']}"
    assert said in " ".join(call("full", "lora", "galore").stdout.split())


def test_where_nothing_is_left_to_compare_all_reasons_are_given() -> None:
    """One answer is no comparison; each reason stands once."""
    alone = call("full", "galore", "galore:r=4")
    assert (alone.exit_code, alone.stdout, alone.stderr.count("galore")) == (2, "", 1)
    both = call("full", "galore", "lora:implementation=unsloth")
    assert "galore" in both.stderr
    assert "; " in both.stderr
    assert "unsloth is not written for gpt2" in both.stderr


@pytest.mark.parametrize("methods", [("galore", "full"), ("lora:r=0", "full", "lora"), ("full", "lora:r=0", "lora")])
def test_the_baseline_and_what_is_no_method_of_any_setup_end_the_question(methods: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"galore|lora: r"):
        compare("gpt2", methods, **SETUP)
    assert call(*methods).exit_code == 2
