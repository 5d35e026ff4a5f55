"""The real models: built from a config with random weights on the meta device, the method applied by peft."""

from typing import Any

import torch

from perfmodel.architectures import Architecture, Config
from perfmodel.methods import Method
from perfmodel.methods.bitfit import BitFit
from perfmodel.methods.full import Full
from perfmodel.methods.lora import Lora
from perfmodel.methods.norm import NormTuning
from perfmodel.methods.top_k import TopK
from perfmodel.setup import Setup

from .trace import TORCH_DTYPES

NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gpt_neo": ["ln_1", "ln_2", "ln_f"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "bert": ["LayerNorm"],
}


def build(config: Config, setup: Setup, *, device: str = "meta") -> Any:
    """The transformers model of a config, base weights in the setup's dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    values = {k: v for k, v in config.values.items() if not k.startswith("_")}
    hf = AutoConfig.for_model(**values)
    if hasattr(hf, "use_cache"):
        hf.use_cache = False  # as transformers.Trainer sets it
    auto = AutoModelForMaskedLM if config.values["model_type"] == "bert" else AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(hf, dtype=TORCH_DTYPES[setup.dtype], attn_implementation=setup.attention)


def apply(model: Any, method: Method, architecture: Architecture) -> Any:
    """The model with the fine-tuning method on it, through peft where peft has it."""
    import peft

    if isinstance(method, Full):
        return model
    if isinstance(method, TopK) and method.inner == "full":
        first = method.layers - method.k
        for name, parameter in model.named_parameters():
            inside = name.startswith(architecture.layer_path + ".")
            parameter.requires_grad = (
                inside and int(name.removeprefix(architecture.layer_path + ".").split(".")[0]) >= first
            )
        return model
    if isinstance(method, BitFit):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith("bias")
        return model
    if isinstance(method, NormTuning):
        targets = NORMS.get(architecture.model_type, NORMS["llama"])
        return peft.get_peft_model(model, peft.LNTuningConfig(target_modules=targets))
    if isinstance(method, TopK):
        method = method.inside
    if isinstance(method, Lora):
        return _lora(model, method, architecture)
    raise TypeError(f"no reference program for method {method.name}")


def _lora(model: Any, method: Lora, architecture: Architecture) -> Any:
    import peft

    targets = method.target_names
    config = peft.LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        layers_to_transform=list(method.layers_to_transform) if method.layers_to_transform is not None else None,
        fan_in_fan_out=architecture.model_type == "gpt2",
    )
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=method.adapter_dtype != "bf16")
    if method.adapter_dtype is not None:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(TORCH_DTYPES[method.adapter_dtype])
    return adapted
