"""`perfmodel estimate`: what training takes by method and precision, each figure that of `predict`."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import SMALL

from perfmodel import UserError, predict
from perfmodel.cli import main
from perfmodel.questions.precisions import estimated, precisions
from perfmodel.setup import Setup


def asked(*words: str) -> Any:
    done = CliRunner().invoke(main, ["estimate", *words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_row_is_what_predict_says() -> None:
    """A table with figures of its own would be a second model."""
    e = estimated("gpt2", Setup(batch=2, seq=64, optimizer="sgd", dtype="fp16", amp=None), "a100-80gb-sxm")
    rows = [
        (precision, fields, method) for precision, (fields, methods) in precisions("bf16").items() for method in methods
    ]
    assert len(e.rows) == len(rows)
    for row, (precision, fields, method) in zip(e.rows, rows, strict=True):
        alone = predict("gpt2", method, device="a100-80gb-sxm", batch=2, seq=64, optimizer="sgd", **fields)
        assert (row.precision, row.prediction) == (precision, alone)


def test_a_gpu_without_bf16_units_is_answered_in_fp16() -> None:
    """PyTorch emulates bf16 on a T4: LoRA took twice as long, and an 8-bit base was called the fastest."""
    e = estimated("gpt2", Setup(batch=2, seq=64), "t4")
    assert {row.precision for row in e.rows} == precisions("fp16").keys()
    assert not any("bf16 units" in note for note in e.notes)
    emulated = predict("gpt2", "lora", device="t4", batch=2, seq=64, dtype="bf16").notes
    assert any("t4 has no bf16 units" in note and "--dtype fp16" in note for note in emulated)
    assert any("--amp fp16" in note for note in predict("gpt2", device="v100", dtype="fp32", amp="bf16").notes)
    assert not any("bf16 units" in note for note in predict("gpt2", device="l4").notes)


def test_the_answer_is_the_fastest_that_fits_or_the_smallest() -> None:
    """The row that a reader looks for, in words; the table and the JSON say the same."""
    said = asked("llama-3-8b")
    fit = [row for row in said["rows"] if row["fits"]]
    assert 0 < len(fit) < len(said["rows"])
    assert min(fit, key=lambda row: row["time_s"]["total"])["precision"] == "bf16"
    assert said["answer"].startswith("Fastest of what fits on l40s (47.7 GB): LoRA r=8 on q,v (bf16), ")
    none = asked("llama-3.1-70b", "--device", "rtx-4090")["answer"]
    assert none.startswith(
        "None of these fits on rtx-4090 (25.3 GB): QLoRA r=8 on q,v (4-bit base, bf16) takes least, "
    )
    text = CliRunner().invoke(main, ["estimate", "llama-3-8b"], env={"COLUMNS": "80"}).stdout
    table = text[text.index("precision") :].splitlines()
    assert [line.split("  ")[0] for line in table[1 : 1 + len(said["rows"])]] == [r["precision"] for r in said["rows"]]


def test_a_repository_is_known_by_its_name(no_hub: None) -> None:
    """As everywhere: a hub id of a bundled model needs no network, and the answer says what it was taken for."""
    assert asked("NousResearch/Meta-Llama-3-8B-Instruct")["rows"][0]["model"] == "llama-3-8b"
    text = CliRunner().invoke(main, ["estimate", "NousResearch/Meta-Llama-3-8B-Instruct"]).stdout
    assert "is taken for llama-3-8b" in " ".join(text.split())


def test_what_a_precision_refuses_is_left_out_and_said() -> None:
    """flash-attn has no fp32: the others are answered."""
    e = estimated("gpt2", Setup(attention="flash2"), "l40s")
    assert {row.precision for row in e.rows} == precisions("bf16").keys() - {"fp32"}
    left_out = [note.partition(" is left out: ")[0] for note in e.notes if "is left out" in note]
    assert left_out == ["full in fp32", "lora in fp32"]


def test_what_all_refuse_is_a_mistake() -> None:
    """An empty table is no answer."""
    with pytest.raises(UserError, match="exceeds its 1024 learned positions"):
        estimated("gpt2", Setup(seq=2048), "l40s")


def test_a_model_without_a_built_in_form_is_traced(tmp_path: Path) -> None:
    """Any model of transformers is answered, as by the other commands."""
    pytest.importorskip("peft")
    config = {**SMALL["llama"], "model_type": "helium", "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "traced" in " ".join(asked(str(tmp_path), "--seq", "16")["rows"][0]["notes"])


def test_adapters_without_default_targets_are_on_queries_and_values() -> None:
    """A mixture's LoRA and QLoRA were left out, and full fine-tuning "takes least" of what was answered."""
    found = estimated("qwen3-30b-a3b", Setup(), "h100-sxm")
    assert not found.left_out
    assert found.answer.startswith("Fastest of what fits on h100-sxm")
