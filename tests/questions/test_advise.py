"""What `advise` promises: nothing that does not fit, and nothing better left out of a small space."""

import json
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fuzzing import NO_SHRINK
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import advise, predict
from perfmodel.cli import main
from perfmodel.commands.advise import BYTES, NUMBER, Quantity
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.prediction import memory
from perfmodel.questions.advice import Advice, Candidate, Change
from perfmodel.recording.reuse import Shared
from perfmodel.report.advice import SHOWN, _spread, advice_answer
from perfmodel.setup import Setup

MODEL, DEVICE, CPU = "smollm2-135m", "l40s", "cpu-xeon-2.5ghz-1t"
advise_module = import_module("perfmodel.questions.advice")


def brute_force(method: str, batch: int, seq: int, limit: float) -> float:
    """The fastest step of a method without knobs of its own, over everything a setup can turn."""
    best = float("inf")
    micro = [b for b in range(1, batch + 1) if batch % b == 0 and (b & (b - 1) == 0 or b == batch)]
    for size, checkpoint, optimizer, kernels, compiled in product(
        micro, ("none", "block"), ("adamw", "adamw-fused", "adamw-8bit"), ("torch", "liger"), ("none", "default")
    ):
        try:
            p = predict(
                MODEL, method, device=DEVICE, batch=size, seq=seq, grad_accum=batch // size, checkpoint=checkpoint,
                optimizer=optimizer, kernels=kernels, compile=compiled,
            )  # fmt: skip
        except UserError:  # an optimizer that this version does not have
            continue
        if memory.fits(p.memory.peak, limit, "cuda"):
            best = min(best, p.time.phases["total"])
    return best


@settings(max_examples=2, phases=NO_SHRINK)
@given(
    method=st.sampled_from(("full", "bitfit", "norm")), batch=st.integers(1, 3), seq=st.sampled_from((64, 512)),
    limit=st.sampled_from((2e9, 4e9, 48e9)),
)  # fmt: skip
def test_the_best_equals_a_brute_force_search(method: str, batch: int, seq: int, limit: float) -> None:
    """On a small space all combinations are tried, so nothing faster that fits may exist."""
    if method == "bitfit":  # Llamas have no biases
        method = "top_k:k=2"
    found = advise(MODEL, method, device=DEVICE, batch=batch, seq=seq, memory_bytes=limit)
    assert found.exhaustive
    expected = brute_force(method, batch, seq, limit)
    assert (found.best.seconds if found.best else float("inf")) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=2, phases=NO_SHRINK)
@given(
    method=st.sampled_from(("full", "lora:r=4", "lora:targets=all-linear", "dora")), batch=st.sampled_from((1, 4)),
    limit=st.sampled_from((1.5e9, 3e9, 48e9)), trainable=st.sampled_from((None, 10**6)),
)  # fmt: skip
def test_advice_fits_and_adds_up(method: str, batch: int, limit: float, trainable: int | None) -> None:
    """The best fits and is no slower than a start that fits; the path's gains sum to the whole gain."""
    found = advise(MODEL, method, device=DEVICE, batch=batch, seq=256, memory_bytes=limit, min_trainable=trainable)
    for c in (found.best, *found.front):
        if c is not None:
            assert memory.fits(c.peak, limit, "cuda")
            assert c.prediction.trainable_params >= (trainable or 0)
            assert c.prediction.setup.batch * c.prediction.setup.grad_accum == batch
    if found.best is None:
        assert not found.start.fits
        assert not found.front
        return
    assert not found.start.fits or found.best.seconds <= found.start.seconds
    assert found.start.seconds + sum(c.seconds for c in found.path) == pytest.approx(found.best.seconds)
    assert found.start.peak + sum(c.nbytes for c in found.path) == found.best.peak
    assert min(c.seconds for c in found.front) == found.best.seconds
    for cheaper, dearer in zip(found.front, found.front[1:], strict=False):
        assert cheaper.peak < dearer.peak
        assert cheaper.seconds > dearer.seconds


def test_fp32_adapters_and_unfused_kernels_are_named() -> None:
    """The advice is concrete: it says which switch to turn, and what it buys."""
    found = advise("llama-3.2-1b", "lora:targets=all-linear", device="a100-80gb-sxm", batch=4, seq=512)
    gains = {c.label: c.seconds for c in found.alone}
    assert gains["adapters in bf16 (autocast_adapter_dtype=False)"] < 0
    assert gains["Unsloth's fused LoRA"] < 0
    assert gains["Liger kernels"] < 0
    assert gains["activation checkpointing"] > 0


def test_grouped_products_are_named_where_experts_are_looped_over() -> None:
    """128 experts one after another cost most of the step; a dense model has none."""
    label, method = "grouped products of experts", "lora:targets=q_proj"
    on: Any = {"device": "h200", "batch": 1, "seq": 512, "experts": "eager"}
    found = advise("qwen3-30b-a3b", method, **on)
    gains = {c.label: c.seconds for c in found.alone}
    assert gains[label] < -0.5 * found.start.seconds
    with pytest.raises(UserError, match="has no experts; leave it out"):
        advise("llama-3.2-1b", method, **on)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"memory_bytes": 0}, "memory must be positive"),
        ({"methods": ["lorra"]}, "did you mean 'lora'"),
        ({"batch": np.array([1, 2])}, "for grids use sweep"),
    ],
)
def test_bad_questions_are_refused(arguments: dict[str, object], words: str) -> None:
    """One line that names the fault."""
    with pytest.raises(UserError, match=words):
        advise(MODEL, device=DEVICE, **arguments)  # type: ignore[arg-type]


def test_the_command_answers_in_words_and_in_json() -> None:
    """What a user sees, and what a script reads."""
    command = ["advise", "--model", MODEL, "--device", DEVICE, "--batch", "2", "--seq", "128"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "faster" in shown.stdout
    assert "Quality is outside the model" in " ".join(shown.stdout.split())
    answer = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert answer["best"]["fits"]
    assert answer["best"]["step_s"] <= answer["start"]["step_s"]
    whole = answer["best"]["step_s"] - answer["start"]["step_s"]
    assert sum(change["step_change_s"] for change in answer["path"]) == pytest.approx(whole)
    assert all("peak_change_bytes" in change and "step_s" not in change for change in answer["alone"])
    refused = CliRunner().invoke(main, [*command, "--memory", "lots"])
    assert refused.exit_code == 2
    assert "such as 24GB" in refused.stderr
    limited = json.loads(CliRunner().invoke(main, [*command, "--memory", "3GB", "--json"]).stdout)
    assert limited["limit_bytes"] == 3e9
    asked = json.loads(CliRunner().invoke(main, [*command, "--min-trainable", "1M", "--json"]).stdout)
    assert asked["best"]["trainable_params"] >= 1e6 > asked["start"]["trainable_params"]


def test_a_long_list_of_time_against_memory_still_ends_at_the_fastest() -> None:
    """The answer's own row was once cut off."""
    for count in range(2, 40):
        shown = _spread(list(range(count)))  # type: ignore[arg-type]
        assert (shown[0], shown[-1]) == (0, count - 1)
        assert len(set(shown)) == len(shown) == min(count, SHOWN)


def test_a_b_is_a_byte_of_memory_and_a_billion_parameters() -> None:
    """Models are said to have 1.5B parameters, cards 80GB."""
    assert Quantity(BYTES, "")("80GiB") == 80 * 2**30
    assert Quantity(NUMBER, "")("1.5B") == 1.5e9
    for power, prefix in enumerate("KMG", 1):
        for unit in (prefix, f"{prefix}b", f"{prefix.lower()}B"):
            assert Quantity(BYTES, "")(f"3 {unit}") == 3 * 1000**power
        for unit in (f"{prefix}i", f"{prefix}iB"):
            assert Quantity(BYTES, "")(f"3{unit}") == 3 * 1024**power
        assert Quantity(NUMBER, "")(f"3{prefix}") == 3 * 1000**power


@pytest.mark.parametrize(("method", "batch"), [("full", 2), ("top_k:k=2", 3), ("norm", 2)])
def test_turning_knobs_ends_where_trying_all_does(monkeypatch: pytest.MonkeyPatch, method: str, batch: int) -> None:
    """In large spaces not all is tried: the best, the way there and the single changes are the same for that."""
    everything = advise(MODEL, method, device=DEVICE, batch=batch, seq=256)
    monkeypatch.setattr(advise_module, "EXHAUSTIVE", 0)
    turned = advise(MODEL, method, device=DEVICE, batch=batch, seq=256)
    assert everything.exhaustive
    assert not turned.exhaustive
    assert turned.tried < everything.tried
    assert turned.best is not None
    assert everything.best is not None
    assert turned.best.as_dict() == everything.best.as_dict()
    assert [c.as_dict() for c in turned.path] == [c.as_dict() for c in everything.path]
    assert [c.as_dict() for c in turned.alone] == [c.as_dict() for c in everything.alone]
    assert turned.front[-1].as_dict() == everything.front[-1].as_dict()


@settings(max_examples=2, phases=NO_SHRINK)
@given(method=st.sampled_from(("full", "lora:r=4", "dora")), limit=st.sampled_from((1.5e9, 2.5e9, 48e9)))
def test_no_single_change_makes_the_best_faster(method: str, limit: float) -> None:
    """Where a search of a large space stops, every other choice of every knob was tried and is no better."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(advise_module, "EXHAUSTIVE", 0)
        spaces: list[Any] = []
        answer = advise_module._answer

        def noted(start: Any, found: list[Any], limit: float) -> Any:
            spaces.extend(found)
            return answer(start, found, limit)

        patched.setattr(advise_module, "_answer", noted)
        advise(MODEL, method, device=DEVICE, batch=2, seq=256, memory_bytes=limit)
        found = [(space, best) for space in spaces if (best := space.best()) is not None]
        assert found
        for space, best in found:
            count = len(space.known)
            assert list(space.neighbours(best))
            assert len(space.known) == count
            assert all(space._order(p) >= space._order(best) for p in space.neighbours(best))


@pytest.mark.parametrize(
    ("method", "same"),
    [
        ("lora:targets=q_proj+v_proj", "lora:targets=q_proj+v_proj,implementation=unsloth"),
        ("lora:dropout=0.1,targets=all-linear", "lora:dropout=0.1,targets=all-linear,implementation=unsloth"),
        ("lora", "lora:adapter_dtype=fp32"),
        ("lora:implementation=lorafusion", "lora:implementation=lorafusion,adapter_dtype=bf16"),
    ],
)
def test_options_that_change_nothing_are_recorded_once(method: str, same: str) -> None:
    """A search tries them for nothing; what it says of them is what a prediction alone says."""
    shared = Shared()
    first = predict(MODEL, method, device=DEVICE, batch=2, seq=64, shared=shared)
    second = predict(MODEL, same, device=DEVICE, batch=2, seq=64, shared=shared)
    assert len(shared.micro_batches) == 1
    assert second.as_dict() == predict(MODEL, same, device=DEVICE, batch=2, seq=64).as_dict()
    told = [note for note in second.notes if "fuses nothing" in note]  # that the option changes nothing is said
    assert second.notes == sorted([*first.notes, *told], key=second.notes.index)
    assert second.as_dict() == {**first.as_dict(), "method": second.method, "notes": second.notes}
    assert bool(told) == ("unsloth" in same)


def test_options_that_change_something_are_recorded_apart() -> None:
    """Only what is the same program may be taken for the same."""
    shared = Shared()
    specs = ("lora:targets=all-linear", "lora:targets=all-linear,implementation=unsloth", "lora:adapter_dtype=bf16")
    for spec in specs:
        predict(MODEL, spec, device=DEVICE, batch=2, seq=64, shared=shared)
    assert len(shared.micro_batches) == len(specs)


@settings(max_examples=6, phases=NO_SHRINK)
@given(
    method=st.sampled_from(("full", "lora:r=8", "lora:implementation=lorafusion", "adalora", "lisa", "galore")),
    accum=st.sampled_from((1, 3)), compiled=st.sampled_from(("none", "default")), device=st.sampled_from((DEVICE, CPU)),
)  # fmt: skip
def test_what_a_search_shares_changes_no_figure(method: str, accum: int, compiled: str, device: str) -> None:
    """With another optimizer or clipping, recorded micro-batches and compiled programs serve as if made anew."""
    shared = Shared()
    for optimizer, clip in (("adamw", True), ("adamw-fused", True), ("adamw-8bit", False), ("sgd", True)):
        changes: dict[str, Any] = {
            "batch": 2, "seq": 64, "grad_accum": accum, "compile": compiled, "optimizer": optimizer, "clip_grad": clip,
        }  # fmt: skip
        alone = predict(MODEL, method, device=device, **changes)
        assert predict(MODEL, method, device=device, shared=shared, **changes).as_dict() == alone.as_dict()
    assert len(shared.micro_batches) == 1


@given(points=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_the_front_holds_what_nothing_beats_and_nothing_twice(points: list[tuple[int, int]]) -> None:
    """A candidate as fast as one that needs no more memory is no answer: ties are where a front goes wrong."""
    front = advise_module._front([SimpleNamespace(peak=peak, seconds=seconds, changes=()) for peak, seconds in points])

    def beaten(point: tuple[int, int]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    assert [(c.peak, c.seconds) for c in front] == sorted({p for p in points if not beaten(p)})


@pytest.mark.parametrize("ddp", ["plain", "find-unused"])
@pytest.mark.parametrize("form", ["ddp", "fsdp2", "fsdp1", "zero1", "zero2", "zero3"])
def test_what_a_search_shares_changes_no_figure_of_several_gpus(form: str, ddp: str) -> None:
    """Under ZeRO-2 the second optimizer was told less memory: nobody knew how many micro-batches had gone before."""
    if ddp != "plain" and form != "ddp":
        pytest.skip("DDP's alone")
    on, shared = profile.load("l40s"), Shared()
    for optimizer in ("adamw", "adamw-8bit"):
        setup = Setup(batch=1, seq=32, gpus=2, grad_accum=3, parallel=form, ddp=ddp, optimizer=optimizer)
        alone, again = (predict("gpt2", "lora", setup, on, shared=s) for s in (None, shared))
        assert again.memory == alone.memory
        assert again.time.phases == alone.time.phases


def test_no_limit_gives_more_memory_than_the_device_has() -> None:
    """Whoever types 80GB for a card of 48 must not be told to run what cannot start there."""
    asked = {"device": DEVICE, "batch": 64, "seq": 2048, "optimizer": "adamw-fused", "kernels": "liger"}
    own, more = (advise("smollm2-1.7b", "full", memory_bytes=limit, **asked) for limit in (None, 1e15))  # type: ignore[arg-type]
    assert not own.start.fits
    assert own.limit == profile.load(DEVICE).capacity
    assert more.as_dict() == own.as_dict()


def test_a_method_that_trains_exactly_what_has_to_train_is_anadvice_answer() -> None:
    """ "At least": the number that a user copies from the answer must give the same answer again."""
    found = advise(MODEL, "lora:r=8", device=DEVICE, batch=1, seq=64)
    again = advise(
        MODEL, "lora:r=8", device=DEVICE, batch=1, seq=64, min_trainable=found.start.prediction.trainable_params
    )
    assert again.start.fits
    assert not advise(
        MODEL, "lora:r=8", device=DEVICE, batch=1, seq=64, min_trainable=found.start.prediction.trainable_params + 1
    ).start.fits


@pytest.mark.parametrize(("model", "dtype", "offered"), [("gpt2", "bf16", 1), ("gpt2", "fp32", 0), (MODEL, "bf16", 0)])
def test_an_unaligned_vocabulary_is_padded_where_that_pays(model: str, dtype: str, offered: int) -> None:
    """A quarter of GPT-2's step goes into 47 columns that are not there, and only in 16 bit."""
    advice = advise(model, "full", device="a100", batch=8, seq=256, dtype=dtype)
    changes = [c for c in advice.alone if c.label.startswith("a vocabulary of")]
    assert len(changes) == offered
    assert all(c.seconds < -0.1 * advice.start.seconds and "50304" in c.label for c in changes)


def test_what_changes_nothing_is_no_advice() -> None:
    """Ranks that all share layers have no shards to leave gathered: of equals the answer changes least."""
    found = advise(MODEL, "full", device=DEVICE, batch=2, seq=256, gpus=3, tp=3, parallel="fsdp2")
    assert found.best is not None
    assert not [label for label in found.best.changes if "FSDP" in label or "zero" in label]
    assert all(change.seconds for change in found.path)


def test_compiling_can_be_undone() -> None:
    """Beside compiled code sdpa's explicit mask can cost more than fusing gains, and it kept jobs off the host."""
    asked: dict[str, Any] = {"device": DEVICE, "batch": 2, "seq": 256}
    eager, compiled = (advise(MODEL, "full", compile=how, **asked).best for how in ("none", "default"))
    assert eager is not None
    assert compiled is not None
    assert compiled.prediction.setup == eager.prediction.setup
    for how in ("none", "default"):
        found = advise(MODEL, "full", compile=how, memory_bytes=1e9, **asked)
        assert found.best is not None
        assert found.best.prediction.setup.offload == "params"
        assert ("no torch.compile" in found.path[0].label) == (how == "default")


@pytest.mark.parametrize(("changes", "told"), [(("a",), "a"), (("a", "b"), "a and b"), (("a", "b", "c"), "a, b and c")])
def test_changes_are_listed_as_people_do(changes: tuple[str, ...], told: str) -> None:
    """The sentence that most readers stop at."""
    start, best = (Candidate(names, predict("gpt2", "full", device="l40s", seq=16), True) for names in ((), changes))
    path = [Change("x", 0.0, 0, best)]
    assert advice_answer(Advice(start, best, path, path, [], 2, True, 1e9)).endswith(f"with {told}")


def test_each_setup_is_told_to_whoever_watches() -> None:
    """A search of one method took up to half a minute in which nothing moved."""
    told: list[tuple[int, int, str]] = []
    found = advise_module.advise(
        MODEL, "full", device=DEVICE, batch=1, seq=64, methods=["norm"], progress=lambda *what: told.append(what)
    )
    assert found.tried / 2 < len(told) <= found.tried
    assert {done for done, _, _ in told} == {0, 1}
    assert told[-1] == (1, 2, f"norm, setup {len(told)}")


def test_a_gpu_without_bf16_units_is_advised_to_leave_bf16() -> None:
    """PyTorch emulates bf16 on a T4; advice stayed in it, at twice the time of fp16."""
    found = advise("gpt2", "lora", device="t4", batch=2, seq=128, dtype="bf16")
    assert found.best is not None
    assert found.best.prediction.setup.dtype == "fp16"
    assert found.path[0].label.startswith("fp16")
    assert sum(change.seconds for change in found.path) == pytest.approx(found.best.seconds - found.start.seconds)
    asked = advise("gpt2", "lora", device="t4", batch=2, seq=128, dtype="fp16")
    assert asked.best is not None
    assert asked.best.seconds == pytest.approx(found.best.seconds)
