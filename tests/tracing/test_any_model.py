"""Traces of models that the tape does not know: families of transformers, modules of one's own, and what is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from parameter_counts import IN_BILLIONS
from test_traced import ops

pytest.importorskip("peft")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from perfmodel import UserError, cli, predict_module
from perfmodel.architectures import Config, load
from perfmodel.calls.costs import products
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.devices.device import profile_of
from perfmodel.prediction.predict import of_step
from perfmodel.program.op import Op, Spec
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing import growth, programs, traced
from perfmodel.tracing.cuda_forms import cuda_forms
from perfmodel.tracing.programs import stacks
from perfmodel.tracing.trace import call_name

SETUP = Setup(batch=2, seq=16)
TEXT = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64, "pad_token_id": 0}
SMALL: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **TEXT, "intermediate_size": 48, "num_hidden_layers": 18, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": 8,
    },
    "roberta": {**TEXT, "intermediate_size": 48, "num_hidden_layers": 10},
    "xlm": {"emb_dim": 32, "n_layers": 10, "n_heads": 2, "vocab_size": 64},
    "t5": {
        "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 12, "num_decoder_layers": 14,
        "vocab_size": 64,
    },
    "vit": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 10, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    },
    "convnext": {"depths": [1, 1, 10, 1], "hidden_sizes": [8, 16, 24, 32], "image_size": 64},
}  # fmt: skip


def config_of(name: str, **changes: Any) -> Config:
    return Config({"model_type": name, **SMALL[name], **changes}, name, name)


def whole_step(config: Config, method: str, monkeypatch: pytest.MonkeyPatch) -> Step:
    """The step of a trace of all blocks."""
    with monkeypatch.context() as changed:
        changed.setattr(growth._Plan, "cost", 10**9)
        step, made = traced.of_method(config, method, SETUP)
    assert not made.extrapolated
    return step


@pytest.mark.parametrize("name", SMALL)
def test_a_model_follows_exactly_from_a_few_of_its_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise of the traced path: what is extrapolated is what a trace of every block finds, call for call."""
    config = config_of(name)
    few, made = traced.of_method(config, "full", SETUP)
    assert made.extrapolated, "nothing was left out, so nothing was tested"
    every = whole_step(config, "full", monkeypatch)
    for phase in ("forward", "backward"):
        assert ops(few, phase) == ops(every, phase)
    for count in ("nodes", "modules"):
        assert total(few, count) == total(every, count)
    assert few.groups[0].parts[0].peak == pytest.approx(every.groups[0].parts[0].peak, rel=0.01)


def total(step: Step, count: str) -> int:
    return sum(getattr(part.host, count) * times for part, times in step.parts())


def test_adapters_on_a_model_that_the_tape_does_not_know() -> None:
    """PEFT's default targets of the type: q and v of every attention, in encoder, decoder and across."""
    step, _ = traced.of_method(config_of("t5"), "lora:r=4", SETUP)
    assert step.trainable == (12 + 2 * 14) * 2 * 4 * (32 + 32)
    assert step.method.name == "lora"


def test_a_target_that_no_layer_has_is_refused() -> None:
    with pytest.raises(UserError, match="matches no linear layer"):
        traced.of_method(config_of("t5"), "lora:targets=q_porj", SETUP)
    with pytest.raises(UserError, match=r"paths are like encoder\.block\.0\.layer\.0\.SelfAttention\.q$"):
        traced.of_method(config_of("t5"), "lora:targets=/q_porj/", SETUP)


def test_of_several_targets_those_that_no_layer_has_are_left_out() -> None:
    """As peft does: examples name Llama's layers for models that have others, such as DeepSeek's latent attention."""
    step, _ = traced.of_method(config_of("t5"), "lora:r=4,targets=q+v_proj", SETUP)
    assert step.trainable == (12 + 2 * 14) * 4 * (32 + 32)
    notes = of_step(step, profile_of("h100-sxm"), hosts.load()).notes
    assert any("called v_proj" in note for note in notes)


@pytest.mark.parametrize(("name", "billions"), IN_BILLIONS.items())
def test_bundled_models_that_are_traced_have_their_published_size(name: str, billions: float) -> None:
    """The first figure a user compares; it also fixes every width of the model."""
    model = programs.build_model(load(name), SETUP)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.01)


def test_layers_of_several_kinds_are_told_apart() -> None:
    """Gemma 3's sliding layers see another mask: cut to its first layers alone, the model would lose the full ones."""
    model = programs.build_model(config_of("gemma3_text"), SETUP)
    (row,) = stacks.stacks(model)
    kinds = Counter(row.kinds)
    assert sorted(kinds.values()) == [3, 15]


WHISPER = {
    "model_type": "whisper", "d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "num_mel_bins": 16,
    "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
TINY = {**TEXT, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
MOE = {**TINY, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def test_speech_is_traced_with_its_encoder() -> None:
    """Whisper stands among the decoders too: traced as one it had half of its program."""
    step, _ = traced.of_method(Config(WHISPER, "whisper", "whisper"), "full", SETUP)
    convolutions = [op for part, op, _ in step.ops() if op.name == "convolution" and part.phase == "forward"]
    assert len(convolutions) == 2
    assert convolutions[0].inputs[0].shape == (SETUP.batch, 16, 100)


def test_a_model_of_images_and_text_says_that_it_was_asked_for_text() -> None:
    """Gemma 3 from 4B on has a vision tower, which a step on text alone does not run."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {"text_config": {**TINY, "head_dim": 16}, "vision_config": {**vision, "image_size": 28, "patch_size": 14}}
    head = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    step, _ = traced.of_method(Config({**head, **values}, "gemma3", "gemma3"), "full", SETUP)
    assert any("text alone: no vision input" in note for note in step.notes)


@pytest.mark.parametrize(
    ("values", "head", "says"),
    [
        (WHISPER, "WhisperModel", "WhisperForConditionalGeneration"),
        ({**TINY, "model_type": "bert"}, "BertForQuestionAnswering", "BertForMaskedLM"),
    ],
)
def test_a_head_that_is_not_known_is_never_replaced_by_another(values: dict[str, Any], head: str, says: str) -> None:
    with pytest.raises(UserError, match=head) as caught:
        traced.of_method(Config({**values, "architectures": [head]}, "x", "x"), "full", SETUP)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "head", "outputs"),
    [
        ("llama", "LlamaForSequenceClassification", (2, 2)),
        ("bert", "BertForTokenClassification", (2 * 16, 2)),
    ],
)
def test_classifiers_have_the_head_that_they_name(kind: str, head: str, outputs: tuple[int, ...]) -> None:
    """Two classes a sample, or a token: a language model's head is thousands of times as wide."""
    config = Config({**TINY, "model_type": kind, "architectures": [head]}, kind, kind)
    step, _ = traced.of_method(config, "full", SETUP)
    losses = [op for part, op, _ in step.ops() if op.name == "_log_softmax" and part.phase == "forward"]
    assert [op.inputs[0].shape for op in losses] == [outputs]


def test_experts_in_fp32_are_those_of_the_real_program() -> None:
    """The rule for fake tensors knows grouped products in bf16 alone; a run on real ones makes the same calls."""
    config, setup = Config(MOE, "moe", "moe"), Setup(batch=2, seq=16, dtype="fp32")
    model = programs.build_model(config, setup, device="cpu")
    called: Counter[str] = Counter()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[call_name(func).removesuffix(".default")] += 1
            return func(*args, **(kwargs or {}))

    ids = torch.zeros((2, 16), dtype=torch.long)
    with Names():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    step, _ = traced.of_method(config, "full", setup, profile.load("cpu-epyc-genoa-2c"))
    found: Counter[str] = Counter()
    for part, op, times in step.ops():
        if part.phase != "optimizer":
            found[op.name] += times
    products = ("_grouped_mm", "mm", "topk", "index.Tensor", "_scaled_dot_product_flash_attention_for_cpu")
    assert {name: found[name] for name in products} == {name: called[name] for name in products}
    assert found["_grouped_mm"] > 0


class Block(torch.nn.Module):
    """A residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(torch.nn.Module):
    """A module of one's own: blocks in a list, and a head."""

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(depth))
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def squared(y: torch.Tensor) -> torch.Tensor:
    return y.pow(2).mean()


def test_a_module_of_ones_own() -> None:
    """FLOPs by hand: 12 blocks of two products and the head, twice that in backward but for the input's gradient."""
    module = Net(12)
    p = predict_module(module, torch.ones(5, 16), loss=squared, device="a100-80gb-sxm")
    forward = 12 * 2 * (2 * 5 * 16 * 64) + 2 * 5 * 16 * 3
    assert p.flops["forward"] == forward
    assert p.flops["backward"] == 2 * forward - 2 * 5 * 16 * 64
    assert p.trainable_params == sum(t.numel() for t in module.parameters())
    assert p.model == "Net"
    assert p.setup.batch == 5
    assert any("4 of its 12 blocks" in note for note in p.notes)
    assert next(module.parameters()).device.type == "cpu", "the module itself must stay as it is"


class Images(torch.nn.Module):
    """A convolution with stride, one by groups, and a biased batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.inner = torch.nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(self.wide(x)).flatten(2)
        return torch.baddbmm(torch.zeros(2, 16, 16), y, y.transpose(1, 2))


def test_convolutions_count_as_the_products_that_they_are() -> None:
    """Forward and backward FLOPs of PyTorch's own counter; without them a vision model would be free."""
    module, x = Images(), torch.ones(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        module(x).pow(2).mean().backward()
    p = predict_module(module, x, loss=squared)
    assert p.flops["total"] == counter.get_total_flops()
    assert p.time.phases["total"] > 0


def test_filters_by_channel_and_products_by_expert() -> None:
    """By hand: a depthwise filter of 3 x 3 over 2 x 4 x 8 x 8, and tokens through one of 3 experts each."""
    x, w = Spec("bf16", (2, 4, 8, 8)), Spec("bf16", (4, 1, 3, 3))
    convolution = Op("convolution", (x, w), (x,), 0, 0)
    (filtered,) = products(convolution)
    assert filtered.depthwise(convolution)
    assert filtered.flops == 2 * 9 * (2 * 4 * 8 * 8)
    for tokens in (12, 3):
        x, experts = Spec("bf16", (tokens, 16)), Spec("bf16", (3, 16, 32))
        (routed,) = products(Op("_grouped_mm", (x, experts), (Spec("bf16", (tokens, 32)),), 0, 0))
        assert routed.flops == 2 * tokens * 16 * 32


def test_a_module_with_frozen_parts_and_named_inputs() -> None:
    """What trains is what has requires_grad: below the last block no backward runs."""
    module = Net(3)
    for parameter in module.blocks[:2].parameters():
        parameter.requires_grad = False
    p = predict_module(module, {"x": torch.empty(5, 16, device="meta")}, loss=squared)
    assert p.flops["backward"] < p.flops["forward"]
    assert p.trainable_params == 2 * 16 * 64 + 64 + 16 + 51


def test_hooks_on_gradients_are_part_of_the_step() -> None:
    """OSF projects gradients in hooks on its parameters: swapped for fake ones they had lost them."""
    module, (plain, hooked) = Net(3), ({}, {})
    for found in (plain, hooked):
        p = predict_module(module, torch.ones(5, 16), loss=squared)
        found.update({"dispatches": p.dispatches["backward"], "flops": p.flops["backward"]})
        weight = module.head.weight
        weight.register_hook(lambda g: g @ g.T @ g)
    assert hooked["dispatches"] == plain["dispatches"] + 2
    assert hooked["flops"] == plain["flops"] + 2 * (2 * 3 * 3 * 16)
    values = {"peft_type": "OSF", "target_modules": ["q_proj"]}
    steps = [
        traced.of_peft(Config({**TINY, "model_type": "llama"}, "llama", "llama"), values, replace(SETUP, dtype=dtype))[
            0
        ]
        for dtype in ("fp32", "bf16")  # where peft casts its parameters it loses their hooks, in real runs too
    ]
    products = [sum(n for part, op, n in step.ops() if part.phase == "backward" and op.name == "mm") for step in steps]
    assert products[0] - products[1] == 2 * 2 * 2  # two products for either factor of two layers


@pytest.mark.parametrize(
    ("inputs", "loss", "says"),
    [
        (torch.ones(5, 16), None, "loss="),
        ((), squared, "example tensors"),
        (torch.ones(5, 7), squared, "cannot be traced"),
    ],
)
def test_a_module_that_cannot_be_run_is_refused_in_one_line(inputs: Any, loss: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        predict_module(Net(2), inputs, loss=loss)
    assert "\n" not in str(caught.value)


def test_megatrons_program_has_no_trace() -> None:
    """A line of transformers about a model type that nobody typed came in its place."""
    result = CliRunner().invoke(
        cli.main, ["predict", "--model", "megatron:llama-3.2-1b", "--device", "l40s", "--traced"]
    )
    assert (result.exit_code, result.stderr) == (
        2, "perfmodel: megatron:llama-3.2-1b: Megatron's program has no trace; leave --traced out\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "lama"}, "unknown to the installed transformers"),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "trust_remote_code"),
        ({"model_type": "wav2vec2"}, "none of the families"),
        ({"model_type": "gpt_neox", "hidden_size": 30, "num_attention_heads": 7}, "transformers"),
        ({"hidden_size": 30}, "model_type"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "cannot be traced"),
        ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, "cannot be traced"),
    ],
)
def test_a_config_that_cannot_be_built_ends_in_one_line(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    """Exit code 2 and what is wrong, never a traceback."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(cli.main, ["predict", "--model", str(file), "--device", "l40s", "--traced"])
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "option", [("--kernels", "liger"), ("--compile", "default"), ("--experts", "eager"), ("--routing", "zipf:1.1")]
)
def test_what_a_trace_cannot_follow_is_refused(option: tuple[str, str]) -> None:
    arguments = ["predict", "--model", "gpt2", "--device", "l40s", "--traced", *option]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert option[0] in result.stderr


def test_a_vision_model_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of("vit").values))
    arguments = ["predict", "--model", str(file), "--device", "l40s", "--traced", "--batch", "4", "--json"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["flops"]["total"] > 0
    assert any("images" in note for note in found["notes"])


@pytest.mark.parametrize(("trained", "name"), [(False, "cudnn"), (True, "efficient")])
def test_a_bias_that_trains_gets_a_kernel_that_gives_it_a_gradient(trained: bool, name: str) -> None:
    """T5's position bias on an H100: cuDNN, which is first there, would leave the bias without a gradient."""
    bias = torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16, requires_grad=trained)
    q, k, v = (torch.ones(1, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    called = []

    class Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), Names(), cuda_forms("9.0"):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    assert f"aten::_scaled_dot_product_{name}_attention" in called
