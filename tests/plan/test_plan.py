"""A plan: hours and dollars recomputed by hand, nothing that does not fit, and what a search by hand finds."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fuzzing import NO_SHRINK
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import plan, predict
from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.prediction.energy import board_power
from perfmodel.prediction.predict import predict as predict_with
from perfmodel.prediction.remembered import Steps
from perfmodel.questions.plan import words
from perfmodel.questions.plan.job import Job, job_counts
from perfmodel.questions.plan.planning import Plan
from perfmodel.questions.plan.runs import PlannedRun, checkpoint_bytes
from perfmodel.setup import Setup

MODEL = "smollm2-135m"
HOUR = 3600.0


def only(found: Plan) -> PlannedRun:
    (run,) = found.runs
    return run


@pytest.mark.parametrize("packing", ["none", "dense", "varlen", "flat"])
def test_hours_recomputed_by_hand(packing: str) -> None:
    """Padding or packing, evaluation, accumulation, a last short batch, checkpoints: a sum that anybody can check."""
    lengths = [37, 512, 90, 300, 128, 64, 450] * 31 + [200] * 2
    options: dict[str, Any] = {"batch": 4, "seq": 512, "grad_accum": 3, "packing": packing, "lengths": lengths}
    job = Job(epochs=3, eval_every=5, eval_samples=10, save_every=20, disk=2e8, startup=90)
    found = only(plan(MODEL, "lora:r=4", device="l40s", job=job, price=["3.6"], **options))
    p = predict(MODEL, "lora:r=4", device="l40s", **options)
    rows = {"none": 219, "flat": 219, "dense": job_counts(job, p.setup).rows, "varlen": job_counts(job, p.setup).rows}[
        packing
    ]
    whole, left = divmod(rows, 12)
    t = p.time.phases
    steps = 3 * (whole + (left > 0))
    training = 3 * (whole * t["total"] + (left > 0) * (t["optimizer"] + left / 12 * (t["forward"] + t["backward"])))
    batches = {"none": 3, "flat": 3, "dense": 2, "varlen": 2}[packing]  # of four rows; ten samples are five packed rows
    evaluation = -(-steps // 5) * batches * t["forward"] / 3
    adapters = 2 * 30 * 4 * ((576 + 576) + (576 + 192))  # r 4 on q and v of 30 layers; AdamW keeps twice as much
    saved = -(-steps // 20) * (4 * adapters / 2 + p.memory.optimizer) / 2e8
    assert left
    assert found.work.steps == steps
    assert found.parts["training"] == pytest.approx(training, rel=1e-12)
    assert found.parts["evaluation"] == pytest.approx(evaluation, rel=1e-12)
    assert found.parts["checkpoints"] == pytest.approx(saved, rel=1e-12)
    assert found.seconds == pytest.approx(training + evaluation + saved + 90, rel=1e-12)
    assert found.dollars == pytest.approx(found.seconds / 1000, rel=1e-12)  # $3.6 an hour are $0.001 a second
    low, high = found.interval
    scaled = training + evaluation
    assert low == pytest.approx(found.seconds - scaled * (1 - p.time.low / t["total"]))
    assert high == pytest.approx(found.seconds + scaled * (p.time.high / t["total"] - 1))


def test_a_file_of_a_hundred_thousand_samples_is_a_job(tmp_path: Any) -> None:
    """What a user has is a file with a length a line."""
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(str(1 + i * 7919 % 900) for i in range(100_000)))
    found = only(plan(MODEL, "lora", device="l40s", batch=8, seq=512, lengths=str(path)))
    assert found.work.samples == 100_000
    assert found.work.tokens == sum(min(512, 1 + i * 7919 % 900) for i in range(100_000))
    assert found.work.steps == 12_500


def test_periodic_work_counts() -> None:
    """GaLore's SVDs every 200 steps are hours of a long job; a merge at its beginning comes once."""
    found = only(plan(MODEL, "galore", device="a100", batch=4, seq=256, samples=4_000))
    p = predict(MODEL, "galore", device="a100", batch=4, seq=256)
    every = {cost.what: (cost.every, cost.seconds) for cost in p.periodic}
    assert every
    expected = sum(seconds * (1 if n is None else 1000 // n) for n, seconds in every.values())
    assert found.parts["periodic work"] == pytest.approx(expected) != 0


def small(name: str, memory: float) -> DeviceProfile:
    """A device of the catalogue with another memory."""
    on = profile.load(name)
    return replace(on, hardware=replace(on.hardware, memory_bytes=memory, usable_bytes=memory))


def by_brute_force(
    devices: Sequence[DeviceProfile], method: str, setup: Setup, job: Job, price: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """(dollars, seconds) of every device on which anything fits: all combinations of the first stage that has one."""

    def seconds(on: DeviceProfile, spec: str, s: Setup) -> float | None:
        p = predict(MODEL, spec, s, on)
        return only(plan(MODEL, spec, s, on, job=job)).seconds if p.fits else None

    group = setup.batch * setup.grad_accum
    sizes = [b for b in (1, 2, 4, 8, 16) if group % b == 0 and b <= setup.batch]
    smaller = [
        replace(setup, batch=b, grad_accum=group // b, checkpoint=c) for b, c in product(sizes, ("none", "block"))
    ]
    stages: list[list[tuple[str, Setup]]] = [[(method, setup)], [(method, s) for s in smaller]]
    if method.startswith("lora"):
        stages.append([(method.replace("lora", "qlora"), s) for s in smaller])
    found = {}
    for on in devices:
        for stage in stages:
            times = [t for spec, s in stage if (t := seconds(on, spec, s)) is not None]
            if times:
                found[on.slug] = (min(times) / HOUR * price[on.slug], min(times))
                break
    return found


@settings(max_examples=6, phases=NO_SHRINK)
@given(
    method=st.sampled_from(("full", "lora:r=4")), batch=st.sampled_from((2, 8)),
    memory=st.lists(st.sampled_from((1.05e9, 1.4e9, 2e9, 3e9, 8e9)), min_size=3, max_size=3),
    usd=st.lists(st.sampled_from((0.5, 1.0, 4.0)), min_size=3, max_size=3),
)  # fmt: skip
def test_a_plan_finds_what_brute_force_finds(method: str, batch: int, memory: list[float], usd: list[float]) -> None:
    """The cheapest and the fastest of a small catalogue, with what has to be given up on each device."""
    names = ("l40s", "a100-80gb-sxm", "t4")
    devices = [small(name, nbytes) for name, nbytes in zip(names, memory, strict=True)]
    price = dict(zip(names, usd, strict=True))
    setup, job = Setup(batch=batch, seq=256), Job(samples=101)
    expected = by_brute_force(devices, method, setup, job, price)
    found = plan(MODEL, method, setup, devices, job=job, price=price)
    assert {run.device: run.seconds for run in found.runs} == pytest.approx({d: s for d, (_, s) in expected.items()})
    assert all(run.prediction.fits for run in found.runs)
    assert {d for d, _, _ in found.left_out} == set(names) - expected.keys()
    for run in found.runs:
        assert run.prediction.setup.batch * run.prediction.setup.grad_accum == batch
    if expected:
        cheapest, fastest = (min(figures) for figures in zip(*expected.values(), strict=True))
        assert min(run.dollars or 0 for run in found.cheapest()) == pytest.approx(cheapest)
        assert min(run.seconds for run in found.fastest()) == pytest.approx(fastest)


def test_what_is_given_up_comes_in_stages() -> None:
    """LoRA as asked, then smaller micro-batches and checkpointing, then QLoRA; what does not fit then is said."""
    devices = [replace(small("l40s", nbytes), slug=name) for name, nbytes in
               (("roomy", 40e9), ("tight", 10e9), ("tiny", 4.5e9), ("none", 1e9))]  # fmt: skip
    found = plan("llama-3.2-3b", "lora:r=4", device=devices, samples=64, batch=8, seq=512)
    given_up = {run.device: run.given_up for run in found.runs}
    assert given_up["roomy"] == ()
    assert "micro-batches of" in given_up["tight"][0] or "checkpointing" in given_up["tight"][0]
    assert given_up["tiny"][0] == "QLoRA"
    assert found.left_out.keys() == {("none", 1, "lora:r=4")}
    assert "left out of lora:r=4: none: needs 3." in " ".join(words.plan_notes(found))


@pytest.mark.parametrize("global_batch", [None, 16])
def test_several_numbers_of_gpus_are_planned_as_each_alone(global_batch: int | None) -> None:
    """Whether eight GPUs for an hour are cheaper than one for a day is one question; each has the same global batch."""
    asked: dict[str, Any] = {"device": ["l40s", "h100-sxm"], "samples": 1000, "seq": 128, "global_batch": global_batch}
    together = plan(MODEL, ["full", "lora:r=4"], **asked, gpus=(1, 2, 8))
    alone = [run for gpus in (1, 2, 8) for run in plan(MODEL, ["full", "lora:r=4"], **asked, gpus=gpus).runs]
    assert sorted((run.where, run.method, run.seconds, run.dollars) for run in together.runs) == sorted(
        (run.where, run.method, run.seconds, run.dollars) for run in alone
    )
    assert len(alone) == 12
    sizes = [(run.prediction.setup, run.gpus) for run in together.runs]
    assert {s.batch * s.grad_accum * gpus for s, gpus in sizes} == ({16} if global_batch else {1, 2, 8})


def test_a_number_of_gpus_that_does_not_go_is_left_out_and_said() -> None:
    """Of several numbers one that the batch, the cut or the node does not allow takes no answer from the others."""
    asked: dict[str, Any] = {"device": ["rtx-4090", "h100-sxm"], "samples": 1000, "seq": 128, "tp": 2}
    found = plan("llama-3.2-1b", "lora:r=4", **asked, global_batch=4, gpus=(1, 4, 6, 16))
    assert {(run.device, run.gpus) for run in found.runs} == {("rtx-4090", 4), ("h100-sxm", 4)}
    why = {(device, gpus): words for (device, gpus, _), words in found.left_out.items()}
    assert {gpus for _, gpus in why} == {1, 6, 16}
    assert why["h100-sxm", 1] == "tp 2 does not divide the 1 GPU of the job"
    assert why["rtx-4090", 16] == why["h100-sxm", 16] == "global batch 4 does not divide among 8 GPUs"
    with pytest.raises(UserError, match="tp 2 does not divide the 1 GPU of"):
        plan("llama-3.2-1b", "lora:r=4", **asked, gpus=(1, 3))


def test_ties_unknown_prices_and_a_deadline_are_said() -> None:
    """Who is not told that two are alike, or that a price is missing, decides on nothing."""
    l40s = profile.load("l40s")
    devices = [l40s, replace(l40s, slug="twin"), profile.load("b200"), profile.load("t4"), profile.load("p4")]
    options: dict[str, Any] = {"samples": 20_000, "batch": 4, "seq": 256, "device": devices}
    price = {"l40s": 1.0, "twin": 1.001, "b200": 9.0, "t4": 0.9}
    found = plan(MODEL, ["full", "lora:r=4"], price=price, deadline=0.3, **options)
    assert {run.device for run in found.cheapest("lora:r=4")} == {"l40s", "twin"}
    assert found.unpriced == ["p4"]
    said = words.plan_answer(found)
    assert "twin" in said
    assert "cost the same" in said
    assert "At its cheapest LoRA r=4 on q,v" in said
    notes = " ".join(words.plan_notes(found))
    assert "no price is known of p4: give --price DEVICE=USD" in notes
    assert "$1.00 an hour, as you gave it" in notes
    assert all(run.interval[1] <= 0.3 * HOUR for run in found.in_time())
    assert found.in_time()
    late = plan(MODEL, "lora:r=4", price=price, deadline=1e-3, **options)
    assert not late.in_time()
    assert "none is sure to end" in words.plan_answer(late)
    unpriced = plan(MODEL, "lora:r=4", samples=20_000, batch=4, seq=256, device="p4")
    assert not unpriced.cheapest()
    assert "at a price that is not known" in words.plan_answer(unpriced)


def test_the_answer_says_how_old_its_price_is() -> None:
    found = plan(MODEL, "lora", device=["h100-sxm", "l40s"], samples=100, today=date(2026, 11, 30))
    said = " ".join(words.plan_notes(found))
    assert "2025 (11 months old at least), https://github.com/skypilot-org/skypilot-catalog" in said
    price = found.as_dict()["runs"][0]["price"]
    assert price["months_old"] >= 6
    assert price["source"].startswith("https://")


def test_energy_of_a_job_by_hand() -> None:
    """Steps at the power of a step, the rest idle, the node all the time; CO2 by the grid's factor."""
    options: dict[str, Any] = {"batch": 4, "seq": 256}
    found = plan(MODEL, "lora", device="h100-sxm", samples=4000, startup=600, node_power=200, grid_co2=380, **options)
    run, p = only(found), predict(MODEL, "lora", device="h100-sxm", **options)
    drawn = board_power(p, profile.load("h100-sxm").hardware, 200)
    assert drawn is not None
    assert run.joules is not None
    assert run.joules_interval is not None
    training = 1000 * p.time.phases["total"]
    board = training * drawn.step + (600 + run.parts["checkpoints"]) * drawn.idle
    assert run.joules == {"gpu": pytest.approx(board), "node": pytest.approx(200 * run.seconds)}
    total = sum(run.joules.values())
    assert run.co2(380) == pytest.approx(total / 3.6e6 * 0.38)
    energy = found.as_dict()["runs"][0]["energy_j"]
    assert energy["token"] == pytest.approx(total / (4000 * 256))
    assert energy["step"] == pytest.approx(p.time.phases["total"] * (drawn.step + 200))
    low, high = run.joules_interval
    assert low < total < high
    none = replace(profile.load("l40s"), hardware=replace(profile.load("l40s").hardware, board_power=None))
    assert only(plan(MODEL, "lora", device=none, samples=10)).joules is None


def test_a_checkpoint_holds_adapters_or_all_weights() -> None:
    """PEFT saves its adapters; what trains some of a model's own weights saves the model."""
    full, lora, top = (predict(MODEL, m, device="l40s", seq=16) for m in ("full", "lora", "top_k:k=2"))
    assert checkpoint_bytes(full) == full.memory.weights + full.memory.optimizer
    assert checkpoint_bytes(lora) == 4 * lora.trainable_params + lora.memory.optimizer
    assert checkpoint_bytes(top) == top.memory.weights + top.memory.optimizer


@pytest.mark.parametrize("model", ["llama-3.2-1b", "gemma-2b", "qwen3-30b-a3b"])
def test_devices_that_share_a_recorded_step_answer_as_alone(model: str) -> None:
    """A step is recorded once for devices that run the same calls: that they do is what is checked here."""
    steps = Steps(whole=True)
    for name in ("p4", "v100", "t4", "a100", "rtx-3090", "l40s", "h100-sxm", "b200", "b300", "rtx-5090"):
        asked: dict[str, Any] = {"device": name, "batch": 2, "seq": 128}
        asked |= {"experts": "eager"} if model == "qwen3-30b-a3b" else {}
        alone = predict(model, "lora:targets=q_proj", **asked)
        shared = predict_with(model, "lora:targets=q_proj", steps=steps, **asked)
        assert (shared.time, shared.memory, shared.kernels, shared.flops) == (
            alone.time, alone.memory, alone.kernels, alone.flops
        )  # fmt: skip
    assert 3 <= len(steps.programs) <= 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"global_batch": 32, "batch": 8}, (8, 4)), ({"global_batch": 32}, (32, 1)), ({"batch": 8}, (8, 1))],
)
def test_a_global_batch_is_made_of_micro_batches(arguments: dict[str, int], expected: tuple[int, int]) -> None:
    """What is compared between GPUs is the same optimizer step."""
    setup = only(plan(MODEL, "lora", device="b200", samples=100, seq=64, **arguments)).prediction.setup
    assert (setup.batch, setup.grad_accum) == expected


def typed(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["plan", "--model", MODEL, *arguments])


def test_the_command_line_answers_as_the_function_does(tmp_path: Any) -> None:
    """Also with a training config, whose step is the job's."""
    data = ["--device", "l40s", "a100", "--samples", "1000", "--epochs", "2", "--price", "2", "--grid-co2", "400"]
    shown = json.loads(typed("--methods", "lora", *data, "--global-batch", "16", "--json").stdout)
    found = plan(MODEL, "lora", device=["l40s", "a100"], samples=1000, epochs=2, price=["2"], global_batch=16)
    assert [run["seconds"]["total"] for run in shown["runs"]] == [run.seconds for run in found.runs]
    assert shown["runs"][0]["setup"]["batch"] == 16
    assert shown["runs"][0]["co2_kg"] > 0
    table = typed("--methods", "full", "lora", *data).stdout
    assert "Cheapest" in table
    assert all(word in table for word in ("given", "energy", "CO2"))
    b200 = typed("--methods", "full", "lora", "--device", "b200", "l40s", "--samples", "1000").stdout
    assert "* a GPU's share of a larger machine" in b200
    assert "5.50*" in b200
    assert "what takes the time" in typed("--methods", "lora", "--device", "l40s", "--tokens", "1M").stdout
    config = tmp_path / "config.yml"
    config.write_text(
        "base_model: HuggingFaceTB/SmolLM2-135M\nmicro_batch_size: 2\ngradient_accumulation_steps: 3\n"
        "sequence_len: 256\nadapter: lora\nlora_r: 8\nlora_target_modules: [q_proj]\nsample_packing: false\n"
        "num_epochs: 2\nsave_steps: 10\n"
    )
    said = CliRunner().invoke(main, ["plan", "--config", str(config), "--samples", "90", "--device", "l40s", "--json"])
    asked = json.loads(said.stdout)["runs"]
    assert {run["method"].split(":")[0] for run in asked} == {"full", "lora"}
    assert {(run["setup"]["batch"], run["setup"]["grad_accum"], run["steps"]) for run in asked} == {(2, 3, 30)}
    assert json.loads(said.stdout)["job"]["save_every"] == 10


@pytest.mark.parametrize(
    ("arguments", "words_said"),
    [
        (("--device", "l40s"), "how large is the data set"),
        (("--samples", "5", "--device", "l40"), ""),
        (("--samples", "5", "--device", "l4O"), "unknown device 'l4O'"),
        (("--samples", "5", "--price", "much", "--device", "l40s"), "dollars an hour and GPU"),
        (
            ("--samples", "5", "--batch", "4", "--global-batch", "6", "--device", "l40s"),
            "no multiple of the micro-batches",
        ),
        (("--samples", "5", "--tokens", "5M", "--device", "l40s"), "give one of the two"),
        (("--samples", "5", "--methods", "lorra", "--device", "l40s"), "did you mean 'lora'"),
        (("--samples", "5", "--fp8", "rowwise", "--methods", "full", "--device", "a100"), "has no float8 peak"),
        (("--samples", "5", "--eval-every", "3", "--device", "l40s"), "takes both"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words_said: str) -> None:
    result = typed(*arguments)
    assert result.exit_code == (2 if words_said else 0)
    assert words_said in result.output
    assert "Traceback" not in result.output


def test_arrays_and_jobs_given_twice_are_refused() -> None:
    import numpy as np

    with pytest.raises(UserError, match="for grids use sweep"):
        plan(MODEL, "lora", device="l40s", samples=1, batch=np.array([1, 2]))
    with pytest.raises(UserError, match="not both"):
        plan(MODEL, "lora", device="l40s", job=Job(samples=1), samples=2)
    with pytest.raises(UserError, match="deadline must be a number from 0"):
        plan(MODEL, "lora", device="l40s", samples=2, deadline=float("nan"))
    with pytest.raises(UserError, match="needs a device"):
        plan(MODEL, "lora", device=[], samples=2)


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_does_not_fit_is_said_of_the_form_that_was_asked_for(gpus: int) -> None:
    """A plan gives up no form of several GPUs, under another of which the same job may fit."""
    found = plan("llama-3.1-8b", ["full", "norm"], device="l40s", gpus=gpus, seq=64, samples=8, global_batch=2)
    (why,) = found.left_out.values()
    under = " under ddp" if gpus > 1 else ""
    assert why.endswith(f" at least{under}, having tried smaller micro-batches and checkpointing alone")
    forms = "other --parallel, " if gpus > 1 else ""
    further = f"advise tries more: {forms}optimizers, kernels and methods"
    assert further in words.plan_notes(found)
    none = plan("llama-3.1-8b", ["full", "lora:r=4"], device=small("l40s", 2e9), gpus=gpus, seq=64, samples=8)
    assert words.plan_answer(none).endswith(f"checkpointing and QLoRA alone. {further}.")


def test_one_of_a_thing_is_no_several() -> None:
    (run,) = (found := plan(MODEL, "lora", device="l40s", batch=4, samples=4)).runs
    assert "4 samples of" in (told := words.job_in_words(found, run))
    assert "1 step of 4" in told
    assert "1 checkpoint;" in told


def test_what_two_methods_come_to_stands_once() -> None:
    """LoRA gives way to QLoRA where it does not fit; beside QLoRA that is the same run, and was told twice."""
    tight = small("l40s", 4.5e9)
    found = plan("llama-3.2-3b", ("lora:r=4", "qlora:r=4"), device=tight, samples=64, batch=8, seq=512)
    assert [run.asked for run in found.runs] == ["qlora:r=4"]
    assert list(found.left_out.values()) == ["fits as qlora:r=4, which is asked for, too"]
    alone = plan("llama-3.2-3b", "lora:r=4", device=tight, samples=64, batch=8, seq=512)
    assert [(run.asked, run.method) for run in alone.runs] == [("lora:r=4", "qlora:r=4")]


def test_a_gpu_without_bf16_units_runs_in_fp16() -> None:
    """A T4 was planned in bf16, which PyTorch emulates there: three times the hours."""
    found = plan(MODEL, "lora", device=["t4", "l40s"], samples=1000, today=date(2026, 11, 29))
    dtypes = {run.device: run.prediction.setup.dtype for run in found.runs}
    assert dtypes == {"t4": "fp16", "l40s": "bf16"}
    assert "t4: no bf16 units, so in fp16" in words.plan_notes(found)


def test_partitions_keep_what_ran_in_fp16(tmp_path: Path) -> None:
    """What a run gave up is looked up again among what there was to give up for its own device."""
    pytest.importorskip("pyarrow")
    given = ["plan", "--model", MODEL, "--methods", "lora", "--device", "t4", "--samples", "1000", "--json"]
    alone, kept = (
        CliRunner().invoke(main, [*given, *more]).stdout for more in ((), ("--partitions", str(tmp_path / "kept")))
    )
    assert json.loads(alone)["runs"][0]["setup"]["dtype"] == "fp16"
    assert json.loads(alone) == json.loads(kept)
