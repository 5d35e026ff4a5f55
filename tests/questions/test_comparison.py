"""What is compared where not all of it is modelled: what can be answered is, and the rest has its reason."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from perfmodel import compare, explain, sweep
from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.prediction.memory import room
from perfmodel.questions.anatomy import PERIODIC
from perfmodel.questions.sentences import answer
from perfmodel.report.figures import any_best, figures

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


def test_what_comes_every_so_many_steps_is_part_of_every_verdict() -> None:
    """GaLore's steps are shorter than full fine-tuning's, and its SVDs take longer than what they save."""
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 4, "seq": 512}
    found = compare("tinyllama-1.1b", ("full", "galore"), **asked)
    full, galore = found.predictions
    (cost,) = (cost for cost in galore.periodic if cost.every)
    assert galore.time.phases["total"] < full.time.phases["total"] < galore.mean_step
    assert galore.mean_step == galore.time.phases["total"] + cost.seconds / cost.every
    assert found.speedups[0].ratio == full.mean_step / galore.mean_step
    assert found.speedups[0].verdict == "slower"

    explained = explain("tinyllama-1.1b", "full", "galore", **asked, axes=("batch",))
    assert sum(bar.difference for bar in explained.waterfall) == pytest.approx(galore.mean_step - full.mean_step)
    assert explained.waterfall[0].part == PERIODIC
    (batch,) = explained.crossovers
    assert batch.ratio[batch.values.index(asked["batch"])] == pytest.approx(found.speedups[0].ratio)

    swept = sweep("tinyllama-1.1b", ("full", "galore"), device=["h100-sxm", "a100"], batch=[2, 4], seq=512).table()
    (row,) = np.flatnonzero(
        (swept["method"] == galore.method) & (swept["batch"] == 4) & (swept["device"] == "h100-sxm")
    )
    assert swept["speedup"][row] == pytest.approx(found.speedups[0].ratio)
    assert swept["tokens_per_s"][row] == pytest.approx(galore.tokens_per_second)


def test_the_limit_of_a_sentence_is_the_one_that_was_applied() -> None:
    """25.0 GB did not fit into 25.3 GB, it said: what CUDA keeps of them was not told."""
    c = compare("mistral-7b", ("qlora", "qlora:r=16"), device="rtx-4090", batch=1, seq=3530)
    (told,) = c.speedups
    *peaks, limit = [float(x) for x in re.findall(r"([\d.]+) GB", told.answer.split("Neither fits")[1])][:3]
    on = profile.load("rtx-4090")
    assert room(on.capacity, on.kind) == pytest.approx(1e9 * limit, rel=0.005)
    assert min(peaks) > limit
    near = [replace(p, memory=replace(p.memory, peak=24_803_000_000)) for p in c.predictions]
    said = answer(near[0], near[1], told, "", 25.3e9, 24.8e9)
    assert "24.803 GB and 24.803 GB of 24.800 GB (25.3 GB less CUDA's" in said


def test_nothing_is_best_where_nothing_fits() -> None:
    """Nor is a mark explained that stands nowhere."""
    c = compare("mistral-7b", ("full", "lora"), device="rtx-3060", batch=4, seq=512)
    assert not any_best(figures(c))
    assert "best of those" not in str(c._repr_html_())
    shown = CliRunner().invoke(
        main, ["compare", "--model", "mistral-7b", "--device", "rtx-3060", "--batch", "4", "--seq", "512"]
    )
    assert "*" not in shown.stdout
    assert "best of" not in shown.stdout
