"""What is remembered from one prediction to the next never gives another answer than a step recorded for it alone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_setup import Question, questions
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import predict as ask
from perfmodel.architectures import load
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.methods import parse
from perfmodel.prediction import remembered
from perfmodel.prediction.predict import Prediction, predict
from perfmodel.prediction.remembered import LruCache, Steps
from perfmodel.program.formulas import Formula, Formulas, NotTraceable

MODEL, LORA = "smollm2-135m", "lora:targets=q_proj"


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas are made at the second size, not at the fifth."""
    monkeypatch.setattr(remembered, "WAIT", 1)


def ranked(question: Question, more: int) -> Any:
    """The method with a rank that is `more`, if it has one."""
    method = question.parsed
    known = {f.name for f in fields(method)}
    changed: dict[str, Any] = {"r": method.r + more} if "r" in known and type(method.r) is int else {}  # type: ignore[attr-defined]
    return replace(method, **changed)


@tries(15)
@given(
    questions(),
    st.lists(st.tuples(*(st.integers(0, n) for n in (5, 300, 9))), min_size=2, max_size=4),
    st.sampled_from(profile.names()),
)
def test_a_remembered_answer_is_that_of_a_step_recorded_alone(
    question: Question, others: list[tuple[int, int, int]], device: str
) -> None:
    """Any model, method and setup at other batches, lengths and ranks, all of them on another device: bit by bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "WAIT", 1)
        steps = Steps()

        def answer(of: Steps, on: str | Any, batch: int, seq: int, rank: int) -> Any:
            sizes = {"batch": question.setup["batch"] + batch, "seq": question.setup["seq"] + seq}
            try:
                setup, method = question.made(**sizes), ranked(question, rank)
                return predict(question.model, method, setup, on, host=question.host, steps=of).as_dict()
            except UserError as error:
                return str(error)

        for on in (question.device, device):
            for sizes in [(0, 0, 0), *others, (0, 0, 0)]:
                assert answer(steps, on, *sizes) == answer(Steps(), on, *sizes)


def formulas_of(steps: Steps) -> list[int]:
    """Of each program that is kept, for how many ranges of sizes there are formulas."""
    return [len(program.formulated) for program in steps.programs.values()]


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        ("llama-3.2-1b", "full", {}),
        ("llama-3.2-1b", "qlora:targets=all-linear", {"checkpoint": "block", "grad_accum": 4}),
        ("gpt2", "lora", {"dtype": "fp32", "amp": "bf16"}),
        ("mistral-7b", "dora", {"padded": True}),
        ("bert-base-uncased", "ia3", {"attention": "eager"}),
        ("t5-small", "lora", {}),
    ],
)
def test_sizes_of_a_slider_need_one_recording(model: str, method: str, options: dict[str, Any]) -> None:
    """Else dragging it is as slow as asking anew; and a step that somebody looks at is the one that was asked for."""
    steps = Steps()

    def at(batch: int, seq: int, of: Steps) -> Prediction:
        return predict(model, method, device="a100", steps=of, batch=batch, seq=seq, **options)

    for batch, seq in ((4, 256), (5, 256), (8, 256), (8, 320), (3, 500), (16, 128)):
        kept, alone = at(batch, seq, steps), at(batch, seq, Steps())
        assert kept.as_dict() == alone.as_dict()
    assert formulas_of(steps) == [1]
    assert kept.recorded is not None
    assert kept.step is not None
    assert alone.step is not None
    assert [str(op) for _, op, _ in kept.step.ops()] == [str(op) for _, op, _ in alone.step.ops()]
    for mine, other in zip(kept.durations or [], alone.durations or [], strict=True):
        assert np.array_equal(mine.alone, other.alone)


def test_a_rank_is_a_size_like_any_other() -> None:
    """Kernels that a launch over lists takes hang on it, too."""
    steps = Steps()
    for r in (4, 8, 16, 24, 33, 128):
        kept, alone = (predict(MODEL, f"lora:r={r}", device="l40s", seq=64, steps=s) for s in (steps, Steps()))
        assert kept.as_dict() == alone.as_dict()
        assert kept.method == f"lora:r={r}"
    assert formulas_of(steps) == [1]


def test_where_a_program_changes_another_one_is_recorded() -> None:
    """A batch of 1, a sequence beyond a window, more than the positions of a model."""
    steps = Steps()
    for batch, seq in ((4, 64), (5, 64), (1, 64), (2, 64), (2, 1024), (1, 512), (7, 1023)):
        kept, alone = (predict("gpt2", "lora", device="l40s", batch=batch, seq=seq, steps=s) for s in (steps, Steps()))
        assert kept.as_dict() == alone.as_dict()
    for _ in range(2):
        with pytest.raises(UserError, match="1024"):
            predict("gpt2", "lora", device="l40s", batch=2, seq=1025, steps=steps)


def test_whoever_changes_an_answer_or_a_question_changes_no_other_answer(tmp_path: Path) -> None:
    """Arrays of a grid, a config's values, an own device's file and the dicts of a prediction are their owners'."""
    batch = np.array([2, 3])
    asked: dict[str, Any] = {"device": "l40s", "seq": 64}
    first = ask(MODEL, LORA, batch=batch, **asked)
    batch[:] = 5
    assert ask(MODEL, LORA, batch=batch, **asked).as_dict() != first.as_dict()
    assert ask(MODEL, LORA, batch=np.array([2, 3]), **asked).as_dict() == first.as_dict()

    config = load(MODEL)
    before = ask(config, LORA, **asked).total_params
    config.values["num_hidden_layers"] = 12
    assert ask(config, LORA, **asked).total_params < before == ask(MODEL, LORA, **asked).total_params

    answer = ask(MODEL, LORA, **asked)
    untouched = ask(MODEL, LORA, **asked).as_dict()
    for changed in (answer.flops, answer.bytes, answer.kernels, answer.dispatches, answer.time.phases):
        changed["total"] = 0
    answer.notes.append("mine")
    assert ask(MODEL, LORA, **asked).as_dict() == untouched

    text = (profile.DEVICES / "l40s.toml").read_text(encoding="utf-8")
    own = tmp_path / "own.toml"
    own.write_text(text, encoding="utf-8")
    as_bundled = ask(MODEL, LORA, batch=4, seq=512, device=str(own)).time.phases["total"]
    assert "memory_bandwidth = 864e9" in text
    own.write_text(text.replace("memory_bandwidth = 864e9", "memory_bandwidth = 432e9"), encoding="utf-8")
    assert ask(MODEL, LORA, batch=4, seq=512, device=str(own)).time.phases["total"] > as_bundled


def test_an_option_that_no_spec_names_is_told_apart() -> None:
    """What decides a step is all of a method, not what it is called."""
    steps = Steps()
    method = parse("lora:r=8")
    for changed in ({}, {"dropout": 0.1}, {"r": 16}, {"targets": ("q_proj",)}, {"target_parameters": ()}):
        found, alone = (predict(MODEL, replace(method, **changed), seq=64, steps=s) for s in (steps, Steps()))
        assert found.as_dict() == alone.as_dict()


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is asked for days; the step itself, a megabyte of ops, is not kept at all."""
    monkeypatch.setattr(remembered, "MOST_PROGRAMS", 3)
    monkeypatch.setattr(remembered, "MOST_SIZES", 2)
    steps = Steps()
    for grad_accum in (1, 2, 3, 4, 5):
        for seq in (1, 32, 33):
            predict(MODEL, LORA, seq=seq, batch=1, grad_accum=grad_accum, steps=steps)
    predict(MODEL, LORA, seq=np.arange(64, 64 + 2 * remembered.MOST_POINTS), batch=2, grad_accum=5, steps=steps)
    assert [len(program.steps) for program in steps.programs.values()] == [1, 2, 0]  # a large grid is not kept
    for program in steps.programs.values():
        for known in program.steps.values():
            assert known.step is None
            assert not any(part.ops for group in known.work.groups for part in group.parts)


def test_the_least_recently_used_goes() -> None:
    """Whoever asks for one device after another goes round more steps than there may be."""
    recent: LruCache[str, int] = LruCache(2)
    recent.keep("a", 1)
    recent.keep("b", 2)
    assert recent.recall("a") == 1
    recent.keep("c", 3)
    assert (recent.recall("a"), recent.recall("b"), recent.recall("c")) == (1, None, 3)


def test_threads_may_share_what_is_known() -> None:
    """A page answers several people at once."""
    steps = Steps()
    devices = ("l40s", "a100", "t4", "h100-sxm") * 8
    answers = {name: predict(MODEL, LORA, seq=64, device=name, steps=steps).as_dict() for name in devices}
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: predict(MODEL, LORA, seq=64, device=name, steps=steps).as_dict(), devices)
        assert list(found) == [answers[name] for name in devices]


def numbers() -> tuple[Formulas, Any, Any]:
    formulas = Formulas((4, 6))
    return formulas, *formulas.symbols()


def test_a_formula_is_worked_out_at_other_sizes() -> None:
    """With Python's operators, NumPy's functions, and functions of lists."""
    formulas, a, b = numbers()
    made = [a + 1, 2 * a - b, -(-b // 4), np.maximum(a, b) % 5, b / a, a**2, formulas.of_list(sum, [a, b, 7]), a * 1]
    assert [x.value for x in made] == [5, 2, 2, 1, 1.5, 16, 17, 4]
    formulas.close(x.number for x in made)
    values = formulas.at((3, 2**70))
    assert values is not None
    a, b = 3, 2**70
    expected = [a + 1, 2 * a - b, -(-b // 4), max(a, b) % 5, b / a, a**2, a + b + 7, a]
    assert [values[x.number] for x in made] == expected


def test_what_changes_no_number_makes_none() -> None:
    """Most products and sums of a step are of ones and zeros: they would be worked out anew for every size."""
    _, a, _ = numbers()
    assert all(same is a for same in (a + 0, a - 0, a * 1, a // 1))
    assert all(other is not a for other in (a + 1, a - 1, a * 0, a // 2, 1 // a, 0 - a))


def test_what_was_asked_of_a_formula_is_a_condition() -> None:
    """Elsewhere the program is another one."""
    formulas, a, b = numbers()
    taken = [bool(a < b), bool(a == 4), bool(np.greater_equal(b, 3)), bool(b % 2)]
    assert taken == [True, True, True, False]
    formulas.close([])
    assert formulas.at((4, 8)) is not None
    assert [formulas.at(sizes) for sizes in ((5, 8), (4, 2), (4, 7), (4, 4))] == [None] * 4


@pytest.mark.parametrize(
    "asked",
    [int, float, range, str, np.asarray, np.sort, "{:d}".format, lambda a: [0, 1, 2, 3, 4][a], np.cumsum, iter, round],
)
def test_a_program_that_goes_by_the_number_itself_is_not_traced(asked: Any) -> None:
    """It would be the same for a number only, which nobody asks for again."""
    formulas, a, _ = numbers()
    with pytest.raises(NotTraceable):
        asked(a)
    with pytest.raises(NotTraceable):
        formulas.close([])


def test_what_no_formula_follows_gives_its_value_and_ends_the_trace() -> None:
    """No exception arrives where a tensor dies: the answer is thrown away at the end."""
    formulas, a, b = numbers()
    assert np.log2(a) == 2.0
    assert (a * np.array([1, 2])).tolist() == [4, 8]
    with pytest.raises(NotTraceable):
        formulas.close([])
    other, c, _ = numbers()
    assert (c + b) == 10
    with pytest.raises(NotTraceable):
        other.close([])
    with pytest.raises(TypeError):
        hash(c)
    assert repr(c) == "<4>"
    assert type(c) is Formula
