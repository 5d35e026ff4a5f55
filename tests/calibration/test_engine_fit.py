"""`perfmodel validate engine`: the costs come back out of timings that were made with them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("peft")

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.devices import engine as engines
from perfmodel.devices import host
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from validate.calibration import engine
from validate.oracle.cases import SMALL

COSTS = {"fetch": 4.0, "release": 1.5, "reduce": 6.0, "settle": 0.5, "wrap": 0.0}  # DeepSpeed wraps no units
OF_FSDP = {"fetch": 0.5, "release": 1.0, "reduce": 2.0, "settle": 0.0, "wrap": 12.0}
SLOWER = 3.0  # the host that is measured


def rows(name: str, costs: dict[str, float]) -> list[engine.EngineRow]:
    """What `time_programs` would give on a host three times as slow as the default one, with these costs."""
    found, by = [], host.load()
    architecture = from_config(Config({**SMALL["llama"], "num_hidden_layers": 4}, "llama", "llama"))
    for method, checkpoint in engine.engine_programs():
        setup = Setup(batch=1, seq=4, dtype="fp32", checkpoint=checkpoint, optimizer="adamw-fused")
        bound = methods.parse(method).bind(architecture)
        ways = ({}, engine.options_of(name))
        plain, zero = (build(architecture, bound, replace(setup, **options), "cpu") for options in ways)
        expected, recorded = engine.dispatched(plain, by), engine.dispatched(zero, by)
        for phase in PHASES:
            units = engine.units(zero, phase)
            python = by.module * sum(costs[cost] * n for cost, n in zip(engines.COSTS, units, strict=True))
            found.append(
                engine.EngineRow(
                    f"{method} {checkpoint} {phase}", SLOWER * expected[phase], SLOWER * (recorded[phase] + python),
                    expected[phase], recorded[phase], units,
                )
            )  # fmt: skip
    return found


@pytest.mark.parametrize(("name", "costs"), [(engine.DEEPSPEED, COSTS), ("fsdp1", OF_FSDP)])
def test_costs_come_back_whatever_the_machine_is_like(
    name: str, costs: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on a slow CPU, they hold for a fast one: they are in modules of the host. The file is
    read back, and names the CPU where that is known."""
    made = rows(name, costs)
    found, error = engine.fit_engine(made)
    assert found == pytest.approx(costs, rel=1e-6, abs=1e-9)
    assert error < 1e-6
    assert engine.slowness(made) == pytest.approx(SLOWER)
    monkeypatch.setattr(engine, "version", lambda name: "1.0")
    for told, named in ((None, "a CPU"), ("EPYC 9R14", "EPYC 9R14")):
        monkeypatch.setattr(engine, "cpu_name", lambda told=told: told)
        engine.write_engine(name, found, error, made, tmp_path / "mine.toml")
        assert f"measured on {named}, " in (tmp_path / "mine.toml").read_text()
    monkeypatch.setattr(engines, "FOLDER", tmp_path)
    engines.ratios.cache_clear()
    assert engines.ratios("mine") == pytest.approx(costs, rel=0.01, abs=1e-9)


@pytest.mark.parametrize("checkpoint", engine.CHECKPOINTS)
def test_what_is_timed_recomputes_as_what_is_recorded(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the seconds leave over beside the recorded calls are the costs: both have to be of one program."""
    timed: list[engine.Running] = []

    def in_turns(programs: list[engine.Running]) -> list[engine.Seconds]:
        timed.extend(programs)
        return [dict.fromkeys(PHASES, 1.0) for _ in programs]

    monkeypatch.setattr(engine, "_in_turns", in_turns)
    made = engine._at_depth(engine.DEEPSPEED, engine._plain, "lora:r=4", checkpoint, 2)
    assert [row.name for row in made] == list(PHASES)
    assert [program.model.is_gradient_checkpointing for program in timed] == [checkpoint != "none"] * 2


def test_without_deepspeed_it_says_what_to_install() -> None:
    """DeepSpeed is needed by this command alone, so few have it."""
    code = "import sys; sys.modules['deepspeed'] = None; from perfmodel.cli import main; main(['validate', 'engine'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'perfmodel[engine]'" in result.stderr
