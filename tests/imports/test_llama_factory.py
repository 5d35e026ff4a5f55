"""What LLaMA-Factory makes of keys that Transformers or another of its methods has, too."""

from pathlib import Path

import pytest

from perfmodel.imports import read
from perfmodel.imports.llama_factory_v1 import FUSED_LOSS, OWN_LOSS

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
    ("text", "kernels"),
    [
        ("model_name_or_path: meta-llama/Llama-3.2-1B\nenable_liger_kernel: true\nfinetuning_type: full", "liger"),
        ("model_name_or_path: HuggingFaceTB/SmolLM3-3B\nenable_liger_kernel: true\nfinetuning_type: full", "torch"),
        ("model: Qwen/Qwen3-0.6B\nkernel_config: {name: liger_kernel}", "liger"),
        ("kernel_config: {name: liger_kernel}\nmodel_class: llm", "liger"),
        ("model: meta-llama/Llama-3.2-1B\nkernel_config: {name: liger_kernel}", "torch"),
    ],
)
def test_ligers_kernels_are_those_of_some_models(text: str, kernels: str, tmp_path: Path) -> None:
    """Each version has a list of its own; on another model it warns, and goes on with PyTorch's."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    found = read(file)
    assert found.setup["kernels"] == kernels
    if "model_name_or_path" not in text:
        assert {FUSED_LOSS, OWN_LOSS} & set(found.differences) == {FUSED_LOSS if kernels == "liger" else OWN_LOSS}
