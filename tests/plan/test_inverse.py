"""What fits: each answer fits, and the next one up does not."""

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel import predict
from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.devices.profile import DeviceProfile
from perfmodel.questions.plan import words
from perfmodel.questions.plan.inverse import Largest, answers, biggest_model
from perfmodel.setup import Setup

MODEL, METHOD = "smollm2-135m", "lora:r=4"


def small(memory: float, slug: str = "small") -> DeviceProfile:
    on = profile.load("l40s")
    return replace(on, slug=slug, hardware=replace(on.hardware, memory_bytes=memory, usable_bytes=memory))


@pytest.mark.parametrize(
    ("question", "name", "more"),
    [("largest_batch", "batch", {}), ("longest_context", "seq", {}),
     ("longest_context", "seq", {"objective": "grpo", "prompt": 100})],
)  # fmt: skip
@pytest.mark.parametrize("memory", [1.8e9, 6e9])
def test_the_largest_fits_and_one_more_does_not(question: str, name: str, more: dict[str, Any], memory: float) -> None:
    """The edge itself is the answer, not a power of two below it; a prompt is as long as it was given."""
    setup, on = Setup(batch=2, seq=300, checkpoint="block", **more), small(memory)
    (found,) = answers([question], MODEL, [METHOD], setup, on)
    assert isinstance(found.value, int)
    fits = [predict(MODEL, METHOD, replace(setup, **{name: found.value + further}), on).fits for further in (0, 1)]  # type: ignore[arg-type]
    assert fits == [True, False]
    assert "".join(words.what_fits([found])).count(f"{found.value:,}") == 1


@pytest.mark.parametrize(
    ("multiple", "shared"), [(2, {"tp": 2, "sequence_parallel": True}), (4, {"cp": 2, "parallel": "fsdp2"})]
)
def test_the_longest_context_is_one_that_ranks_can_share(multiple: int, shared: dict[str, Any]) -> None:
    """Others are refused, which is no question of memory; the next one that they can share does not fit."""
    setup, on = Setup(gpus=2, checkpoint="block", **shared), small(6e9)
    (found,) = answers(["longest_context"], "tinyllama-1.1b", [METHOD], setup, on)
    assert isinstance(found.value, int)
    assert (found.value % multiple, found.limited_by) == (0, "memory")
    sizes = (found.value, found.value + multiple)
    assert [predict("tinyllama-1.1b", METHOD, replace(setup, seq=n), on).fits for n in sizes] == [True, False]


def test_a_context_that_the_model_does_not_take_is_no_question_of_memory() -> None:
    """GPT-2 has 1,024 positions, whatever the card."""
    (found,) = answers(["longest_context"], "gpt2", ["lora"], Setup(), "h100-sxm")
    assert found.value == 1024
    assert "1024" in found.limited_by
    assert found.limited_by in "".join(words.what_fits([found]))


@pytest.mark.parametrize("question", ["largest_batch", "smallest_gpu"])
def test_an_answer_names_its_gpus(question: str) -> None:
    """Four GPUs share what one of them would have to hold: their answer read as that of one."""
    asked = ["plan", "--model", MODEL, "--methods", METHOD, "--device", "l40s", f"--{question.replace('_', '-')}"]
    several = [*asked, "--gpus", "4", "--parallel", "fsdp2"]
    run = CliRunner()
    told = " ".join(run.invoke(main, several).stdout.split())
    assert "4 x l40s" in told
    assert "note: " in told
    assert json.loads(run.invoke(main, [*several, "--json"]).stdout)["answers"][0]["gpus"] == 4
    alone = run.invoke(main, asked).stdout
    assert " x l40s" not in alone
    assert "note: " not in alone


def test_nothing_fits_is_an_answer() -> None:
    (found,) = answers(["largest_batch"], MODEL, ["full"], Setup(), small(1e8))
    assert (found.value, found.prediction) == (None, None)
    assert list(words.what_fits([found])) == ["largest micro-batch of full on small: none fits"]


def test_the_smallest_gpu_as_it_is_and_with_what_is_given_up() -> None:
    """Two answers, and all devices of the same memory; none that is larger than needed."""
    devices = [small(20e9, "large"), small(8e9, "middle"), small(8e9, "twin"), small(2e9, "tiny"), small(3e8, "none")]
    setup = Setup(batch=8, seq=512)
    assert predict(MODEL, METHOD, setup, devices[1]).fits
    assert not predict(MODEL, METHOD, setup, devices[3]).fits
    found = answers(["smallest_gpu"], MODEL, [METHOD], setup, devices)
    assert {(a.value, bool(a.given_up)) for a in found} == {("middle", False), ("twin", False), ("tiny", True)}
    assert all(a.prediction is not None and a.prediction.fits for a in found)


@pytest.mark.parametrize(
    "shared", [{}, {"gpus": 8, "parallel": "fsdp2", "node": "l40s-8"}, {"parallel": "zero3", "offload": "params"}]
)
def test_the_biggest_model_fits_and_no_bigger_one_does(monkeypatch: Any, shared: dict[str, Any]) -> None:
    """By its parameters, among models that the method and setup go with; GPUs share weights, hosts hold them."""
    some = [
        "smollm2-135m",
        "gpt2",
        "tinyllama-1.1b",
        "llama-3.2-1b",
        "llama-3.2-3b",
        "llama-3.1-70b",
        "bert-base",
    ]
    monkeypatch.setattr("perfmodel.architectures.model_names", lambda: some)
    method, setup = "lora:targets=all-linear", Setup(seq=64, **shared)
    for memory in (1e8, 2e9, 5e9, 9e9, 30e9, 300e9):
        on, fitting = small(memory), {}
        for model in some[:-1]:  # its default targets are none of BERT's
            p = predict(model, method, setup, on)
            if p.fits:
                fitting[p.total_params] = model
        found = biggest_model(method, setup, on, "default")
        assert found.value == (fitting[max(fitting)] if fitting else None)


def test_the_command_line_asks_each(tmp_path: Any) -> None:
    """One option a question, no job needed."""
    run = CliRunner()
    asked = ["plan", "--model", MODEL, "--methods", METHOD, "--largest-batch", "--longest-context", "--smallest-gpu"]
    told = json.loads(run.invoke(main, [*asked, "--device", "t4", "--json"]).stdout)["answers"]
    assert [answer["what"] for answer in told] == ["batch", "seq", "device"]
    assert "largest micro-batch of LoRA r=4 on q,v on t4" in run.invoke(main, [*asked, "--device", "t4"]).stdout
    missing = run.invoke(main, asked)
    assert (missing.exit_code, "asks about a device" in missing.output) == (2, True)
    without = run.invoke(main, ["plan", "--largest-batch", "--device", "t4"])
    assert (without.exit_code, "Missing option '--model'" in without.output) == (2, True)


@pytest.mark.parametrize("typed", [("--samples", "100"), ("--price", "2"), ("--deadline", "3"), ("--spot",)])
def test_what_belongs_to_a_job_is_refused_beside_a_question_about_one_step(typed: tuple[str, ...]) -> None:
    """A price beside `--smallest-gpu` was passed over in silence."""
    done = CliRunner().invoke(main, ["plan", "--model", MODEL, "--smallest-gpu", *typed])
    assert (done.exit_code, f"leave out {typed[0]}" in done.output) == (2, True)


def test_gpus_of_one_size_share_a_line() -> None:
    """Each was a line of its own."""
    devices = [small(8e9, "one"), small(8e9, "twin"), small(2e9, "tiny")]
    found = answers(["smallest_gpu"], MODEL, [METHOD], Setup(batch=8, seq=512), devices)
    fits, gives_up = words.what_fits(found)
    assert "one (" in fits
    assert "twin (" in fits
    assert "tiny (" in gives_up
    assert gives_up.startswith("smallest GPU of LoRA r=4 on q,v, with ")


def test_an_answer_is_plain_values() -> None:
    (found,) = answers(["largest_batch"], MODEL, [METHOD], Setup(seq=64), small(2e9))
    assert isinstance(found, Largest)
    assert found.as_dict()["value"] == found.value
    assert found.as_dict()["peak_bytes"] <= 2e9
