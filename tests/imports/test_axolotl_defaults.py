"""What Axolotl switches on by itself, by its sources."""

from pathlib import Path

import pytest

from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.imports.axolotl import BOTH_FACTORS, NO_BATCH_SIZE
from perfmodel.imports.fields import EMBEDDING_STATES

BASE = "base_model: gpt2\nmicro_batch_size: 1\nsequence_len: 64\nlora_target_modules: [c_attn]\n"
LORA = BASE + "adapter: lora\nlora_target_linear: true\n"


@pytest.mark.parametrize(
    ("text", "fused"),
    [
        ("", True),
        ("lora_target_linear: false\nlora_target_modules: [q_proj, v_proj]", False),
        ("lora_target_linear: false\nlora_target_modules: [a.q_proj, a.k_proj, a.v_proj]", True),
        ("deepspeed: zero3.json", True),
        ("fsdp_config: {a: b}\nfsdp_version: 2", True),
        ("fsdp_config: {a: b}", False),
        ("lora_o_kernel: false", False),
        ("lora_embedding_kernel: true", False),
        ("rl: dpo", False),
        ("trust_remote_code: true", False),
        ("base_model: PaddlePaddle/PaddleOCR-VL-1.6", False),
        ("load_in_8bit: true", False),
        ("lora_dropout: 0.05", True),
        ("adapter: qlora\nload_in_4bit: true", True),
        ("peft_use_dora: true", False),
    ],
)
def test_kernels_for_adapters_come_by_themselves(tmp_path: Path, text: str, fused: bool) -> None:
    """Most configs name no kernels and run with them: PEFT's own adapters need more time and memory."""
    (tmp_path / "config.yml").write_text(LORA + text)
    found = read(tmp_path / "config.yml")
    assert ("implementation=axolotl" in str(found.method)) == fused
    told = any("without fused kernels for adapters" in said for said in found.differences)
    assert told == ("dora" in text)


@pytest.mark.parametrize(
    ("text", "micro_batches"),
    [
        ("", 1),
        ("batch_size: 8", 1),
        ("batch_size: 8\ngradient_accumulation_steps:", 8),
        ("gradient_accumulation_steps: 4", 4),
    ],
)
def test_a_batch_size_makes_no_micro_batches(tmp_path: Path, text: str, micro_batches: int) -> None:
    """The schema's default of one micro-batch stands before it: a step of eight would take eight times as long."""
    (tmp_path / "config.yml").write_text(BASE + text)
    found = read(tmp_path / "config.yml")
    assert found.setup["grad_accum"] == micro_batches
    assert (NO_BATCH_SIZE in found.notes) == (text == "batch_size: 8")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("gradient_checkpointing: true", "block-reentrant"),
        ("gradient_checkpointing: true\nrl: dpo", "block"),
        ("gradient_checkpointing: true\nbase_model: google/gemma-4-12B-it", "block"),
        ("gradient_checkpointing: true\nactivation_offloading: true", "block"),
        ("gradient_checkpointing: true\nactivation_offloading: hidden_states\nadapter: lora", "block"),
        ("gradient_checkpointing: offload", "block"),
        ("gradient_checkpointing: true\nrl: ebft\nebft: {mode: strided}", "block"),
        ("gradient_checkpointing: true\nrl: ebft\nebft: {mode: strided}\nflex_attention: true", "block-reentrant"),
        ("rl: ebft\nebft: {mode: strided}\nflex_attention: true", "none"),
        ("gradient_checkpointing: true\nactivation_offloading: true\nadapter: lora", "block-reentrant"),
    ],
)
def test_checkpoints_are_those_that_axolotl_runs(tmp_path: Path, text: str, kind: str) -> None:
    """Reentrant ones save the inputs of blocks alone, the others run through saved-tensor hooks."""
    (tmp_path / "config.yml").write_text(BASE + text)
    assert read(tmp_path / "config.yml").setup["checkpoint"] == kind


@pytest.mark.parametrize(
    ("text", "dtype", "amp"),
    [
        ("", "bf16", "bf16"),
        ("float16: true", "bf16", "bf16"),
        ("fp16: true", "fp16", "fp16"),
        ("bf16:", "fp32", None),
        ("bf16: false", "fp32", None),
        ("bf16: false\nfloat16: true", "fp16", None),
        ("bf16: false\nadapter: lora\nload_in_8bit: true", "fp16", None),
        ("bf16: full", "bf16", None),
        ("bf16: full\nadapter: lora", "bf16", None),
    ],
)
def test_bf16_comes_by_itself(tmp_path: Path, text: str, dtype: str, amp: str | None) -> None:
    """A file that names no precision was answered in fp32 once: twice the memory, an eighth of the rate."""
    (tmp_path / "config.yml").write_text(BASE + text)
    found = read(tmp_path / "config.yml")
    assert (found.setup["dtype"], found.setup["amp"]) == (dtype, amp)
    in_fp32 = dtype == "fp32" or (amp is None and "adapter" in text)
    assert any("TF32" in said for said in found.differences) == in_fp32, "so does TF32, of adapters too"


def test_modules_of_images_are_frozen_on_request(tmp_path: Path) -> None:
    """Full tuning of a vision-language model with `freeze_mm_modules` trains the language model alone."""
    file = tmp_path / "config.yml"
    file.write_text(BASE + "freeze_mm_modules: true")
    assert read(file).frozen == ("vision tower", "projector")
    file.write_text(BASE)
    assert read(file).frozen == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: google/gemma-4-31B\n", ["without the fused kernel around attention"]),
        (
            "base_model: google/gemma-4-31B\nfused_attn_kernel: true\n",
            ["without the fused kernel around attention (fused_attn_kernel)"],
        ),
        ("base_model: google/gemma-3-12b-it\n", []),
    ],
)
def test_gemma_4s_fused_kernel_comes_by_itself(tmp_path: Path, text: str, said: list[str]) -> None:
    """Norms, rotations and transposes of every layer are one kernel there, whatever the file says."""
    (tmp_path / "config.yml").write_text(BASE + text)
    assert [d for d in read(tmp_path / "config.yml").differences if "fused kernel" in d] == said


@pytest.mark.parametrize(
    ("text", "experts"),
    [
        ("", "grouped_mm"),
        ("plugins: [axolotl.integrations.kernels.KernelsPlugin]", "eager"),
        ("plugins: [axolotl.integrations.kernels.KernelsPlugin]\nuse_scattermoe: true", "grouped_mm"),
        ("plugins: [axolotl.integrations.kernels.KernelsPlugin]\nexpert_backend: sonicmoe", "grouped_mm"),
        ("plugins: [axolotl.integrations.kernels.KernelsPlugin]\nexperts_implementation: grouped_mm", "grouped_mm"),
    ],
)
def test_the_plugin_of_kernels_makes_experts_eager(tmp_path: Path, text: str, experts: str) -> None:
    """A loop over the experts that are hit waits for the device in every block: transformers' default does not."""
    (tmp_path / "config.yml").write_text(BASE + text)
    assert read(tmp_path / "config.yml").setup["experts"] == experts


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bf16: true\nfsdp: [full_shard]\nfsdp_config: {offload_params: true}", ["weights"]),
        ("bf16: true\nfsdp_config: {fsdp_version: 2}", []),
        ("bf16: true\nfsdp_version: 2\nfsdp_config: {a: b}", []),
        ("bf16: full\nfsdp_config: {a: b}", []),
        ("bf16: true\nfsdp_config: {a: b}\nadapter: lora\nlora_target_linear: true", []),
        (
            "bf16: true\nfsdp_config: {a: b}\nadapter: lora\nlora_target_linear: true\nlora_modules_to_save: [lm_head]",
            ["copies of modules"],
        ),
        ("bf16: true", []),
    ],
)
def test_weights_that_fsdp_keeps_in_fp32_are_told(tmp_path: Path, text: str, told: list[str]) -> None:
    """In 16 bit weights and the optimizer's states have half the bytes, and its step half the traffic."""
    (tmp_path / "config.yml").write_text(BASE + text)
    said = [words.split(" in bf16, ") for words in read(tmp_path / "config.yml").differences]
    assert [words for words, *rest in said if rest == ["not in fp32 as FSDP keeps them"]] == told


@pytest.mark.parametrize(
    ("text", "cast"),
    [
        ("use_dsv4_kernels: true", True),
        ("base_model: nvidia/DeepSeek-V4-Flash-NVFP4\nfsdp_version: 2\nfsdp_config: {a: b}", True),
        ("base_model: nvidia/DeepSeek-V4-Flash-NVFP4\nfsdp_config: {a: b}", False),
        ("base_model: nvidia/DeepSeek-V4-Flash-NVFP4", False),
        ("fsdp_version: 2\nfsdp_config: {a: b}", False),
        ("peft_autocast_adapter_dtype: false", True),
        ("peft_autocast_adapter_dtype: false\nrl: orpo", True),
        ("peft_autocast_adapter_dtype: false\nrl: dpo", False),  # whose adapters TRL makes
        ("peft_autocast_adapter_dtype: false\nrl: kto", False),
        ("rl: dpo\nfsdp_config: {a: b}", True),
    ],
)
def test_adapters_that_are_cast_once_peft_made_them(tmp_path: Path, text: str, cast: bool) -> None:
    """Adapters of experts have billions of weights: in fp32 gradients and states take twice the memory."""
    (tmp_path / "config.yml").write_text(LORA + text)
    assert ("adapter_dtype=bf16" in str(read(tmp_path / "config.yml").method)) == cast


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", True),
        ("plugins: [a.CutCrossEntropyPlugin]", False),
        ("plugins: [a.CutCrossEntropyPlugin]\ncut_cross_entropy: false", True),
        ("plugins: [a.CutCrossEntropyPlugin]\nattn_implementation: sdpa", False),
        ("flash_attention: true", False),
    ],
)
def test_embeddings_that_stay_in_fp32_are_told(tmp_path: Path, text: str, told: bool) -> None:
    """Cut cross entropy has them cast back, and its plugin switches it on by itself: what is answered then is true."""
    (tmp_path / "config.yml").write_text(BASE + text)
    found = read(tmp_path / "config.yml")
    assert ("embeddings and norms in the dtype of the rest, not in fp32" in found.differences) == told


@pytest.mark.parametrize(("text", "clips"), [("", True), ("max_grad_norm: 0", False), ("gradient_clipping: 0", True)])
def test_gradients_are_clipped_by_one_key_alone(tmp_path: Path, text: str, clips: bool) -> None:
    """A key that Axolotl does not know changes nothing, however much it looks like one."""
    (tmp_path / "config.yml").write_text(BASE + text)
    found = read(tmp_path / "config.yml")
    assert found.setup["clip_grad"] == clips
    assert not any("unknown" in said for said in found.differences)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("embedding_lr: 1.0e-5", True),
        ("embedding_lr: 1.0e-5\noptimizer: adamw_torch", False),
        ("embedding_lr: 1.0e-5\nadapter: lora", False),
        ("loraplus_lr_ratio: 16\nadapter: lora\nlora_modules_to_save: [embed_tokens]", True),
        ("loraplus_lr_ratio: 16\nadapter: lora\nlora_modules_to_save: [lm_head]", False),
        ("", False),
    ],
)
def test_an_embedding_of_8_bit_states_is_told(tmp_path: Path, text: str, told: bool) -> None:
    """transformers keeps those of an embedding in fp32; groups of Axolotl's own leave them to bitsandbytes."""
    (tmp_path / "config.yml").write_text(f"{BASE}optimizer: adamw_8bit\n{text}")
    assert (EMBEDDING_STATES in read(tmp_path / "config.yml").differences) == told


@pytest.mark.parametrize("start", ["mica", "gaussian"])
def test_a_frozen_factor_is_told(tmp_path: Path, start: str) -> None:
    """MiCA trains one of the two: half of the states, and no product for the gradient of the other."""
    (tmp_path / "config.yml").write_text(f"{LORA}peft_init_lora_weights: {start}")
    told = any(words.startswith(BOTH_FACTORS) for words in read(tmp_path / "config.yml").differences)
    assert told == (start == "mica")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("gradient_checkpointing:", "none"),
        ("gradient_checkpointing:\nrl: dpo", "block"),
        ("gradient_checkpointing:\nreward_model: true", "block"),
        ("gradient_checkpointing: false\nrl: dpo", "none"),
        ("rl: dpo", "none"),
    ],
)
def test_checkpoints_are_trls_default_where_the_key_is_emptied(tmp_path: Path, text: str, kind: str) -> None:
    """Axolotl's own default is handed on as false, an emptied key is not handed on."""
    (tmp_path / "config.yml").write_text(BASE + text)
    assert read(tmp_path / "config.yml").setup["checkpoint"] == kind


@pytest.mark.parametrize(("name", "off"), [("DenseMixer", "dense_mixer"), ("NemoGym", "nemo_gym_enabled")])
def test_a_plugin_that_is_on_by_itself_is_refused(tmp_path: Path, name: str, off: str) -> None:
    """Named alone it makes a step of another kind, as its keys have defaults; one of them may switch it off."""
    (tmp_path / "config.yml").write_text(f"{BASE}plugins: [a.{name}Plugin]\n")
    with pytest.raises(UserError, match=f"plugins: {name}Plugin: .* is not modelled"):
        read(tmp_path / "config.yml")
    (tmp_path / "config.yml").write_text(f"{BASE}plugins: [a.{name}Plugin]\n{off}: false\n")
    assert not any("plugin" in said.lower() for said in read(tmp_path / "config.yml").differences)


def test_words_in_quotes_are_taken_for_true(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"{BASE}gradient_checkpointing: 'true'\nsave_strategy: 'no'\n")
    assert read(path).setup["checkpoint"] == "block-reentrant"
    path.write_text(f"{BASE}sample_packing: 'off'\n")  # pads, though it does not pack
    with pytest.raises(UserError, match="sample_packing 'off' in quotes is a word, which Axolotl may take for true"):
        read(path)
