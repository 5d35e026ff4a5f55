"""The command line: a user's mistake is one line and exit code 2, JSON has the promised keys, start-up stays light.

Scripts and notebooks are built on these promises.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from helpers import SMALL

from perfmodel import architectures, methods
from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.setup import Setup

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["--model", "gpt2", "--device", "l40s", "--batch", "2", "--seq", "64"]
PHASES = {"forward", "backward", "optimizer", "total"}
PREDICTION = {
    "model", "device", "method", "setup", "params", "flops", "bytes", "kernels", "dispatches", "time_s",
    "memory_bytes", "fits", "periodic", "choices", "notes",
}  # fmt: skip


def call(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def value_of(*args: str) -> Any:
    """The JSON that a command prints, which must be all that it prints."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def process(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real process, offline."""
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def predict_with(*options: str, model: str = "gpt2", device: str = "l40s") -> tuple[str, ...]:
    return ("predict", "--model", model, "--device", device, *options)


BROKEN = "broken/config.json"  # made by `folder`
LLAMA = "llama-3.2-1b"
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown model": (predict_with(model="gtp2"), "did you mean 'gpt2'?"),
    "unknown device": (predict_with(device="l4os"), "did you mean 'l40s'?"),
    "unknown host": (predict_with("--host", "defualt"), "did you mean 'default'?"),
    "unknown method": (predict_with("--method", "lara"), "did you mean 'lora'?"),
    "unknown method option": (predict_with("--method", "lora:rnk=4"), "rnk"),
    "option without value": (predict_with("--method", "lora:r="), "r=VALUE"),
    "method option of a wrong type": (predict_with("--method", "lora:r=four"), "four"),
    "option of another method": (predict_with("--method", "full:r=4"), "choose one of: engine"),
    "unknown command": (("perdict",), "perdict"),
    "unknown option": (predict_with("--batchsize", "4"), "--batchsize"),
    "missing option": (("predict", "--device", "l40s"), "--model"),
    "option without argument": (predict_with("--seq"), "--seq"),
    "unknown dtype": (predict_with("--dtype", "bf17"), "bf17"),
    "unknown optimizer": (predict_with("--optimizer", "adam"), "adamw"),
    "seq that is no number": (predict_with("--seq", "1k"), "1k"),
    "batch 0": (predict_with("--batch", "0"), "batch must be from 1"),
    "batch -1": (predict_with("--batch", "-1"), "batch must be from 1"),
    "batch beyond reason": (predict_with("--batch", str(10**30)), "batch must be from 1"),
    "seq 0": (predict_with("--seq", "0"), "seq must be from 1"),
    "grad-accum 0": (predict_with("--grad-accum", "0"), "grad_accum must be from 1"),
    "rank 0": (predict_with("--method", "lora:r=0"), "r must be from 1"),
    "half a rank": (predict_with("--method", "lora:r=1.5"), "r must be a whole number"),
    "rank above the width": (predict_with("--method", "lora:r=769"), "exceeds the width 768"),
    "target that matches nothing": (predict_with("--method", "lora:targets=q_proj"), "matches no linear layer"),
    "target that is a part of a name": (predict_with("--method", "lora:targets=attn"), "matches no linear layer"),
    "tied head as a target": (predict_with("--method", "lora:targets=lm_head"), "shares the embedding"),
    "layer outside": (predict_with("--method", "lora:layers=11-12"), "outside 0-11"),
    "negative layer": (predict_with("--method", "lora:layers=-1"), "layer"),
    "dropout 1": (predict_with("--method", "lora:dropout=1"), "dropout"),
    "dropout nan": (predict_with("--method", "lora:dropout=nan"), "dropout"),
    "unknown adapter dtype": (predict_with("--method", "lora:adapter_dtype=fp8"), "fp8"),
    "k above the layers": (predict_with("--method", "top_k:k=13"), "exceeds the 12 blocks"),
    "k 0": (predict_with("--method", "top_k:k=0"), "k must be from 1"),
    "unknown inner method": (predict_with("--method", "top_k:inner=dora"), "use full or lora"),
    "seq above the learned positions": (predict_with("--seq", "1025"), "exceeds its 1024 learned positions"),
    "amp in another 16-bit dtype": (predict_with("--amp", "bf16", "--dtype", "fp16"), "with dtype fp32 or bf16"),
    "flash2 in fp32": (predict_with("--dtype", "fp32", "--attention", "flash2"), "16-bit"),
    "an unknown way to run experts": (predict_with("--experts", "loop"), "is not one of 'grouped_mm', 'eager'"),
    "bitfit without biases": (predict_with("--method", "bitfit", model=LLAMA), "no bias"),
    "unknown axis": (("explain", "full", "lora", *MODEL, "--axes", "batch+rank"), "use batch, seq, size, targets"),
    "option given twice": (predict_with("--method", "lora:r=8,rank=16"), "r is given twice"),
    "no model": (("predict", "--device", "l40s"), "Missing option '--model'. Bundled name (see `perfmodel models`)"),
    "memory without a unit": (("advise", *MODEL, "--memory", "24"), "such as 24GB"),
    "no records": (("validate", "check"), "perfmodel validate measure"),
    "one method to explain": (("explain", "full", *MODEL), "explain takes two methods"),
    "a picture that is no SVG": (("explain", "full", "lora", *MODEL, "--plot", "why.png"), "why.svg"),
    "a page of one method": (("report", "--methods", "full", *MODEL), "at least two methods"),
    "broken config": (predict_with(model=BROKEN), "not valid JSON"),
    "folder without config": (predict_with(model="empty"), "no config.json"),
    "missing config": (predict_with(model="nowhere/config.json"), "nowhere/config.json"),
    "hub id": (predict_with(model="nobody/no-such-model"), "nobody/no-such-model"),
    "broken device file": (predict_with(device="broken.toml"), "broken.toml"),
    "missing device file": (predict_with(device="nowhere.toml"), "nowhere.toml"),
    "broken host file": (predict_with("--host", "broken.toml"), "broken.toml"),
    "one method to compare": (("compare", *MODEL, "--methods", "full"), "at least two"),
    "mistake in a compared method": (("compare", *MODEL, "--methods", "full", "lora:r=-1"), "r must be from 1"),
    "no value after --methods": (("compare", *MODEL, "--methods"), "--methods"),
}


@pytest.fixture
def folder(no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with broken files; the hub cannot be reached."""
    for name in ("broken", "empty", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / BROKEN).write_text('{"model_type": "llama",')
    (tmp_path / "mine" / "config.json").write_text(json.dumps(SMALL["llama"]))
    (tmp_path / "broken.toml").write_text("name = [")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake: str) -> None:
    """The line says what is wrong; a traceback or a page of usage would bury it."""
    args, expected = MISTAKES[mistake]
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert expected in result.stderr


@pytest.mark.parametrize("mistake", ["unknown model", "rank above the width", "unknown option", "hub id"])
def test_a_mistake_is_one_line_in_a_real_process_too(mistake: str) -> None:
    """The runner catches exceptions that a shell would show."""
    args, expected = MISTAKES[mistake]
    done = process("-m", "perfmodel", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert expected in done.stderr


def check_prediction(value: dict[str, Any]) -> None:
    assert set(value) == PREDICTION
    assert set(value["params"]) == {"total", "trainable", "active"}
    for figure in ("flops", "bytes", "kernels", "dispatches"):
        assert set(value[figure]) == PHASES
        assert all(isinstance(n, int) for n in value[figure].values())
    assert set(value["time_s"]) == PHASES | {"low", "high", "device_busy", "launch_bound_share"}
    assert all(isinstance(t, float) for t in value["time_s"].values())
    assert set(value["memory_bytes"]) == {
        "weights", "gradients", "optimizer", "activations", "peak", "low", "high", "host", "buffers"
    }  # fmt: skip
    assert set(value["setup"]) == set(Setup().as_dict())
    assert isinstance(value["fits"], bool)
    assert all(isinstance(note, str) for note in value["notes"])


def test_predict_prints_the_promised_json() -> None:
    """The keys of the design page, no more and no fewer."""
    value = value_of("predict", *MODEL, "--method", "lora:r=4", "--dtype", "fp32", "--amp", "bf16")
    check_prediction(value)
    assert (value["model"], value["device"], value["method"]) == ("gpt2", "l40s", "lora:r=4")
    assert {k: value["setup"][k] for k in ("batch", "seq", "dtype", "amp")} == {
        "batch": 2, "seq": 64, "dtype": "fp32", "amp": "bf16"
    }  # fmt: skip
    assert value["params"]["trainable"] == 12 * 4 * (768 + 3 * 768)


def test_compare_prints_the_promised_json() -> None:
    """The ratio is the baseline's step time over the method's, and the verdict follows from it."""
    names = ["full", "lora:r=16", "top_k:k=2"]
    value = value_of("compare", *MODEL, "--methods", *names)
    assert set(value) == {"baseline", "predictions", "speedup", "figures", "refused"}
    assert [f["method"] for f in value["figures"]] == names
    assert all(f["tokens_per_s"] > 0 and 0 < f["mfu"] < 1 for f in value["figures"])
    assert (value["baseline"], value["refused"]) == ("full", {})
    assert [p["method"] for p in value["predictions"]] == names
    base, *others = value["predictions"]
    for p in value["predictions"]:
        check_prediction(p)
    for speedup, p in zip(value["speedup"], others, strict=True):
        assert set(speedup) == {"method", "ratio", "low", "high", "verdict", "reason", "answer"}
        assert speedup["reason"] in speedup["answer"]
        assert speedup["method"] == p["method"]
        assert speedup["ratio"] == pytest.approx(base["time_s"]["total"] / p["time_s"]["total"])
        assert speedup["low"] <= speedup["ratio"] <= speedup["high"]
        assert speedup["verdict"] in ("faster", "slower", "same")


def test_explain_prints_the_promised_json() -> None:
    """Both predictions, the waterfall between them, what limits each phase, where the verdict turns."""
    value = value_of("explain", *MODEL, "full", "lora:r=16", "--axes", "batch+size")
    assert set(value) == {"answer", "a", "b", "speedup", "waterfall", "phases", "kernels", "kernels_of", "crossovers"}
    a, b = value["a"], value["b"]
    check_prediction(a)
    check_prediction(b)
    difference = b["time_s"]["total"] - a["time_s"]["total"]
    assert sum(bar["difference_s"] for bar in value["waterfall"]) == pytest.approx(difference, rel=1e-12)
    sizes = [abs(bar["difference_s"]) for bar in value["waterfall"]]
    assert sizes == sorted(sizes, reverse=True)
    for step in ("a", "b"):
        assert set(value["phases"][step]) == PHASES - {"total"}
        assert {p["regime"] for p in value["phases"][step].values()} <= {"compute", "memory", "launch"}
    assert [c["axis"] for c in value["crossovers"]] == ["batch", "r"]
    assert value_of("explain", *MODEL, "full", "lora:r=16", "--axes", "none")["crossovers"] == []


def test_explain_speaks_to_people() -> None:
    """The answer first, then the parts, the phases and the crossovers."""
    text = call("explain", *MODEL, "full", "lora:r=4")
    assert text.exit_code == 0, text.output
    lines = text.stdout.splitlines()
    assert lines[0].startswith("LoRA r=4 on c_attn ")
    for told in ("weight-gradient GEMMs", "B backward", "where the verdict turns", "batch 2 to 512: "):
        assert told in text.stdout


@pytest.mark.parametrize("before", [True, False])
def test_methods_takes_several_values_wherever_it_stands(before: bool) -> None:
    """`--methods full lora:r=16` reads better than an option per method; other options may follow or precede."""
    listed = ["--methods", "full", "lora:r=16", "norm"]
    args = [*listed, *MODEL] if before else [*MODEL, *listed]
    assert [p["method"] for p in value_of("compare", *args)["predictions"]] == ["full", "lora:r=16", "norm"]
    repeated = [x for name in listed[1:] for x in ("--methods", name)]
    assert value_of("compare", *MODEL, *repeated) == value_of("compare", *args)


@pytest.mark.usefixtures("folder")
def test_a_model_may_be_a_file_or_a_folder() -> None:
    """Own models need no registration."""
    by_file, by_folder = (value_of(*predict_with(model=m)) for m in ("mine", "mine/config.json"))
    assert by_file == by_folder
    assert by_file["model"] == "mine"


def test_predict_and_compare_also_speak_to_people() -> None:
    """The same run without --json gives text with the method, the model and the verdict."""
    text = call("predict", *MODEL, "--method", "lora:r=4")
    assert text.exit_code == 0, text.output
    assert "lora:r=4 on gpt2, l40s" in text.stdout
    text = call("compare", *MODEL, "--methods", "full", "lora:r=4")
    assert text.exit_code == 0, text.output
    assert "full" in text.stdout


@pytest.mark.parametrize(
    ("command", "key", "names"),
    [
        ("models", "model", set(architectures.model_names())),
        ("methods", "method", set(methods.registered())),
        ("devices", "device", set(profile.names())),
    ],
)  # fmt: skip
def test_lists_name_everything_that_can_be_asked_for(command: str, key: str, names: set[str]) -> None:
    """What is not listed is not found; the table and the JSON list the same."""
    rows = value_of(command)
    assert {row[key] for row in rows} == names
    assert len({frozenset(row) for row in rows}) == 1, "rows with different keys"
    text = call(command)
    assert text.exit_code == 0
    assert all(name in text.stdout for name in names)


def test_listed_sources_and_options_are_there() -> None:
    """A method without its paper, or a model without its source, cannot be checked."""
    assert all(row["source"] and row["what"] for row in value_of("methods"))
    assert all(row["source"] for row in value_of("models"))
    lora = next(row for row in value_of("methods") if row["method"] == "lora")
    assert {"r", "alpha", "targets", "dropout"} <= set(lora["options"])


def test_an_option_with_one_choice_is_not_offered() -> None:
    """What is listed and then refused, whatever is given, is an untrue word."""
    offers = {row["method"]: "implementation" in row["options"] for row in value_of("methods")}
    assert offers["lora"]
    assert offers["rslora"]
    assert offers["qlora"]
    assert not any(offers[method] for method in ("lora_gptq", "lora_8bit", "lora_fa", "full"))
    refused = call("predict", *MODEL, "--method", "lora_fa:implementation=unsloth")
    assert refused.exit_code == 2
    assert "choose one of: peft" in refused.stderr


def test_methods_fit_on_a_screen_one_line_each() -> None:
    """The list is for choosing: what trains, what it adds, where it comes from. Options are a second question."""
    result = call("methods")
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:-1]] == list(methods.registered()), "a line that wraps"
    for row in value_of("methods"):
        assert row["trains"], f"@method({row['method']!r}) says nothing of what trains"
        assert row["adds"], f"@method({row['method']!r}) says nothing of what it adds"


def test_a_method_is_described_with_its_options_on_demand() -> None:
    """`perfmodel methods NAME` is the manual of one method; a typing error names the nearest."""
    text = " ".join(call("methods", "gelora").stdout.split())
    assert "intrinsic dimensions" in text
    assert all(option in text for option in ("ranks", "samples", "targets"))
    assert value_of("methods", "gelora") == next(r for r in value_of("methods") if r["method"] == "gelora")
    result = call("methods", "gelroa")
    assert result.exit_code == 2
    assert "did you mean 'gelora'?" in result.stderr


HEAVY = ("torch", "transformers", "peft", "pandas", "scipy", "matplotlib", "hypothesis")


@pytest.mark.parametrize(
    "code",
    [
        "import perfmodel",
        "from perfmodel.integrations.trainer import StepPrediction; StepPrediction()",
        "from perfmodel import compare; compare('gpt2', ('full', 'lora:r=4'), device='l40s', batch=2, seq=64)",
        "from perfmodel.cli import main; main(['predict', '--model', 'gpt2', '--device', 'l40s'], standalone_mode=0)",
        "from perfmodel.cli import main; main(['models', '--json'], standalone_mode=0)",
        "from perfmodel import explain; explain('gpt2', 'full', 'lora:r=4', device='l40s', batch=2, seq=64)",
        "from perfmodel.report.page import report; report('gpt2', device='l40s', batch=2, seq=64, axes=())",
    ],
)
def test_no_heavy_package_is_loaded(code: str) -> None:
    """Answers come in milliseconds and without a GPU stack: one stray import would cost seconds."""
    if "report" in code:
        pytest.importorskip("jinja2")
    done = process("-c", f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "args", [("--help",), ("predict", "--help"), ("compare", "-h"), ("explain", "-h"), ("report", "-h")]
)
def test_help_exits_with_0(args: tuple[str, ...]) -> None:
    """The first thing anyone types."""
    result = call(*args)
    assert result.exit_code == 0, result.output
    assert result.stdout


def options(command: click.Command = main, *path: str) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    """Every option of every command."""
    if not isinstance(command, click.Group):
        yield from ((path, p) for p in command.params if isinstance(p, click.Option))
        return
    for name in command.list_commands(click.Context(command)):
        child = command.get_command(click.Context(command), name)
        assert child is not None
        yield from options(child, *path, name)


def test_a_folder_is_refused_where_a_file_is_written_or_read(tmp_path: Path) -> None:
    """Before the work begins: after an hour of measuring, a page that cannot be written is an hour lost."""
    refused = 0
    for path, option in options():
        if isinstance(option.type, click.Path) and option.type.file_okay and option.name != "peft_config":
            done = call(*path, option.opts[0], str(tmp_path))
            assert (done.exit_code, "is a directory" in done.stderr) == (2, True), (path, option.name)
            refused += 1
    assert refused > 15


def test_help_tells_what_is_taken_where_nothing_is_given() -> None:
    """A default that is nowhere to be read is found out by a run."""
    kinds = str | int | float | Path
    preset = [(path, o) for path, o in options() if isinstance(o.default, kinds) and not o.is_flag]
    assert len(preset) > 15
    for path, option in preset:
        _, told = option.get_help_record(click.Context(main)) or ("", "")
        assert f"[default: {option.default}" in told, (path, option.name)


@pytest.mark.parametrize("command", ["predict", "compare", "sweep", "explain", "advise"])
@pytest.mark.parametrize(("given", "missing"), [("--model gpt2", "--device"), ("--device l40s", "--model")])
def test_what_every_question_needs_is_asked_for(command: str, given: str, missing: str) -> None:
    """Whoever leaves out the device or the model reads which, and what it may be, in one line."""
    words = ["full", "lora"] if command == "explain" else []
    done = call(command, *words, *given.split())
    assert done.exit_code == 2
    assert f"Missing option '{missing}'" in done.stderr
    assert done.stderr.count("\n") == 1
