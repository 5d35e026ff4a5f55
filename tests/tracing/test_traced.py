"""`predict --traced` takes its ops from the real program: the same Step as the tape's wherever both exist."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import by_phase, config_of, setup_of, step_of

pytest.importorskip("peft")

from perfmodel import cli
from perfmodel.architectures import Config, load
from perfmodel.calls import costs
from perfmodel.devices import host, profile
from perfmodel.optimizers import optimizer_names
from perfmodel.prediction.memory import peak_bytes
from perfmodel.prediction.predict import of_step, predict, resolve
from perfmodel.recording import record
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing import parts, recorded, traced

NAMES = ("llama", "gpt2", "opt", "gpt_neo", "bert", "gpt_neox")
OF_REFERENCE = {"objective": "grpo", "reference": "adapter-off", "prompt": 8}
METHODS = ("full", "lora:r=4", "lora:r=4,targets=all-linear,dropout=0.1", "ia3")


def both(name: str, method: str, setup: Setup, device: str, **changes: Any) -> tuple[Step, Step]:
    """The traced and the taped Step of a model with seven layers."""
    config = config_of(name, layers=7, **changes)
    architecture, bound = resolve(config, method)
    on = profile.load("a100-80gb-sxm" if device == "cuda" else "cpu-epyc-genoa-2c")
    built, _ = traced.of_method(config, method, setup, on)
    return built, record.build(architecture, bound, setup, device, "8.0")


def ops(built: Step, phase: str) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for group in built.groups:
        for part in group.parts:
            for op in part.ops:
                if part.phase == phase and not op.view:
                    found[op.name, op.inputs, op.outputs, op.attrs] += int(part.repeat * group.repeat)
    return found


def accounts(built: Step, phase: str) -> Counter[Any]:
    """On whose account calls run, and whether a checkpoint runs them again; attention is told by its kernel."""
    found: Counter[Any] = Counter()
    for part, op, times in built.ops():
        if part.phase == phase and not op.view:
            owner = "base" if op.owner == "attention" else op.owner
            found[op.name, op.inputs, op.outputs, owner, op.recompute] += int(times)
    return found


def cells() -> Iterator[tuple[str, str, str, str]]:
    """Every architecture with every method, checkpoints and devices in turn.

    GPT-Neo moves a scalar from the host to the GPU in every layer, Falcon its places of key and value: a trace on the
    CPU cannot see that.
    """
    for i, name in enumerate(NAMES):
        for j, method in enumerate(METHODS):
            device = "cpu" if name == "gpt_neo" else ("cuda", "cpu", "cuda")[(i + j) % 3]
            yield name, method, ("none", "block")[(i + j) % 2], device


@pytest.mark.parametrize(("name", "method", "checkpoint", "device"), cells())
def test_forward_and_backward_hold_the_tapes_ops(name: str, method: str, checkpoint: str, device: str) -> None:
    """Op for op, with shapes, dtypes and layouts, seven layers from traces of a few; on CUDA its kernels too."""
    real, tape = both(name, method, setup_of(name, batch=2, seq=16, checkpoint=checkpoint), device)
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)
        assert accounts(real, phase) == accounts(tape, phase)
    assert real.total == tape.total
    assert real.trainable == tape.trainable


@pytest.mark.parametrize("name", ["seed_oss", "gpt_bigcode"])
def test_attention_without_a_kernel_drops_out_as_cuda_does(name: str) -> None:
    """Grouped heads in fp32: sdpa's own dropout was the CPU's three calls."""
    real, tape = both(name, "lora:r=4,targets=all-linear", setup_of(name, batch=1, seq=33, dtype="fp32"), "cuda")
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)
    assert any(op.name == "_safe_softmax" for _, op, _ in real.ops())
    assert peak_bytes(real) == pytest.approx(peak_bytes(tape), rel=0.01)


@pytest.mark.parametrize(
    ("name", "head", "device"),
    [
        ("bert", "BertForSequenceClassification", "cuda"),
        ("llama", "LlamaForTokenClassification", "cuda"),
        ("falcon", "FalconForCausalLM", "cpu"),
    ],
)
def test_the_head_that_a_config_names_is_traced(name: str, head: str, device: str) -> None:
    """A classifier that is traced as a language model would be another program, with another adapter of PEFT's."""
    real, tape = both(name, "lora:r=4", setup_of(name, batch=2, seq=16), device, architectures=[head])
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)
    assert (real.total, real.trainable) == (tape.total, tape.trainable)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"batch": 1}),
        ("mistral", {"seq": 40, "checkpoint": "block"}),  # its window binds
        ("gemma3_text", {"seq": 40, "dtype": "fp32", "amp": "bf16"}),
        ("bert", {}),
    ],
)
def test_flash_attn_is_traced_without_the_package(name: str, options: dict[str, Any]) -> None:
    """What most configs of large models ask for; its windows and transformers' questions to it are in the trace."""
    setup = setup_of(name, **{"batch": 2, "seq": 16, "attention": "flash2", **options})
    real, tape = both(name, "lora:r=4", setup, "cuda")
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)
        assert accounts(real, phase) == accounts(tape, phase)


def test_cerebras_gpt_is_a_gpt2_whose_gelu_is_one_op() -> None:
    real, tape = both("gpt2", "lora:r=4", setup_of("gpt2", batch=2, seq=16), "cuda", activation_function="gelu")
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)


@pytest.mark.parametrize("objective", [{"objective": "dpo"}, {"objective": "grpo"}, OF_REFERENCE])
@pytest.mark.parametrize("precision", [{}, {"dtype": "fp32", "amp": "bf16"}])
def test_an_objective_makes_the_tapes_products(objective: dict[str, Any], precision: dict[str, Any]) -> None:
    """Pairs, the reference and the logits that are kept: each is a good part of the step."""
    taken = Setup(batch=2, seq=33, attention="sdpa", grad_accum=2, **objective, **precision)
    built, taped = both("llama", "lora:r=4", taken, "cuda")
    assert by_phase(built) == by_phase(taped)
    assert built.weight_bytes == taped.weight_bytes


@pytest.mark.parametrize(("objective", "drops"), [("dpo", False), ("grpo", True)])
def test_dropout_is_off_where_the_trainer_switches_it_off(objective: str, drops: bool) -> None:
    """DPO's compares two passes of one model: random masks would be all of the difference."""
    for built in both("llama", "lora:r=4,dropout=0.1", Setup(batch=2, seq=33, objective=objective), "cuda"):
        assert any("dropout" in name for name, *_ in ops(built, "forward")) == drops


def test_the_update_follows_from_the_list_of_parameters() -> None:
    real, tape = both("llama", "lora:r=4", setup_of("llama", batch=2, seq=16), "cpu")
    for count in (costs.flops, costs.kernels, lambda op: op.bytes_read + op.bytes_written):
        sums = [sum(count(op) * n for op, n in updates(built)) for built in (real, tape)]
        assert sums[0] == sums[1]


def updates(built: Step) -> list[tuple[Any, int]]:
    return [(op, int(p.repeat)) for g in built.groups for p in g.parts if p.phase == "optimizer" for op in p.ops]


def test_micro_batches_are_traced_once_each() -> None:
    real, tape = both("llama", "lora:r=4", setup_of("llama", batch=2, seq=16, grad_accum=3), "cpu")
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)
        assert accounts(real, phase) == accounts(tape, phase)


def test_peak_memory_is_the_tapes() -> None:
    real, tape = both("llama", "lora:r=4", setup_of("llama", batch=4, seq=64), "cpu")
    assert int(peak_bytes(real)) == pytest.approx(int(peak_bytes(tape)), rel=0.01)


def test_gradients_wait_once_where_blocks_without_any_come_last() -> None:
    """They were counted again for each block that was not traced: top-K of 8B took three times its memory."""
    for k in (1, 2):
        real, tape = both("llama", f"top_k:k={k}", setup_of("llama", batch=4, seq=64), "cpu")
        assert int(peak_bytes(real)) == pytest.approx(int(peak_bytes(tape)), rel=0.02)


@pytest.mark.parametrize("method", ["full", "lora:r=4"])
def test_every_optimizer_updates_what_it_updates_on_the_tape(method: str, tmp_path: Path) -> None:
    """Of a traced model Muon knew no matrix of a block, and was AdamW."""
    config = config_of("llama", layers=7)
    real = recorded.traced(config, tmp_path)
    for optimizer in optimizer_names():
        if (method, optimizer) == ("lora:r=4", "adam-mini"):  # it takes no adapters
            continue
        asked: dict[str, Any] = {"batch": 1, "seq": 16, "optimizer": optimizer, "device": "a100-80gb-sxm"}
        found, tape = (predict(model, method, **asked) for model in (real, config))
        for figure in ("flops", "bytes", "kernels", "dispatches"):
            assert getattr(found, figure)["optimizer"] == getattr(tape, figure)["optimizer"], optimizer
        assert found.memory.optimizer == tape.memory.optimizer, optimizer


def test_layers_that_are_not_alike_are_all_traced() -> None:
    """LoRA on two named layers of seven: cutting the model would lose them."""
    config = config_of("llama", layers=7)
    values = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1, 5]}
    built, _ = traced.of_peft(config, values, setup_of("llama", batch=1, seq=16))
    assert built.trainable == 2 * 4 * (64 + 64)
    assert sum(n for (name, *_), n in ops(built, "forward").items() if name == "mm") == 7 * 7 + 1 + 2 * 2


def test_mica_trains_one_factor_alone() -> None:
    """peft freezes B, which MiCA takes from the weight's singular vectors."""
    values = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "init_lora_weights": "mica"}
    built, _ = traced.of_peft(config_of("llama", layers=2), values, setup_of("llama", batch=1, seq=16))
    assert built.trainable == 2 * 4 * 64


@pytest.mark.parametrize("kind", ["FOURIERFT", "WAVEFT"])
def test_places_that_peft_leaves_on_the_host_are_copied_in_every_forward_pass(kind: str) -> None:
    """They are neither parameters nor buffers, so that nothing moves them; FourierFT's tape has the copies too."""
    values = {"peft_type": kind, "n_frequency": 16, "target_modules": ["q_proj"]}
    built, _ = traced.of_peft(config_of("llama", layers=2), values, setup_of("llama", batch=1, seq=16))
    steps = [built, step_of("llama", "fourierft:n=16,targets=q_proj", layers=2, device="cuda")]
    for step in steps:
        copies = [(part.phase, op.outputs[0].shape) for part, op, n in step.ops() for _ in range(n) if op.attrs.bus]
        assert copies == [("forward", (2, 16))] * 2


def test_a_peft_config_is_enough(tmp_path: Path) -> None:
    """A tuner that the tape does not know, from the command line to the answer."""
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "RANDLORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}))
    model = tmp_path / "config.json"
    model.write_text(json.dumps(config_of("llama").values))
    arguments = ["predict", "--model", str(model), "--device", "l40s", "--peft-config", str(file), "--json"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["method"] == "randlora"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "adapter_config.json"),
        ("[]", "keys and values"),
        ('{"peft_type": "LORAA"}', "LORA"),
        ('{"peft_type": "LORA", "target_modules": ["nothing"]}', "peft cannot apply LORA"),
    ],
)
def test_a_bad_peft_config_ends_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(text)
    arguments = ["predict", "--model", "gpt2", "--device", "l40s", "--peft-config", str(file)]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_peft_config_and_a_method_exclude_each_other(tmp_path: Path) -> None:
    arguments = ["predict", "--model", "gpt2", "--device", "l40s", "--method", "full", "--peft-config", str(tmp_path)]
    assert CliRunner().invoke(cli.main, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("llama", "lora:r=4", {"dtype": "bf16"}),
        ("llama", "lora:r=4,targets=all-linear,dropout=0.1", {"dtype": "fp32", "checkpoint": "block"}),
        ("qwen2", "full", {"dtype": "fp32", "attention": "eager"}),
        ("gpt2", "lora:r=4", {"dtype": "fp32", "grad_accum": 2}),
        ("bert", "full", {"dtype": "fp32"}),
    ],
)
def test_autocast_casts_what_it_casts_on_a_gpu(name: str, method: str, options: dict[str, Any]) -> None:
    """Most training configs ask for it; on a GPU it widens norms, softmax and powers, which the CPU's leaves as is."""
    real, tape = both(name, method, setup_of(name, batch=2, seq=16, amp="bf16", **options), "cuda")
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("llama", "qlora:r=4", {"dtype": "bf16"}),
        ("llama", "qlora:r=4,targets=all-linear,dropout=0.1", {"dtype": "bf16", "amp": "bf16"}),
        ("qwen2", "qlora:r=4,double_quant=false", {"dtype": "bf16", "checkpoint": "block"}),
        ("llama", "lora_8bit:r=4,targets=all-linear", {"dtype": "bf16"}),
    ],
)
def test_quantised_bases_are_those_of_the_tape(name: str, method: str, options: dict[str, Any]) -> None:
    """Half of the configs that only a trace can answer have a 4-bit base; bitsandbytes need not be installed for it."""
    real, tape = both(name, method, setup_of(name, batch=2, seq=16, **options), "cuda")
    for phase in ("forward", "backward"):
        assert ops(real, phase) == ops(tape, phase)
    assert (real.total, real.trainable) == (tape.total, tape.trainable)
    assert int(peak_bytes(real)) == pytest.approx(int(peak_bytes(tape)), rel=0.01)


def test_equal_ops_take_equal_time() -> None:
    """The device's seconds are the tape's: layouts and broadcasts, which prices look at, are seen in the trace too."""
    setup = Setup(batch=2, seq=256)
    real = predict(recorded.traced("gpt2"), "lora:r=8,dropout=0.1", setup, "a100-80gb-sxm")
    tape = predict("gpt2", "lora:r=8,dropout=0.1", setup, "a100-80gb-sxm")
    assert float(real.time.device_busy) == pytest.approx(float(tape.time.device_busy), rel=1e-3)
    assert real.kernels == tape.kernels
    assert real.flops == tape.flops


def test_the_host_waits_as_often_and_as_long_as_on_the_tape() -> None:
    """A trace keeps no order: waits that stood in a row would cost as much as one. VB-LoRA has one in each adapter."""
    setup, method, on = Setup(batch=4, seq=300), "vblora:length=256", profile.load("l40s")
    built, _ = traced.of_method(load("smollm2-1.7b"), method, setup, on)
    assert any(costs.synchronises(op) for _, op, _ in built.ops())
    total = predict("smollm2-1.7b", method, setup, on).time.phases["total"]
    assert of_step(built, on, host.host_of("default", on)).time.phases["total"] == pytest.approx(total, rel=0.005)
    shuffled = sorted((op for part, _ in built.parts() for op in part.ops), key=costs.synchronises)
    assert Counter(map(id, parts.spread(shuffled))) == Counter(map(id, shuffled))


def test_weights_that_a_program_clamps_are_not_packed() -> None:
    """Gemma 3n clamps the coefficients of AltUp in place: on a packed weight its forward pass fails."""
    values = {
        "hidden_size": 32, "intermediate_size": [48] * 4, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4,
    }  # fmt: skip
    config = Config({"model_type": "gemma3n_text", **values}, "gemma3n", "gemma3n")
    step, _ = traced.of_method(config, "qlora:r=4,targets=q_proj", Setup(batch=2, seq=16, dtype="bf16"))
    dtypes = {p.name.split(".")[-2]: p.dtype for p in step.parameters}
    assert dtypes["prediction_coefs"] == dtypes["correction_coefs"] == "bf16"
    assert dtypes["q_proj"] != "bf16"
