"""Recorded programs: what a few traces say of every size, kept in files, is what a trace of that size finds."""

import gzip
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import config_of, setup_of

pytest.importorskip("peft")

from test_any_model import config_of as any_config
from test_traced import ops

from perfmodel import UserError, cli, compare, explain, predict, sweep
from perfmodel.architectures import Config
from perfmodel.prediction.memory import peak_bytes
from perfmodel.program.op import Op, Spec
from perfmodel.program.polynomials import NoPolynomial
from perfmodel.program.software import SoftwareStack
from perfmodel.recording import files
from perfmodel.recording.program import RecordedModel
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing import recorded, regions, traced
from perfmodel.tracing.calls import Calls, key_of
from perfmodel.tracing.sizes import check_at, solved

WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 12}
CASES: dict[str, tuple[Callable[[], Config], str, dict[str, Any]]] = {
    "full": (lambda: config_of("llama", layers=2), "full", {}),
    "adapters": (lambda: config_of("llama", layers=2), "lora:r=4,targets=all-linear,dropout=0.1", {}),
    "checkpoints": (lambda: config_of("qwen2", layers=2), "lora:r=4", {"checkpoint": "block"}),
    "scores": (lambda: config_of("gpt2", layers=2, n_positions=512), "ia3", {"attention": "eager"}),
    "micro-batches": (lambda: config_of("llama", layers=2), "lora:r=4", {"grad_accum": 3}),
    "windows": (lambda: config_of("qwen2", layers=16, **WINDOWS), "full", {}),
    "two stacks": (lambda: any_config("t5", num_layers=2, num_decoder_layers=2), "lora:r=4", {}),
    "images": (lambda: any_config("vit"), "full", {}),
}
GROWN = ("windows", "images")  # of these most blocks follow from a few, at every size


def fresh(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on another process: nothing but the files of a folder is known, and torch cannot be asked."""
    monkeypatch.setattr(recorded, "needed", lambda _: pytest.fail("a recorded program was traced again"))


def step_at(model: RecordedModel, method: str, setup: Setup) -> Step:
    """The step that a recorded model gives."""
    return build(model, predict_method(method, model), setup, "cuda", "8.0")


def predict_method(text: str, model: RecordedModel) -> Any:
    from perfmodel.prediction.predict import resolve

    return resolve(model, text)[1]


def host_work(step: Step) -> Counter[str]:
    found: Counter[str] = Counter()
    for part, times in step.parts():
        for count in ("nodes", "modules", "adapters", "checkpoints", "hooks"):
            found[count] += times * getattr(part.host, count)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_program_is_the_one_that_a_trace_finds(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded at one size, stored, loaded, asked at others: op for op, with host work and parameters."""
    make, method, options = CASES[case]
    setup, sizes = Setup(batch=4, seq=24, **options), SIZES if case == "full" else SIZES[1:]
    step_at(recorded.traced(make(), tmp_path), method, setup)
    with monkeypatch.context() as later:
        fresh(later, tmp_path)
        again = [step_at(recorded.traced(make(), tmp_path), method, replace(setup, batch=b, seq=s)) for b, s in sizes]
    for (batch, seq), found in zip(sizes, again, strict=True):
        real, made = traced.of_method(make(), method, replace(setup, batch=batch, seq=seq))
        assert made.extrapolated == (case in GROWN)
        for phase in ("forward", "backward", "optimizer"):
            assert ops(found, phase) == ops(real, phase)
        assert host_work(found) == host_work(real)
        assert (found.total, found.trainable) == (real.total, real.trainable)
        assert peak_bytes(found) == pytest.approx(peak_bytes(real), rel=0.01)


def test_a_recorded_program_follows_the_stack(tmp_path: Path) -> None:
    """The attention kernel and the adapters' dtype come from the versions that are asked for, and the answer says that
    the rest is the installed packages'."""

    def kernels_and_adapters(stack: str) -> tuple[set[str], set[str]]:
        model = recorded.traced(config_of("llama", layers=2), tmp_path)
        setup = Setup(batch=2, seq=24, stack=SoftwareStack.of(stack))
        step = build(model, predict_method("lora:r=4", model), setup, "cuda", "9.0")
        names = {op.name for _, op, _ in step.ops() if "attention" in op.name and "backward" not in op.name}
        return {name.split("_")[4] for name in names}, {p.dtype for p in step.parameters if p.used}

    assert kernels_and_adapters("current") == ({"cudnn"}, {"fp32"})
    assert kernels_and_adapters("torch=2.6,peft=0.11") == ({"flash"}, {"bf16"})
    model = recorded.traced(config_of("llama", layers=2), tmp_path)
    notes = predict(model, "lora:r=4", device="h100-sxm", batch=2, seq=24, stack="torch=2.6,peft=0.11").notes
    assert any("that of the installed packages" in note for note in notes)


SIZES = ((2, 30), (9, 200))


def test_a_file_gives_back_what_was_stored() -> None:
    """store ∘ load is the identity, for numbers that follow the size and for those that do not."""
    for region in (regions.Region(single=False, low=2, high=None), None):
        method = predict_method("lora:r=4", recorded.traced(config_of("llama", layers=1)))
        _, _, program = traced.trace_model(
            config_of("llama", layers=1), replace(method, architecture=None), Setup(batch=4, seq=24, grad_accum=2),
            "cuda", "8.0", region,
        )  # fmt: skip
        plain = files.encoded(program)
        assert files.encoded(files.decoded_value(json.loads(json.dumps(plain)))) == plain
        assert (program.at is None) == (region is not None)


def test_a_grid_is_one_program(tmp_path: Path) -> None:
    """A sweep over batch and length asks for no further trace, and gives point by point what single setups give."""
    model = recorded.traced(config_of("llama", layers=2), tmp_path)
    batch, seq = np.array([[1], [2], [5]]), np.array([16, 24, 40, 64])
    together = predict(model, "lora:r=4", device="l40s", batch=batch, seq=seq)
    for i, b in enumerate(batch.flat):
        for j, s in enumerate(seq.flat):
            alone = predict(model, "lora:r=4", device="l40s", batch=int(b), seq=int(s))
            assert together.time.phases["total"][i, j] == pytest.approx(alone.time.phases["total"])
            assert together.memory.peak[i, j] == alone.memory.peak
    assert len(list(tmp_path.iterdir())) == 3  # the model, and the program of a batch of one beside the others'


def test_every_question_takes_a_traced_model(tmp_path: Path) -> None:
    """What the tape knows too has the same answer from either."""
    config = config_of("llama", layers=2)
    model, given = recorded.traced(config, tmp_path), {"device": "a100-80gb-sxm", "batch": 4, "seq": 48}
    real, tape = (compare(m, ["full", "lora:r=4"], **given) for m in (model, config))
    for a, b in zip(real.predictions, tape.predictions, strict=True):
        assert (a.flops, a.kernels, a.total_params) == (b.flops, b.kernels, b.total_params)
        assert float(a.time.device_busy) == pytest.approx(float(b.time.device_busy), rel=1e-3)
    assert explain(model, "full", "lora:r=4", axes=("batch", "seq"), **given).crossovers
    rows = sweep(model, ["full", "lora:r=4"], device="l40s", batch=[2, 4], seq=[16, 32], rank=[2, 4]).table()
    assert len(rows["step_s"]) == 12


def test_threads_may_trace_at_once(tmp_path: Path) -> None:
    """A trace changes functions of PyTorch and transformers until it is done: another would put back changed ones."""
    from transformers.utils import import_utils

    asked, before = [Setup(batch=2, seq=seq) for seq in (16, 24)], import_utils.is_fake_tensor

    def traced_alone(setup: Setup) -> Any:
        model = recorded.traced(config_of("llama", layers=1), tmp_path / f"{threading.get_ident()}-{setup.seq}")
        return predict(model, "lora:r=4", setup, "l40s").as_dict()

    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(traced_alone, asked))
    assert [traced_alone(setup) for setup in asked] == at_once
    assert import_utils.is_fake_tensor is before


BROKEN = (b"", b"{}", gzip.compress(b'{"form": "another"}\n{}', mtime=0), gzip.compress(b"[", mtime=0))


def test_a_broken_file_is_recorded_anew(tmp_path: Path) -> None:
    """Whatever happened to the folder: an answer, and the file is whole again."""
    config, setup = config_of("llama", layers=1), Setup(batch=2, seq=16)
    first = step_at(recorded.traced(config, tmp_path), "full", setup)
    paths = list(tmp_path.iterdir())
    for text in BROKEN:
        for path in paths:
            path.write_bytes(text)
        for path in paths:
            with pytest.raises(files.NotAProgram):
                files.read_object(path)
    assert ops(step_at(recorded.traced(config, tmp_path), "full", setup), "forward") == ops(first, "forward")
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(files.read_object(path) for path in paths)


def test_an_answer_does_not_need_a_folder_to_write_to(tmp_path: Path) -> None:
    file = tmp_path / "no-folder"
    file.write_text("in the way")
    assert step_at(recorded.traced(config_of("llama", layers=1), file), "full", Setup(batch=2, seq=16)).groups


def test_the_second_question_needs_no_torch(tmp_path: Path) -> None:
    """On a machine without torch, with the folder of another."""
    arguments = ["compare", "--model", config_file(tmp_path), "--device", "l40s", "--traced", "--seq", "32", "--json"]
    first = CliRunner().invoke(cli.main, arguments)
    assert first.exit_code == 0, first.output
    blocked = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft'): sys.modules[name] = None\n"
        "from perfmodel.cli import main\nmain()"
    )
    second = subprocess.run([sys.executable, "-c", blocked, *arguments], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["speedup"] == json.loads(first.stdout)["speedup"]


def test_what_does_not_follow_from_other_sizes_is_traced_at_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longformer pads to a multiple of its window: no polynomial, so single sizes work, from a file the second time,
    and large grids are refused."""
    values = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1}
    values |= {"attention_window": [8], "vocab_size": 64, "max_position_embeddings": 514}
    config = Config({"model_type": "longformer", **values}, "longformer", "longformer")
    model, setup = recorded.traced(config, tmp_path), Setup(batch=2, seq=20)
    real, _ = traced.of_method(config, "full", setup)
    assert ops(step_at(model, "full", setup), "forward") == ops(real, "forward")
    with monkeypatch.context() as later:
        fresh(later, tmp_path)
        again = step_at(recorded.traced(config, tmp_path), "full", setup)
    assert ops(again, "forward") == ops(real, "forward")
    with pytest.raises(UserError, match="does not follow from others"):
        predict(model, "full", device="l40s", batch=2, seq=np.arange(20, 60))


def test_few_lengths_below_a_window_are_not_taken_for_one(tmp_path: Path) -> None:
    """The first length that anybody asked about answered for all of them, also from the file."""
    config = Config({**config_of("llama").values, "model_type": "qwen2", "use_sliding_window": True,
                     "sliding_window": 24, "max_window_layers": 0}, "narrow", "narrow")  # fmt: skip
    model = recorded.traced(config, tmp_path)
    for length in (8, 16, 3):
        setup = Setup(batch=2, seq=length)
        real, _ = traced.of_method(config, "full", setup)
        assert ops(step_at(model, "full", setup), "forward") == ops(real, "forward")


@pytest.mark.parametrize(
    ("low", "high", "found"), [(1, None, (83, 1367, 4099)), (1, 32, (3, 11, 31)), (2, 16, (3, 5, 15))]
)
def test_a_region_is_solved_from_three_lengths(low: int, high: int | None, found: tuple[int, ...]) -> None:
    """A square goes through three points; where fewer are left there is no telling one from another."""
    region = regions.Region(single=False, low=low, high=high)
    assert region.sizes(lengths=True)[1] == found
    assert region.sizes(lengths=False) == ((2, 3), ())
    with pytest.raises(NoPolynomial):
        regions.Region(single=False, low=2, high=8).sizes(lengths=True)


def test_a_window_ends_a_region() -> None:
    """From the length of a sliding window on, sdpa gets a mask and runs another kernel."""
    limits = regions.bounds({"sliding_window": 4096, "text_config": {"max_position_embeddings": 8192}})
    region = regions.region_of(Setup(batch=2, seq=512), limits)
    assert (region.low, region.high) == (2, 4096)
    assert regions.region_of(Setup(batch=1, seq=4096), limits) == regions.Region(single=True, low=4096, high=8193)


def config_file(folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(config_of("llama", layers=2).values))
    return str(file)


ASKED: dict[str, tuple[str, ...]] = {
    "record": ("--methods", "full", "lora:r=4"),
    "compare": (),
    "explain": ("full", "lora:r=4", "--axes", "batch"),
    "advise": ("--methods", "full"),
    "sweep": ("--batch", "2-8*2"),
    "report": ("--methods", "full", "lora:r=4", "--axes", "none", "-o", "page.html"),
}


def test_every_command_takes_a_traced_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config.json to the answer, with a tuner that the tape does not know where a method is left open; what one
    command has recorded serves the next."""
    pytest.importorskip("jinja2")
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("adapter.json").write_text(json.dumps({"peft_type": "RANDLORA", "r": 4, "target_modules": ["q_proj"]}))
    given = ["--model", config_file(tmp_path), "--device", "l40s", "--seq", "16", "--traced"]
    for command, options in ASKED.items():
        tuner = () if command == "explain" else ("--peft-config", "adapter.json")
        result = CliRunner().invoke(cli.main, [command, *options, *given, *tuner, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)
        told = Path("page.html").read_text(encoding="utf-8") if command == "report" else result.stdout
        assert ("randlora" in told.lower()) == bool(tuner)
        assert len(list((tmp_path / "home" / "programs").iterdir())) >= 2


def test_a_second_method_may_be_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain full --peft-config FILE`; of none, or of three, one line."""
    monkeypatch.chdir(tmp_path)
    Path("adapter.json").write_text(json.dumps({"peft_type": "IA3"}))
    given = ["--model", config_file(tmp_path), "--device", "l40s", "--seq", "16", "--axes", "none"]
    result = CliRunner().invoke(cli.main, ["explain", "full", *given, "--peft-config", "adapter.json", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["b"]["method"] == "ia3"
    for wrong in (["full"], ["full", "lora", "--peft-config", "adapter.json"]):
        result = CliRunner().invoke(cli.main, ["explain", *wrong, *given])
        assert result.exit_code == 2
        assert "two methods" in result.stderr


def test_a_record_that_cannot_be_kept_is_a_complaint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a file wants to know that there is none; a question has its answer all the same."""
    (tmp_path / "home").write_text("in the way")
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "home"))
    given = ["--model", config_file(tmp_path), "--device", "l40s", "--seq", "16", "--traced"]
    result = CliRunner().invoke(cli.main, ["record", *given])
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert CliRunner().invoke(cli.main, ["predict", *given]).exit_code == 0


def test_limits_come_from_defaults_too() -> None:
    """A config.json leaves out what transformers fills in: Mistral's window of 4,096 tokens."""
    values = {key: value for key, value in config_of("mistral").values.items() if key != "sliding_window"}
    assert 4096 in recorded.traced(Config(values, "mistral", "mistral")).limits


def test_adapter_configs_are_methods_like_others(tmp_path: Path) -> None:
    """Two tuners that the tape does not know, beside one that it does."""
    for name, r in (("small", 4), ("wide", 8)):
        values = {"peft_type": "RANDLORA", "r": r, "target_modules": ["q_proj"]}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    config = config_file(tmp_path)
    paths = [str(tmp_path / f"{name}.json") for name in ("small", "wide")]
    given = ["compare", "--model", config, "--device", "l40s", "--seq", "16", "--json"]
    result = CliRunner().invoke(cli.main, [*given, "--traced", "--methods", "full", *paths])
    assert result.exit_code == 0, result.output
    assert [p["method"] for p in json.loads(result.stdout)["predictions"]] == ["full", *paths]
    result = CliRunner().invoke(cli.main, [*given, "--methods", "full", paths[0]])
    assert result.exit_code == 2
    assert "--traced" in result.stderr
    result = CliRunner().invoke(cli.main, [*given, "--peft-config", paths[0]])
    assert [p["method"] for p in json.loads(result.stdout)["predictions"]] == ["full", "randlora"]


def test_the_scores_of_adalora_are_part_of_its_step(tmp_path: Path) -> None:
    """PEFT's allocator runs after every optimizer step: by its config as by its name."""
    config, setup = config_of("llama"), setup_of("llama", batch=2, seq=16)
    values = {"peft_type": "ADALORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "total_step": 100}
    by_name, _ = traced.of_method(config, "adalora:targets=q_proj", setup)
    by_config, _ = traced.of_peft(config, values, setup)
    for phase in ("forward", "backward", "optimizer"):
        assert ops(by_config, phase) == ops(by_name, phase)


def test_a_dim_that_only_seemed_to_follow_is_found_at_one_more_size() -> None:
    """Rounded up to 8 as all recorded sizes are: read off the line between them, other sizes would be wrong."""

    def trace(batch: int, seq: int) -> Calls:
        n = -(-batch * seq // 8) * 8
        op, calls = Op("add.Tensor", (Spec("fp32", (n,)),), (Spec("fp32", (n,)),), 4 * n, 4 * n), Calls()
        calls.add(key_of((0, "forward"), op), op)
        calls.live[0].append(4 * n)
        calls.live[1].append(4 * n)
        return calls

    batches, lengths = (2, 3), (8, 16, 32)
    found = solved([trace(b, s) for b in batches for s in lengths], batches, lengths)
    check_at(found, (5, 24), trace(5, 24))
    with pytest.raises(NoPolynomial, match=r"add.Tensor does not follow at \(3, 7\)"):
        check_at(found, (3, 7), trace(3, 7))
