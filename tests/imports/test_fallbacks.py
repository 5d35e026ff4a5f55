"""A config on its model: what the model has no program of is answered otherwise, and the first line says so."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel.architectures import from_config, load
from perfmodel.cli import main
from perfmodel.imports import DIFFERS, read
from perfmodel.imports.fallbacks import HEADLESS, OWN_HEAD, UNBALANCED, fallbacks, of_another_task
from perfmodel.imports.llama_factory_v1 import FUSED_LOSS, OWN_LOSS

LORA = "micro_batch_size: 1\nsequence_len: 64\nbf16: true\nadapter: lora\nlora_r: 4\n"
QLORA = LORA.replace("lora\n", "qlora\n", 1) + "load_in_4bit: true\n"
CODES = "a base in codes of 4 bits, 128 in a group, on gptqmodel's kernels that train"
FACTORY = "finetuning_type: lora\nlora_target: all\ncutoff_len: 64\nbf16: true\n"
FLASH = "attn_implementation: flash_attention_2\n"
LINEAR = "lora_target_linear: true\n"
LIGER = "plugins: [LigerPlugin]\nliger_rope: true\nliger_rms_norm: true\nliger_glu_activation: true\n"
LIGER += "liger_fused_linear_cross_entropy: true\n"
CUT = "plugins: [LigerPlugin, CutCrossEntropyPlugin]\n"
REST_OF_LIGER = "liger_rope: true\nliger_rms_norm: true\nliger_glu_activation: true\n"
FUSED = "lora_mlp_kernel: true\nlora_qkv_kernel: true\nlora_o_kernel: true\n"


def asked(folder: Path, text: str, *options: str) -> str:
    path = folder / "config.yml"
    path.write_text(text)
    result = CliRunner().invoke(main, ["predict", "--config", str(path), "--device", "h100-sxm", *options])
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("more", "typed", "differs", "answered"),
    [
        ("torch_compile: true\n", "", "", "all-linear,implementation=axolotl on"),
        ("torch_compile: true\n", "--gpus 4", "not modelled compiled on several GPUs", "all-linear on"),
        ("torch_compile: true\n", "--gpus 4 --compile none", "", "all-linear,implementation=axolotl on"),
        ("", "--gpus 4", "", "all-linear,implementation=axolotl on"),
        ("", "--gpus 4 --compile default", "not modelled compiled on several GPUs", "all-linear on"),
        ("", "--gpus 2 --tp 2", "not modelled on layers that GPUs share", "all-linear on"),
        ("", "--gpus 2 --pp 2", "not modelled in stages of a pipeline", "all-linear on"),
        ("tensor_parallel_size: 2\n", "--gpus 2", "not modelled on layers that GPUs share", "all-linear on"),
        ("tensor_parallel_size: 2\n", "--gpus 4 --tp 1", "", "all-linear,implementation=axolotl on"),
        ("gptq: true\n", "", CODES, "lora_gptq:r=4,targets=all-linear on"),
        ("# GPTQ\n", "", "peft's adapters, not Axolotl's", "lora_gptq:r=4,targets=all-linear on"),
    ],
)
def test_fused_kernels_give_way_where_they_are_not_modelled(
    tmp_path: Path, more: str, typed: str, differs: str, answered: str
) -> None:
    """Axolotl switches them on by itself: nobody who named none is refused for them."""
    base = "TheBloke/Llama-2-7B-GPTQ" if "gptq" in more.lower() else "NousResearch/Llama-2-7b-hf"
    text = f"base_model: {base}\nlora_dropout: 0\ngradient_accumulation_steps: 4\n{LORA}{LINEAR}{more}"
    said = asked(tmp_path, text, *typed.split())
    assert (DIFFERS in said) == bool(differs)
    assert differs in said
    assert answered in said


@pytest.mark.parametrize(
    ("text", "differs", "answered"),
    [
        (f"base_model: openai/gpt-oss-20b\n{LORA}{LINEAR}{FLASH}", "eager attention, not flash2", "eager attention"),
        (f"base_model: THUDM/glm-4-9b-hf\n{LORA}{LINEAR}{LIGER}", "PyTorch's kernels, not Liger's", "on glm-4-9b"),
        (f"base_model: Qwen/Qwen-7B\n{LORA}{LINEAR}{FUSED}", "peft's adapters, not Axolotl's", "linear on qwen-7b"),
        (f"base_model: google/gemma-3-4b-it\n{LORA}{LINEAR}", "the text decoder alone of a", "on gemma-3-4b"),
        (f"base_model: Qwen/Qwen-7B\n{QLORA}{LINEAR}", "the output head in fp32", "prepared=True on qwen-7b"),
        (f"base_model: Qwen/Qwen-7B\n{LORA}{LINEAR}", "PyTorch's attention and norms, not flash", "linear on qwen-7b"),
        (f"base_model: Qwen/Qwen1.5-7B\n{LORA}{LINEAR}peft_use_dora: true\n", "without fused", "linear on qwen1.5-7b"),
        (
            f"base_model: zai-org/GLM-4.7-Flash\n{LORA}load_in_8bit: true\nlora_target_modules: [o_proj]\n",
            "8-bit layers of four dimensions", "on glm-4.7-flash",
        ),
        (
            f"base_model: deepseek-ai/DeepSeek-V2-Lite\n{QLORA}quantize_moe_experts: true\n"
            "lora_target_modules: [o_proj, shared_experts.gate_proj, shared_experts.up_proj]\n",
            "no adapters on experts in few bits, for which PEFT takes shared_experts.gate_proj, shared_experts.up",
            "qlora:r=4,targets=o_proj,experts=True on deepseek-v2-lite",
        ),
        (f"base_model: EleutherAI/pythia-70m\n{LORA}{LINEAR}", "no adapter on the head, on which", "linear on pythia"),
        (f"base_model: TheBloke/Llama-2-7B-GPTQ\ngptq: true\n{LORA}{LINEAR}", CODES, "lora_gptq:r=4"),
        (f"model_name_or_path: TechxGenus/Meta-Llama-3-8B-Instruct-GPTQ\n{FACTORY}", CODES, "lora_gptq:r=8"),
        (f"base_model: TheBloke/Llama-2-7B-AWQ\n{LORA}{LINEAR}", "weights in bf16, not awq", "on llama-2-7b"),
        (f"base_model: deepseek-ai/DeepSeek-V3\n{LORA}{LINEAR}", "weights in bf16, not fp8", "on deepseek-v3"),
        (
            f"base_model: tiiuae/falcon-7b\n{LORA}load_in_8bit: true\n{LINEAR}", "no layer in few bits",
            "lora:r=4,targets=all-linear on falcon-7b, h100-sxm: batch 1 x 64 tokens, fp32 amp bf16",
        ),
        (
            f"model_name_or_path: tiiuae/falcon-7b\n{FACTORY}quantization_bit: 4\n", "no layer in few bits",
            "lora:r=8,targets=all-linear on falcon-7b, h100-sxm: batch 8 x 64 tokens, bf16 amp bf16",
        ),
    ],
)  # fmt: skip
def test_what_a_model_has_no_program_of_is_answered_otherwise(
    tmp_path: Path, text: str, differs: str, answered: str
) -> None:
    """A refusal would leave the user without an answer, an answer without the first line with a wrong one."""
    out = asked(tmp_path, text)
    assert out.startswith(DIFFERS)
    assert differs in out
    assert answered in out


@pytest.mark.parametrize(
    ("model", "more", "typed", "differs", "answered"),
    [
        ("Qwen/Qwen3-8B", CUT, "", "", "cut cross entropy"),
        ("Qwen/Qwen3-8B", f"{CUT}cut_cross_entropy: true\n", "--gpus 8", "", "cut cross entropy, ddp"),
        ("Qwen/Qwen3-8B", f"{CUT}cut_cross_entropy: false\n", "", "", "bf16 amp bf16, adamw-fused"),
        ("Qwen/Qwen3-8B", CUT + REST_OF_LIGER, "", "", "liger kernels, cut cross entropy"),
        ("Qwen/Qwen3-8B", CUT + REST_OF_LIGER, "--gpus 8 --parallel zero3", "Liger's loss, not cut", "liger kernels"),
        ("Qwen/Qwen3-8B", CUT, "--gpus 8 --parallel zero3", "the logits in memory, without cut cross entropy", "zero3"),
        ("Qwen/Qwen3-8B", CUT, "--gpus 8 --parallel fsdp2", "finds the head of an adapted model in shards", "fsdp2"),
        (
            "Qwen/Qwen3-8B",
            f"{CUT}fsdp_config: {{fsdp_version: 2}}\n",
            "--gpus 8",
            "",
            "cut cross entropy, fsdp2, units of blocks and of adapters' halves",
        ),
        ("Qwen/Qwen3-8B", CUT, "--gpus 8 --parallel fsdp2 --kernels torch", "", "fsdp2"),
        ("Qwen/Qwen3-8B", f"{CUT}torch_compile: true\n", "", "the logits in memory, without cut", "torch.compile"),
        ("THUDM/glm-4-9b-hf", CUT + REST_OF_LIGER, "", "PyTorch's kernels, not Liger's", "cut cross entropy"),
        ("google/gemma-2-9b", CUT, "--attention eager", "the logits in memory, without cut", "eager attention"),
    ],
)
def test_cut_cross_entropy_gives_way_where_it_is_not_modelled(
    tmp_path: Path, model: str, more: str, typed: str, differs: str, answered: str
) -> None:
    """A quarter of Axolotl's examples have its plugin; its key switches it off."""
    said = asked(tmp_path, f"base_model: {model}\n{LORA}{LINEAR}{more}", *typed.split())
    assert (DIFFERS in said) == bool(differs)
    assert differs in said
    assert answered in said


@pytest.mark.parametrize(
    ("model", "typed", "differs", "answered"),
    [
        ("llama-3.2-1b", "", "", "TRL's fused head"),
        ("gemma-2-2b", "", "eager attention, not sdpa", "TRL's fused head"),
        ("llama-3.2-1b", "--gpus 8", "", "TRL's fused head, ddp"),
        ("llama-3.2-1b", "--gpus 8 --parallel fsdp2", "", "TRL's fused head, fsdp2"),
        ("llama-3.2-1b", "--gpus 8 --parallel zero3", "the logits in memory, without TRL's fused head", "zero3"),
        ("llama-3.2-1b", "--kernels torch", "", "adamw-fused"),
        ("gpt2", "", "the logits in memory, without TRL's fused head", "on gpt2"),
    ],
)
def test_trls_head_is_answered_where_it_is_modelled(
    tmp_path: Path, model: str, typed: str, differs: str, answered: str
) -> None:
    """SFTTrainer has no other since TRL 1.16."""
    text = f"model_name_or_path: {model}\nmax_length: 64\nuse_peft: true\nbf16: true\n"
    text += "lora_target_modules: all-linear\n"
    said = asked(tmp_path, text, *typed.split())
    assert differs in said
    assert ("fused head" in differs) == ("without TRL's fused head" in said)
    assert answered in said


@pytest.mark.parametrize("text", [f"model_name_or_path: EleutherAI/pythia-70m\n{FACTORY}lora_target: all\n"])
def test_what_one_tool_does_alone_is_not_said_of_another(tmp_path: Path, text: str) -> None:
    """LLaMA-Factory leaves the head of GPT-NeoX out of all linear layers, so nothing differs there."""
    assert HEADLESS not in asked(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "liger", "said"),
    [
        ("model: Qwen/Qwen3-0.6B\nkernel_config: {name: liger_kernel}\n", True, FUSED_LOSS),
        ("model_class: llm\nkernel_config: {name: liger_kernel}\n", True, FUSED_LOSS),
        ("model: NousResearch/Llama-3.2-1B\nkernel_config: {name: liger_kernel}\n", False, OWN_LOSS),
        (f"model_name_or_path: Qwen/Qwen3-0.6B\nenable_liger_kernel: true\n{FACTORY}", True, ""),
        (f"model_name_or_path: HuggingFaceTB/SmolLM3-3B\nenable_liger_kernel: true\n{FACTORY}", False, ""),
    ],
)
def test_ligers_kernels_are_on_the_models_that_a_tool_puts_them_on(
    tmp_path: Path, text: str, liger: bool, said: str
) -> None:
    """It passes over others with a warning: they train in PyTorch's kernels, whose logits lie in memory."""
    out = asked(tmp_path, text)
    assert ("liger" in out.split("forward")[0].rpartition(" on ")[2]) == liger
    assert said in out
    assert (FUSED_LOSS in out) == (said == FUSED_LOSS)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"model_name_or_path: meta-llama/Llama-2-7b-hf\n{FACTORY}", "bf16, not in fp16"),
        (f"model_name_or_path: Qwen/Qwen3-4B\n{FACTORY}".replace("bf16", "fp16"), "fp16, not in bf16"),
        (f"model_name_or_path: meta-llama/Llama-2-7b-hf\n{FACTORY}".replace("bf16: true", ""), ""),  # no autocast
        (f"model_name_or_path: meta-llama/Llama-2-7b-hf\n{FACTORY}".replace(": lora", ": full"), ""),  # all in fp32
        (f"model_name_or_path: meta-llama/Llama-2-7b-hf\nuse_unsloth: true\n{FACTORY}", ""),
        (f"model_name_or_path: TheBloke/Llama-2-7B-AWQ\n{FACTORY}", ""),  # which is told in other words
        (f"model_name_or_path: Qwen/Qwen3-4B\n{FACTORY}", ""),
        ("model_name_or_path: facebook/opt-1.3b\nmax_length: 64\nuse_peft: true\ndtype: auto\n", "bf16, not in fp16"),
        ("model_name_or_path: facebook/opt-1.3b\nmax_length: 64\nuse_peft: true\ndtype: bfloat16\n", ""),
        (f"base_model: meta-llama/Llama-2-7b-hf\n{LORA}{LINEAR}", ""),
        (f"base_model: meta-llama/Llama-2-7b-hf\nreinit_weights: true\n{LORA}{LINEAR}", "bf16, not in fp16"),
    ],
)
def test_weights_in_the_dtype_of_their_checkpoint_are_told(tmp_path: Path, text: str, kept: str) -> None:
    """LLaMA-Factory loads with "auto": under autocast to another dtype every product casts its frozen weight anew."""
    out = asked(tmp_path, text)
    assert f"weights in {kept} as the checkpoint has them" in out if kept else "as the checkpoint" not in out


@pytest.mark.parametrize(
    "text",
    [
        f"base_model: unsloth/DeepSeek-V3-bf16\n{LORA}lora_target_modules: [o_proj]\n",
        f"model_name_or_path: deepseek-ai/DeepSeek-V3\n{FACTORY}".replace("all", "o_proj"),
    ],
)
def test_weights_that_a_repository_or_a_tool_unpacks_are_in_16_bit(tmp_path: Path, text: str) -> None:
    """Then a first line on their packing would tell of a difference that is none."""
    assert "fp8" not in asked(tmp_path, text)


@pytest.mark.parametrize(
    ("task", "head", "told"),
    [
        ("CAUSAL_LM", "GPT2LMHeadModel", False), ("SEQ_CLS", "GPT2ForSequenceClassification", False),
        ("SEQ_CLS", "GPT2LMHeadModel", True), ("TOKEN_CLS", "GPT2ForSequenceClassification", True),
        ("FEATURE_EXTRACTION", "GPT2LMHeadModel", True),
    ],
)  # fmt: skip
def test_an_adapter_of_another_task_than_its_models_is_told(tmp_path: Path, task: str, head: str, told: bool) -> None:
    """Its program has a classifier where the model's config names the head of 50,000 words, a third of a small step."""
    values = {**load("gpt2").values, "architectures": [head], "num_labels": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    file = tmp_path / "adapter_config.json"
    own = {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"], "base_model_name_or_path": str(tmp_path)}
    file.write_text(json.dumps({**own, "task_type": task}))
    result = CliRunner().invoke(main, ["predict", "--config", str(file), "--device", "h100-sxm"])
    assert result.exit_code == 0, result.stderr
    assert (OWN_HEAD.format(task) in result.stdout.partition("\n")[0]) == told
    assert bool(of_another_task(read(file), None)) == (task != "CAUSAL_LM")  # as a trace's first line asks


def test_what_is_typed_is_not_touched(tmp_path: Path) -> None:
    """Then the file asks for nothing that is answered otherwise."""
    text = f"base_model: openai/gpt-oss-20b\n{LORA}{LINEAR}{FLASH}lora_o_kernel: false\n"
    assert DIFFERS not in asked(tmp_path, text, "--attention", "eager")
    assert DIFFERS not in asked(tmp_path, text, "--model", "llama-3.2-1b")


def test_of_several_targets_those_that_no_layer_has_are_left_out(tmp_path: Path) -> None:
    """PEFT asks for one that matches: GLM-4's gate and up are one layer, and examples name them as Llama's."""
    text = f"base_model: THUDM/GLM-4-9B-0414\n{LORA}lora_target_modules: [gate_proj, up_proj, down_proj, q_proj]\n"
    assert "lora:r=4,targets=down_proj+q_proj,implementation=axolotl on glm-4-9b-0414" in asked(tmp_path, text)
    with pytest.raises(AssertionError, match="matches no linear layer"):
        asked(tmp_path, text, "--method", "lora:targets=gate_proj+q_proj")


def test_all_linear_layers_of_a_mixture_are_its_attention(tmp_path: Path) -> None:
    """Axolotl names modules: experts and routers are none any more. PEFT's own word means them, too."""
    text = f"base_model: mistralai/Mixtral-8x7B-v0.1\n{LORA}{LINEAR}lora_dropout: 0.05\nlora_o_kernel: false\n"
    out = asked(tmp_path, text)
    assert out.startswith("lora:r=4,targets=q_proj+k_proj+v_proj+o_proj,dropout=0.05 on mixtral-8x7b")


def test_experts_in_4_bit_hold_a_quarter(tmp_path: Path) -> None:
    """Nearly all weights of a mixture are its experts'; on a dense model the key means nothing."""
    text = QLORA + LINEAR
    more = "quantize_moe_experts: true\n"
    mixture, dense = "base_model: Qwen/Qwen3-30B-A3B\n", "base_model: meta-llama/Llama-3.2-1B\n"
    assert "experts=True on qwen3-30b-a3b" in asked(tmp_path, mixture + text + more)
    assert asked(tmp_path, dense + text + more) == asked(tmp_path, dense + text)
    assert "in fp32" not in asked(tmp_path, mixture + text + more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("", True),
        ("deepspeed: zero2.json\n", True),
        ("deepspeed: zero3.json\n", False),
        ("fsdp_config: {a: b}\n", False),
    ],
)
def test_experts_beside_a_base_in_4_bit_are_in_fp32(tmp_path: Path, more: str, told: bool) -> None:
    """peft's preparation upcasts all that bitsandbytes passes over: twice the memory, and products in fp32."""
    out = asked(tmp_path, f"base_model: mistralai/Mixtral-8x7B-v0.1\n{QLORA}{LINEAR}{more}")
    assert ("experts in bf16, not in fp32" in out) == told


@pytest.mark.parametrize(
    ("patterns", "method"),
    [
        (
            ["^lm_head.weight$", "model.layers.1[0-3]+.mlp"],
            r"/(?:^lm_head\.weight$).*|(?:model\.layers\.1[0-3]+\.mlp).*/",
        ),
        (["model.layers.[0-7].block_sparse_moe.gate"], r"/(?:model\.layers\.[0-7]\.mlp\.gate).*/"),
    ],
)
def test_unfrozen_parameters_are_one_regex(tmp_path: Path, patterns: list[str], method: Any) -> None:
    """Points stand for themselves, and a path has to match from its start, as Axolotl has it."""
    path = tmp_path / "config.yml"
    path.write_text(f"base_model: mixtral-8x7b\nmicro_batch_size: 1\nunfrozen_parameters: {patterns}\n")
    found = read(path)
    assert found.method == f"selected:parameters={method}"
    renamed = any("block_sparse_moe" in pattern for pattern in patterns)
    assert any("block_sparse_moe as mlp" in said for said in found.differences) == renamed


@pytest.mark.parametrize(
    ("text", "answered", "instead_of"),
    [
        (
            "base_model: openai/gpt-oss-20b\nattn_implementation: flash_attention_3\n",
            "eager attention, not flash2", "flash-attn 2, not 3",
        ),
        (
            "base_model: THUDM/glm-4-9b-hf\nplugins: [LigerPlugin]\nliger_rms_norm: true\n",
            "PyTorch's kernels, not Liger's", "all of Liger's kernels",
        ),
        (
            "base_model: Qwen/Qwen-7B\nlora_mlp_kernel: true\n",
            "peft's adapters, not Axolotl's", "fused kernels for all adapters",
        ),
    ],
)  # fmt: skip
def test_what_is_answered_is_said_once(tmp_path: Path, text: str, answered: str, instead_of: str) -> None:
    """Two answers in the place of one key contradict each other."""
    out = asked(tmp_path, text + LORA + LINEAR)
    assert answered in out
    assert instead_of not in out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model_name_or_path: qwen3-30b-a3b\n{}", True),
        ("model_name_or_path: qwen3-30b-a3b\nrouter_aux_loss_coef: 0.0\n{}", False),
        ("model_name_or_path: qwen3-8b\nrouter_aux_loss_coef: 0.01\n{}", False),
        ("model_name_or_path: deepseek-v2-lite\n{}", False),
        ("model_name_or_path: qwen3-30b-a3b\ncpo_alpha: 1.0\n{}", False),
        ("base_model: qwen3-30b-a3b\nadapter: lora\nlora_target_modules: [q_proj]\nrl: dpo", True),
        ("base_model: qwen3-30b-a3b\nadapter: lora\nlora_target_modules: [q_proj]", False),
    ],
)
def test_trls_trainers_balance_experts_unless_told_not_to(tmp_path: Path, text: str, told: bool) -> None:
    """Its coefficient is 0.001 by default, on models that have such a loss."""
    path = tmp_path / "config.yml"
    path.write_text(text.format("max_length: 64\nuse_peft: true\nper_device_train_batch_size: 1\n"))
    found = read(path)
    architecture = from_config(load(found.model or ""))
    assert (UNBALANCED in [fallback.said for fallback in fallbacks(found, architecture)]) == told
