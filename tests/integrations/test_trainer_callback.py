"""The Trainer callback in real runs of tiny models: it predicts, explains and costs next to nothing."""

import mmap
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from helpers import config_of
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from perfmodel import UserError
from perfmodel.architectures import Config, from_config
from perfmodel.imports.packing import NEVER_CUT
from perfmodel.integrations import program
from perfmodel.integrations.findings import Findings
from perfmodel.integrations.program import CPU, trainer_program
from perfmodel.integrations.trainer import StepPrediction, resident_bytes
from perfmodel.resources import DATA
from perfmodel.setup import Setup
from perfmodel.tracing.programs import build_model
from validate.oracle.cases import MIXTURES

CONFIG = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 512,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@dataclass
class SFTArguments(TrainingArguments):
    """Of TRL's SFTConfig what tells whose it is."""

    max_length: int | None = 1024
    packing: bool = False
    loss_type: str = "nll"


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random tokens; may take a while to come, and may end in padding."""

    def __init__(self, seq: int = 64, padding: int = 0, wait: float = 0.0) -> None:
        self.seq, self.padding, self.wait = seq, padding, wait

    def __len__(self) -> int:
        return 400

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        time.sleep(self.wait)
        ids = torch.randint(1, 512, (self.seq,))
        mask = torch.ones_like(ids)
        if self.padding:
            mask[-self.padding :] = 0
        return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def train(
    folder: Path, callback: StepPrediction, samples: Samples, *, lora: bool | str = False, steps: int = 9,
    logger: TrainerCallback | None = None, **arguments: Any,
) -> list[str]:  # fmt: skip
    """What the callback printed in a real run, and logged where there is a logger."""
    model: Any = LlamaForCausalLM(LlamaConfig(**CONFIG))
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    if lora:
        model = {True: get_peft_model, "injected": lambda m, c: inject_adapter_in_model(c, m)}[lora](model, adapters)
    printed: list[str] = []
    callback.show = printed.append
    options = {"per_device_train_batch_size": 4, "logging_steps": 3, **arguments}
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=samples, callbacks=[logger] if logger else [])
    callback.log = trainer.log if logger else None
    trainer.add_callback(callback)
    trainer.train()
    return printed


def found(callback: StepPrediction) -> Findings:
    assert callback.found is not None
    return callback.found


@pytest.mark.parametrize("lora", [False, True, "injected"])
def test_a_real_run_is_predicted_from_the_trainer_alone(tmp_path: Path, lora: bool | str) -> None:
    """Adapters may be in the model itself. Model, method and setup need no retyping; the causes sum to the gap."""
    callback = StepPrediction(warm_up=2, steps=5)
    (text,) = train(tmp_path, callback, Samples(), lora=lora, gradient_accumulation_steps=2, optim="adamw_torch")
    p = found(callback).planned
    assert p.method == ("lora:r=4,targets=q_proj+v_proj,dropout=0.1" if lora else "full")
    assert (p.setup.batch, p.setup.seq, p.setup.grad_accum, p.setup.dtype) == (4, 64, 2, "fp32")
    assert p.total_params > 500_000
    gap = found(callback).step - found(callback).predicted
    assert sum(c.seconds for c in found(callback).causes) == pytest.approx(gap)
    assert "predicted" in text
    assert "measured" in text


@pytest.mark.parametrize(("length", "named"), [(256, 256), (None, None)])
def test_a_run_that_cuts_no_sample_names_no_length(tmp_path: Path, length: int | None, named: int | None) -> None:
    """TRL's default of 1,024 tokens is not that of a run that empties it: its batches are as long as its samples."""
    arguments = SFTArguments(str(tmp_path), use_cpu=True, max_length=length)
    program = trainer_program(LlamaForCausalLM(LlamaConfig(**CONFIG)), arguments)
    assert program.length == named
    assert not any(words.startswith(NEVER_CUT) for words in program.differences)


UNLIKE = "note: not the run's step as it is: "


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"rank_pattern": {"q_proj": 32}}, "rank_pattern has"),
        ({"exclude_modules": ["v_proj"], "lora_bias": True}, "exclude_modules, lora_bias have"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices has"),
        ({"bias": "all"}, "bias 'all' has"),
    ],
)
def test_an_adapter_beyond_its_built_in_form_is_not_answered_as_a_plain_one(
    tmp_path: Path, asked: dict[str, Any], told: str
) -> None:
    """Eight times the rank, taken for the model's error, would be blamed on the host."""
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **asked)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**CONFIG)), adapters)
    with pytest.raises(UserError) as error:
        trainer_program(model, TrainingArguments(str(tmp_path), use_cpu=True))
    assert str(error.value) == f"peft_config: {told} no built-in form: give traced=True"


def test_what_a_run_asks_beyond_the_predicted_step_is_told(tmp_path: Path) -> None:
    """As of the same keys in a file; a run that asks for nothing else hears nothing."""
    (text,) = train(tmp_path, StepPrediction(warm_up=1, steps=2), Samples(), steps=3)
    assert UNLIKE not in text
    beyond = {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, "weight_decay": 0.1}
    (text,) = train(tmp_path, StepPrediction(warm_up=1, steps=2), Samples(), steps=3, **beyond)
    told = next(line for line in text.splitlines() if line.startswith(UNLIKE)).removeprefix(UNLIKE)
    assert told == "without label smoothing (label_smoothing_factor); without NEFTune's noise (neftune_noise_alpha)"


@pytest.mark.parametrize("asked", [{"full_determinism": True}, {"optim_target_modules": "all-linear"}])
def test_a_run_of_another_kind_is_refused_as_its_file_is(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not modelled"):
        trainer_program(
            LlamaForCausalLM(LlamaConfig(**CONFIG)), TrainingArguments(str(tmp_path), use_cpu=True, **asked)
        )


def test_other_parameters_than_those_of_the_model_are_told(tmp_path: Path) -> None:
    """Whatever was misread: what trains can be counted."""
    callback = StepPrediction(method="lora:r=8,targets=q_proj+v_proj", warm_up=1, steps=2)
    (text,) = train(tmp_path, callback, Samples(), lora=True, steps=3)
    assert "note: 5,376 parameters of the model train, 10,752 are predicted to" in text


class Logger(TrainerCallback):
    """What reporting callbacks get: (step, figures) in their order."""

    def __init__(self) -> None:
        self.got: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.got.append((state.global_step, dict(logs)))


@pytest.mark.parametrize(
    ("release", "asked", "kernels"),
    [
        ("1.16.0", "trl", "trl"), ("2.0.0.dev0", "liger+trl", "liger+trl"), ("1.15.2", "trl", "torch"),
        ("0.24", "liger+trl", "liger"), (None, "trl", "torch"), ("1.16.0", "torch", "torch"),
    ],
)  # fmt: skip
def test_trls_head_is_fused_where_the_trl_of_the_process_fuses_it(
    monkeypatch: pytest.MonkeyPatch, release: str | None, asked: str, kernels: str
) -> None:
    """Older ones keep logits in memory, or chunks of them; so does any of a model that it is not modelled for."""
    monkeypatch.setitem(sys.modules, "trl", None if release is None else SimpleNamespace(__version__=release))
    assert program._kernels(asked, from_config(config_of("llama"))) == kernels
    assert "trl" not in program._kernels(asked, from_config(config_of("gpt2")))


def test_predicted_and_measured_reach_the_loggers_of_the_trainer(tmp_path: Path) -> None:
    """TensorBoard, W&B and MLflow get what any logger gets, at the end of the window; no loss is lost to it."""
    callback, logger = StepPrediction(warm_up=2, steps=4), Logger()
    train(tmp_path, callback, Samples(), logger=logger)
    ((step, figures),) = [(at, logs) for at, logs in logger.got if "perfmodel/step_predicted_s" in logs]
    f = found(callback)
    assert step == 6
    assert figures["perfmodel/step_predicted_s"] == f.predicted
    assert figures["perfmodel/step_measured_s"] == f.step
    assert figures["perfmodel/peak_memory_predicted_bytes"] == f.planned.memory.peak
    assert "perfmodel/peak_memory_measured_bytes" not in figures  # a CPU keeps no record
    assert replace(f, peak=7).metrics()["perfmodel/peak_memory_measured_bytes"] == 7
    assert [at for at, logs in logger.got if "loss" in logs] == [3, 6, 9]


@pytest.mark.parametrize(("memory", "fits"), [(5e6, False), (20e9, True)])
def test_what_will_not_fit_is_said_before_the_first_step(tmp_path: Path, memory: float, fits: bool) -> None:
    """After an hour of loading, the batch that breaks the run should have been known; who fits hears nothing."""
    small = tmp_path / "small.toml"
    text = (DATA / "devices" / f"{CPU}.toml").read_text()
    small.write_text(re.sub(r"(?m)^memory_bytes = \d+$", f"memory_bytes = {memory}", text))
    callback = StepPrediction(str(small), warm_up=3)

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            callback.show(f"step {state.global_step}")

    *warning, first, second = train(tmp_path, callback, Samples(), steps=2, logger=Steps())
    assert (first, second) == ("step 1", "step 2")
    assert bool(warning) != fits
    for line in warning:
        assert line.startswith("perfmodel: this will not fit: full with ")
        assert "batch 4 x 64 tokens" in line
        assert line.endswith("small has 5.00 MB (perfmodel advise finds what fits)")


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_is_predicted_from_a_trace_too(tmp_path: Path, lora: bool) -> None:
    """Models and tuners without a built-in form; where there is one, the counts are the same."""
    counted = []
    for traced in (True, False):
        callback = StepPrediction(warm_up=1, steps=3, traced=traced)
        (text,) = train(tmp_path, callback, Samples(), lora=lora, steps=5)
        assert "measured" in text
        p = found(callback).planned
        counted.append((p.flops, p.kernels, p.total_params, p.trainable_params))
    assert counted[0] == counted[1]


def test_it_costs_less_than_one_percent(tmp_path: Path) -> None:
    """What watches must not be what is seen."""
    callback = StepPrediction(warm_up=2, steps=10)
    train(tmp_path, callback, Samples(), steps=14)
    assert callback.own_seconds / 10 < 0.01 * found(callback).step


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_that_was_given_back_is_in_the_peak_alone() -> None:
    """A step on a CPU is judged by how far the peak rose over what the process held before: the two must differ."""
    size = 64 * 2**20
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
    assert resident_bytes(peak=True) - resident_bytes() > size / 2


def test_slow_data_is_told_apart_from_the_step(tmp_path: Path) -> None:
    """The commonest reason why a real run is slower than any model of its step."""
    callback = StepPrediction(warm_up=1, steps=4)
    (text,) = train(tmp_path, callback, Samples(wait=0.02))
    assert "waiting for data" in text
    data = next(c.seconds for c in found(callback).causes if "data" in c.what)
    assert data == pytest.approx(4 * 0.02, rel=0.5)


def test_short_and_padded_batches_are_told(tmp_path: Path) -> None:
    """A planned length of 256 tokens says little about batches of 64."""
    callback = StepPrediction(warm_up=1, steps=4, seq=256)
    (text,) = train(tmp_path, callback, Samples(padding=16))
    assert found(callback).planned.setup.seq == 256
    assert "256 tokens a step, 1,024 were planned; 25 % of them are padding" in text
    assert found(callback).seen < found(callback).predicted


def test_what_cannot_be_predicted_is_one_line_and_the_run_goes_on(tmp_path: Path) -> None:
    """Hours of training must not end because of a comment on them."""
    callback = StepPrediction("no-such-device", warm_up=1, steps=2)
    (text,) = train(tmp_path, callback, Samples(), steps=5)
    assert text.startswith("perfmodel: no prediction: unknown device 'no-such-device'")
    assert len(text.splitlines()) == 1
    assert callback.found is None


def test_what_fails_here_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be anything, and so may what reading it raises."""
    monkeypatch.setattr("perfmodel.integrations.trainer.trainer_program", lambda *_, **__: 1 / 0)
    (text,) = train(tmp_path, StepPrediction(warm_up=1, steps=2), Samples(), steps=3)
    assert text == "perfmodel: no prediction: ZeroDivisionError: division by zero"


def test_a_run_shorter_than_the_window_is_told_at_its_end(tmp_path: Path) -> None:
    """A trial of three steps has an answer too, logged before the loggers close what they write to."""
    callback, logger = StepPrediction(warm_up=1, steps=50), Logger()
    (text,) = train(tmp_path, callback, Samples(), steps=3, logger=logger)
    assert found(callback).steps == 2
    assert "2 steps of full" in text
    assert [next(iter(logs)) for _, logs in logger.got] == ["perfmodel/step_predicted_s", "loss", "train_runtime"]


@pytest.mark.parametrize("experts", ["grouped_mm", "eager", "batched_mm"])
def test_a_mixture_runs_its_experts_as_the_model_says(tmp_path: Path, experts: str) -> None:
    """A loop over experts takes many times as long as grouped products; what is not modelled ends in one line."""
    model = build_model(Config(MIXTURES["mixtral"], "mixtral", "mixtral"), Setup())
    model.set_experts_implementation(experts)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    if experts == "batched_mm":
        with pytest.raises(UserError, match="did you mean 'grouped_mm'"):
            trainer_program(model, arguments)
    else:
        assert trainer_program(model, arguments).setup.experts == experts
