"""An answer for another step than a config's says so in its first line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.imports import DIFFERS, meanings, read
from perfmodel.imports.fields import UNSCALED
from perfmodel.imports.packing import BY_A_MASK, TO_THE_END, UNKNOWN
from perfmodel.imports.read import ASK
from perfmodel.imports.trainer import COPIES_IN_FP32, IN_FP32, OF_ANOTHER
from perfmodel.imports.vocabulary import AS_IT_IS, NOT_ROUND, UNCUT
from perfmodel.resources import DATA

BASE = "base_model: gpt2\nmicro_batch_size: 1\nsequence_len: 64\nlora_target_modules: [c_attn]\n"
PLAIN = f"{BASE}bf16: false\ntf32: false\n"  # both are on by default
TRL = {"model_name_or_path": "gpt2", "max_length": 64, "dtype": "float32", "packing": False}
UNFUSED = "without fused kernels for adapters, Axolotl's default"
FACTORY = "model_name_or_path: gpt2\ncutoff_len: 64\n"
LOADED = "adapters as the file describes them, not those that are loaded"
PAD = "special_tokens: {pad_token: <|finetune_right_pad_id|>}"

DIFFERENT: dict[str, tuple[str, str]] = {  # key: value -> what the first line says
    "deepspeed: zero2.json": ("axolotl", "one GPU, without ZeRO-2 (deepspeed)"),
    "deepspeed: z3_offload.json": ("axolotl", "one GPU, without ZeRO-3 with offloading (deepspeed)"),
    "fsdp: [full_shard]\nfsdp_config: {a: b}": ("axolotl", "one GPU, without FSDP (fsdp, fsdp_config)"),
    "base_model_config: gpt2-medium": ("axolotl", "the model's own config, not another's (base_model_config)"),
    "tensor_parallel_size: 2": ("axolotl", "one GPU (tensor_parallel_size)"),
    "ray_num_workers: 2": ("axolotl", "one GPU (ray_num_workers)"),
    "ray_num_workers: 4": ("factory", "one GPU (ray_num_workers)"),
    "experts_implementation: scattermoe": (
        "axolotl", "experts as transformers runs them by default (experts_implementation)",
    ),
    "activation_offloading: true": ("axolotl", "activations stay on the GPU (activation_offloading)"),
    "activation_offloading: true\nadapter: lora\ngradient_checkpointing: true": (
        "axolotl", "blocks recomputed, in the place of offloaded activations (activation_offloading)",
    ),
    "attn_implementation: flash_attention_3": ("axolotl", "flash-attn 2, not 3 (attn_implementation)"),
    "attn_implementation: flex_attention": ("axolotl", "sdpa, not flex attention (attn_implementation)"),
    "plugins: [a.DiffusionPlugin]": (
        "axolotl", "a causal step, not masked diffusion's: attention one way, a loss on every token (plugins)",
    ),
    "plugins: [a.MinePlugin]": ("axolotl", "without the plugin MinePlugin (plugins)"),
    "plugins: [a.LigerPlugin]\nliger_cross_entropy: true": ("axolotl", "without Liger's kernels (liger_cross_entropy)"),
    "lora_mlp_kernel: true\nadapter: lora": ("axolotl", "fused kernels for all adapters (lora_mlp_kernel)"),
    "relora: true\nadapter: lora": ("axolotl", "without ReLoRA's restarts (relora)"),
    "adapter: lora\npeft_use_dora: true\nlora_target_linear: true": ("axolotl", UNFUSED),
    "adapter: lora\npeft_use_dora: true\nlora_target_modules: [o_proj]": ("axolotl", UNFUSED),
    "adapter: lora\npeft_use_dora: true\nlora_mlp_kernel: true": (
        "axolotl", "without fused kernels for adapters (lora_mlp_kernel)",
    ),
    "lisa_n_layers: 2\nlisa_step_interval: 5": (
        "axolotl", "a new optimizer at each switch of blocks; Axolotl keeps the states of all blocks drawn so far "
        "(lisa_n_layers)",
    ),
    "adapter: lora\nload_in_8bit: true\nbase_model: tiiuae/Falcon-H1-0.5B-Base": (
        "axolotl", "every linear layer of a block quantised, out_proj too, and not the head",
    ),
    "adapter: lora\nload_in_8bit: true\nbase_model: ai21labs/Jamba-v0.1": (
        "axolotl", "every linear layer of a block quantised, Mamba's too, and not the head",
    ),
    "llama4_linearized_experts: true": (
        "axolotl", "experts as transformers runs them by default (llama4_linearized_experts)",
    ),
    "adapter: lora\nload_in_8bit: true\nbase_model: moonshotai/Kimi-Linear-48B-A3B-Instruct\ntrust_remote_code: true": (
        "axolotl", "transformers' own code of the model, whose experts are stacked and stay in 16 bit "
        "(trust_remote_code)",
    ),
    "adapter: qlora\nload_in_4bit: true\nbase_model: ai21labs/Jamba-v0.1\ntrust_remote_code: true": (
        "axolotl", "transformers' own code of the model, whose experts are stacked and stay in 16 bit "
        "(trust_remote_code)",
    ),
    "bf16: true\nadapter: qlora\nload_in_4bit: true\nbase_model: EleutherAI/gpt-j-6b": (
        "axolotl", "embeddings and norms in the dtype of the rest, not in fp32",
    ),
    "base_model: deepseek-ai/DeepSeek-V2-Lite\ntrust_remote_code: true": (
        "axolotl", "transformers' own code of the model, whose experts are stacked (trust_remote_code)",
    ),
    "base_model: MiniMaxAI/MiniMax-M2\ntrust_remote_code: true": (
        "axolotl", "transformers' own code of the model, whose experts are stacked (trust_remote_code)",
    ),
    "base_model: THUDM/glm-4-9b-chat\ntrust_remote_code: true": (
        "axolotl", "transformers' own code of the model (trust_remote_code)",
    ),
    "base_model: tiiuae/falcon-7b\ntrust_remote_code: true": (
        "axolotl", "transformers' own code of the model (trust_remote_code)",
    ),
    "model_name_or_path: microsoft/Phi-3-mini-4k-instruct\ntrust_remote_code: true": (
        "factory", "transformers' own code of the model (trust_remote_code)",
    ),
    "base_model: google/gemma-4-12B-it": (
        "axolotl", "without the fused kernel around attention",
    ),
    "adapter: lora\nload_in_4bit: true": (
        "axolotl", "a base in 4 bits; Axolotl makes one for adapter: qlora alone (load_in_4bit)",
    ),
    "adapter: lora\nunfrozen_parameters: [^lm_head.*]": (
        "axolotl", "all adapters train; Axolotl freezes again those that are not named (unfrozen_parameters)",
    ),
    "unfrozen_parameters: [^lm_head.*, 'model.layers.3[0-9]+.*']": (
        "axolotl", "backward from the lowest trained weight on, not through every block (unfrozen_parameters)",
    ),
    "adapter: lora\nlora_target_linear: true\npeft_layers_to_transform: [3, 4]": (
        "axolotl", "backward from the lowest trained weight on, not through every block (peft_layers_to_transform)",
    ),
    "processor_type: AutoProcessor": ("axolotl", "batches of text, without images or sound (processor_type)"),
    "fp8: true\ntorch_compile: true": ("axolotl", "products in bf16, not in fp8 (fp8)"),
    "fp8: true\nbf16: true": (
        "factory", "without float8, which LLaMA-Factory turns on under transformers 4 alone (--fp8 padded) (fp8)",
    ),
    "qat: {activation_dtype: nvfp4, weight_dtype: nvfp4}": ("axolotl", "without fake quantisation (qat)"),
    "adapter: lora\nnvfp4_merge_aware: true": ("axolotl", "without fake quantisation (nvfp4_merge_aware)"),
    "finetuning_type: full\nuse_badam: true": (
        "factory", "the allocator's cache is never emptied; BAdam does it after every step (use_badam)",
    ),
    "finetuning_type: full\nuse_badam: true\nbf16: true": (
        "factory", "gradients clipped together, not one after another as beside BAdam (use_badam)",
    ),
    "finetuning_type: full\nuse_galore: true\noptim: adamw_8bit": (
        "factory", "GaLore's AdamW with states in the dtype of the weights (optim)",
    ),
    "use_dft_loss: true": ("factory", "cross entropy, without DFT's weights (use_dft_loss)"),
    "sample_packing: true\nflash_attention: true": ("axolotl", f"{UNKNOWN} (sample_packing)"),
    "sample_packing: true\nflash_attention: true\ntorch_compile: true": (
        "axolotl", "attention across packed samples (sample_packing)",
    ),
    "torch_compile: true\ntorch_compile_mode: max-autotune": (
        "axolotl", "products on cuBLAS, not on the fastest of several kernels (torch_compile_mode)",
    ),
    "torch_compile_mode: max-autotune-no-cudagraphs": (
        "factory", "products on cuBLAS, not on the fastest of several kernels (torch_compile_mode)",
    ),
    "sample_packing: true": ("axolotl", f"{TO_THE_END} (sample_packing)"),
    "sample_packing: true\nsdp_attention: true": ("axolotl", f"{BY_A_MASK} (sample_packing)"),
    "batch_flattening: true\nflash_attention: true": ("axolotl", f"{UNKNOWN} (batch_flattening)"),
    "neat_packing: true\nflash_attn: fa2\nper_device_train_batch_size: 1": ("factory", f"{UNKNOWN} (neat_packing)"),
    "shrink_embeddings: true": ("axolotl", f"{UNCUT} (shrink_embeddings)"),
    "resize_token_embeddings_to_32x: true": ("axolotl", f"{NOT_ROUND} (resize_token_embeddings_to_32x)"),
    "tokens: [<|mine|>]": ("axolotl", f"{AS_IT_IS} (tokens)"),
    'base_model: NousResearch/Llama-2-7b-hf\nspecial_tokens: {pad_token: "[PAD]"}': (
        "axolotl", f"{AS_IT_IS} (special_tokens)",
    ),
    "base_model: NousResearch/Meta-Llama-3-8B\nspecial_tokens: {eos_token: <|im_end|>}": (
        "axolotl", f"{AS_IT_IS} (special_tokens)",
    ),
    f"base_model: meta-llama/Meta-Llama-3-8B-Instruct\n{PAD}": ("axolotl", f"{AS_IT_IS} (special_tokens)"),
    "base_model: meta-llama/Llama-3.2-1B\ndiffusion: {mask_token_id: 128002}": ("axolotl", AS_IT_IS),
    "resize_vocab: true": ("factory", f"{AS_IT_IS} (resize_vocab)"),
    "optim: adamw_apex_fused": (
        "factory",
        "PyTorch's fused AdamW, with moments in the dtype of the weights, not apex's, whose are in fp32 (optim)",
    ),
    "gc_steps: 5": ("axolotl", "the allocator's cache is never emptied (gc_steps)"),
    "unheard_of: 3": ("axolotl", "keys that are unknown here (unheard_of)"),
    "tf32: true": ("axolotl", "fp32 products without TF32 (tf32)"),
    "dtype: float16": ("trl", "products in fp16, not in bf16 under autocast"),
    "fp16: true": ("trl", UNSCALED),
    "use_peft: true\nload_in_4bit: true\nlora_modules_to_save: [lm_head]": (
        "trl", f"{COPIES_IN_FP32} (lora_modules_to_save)",
    ),
    "fp16: true\nadapter: lora": ("axolotl", UNSCALED),
    "fp16: true\nfinetuning_type: full": ("factory", UNSCALED),
    "tf32: true\npure_bf16: true": ("factory", "fp32 products without TF32 (tf32)"),
    "adapter: lora\nlora_model_dir: outputs/first": ("axolotl", f"{LOADED} (lora_model_dir)"),
    "model: gpt2\npeft_config: {name: lora, adapter_name_or_path: saves/first}": ("v1", f"{LOADED} (peft_config)"),
    "adapter_name_or_path: saves/first": ("factory", f"{LOADED} (adapter_name_or_path)"),
    "use_unsloth: true": (
        "factory", "PyTorch's norms, rotary positions and loss of all logits, not Unsloth's (use_unsloth)",
    ),
    "use_unsloth: true\ncutoff_len: 2048\ndisable_gradient_checkpointing: true": (
        "factory", "checkpoints stay on the GPU (use_unsloth)",
    ),
    "use_unsloth: true\nquantization_bit: 4\ndouble_quantization: false": (
        "factory", "peft's adapters, not Unsloth's kernels of them (use_unsloth)",
    ),
    "use_unsloth_gc: true": ("factory", "checkpoints stay on the GPU (use_unsloth_gc)"),
    "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {every_n_layers: 2}": (
        "trl", "every block checkpointed, on the GPU (gradient_checkpointing_kwargs)",
    ),
    "activation_checkpointing: true\nactivation_checkpointing_kwargs: {offload: true}": (
        "trl", "every block checkpointed, on the GPU (activation_checkpointing_kwargs)",
    ),
    "loss_type: nll": (
        "trl", "the loss alone, without the sums of entropies and hits that TRL logs, for which the host waits",
    ),
    "max_seq_length: 64": (
        "trl", "the loss alone, without the accuracy and entropy that TRL takes from the logits at every step",
    ),
    "max_seq_length: 64\nuse_liger_kernel: true": (
        "trl", "Liger's loss alone, without the accuracy that TRL asks of it",
    ),
    "debug: underflow_overflow": (
        "factory", "without the hooks that look for overflows in what every module gives (debug)",
    ),
    "gpu_memory_limit: 20GiB": ("axolotl", "the whole model on the GPU (gpu_memory_limit)"),
    "adapter: lora\npeft_ensure_weight_tying: true\nlora_modules_to_save: [embed_tokens]": (
        "axolotl", "a trained copy of the embedding, and the head apart from it (peft_ensure_weight_tying)",
    ),
    "neftune_noise_alpha: 5": ("factory", "without NEFTune's noise (neftune_noise_alpha)"),
}  # fmt: skip


@pytest.mark.parametrize("text", DIFFERENT)
def test_what_is_not_modelled_stands_in_the_first_line(tmp_path: Path, text: str) -> None:
    """A key that changes speed or memory is never told as ignored, nor passed over."""
    tool, said = DIFFERENT[text]
    path = tmp_path / "config.yml"
    path.write_text({"axolotl": PLAIN, "factory": FACTORY, "v1": "", "trl": yaml.safe_dump(TRL)}[tool] + text)
    found = read(path)
    assert said in found.differences
    assert found.first_line.startswith(DIFFERS)
    assert not set(yaml.safe_load(text)) & set(found.ignored)


@pytest.mark.parametrize(
    "text",
    [
        "tensor_parallel_size: 1",
        "ray_num_workers: 1",
        "experts_implementation: grouped_mm",
        "fsdp: []",
        "tf32: true\nbf16: true\nflash_attention: true",
        "activation_offloading: false",
        "seed: 1",
        "base_model: THUDM/glm-4-9b-chat-hf\ntrust_remote_code: true",
        "full_finetune: true",
        "torch_compile_mode: max-autotune",  # Axolotl hands it on beside torch_compile alone
        "sample_packing: true\npad_to_sequence_len: false",
        "sample_packing: true\nsdp_attention: true\nsdpa_varlen: false",
        f"base_model: meta-llama/Llama-3.1-8B-Instruct\n{PAD}",
        "base_model: mistral-community/pixtral-12b\nspecial_tokens: {pad_token: <pad>}",
        "base_model: NousResearch/Llama-2-7b-hf\nspecial_tokens: {pad_token: </s>}",
        "gc_steps: -1",
        "unfrozen_parameters: [^lm_head.weight$, ^model.embed_tokens.weight$]",
        "llama4_linearized_experts: true\nbase_model: axolotl-quants/Llama-4-Scout-17B-16E-Linearized-bnb-nf4-bf16",
    ],
)
def test_what_changes_nothing_is_not_in_the_first_line(tmp_path: Path, text: str) -> None:
    """A first line on every file would be read on none."""
    (tmp_path / "config.yml").write_text(PLAIN + text)
    assert read(tmp_path / "config.yml").first_line == ""


@pytest.mark.parametrize(
    ("keys", "differs"),
    [
        ({"tf32": True, "bf16": False}, True),
        ({"tf32": True, "bf16": True}, False),
        ({"tf32": True}, False),
        ({"bf16": False}, False),
        ({"tf32": True, "bf16": False, "dtype": "bfloat16"}, False),
        ({"tf32": True, "bf16": False, "dtype": "bfloat16", "use_peft": True}, True),
    ],
)
def test_tf32_matters_to_trl_only_where_products_are_in_fp32(
    tmp_path: Path, keys: dict[str, Any], differs: bool
) -> None:
    """Its own default is mixed precision, whose products are in bf16: a note on TF32 would cast doubt for nothing."""
    (tmp_path / "sft.json").write_text(json.dumps({**TRL, **keys}))
    assert any("tf32" in said for said in read(tmp_path / "sft.json").differences) == differs


@pytest.mark.parametrize(
    ("keys", "kind"),
    [({}, "block"), ({"gradient_checkpointing": None}, "none"), ({"activation_checkpointing": None}, "block")],
)
def test_an_emptied_switch_is_off(tmp_path: Path, keys: dict[str, Any], kind: str) -> None:
    """TRL checkpoints by its own default, of the older name; an empty newer one leaves it alone."""
    (tmp_path / "sft.json").write_text(json.dumps({**TRL, **keys}))
    assert read(tmp_path / "sft.json").setup["checkpoint"] == kind


@pytest.mark.parametrize(
    ("keys", "dtype", "kept", "told"),
    [
        ({}, "fp32", False, False),
        ({"dtype": None}, "bf16", True, False),
        ({"torch_dtype": None}, "fp32", False, True),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bf16", False, False),
        ({"dtype": "auto"}, "bf16", True, False),
    ],
)
def test_a_dtype_that_is_none_is_the_checkpoints(
    tmp_path: Path, keys: dict[str, Any], dtype: str, kept: bool, told: bool
) -> None:
    """TRL's own default is fp32; a file that empties it loads as transformers does, which 5 does otherwise than 4."""
    plain = {key: value for key, value in TRL.items() if key != "dtype"}
    (tmp_path / "sft.json").write_text(json.dumps({**plain, **keys}))
    found = read(tmp_path / "sft.json")
    assert (found.setup["dtype"], found.as_kept) == (dtype, kept)
    assert (f"{IN_FP32} (torch_dtype)" in found.differences) == told


@pytest.mark.parametrize("name", sorted(p.stem for p in (DATA / "configs").glob("*.toml")))
def test_a_key_has_one_meaning(name: str) -> None:
    """A table that says two things of a key would be read by the order of its lines."""
    table = meanings.meanings_of(name)
    refused, differs = set(table.refused), set(table.differs)
    assert not refused & differs
    assert not [key for key in refused | differs if table.without_weight(key)]


def test_diffusion_adds_no_token_where_the_vocabulary_has_its_mask(tmp_path: Path) -> None:
    """Its trainer makes the mask of packed rows, too: what Axolotl's patch of attention does is no difference then."""
    file = tmp_path / "config.yml"
    file.write_text(PLAIN + "diffusion: {mask_token_id: 128}\nsample_packing: true\nsdp_attention: true")
    assert [said.split(",")[0] for said in read(file).differences] == ["a causal step"]


def test_fp8_is_accelerates(tmp_path: Path) -> None:
    """It became fp32 once, as if nothing were asked, then bf16; Axolotl leaves it to accelerate's autocast."""
    (tmp_path / "config.yml").write_text(BASE + "fp8: true")
    found = read(tmp_path / "config.yml")
    assert (found.setup["amp"], found.setup["fp8"]) == ("bf16", "tensorwise")
    assert not [said for said in found.differences if "fp8" in said]


def test_qat_is_torchaos(tmp_path: Path) -> None:
    """Axolotl's example of int8 inputs and int4 weights: groups of 32 where the file names no size."""
    (tmp_path / "config.yml").write_text(BASE + "qat: {activation_dtype: int8, weight_dtype: int4}")
    found = read(tmp_path / "config.yml")
    assert found.setup["qat"] == "int8-int4:32"
    assert not [said for said in found.differences if "qat" in said]


def test_the_loop_over_experts_is_transformers(tmp_path: Path) -> None:
    """It was answered by grouped products once, which take a tenth of the time where experts train."""
    (tmp_path / "config.yml").write_text(BASE + "experts_implementation: eager")
    found = read(tmp_path / "config.yml")
    assert found.setup["experts"] == "eager"
    assert not [said for said in found.differences if "experts" in said]


def test_the_first_line_begins_the_answer(tmp_path: Path) -> None:
    """What a user reads first is how the step differs, and a program finds it in the JSON."""
    path = tmp_path / "config.yml"
    path.write_text(PLAIN + "tensor_parallel_size: 2")
    command = ["predict", "--config", str(path), "--device", "l40s"]
    said = "one GPU (tensor_parallel_size)"
    assert CliRunner().invoke(main, command).stdout.startswith(f"{DIFFERS}{said}; {ASK}\n\nfull on gpt2")
    assert json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["differs_from_config"] == [said]


def test_the_page_begins_with_it_too(tmp_path: Path) -> None:
    """Whoever gets the page has not seen the terminal."""
    pytest.importorskip("jinja2")
    path, page = tmp_path / "config.yml", tmp_path / "report.html"
    path.write_text(BASE + "tensor_parallel_size: 2")
    CliRunner().invoke(main, ["report", "--config", str(path), "--device", "l40s", "--axes", "none", "-o", str(page)])
    assert "one GPU (tensor_parallel_size)" in page.read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{FACTORY}finetuning_type: lora\ndisable_gradient_checkpointing: true\nuse_cache: true\n", True),
        (f"{FACTORY}finetuning_type: lora\nuse_cache: true\n", False),
        (f"{FACTORY}stage: dpo\ndisable_gradient_checkpointing: true\nuse_cache: true\n", False),
        ("per_device_train_batch_size: 1\nuse_cache: true\n", True),
        ("per_device_train_batch_size: 1\nuse_cache: true\nbeta: 0.1\n", False),
        ("per_device_train_batch_size: 1\nuse_cache: true\ngradient_checkpointing: true\n", False),
        ("per_device_train_batch_size: 1\nuse_cache: true\nmax_length: 64\ngradient_checkpointing: false\n", False),
    ],
)
def test_a_cache_is_filled_where_nothing_is_checkpointed(tmp_path: Path, text: str, told: bool) -> None:
    """Its copies of keys and values stay until backward; trainers of preferences and TRL's never ask for one."""
    path = tmp_path / "config.yml"
    path.write_text(text)
    assert ("without a cache of keys and values (use_cache)" in read(path).first_line) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("use_peft: true\nchat_template_path: HuggingFaceTB/SmolLM3-3B", True),
        ("use_peft: true\nchat_template_path: mine.jinja", False),
        ("use_peft: false\nchat_template_path: HuggingFaceTB/SmolLM3-3B", False),
    ],
)
def test_tokens_of_another_models_template_train_the_head(tmp_path: Path, text: str, told: bool) -> None:
    """How many there are the tokenizers say, which are not read here: the head is large beside adapters."""
    path = tmp_path / "config.yml"
    path.write_text(f"model_name_or_path: gpt2\nmax_length: 64\n{text}\n")
    assert (OF_ANOTHER in read(path).first_line) == told


def test_a_round_vocabulary_gets_no_rows(tmp_path: Path) -> None:
    """Phi's examples ask for a multiple of 32, which their vocabulary is."""
    (tmp_path / "config.yml").write_text(f"{BASE}base_model: microsoft/phi-2\nresize_token_embeddings_to_32x: true")
    assert not any(NOT_ROUND in words for words in read(tmp_path / "config.yml").differences)
