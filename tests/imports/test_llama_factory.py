"""What LLaMA-Factory makes of keys that Transformers or another of its methods has, too."""

from pathlib import Path

import pytest

from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.imports.fields import EMBEDDING_STATES, TORCHS_MUON

BY_TRAINER = "gpt2\ngradient_checkpointing: true\n"
OPTIONS = "gradient_checkpointing_kwargs: {use_reentrant: false}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("google/gemma-3n-E2B-it", "none"),
        ("google/gemma-3-4b-it", "block-reentrant"),
        (f"gpt2\n{OPTIONS}", "block-reentrant"),
        (f"{BY_TRAINER}use_reentrant_gc: false", "block-reentrant"),
        (BY_TRAINER + OPTIONS, "block"),
        (f"{BY_TRAINER}disable_gradient_checkpointing: true", "block"),
    ],
)
def test_llama_factory_checkpoints_before_its_trainer_does(text: str, kind: str, tmp_path: Path) -> None:
    """Its own keys decide, and not for Gemma 3n; what transformers' keys ask for comes after that, and stays."""
    file = tmp_path / "config.yaml"
    file.write_text(f"finetuning_type: lora\nmodel_name_or_path: {text}\n")
    assert read(file).setup["checkpoint"] == kind


@pytest.mark.parametrize(
    ("text", "dtypes"),
    [
        ("use_galore: true\nbf16: true", ("fp32", "bf16")),
        ("use_apollo: true\nbf16: true", ("fp32", "bf16")),
        ("use_galore: true", ("fp32", None)),
        ("use_galore: true\npure_bf16: true", ("bf16", None)),
        ("use_badam: true\nbf16: true", ("bf16", "bf16")),
    ],
)
def test_what_projects_gradients_trains_in_fp32(text: str, dtypes: tuple[str, str | None], tmp_path: Path) -> None:
    """All weights are cast that train, but for pure_bf16 and BAdam (model/adapter.py, `init_adapter`)."""
    file = tmp_path / "config.yaml"
    file.write_text(f"model_name_or_path: gpt2\nfinetuning_type: full\n{text}\n")
    found = read(file)
    assert (found.setup["dtype"], found.setup["amp"]) == dtypes


@pytest.mark.parametrize(
    ("text", "differs"),
    [
        ("finetuning_type: lora", False),
        ("finetuning_type: lora\ntf32: true", True),
        ("finetuning_type: lora\ntf32: true\nbf16: true", False),
        ("finetuning_type: full\ntf32: true\npure_bf16: true", False),
    ],
)
def test_tf32_matters_only_where_products_are_in_fp32(text: str, differs: bool, tmp_path: Path) -> None:
    """Under autocast, or with all of it in bf16, there are none."""
    file = tmp_path / "config.yaml"
    file.write_text(f"model_name_or_path: gpt2\n{text}\n")
    assert any("tf32" in said for said in read(file).differences) == differs


@pytest.mark.parametrize(
    ("text", "optimizer"),
    [
        ("use_muon: true", "muon"),
        ("use_adam_mini: true", "adam-mini"),
        ("use_muon: true\nuse_adam_mini: true", "adam-mini"),
        ("use_muon: true\nuse_badam: true", "adamw"),
        ("use_adam_mini: true\nuse_galore: true", "adamw"),
        ("use_muon: true\nfinetuning_type: lora\nloraplus_lr_ratio: 16", "adamw"),
    ],
)
def test_the_first_switch_that_is_on_makes_the_optimizer(text: str, optimizer: str, tmp_path: Path) -> None:
    """LLaMA-Factory asks for GaLore, APOLLO, LoRA+ and BAdam before Adam-mini, and for Muon last."""
    file = tmp_path / "config.yaml"
    kind = "" if "finetuning_type" in text else "finetuning_type: full\n"
    file.write_text(f"model_name_or_path: gpt2\noptim: adamw_torch\n{kind}{text}\n")
    found = read(file)
    assert found.setup["optimizer"] == optimizer
    assert (TORCHS_MUON in " ".join(found.differences)) == (optimizer == "muon")
    assert not any("unknown" in said for said in found.differences)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("additional_target: embed_tokens", True),
        ("resize_vocab: true", True),
        ("additional_target: lm_head", False),
        ("", False),
    ],
)
def test_an_embedding_copied_beside_loraplus_has_states_in_8_bit(text: str, told: bool, tmp_path: Path) -> None:
    """Its own optimizer does not tell bitsandbytes of embeddings, as the trainer's does."""
    for ratio in ("", "loraplus_lr_ratio: 16\n"):
        file = tmp_path / "config.yaml"
        file.write_text(f"model_name_or_path: gpt2\nfinetuning_type: lora\noptim: adamw_8bit\n{ratio}{text}\n")
        said = f"{EMBEDDING_STATES} (loraplus_lr_ratio)"
        assert (said in read(file).differences) == (told and bool(ratio))


@pytest.mark.parametrize(
    ("text", "attention"),
    [
        ("google/gemma-2-9b", "flash2"), ("google/gemma-2-9b\nflash_attn: sdpa", "sdpa"),
        ("tencent/Youtu-LLM-2B", "eager"), ("tencent/Youtu-LLM-2B\nflash_attn: sdpa", "eager"),
        ("tencent/Youtu-LLM-2B\nflash_attn: fa2", "flash2"), ("gpt2\nflash_attn: auto", "sdpa"),
    ],
)  # fmt: skip
def test_some_models_have_an_attention_of_their_own(text: str, attention: str, tmp_path: Path) -> None:
    """LLaMA-Factory changes what is asked for, by the model's type."""
    file = tmp_path / "config.yaml"
    file.write_text(f"finetuning_type: lora\nmodel_name_or_path: {text}\n")
    assert read(file).setup["attention"] == attention


def test_a_quoted_false_is_no_false(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: gpt2\nfinetuning_type: full\nstage: sft\nbf16: 'false'\n")
    with pytest.raises(UserError, match="bf16 'false' in quotes is a word, which LLaMA-Factory may take for true"):
        read(path)
