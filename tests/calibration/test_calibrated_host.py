"""A host's fit cannot lie: what nothing measured stays the default's, and what predicts badly is not written."""

import json
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("scipy")
pytest.importorskip("peft")

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.cli import main
from perfmodel.devices import host as host_files
from perfmodel.prediction.predict import predict
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from validate.calibration import hosts, verify

TRUTH = replace(host_files.load(), call=4e-6, node=5e-6, module=50e-6, hook=12e-6, loop_call=3e-6)


@cache
def timed() -> tuple[hosts.Timed, ...]:
    """The programs of a calibration as a host of known costs dispatches them, with 2 % of noise."""
    noise = np.random.default_rng(0)
    found = []
    for config, method, checkpoint, optimizer in hosts.host_programs():
        architecture = from_config(config)
        setup = Setup(batch=1, seq=4, dtype="fp32", checkpoint=checkpoint, optimizer=optimizer)
        step = build(architecture, methods.parse(method).bind(architecture), setup, "cpu")
        seconds = {p: s * float(np.exp(noise.normal(0, 0.02))) for p, s in hosts.dispatched(step, TRUTH).items()}
        found.append(hosts.Timed(f"{config.name} {method} {checkpoint}", step, seconds))
    return tuple(found)


def test_what_no_program_holds_stays_the_defaults_and_is_named(tmp_path: Path) -> None:
    """Hooks of an engine once came out as 0.1 s each, so that a small step was predicted to take a minute."""
    found, default = hosts.fit_host(timed()), host_files.load()
    unmeasured = {"launch_call", "launch", "graph_launch", "compiled_kernel", "compiled_graph", "guard"}
    assert set(found.caveats.kept) == unmeasured | {"fetch", "release", "reduce", "settle", "wrap", "search"}
    assert all(getattr(found.host, name) == getattr(default, name) for name in found.caveats.kept)
    for cost in ("call", "module", "hook", "loop_call"):
        assert getattr(found.host, cost) == pytest.approx(getattr(TRUTH, cost), rel=0.2), cost
    path = tmp_path / "host.toml"
    hosts.write_host(found.host, path, found.provenance(verify.of_programs(found)))
    table = tomllib.loads(path.read_text())
    assert table["fit"]["kept"] == list(found.caveats.kept)
    assert "fetch" in table["source"]
    step = [predict("smollm2-135m", "full", device="l40s", batch=1, seq=64, host=h) for h in (str(path), TRUTH)]
    assert step[0].time.phases["total"] == pytest.approx(step[1].time.phases["total"], rel=0.1)


def test_programs_are_as_deep_as_their_costs_need() -> None:
    """Of two or three blocks hardly anything would be told by what lies around them, which is timed with them."""
    assert {from_config(config).layers for config, *_ in hosts.host_programs()} == {hosts.LAYERS}
    with pytest.raises(FrozenInstanceError):  # every test here, and every fold of a fit, has the same ones
        timed()[0].name = "another"  # type: ignore[misc]


def test_a_cost_that_goes_to_its_bound_is_named() -> None:
    """A floor that the microbenchmarks give must not pass for a measurement of real steps."""
    found = hosts.fit_host(timed(), least={"module": 80e-6})
    assert "module" in found.caveats.at_bound
    assert found.host.module == pytest.approx(80e-6)


def test_programs_left_out_judge_the_fit() -> None:
    """An error on what was fitted alone says little: every fifth program is predicted without having been seen."""
    found = hosts.fit_host(timed())
    assert (len(found.fitted), len(found.left_out)) == (29, 7)
    assert not {t.name for t in found.fitted} & {t.name for t in found.left_out}
    errors = verify.of_programs(found)
    assert errors["fitted"].mean < 0.03
    assert errors["left_out"].mean < 0.03
    slow = replace(found, host=TRUTH, left_out=[replace(t, seconds=dict.fromkeys(t.seconds, 1e-6)) for t in timed()])
    assert verify.refusal(verify.of_programs(slow)).startswith("predictions of programs left out")


@pytest.mark.parametrize("words", [["validate", "host"], ["calibrate", "--device", "cpu"]])
def test_a_fit_that_predicts_nothing_is_not_written(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what was measured is no error of a machine: such files would be used in good faith."""
    if words[0] == "calibrate":
        from validate.calibration import calibrate as module

        monkeypatch.setattr(module, "microbenchmarks", lambda *arguments: [{"kind": "environment"}])
        monkeypatch.setattr(module, "device_file", lambda *arguments: ("", {}))
        monkeypatch.setattr(module, "profile_of_text", lambda *arguments: SimpleNamespace(name="A box", kind="cpu"))
        monkeypatch.setattr(verify, "of_programs", lambda found, on: {"left_out": verify.Errors.of([0.6])})
        monkeypatch.setattr(verify, "of_steps", lambda *arguments: verify.Errors.of([0.1]))
        monkeypatch.setattr(hosts, "kernel_seconds", lambda step, on: dict.fromkeys(hosts.PHASES, 0.0))
    ready: Any = iter(timed())
    monkeypatch.setattr(hosts, "time_program", lambda *program: next(ready))
    monkeypatch.setattr(hosts, "lsq_linear", lambda a, b, bounds: SimpleNamespace(x=0.1 * np.ones(a.shape[1])))
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1, done.output
    assert "more than 50 %: nothing was written" in " ".join(done.output.split())
    assert not list(tmp_path.rglob("*.toml*"))


def test_costs_are_shown_one_below_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds end where their head ends, remarks begin where theirs begins: what is small is seen at a glance."""
    ready: Any = iter(timed())
    monkeypatch.setattr(hosts, "time_program", lambda *program: next(ready))
    monkeypatch.setenv("COLUMNS", "100")
    done = CliRunner().invoke(main, ["validate", "host", "--output", str(tmp_path / "host.toml")])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    head = next(line for line in lines if line.rstrip().endswith("not measured"))
    rows = [line for line in lines if line.split(" ")[0] in hosts.COSTS]
    assert len(rows) == len(hosts.COSTS)
    end, remarks = head.index("seconds") + len("seconds"), head.index("not measured")
    for row in rows:
        assert row[:end].rstrip() == row[:end]
        assert row[end:].strip() in ("", "the default host's")
        assert not row[end:].strip() or row.index("the default") == remarks


def test_real_steps_are_measured_and_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last judge of a calibration is a step that has nothing to do with its microbenchmarks."""
    monkeypatch.setattr(verify, "MODELS", {"llama": {**verify.MODELS["llama"], "num_hidden_layers": 1}})
    monkeypatch.setattr(verify, "TIMED", 2)
    monkeypatch.setattr(verify, "native_bf16", lambda: False)
    from perfmodel.devices import profile

    errors = verify.of_steps(profile.load("cpu-xeon-2.5ghz-1t"), host_files.load(), 1)
    assert errors.number == 2
    assert 0 < errors.mean < 20


COMMANDS = (
    ["calibrate", "--device", "cpu"], ["validate", "host"], ["validate", "engine"], ["validate", "counts"],
    ["validate", "fit", "--records", __file__], ["validate", "fit", "--kernels", "."], ["validate", "coverage"],
    ["validate", "measure", "--device", "cpu"], ["validate", "tuners"],
)  # fmt: skip


def test_without_the_extra_a_command_says_so_in_one_line() -> None:
    """A user who installed the plain package learns what to install, not where an import stands."""
    program = f"""
import json, sys
sys.modules["torch"] = sys.modules["scipy"] = None
from click.testing import CliRunner
from perfmodel.cli import main
done = [CliRunner().invoke(main, words) for words in {COMMANDS!r}]
print(json.dumps([(d.exit_code, d.stderr) for d in done]))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for words, (code, said) in zip(COMMANDS, json.loads(found.stdout), strict=True):
        assert (code, said.count("\n")) == (2, 1), (words, said)
        assert "pip install 'perfmodel[validate]'" in said, words
