"""Reference programs of quantised bases: stand-ins of bitsandbytes' layers (`low_bit`) in a real model.

Which layers are quantised, and which of them get peft's adapters, is written here from transformers and peft.
"""

from collections.abc import Callable
from typing import Any

import peft
from reference import wrap

from perfmodel.architectures import Architecture
from perfmodel.methods.lora import Lora
from perfmodel.methods.lora_8bit import Lora8bit
from perfmodel.methods.parts.quantised import QuantisedLora
from perfmodel.methods.qlora import QLora
from perfmodel.setup import Setup
from perfmodel.tracing.parameters import stood_for
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES
from perfmodel.tracing.programs.low_bit import Linear4bit, Linear8bitLt, peft_layer


def quantise(model: Any, method: QuantisedLora, architecture: Architecture, setup: Setup) -> Any:
    """The model with quantised linears, prepared if the method says so, and peft's LoRA on the targets."""
    kind: type = Linear4bit if isinstance(method, QLora) else Linear8bitLt

    def make(base: Any) -> Any:
        if isinstance(method, Lora8bit):
            return Linear8bitLt(base, method.outliers)
        assert isinstance(method, QLora)
        compute = TORCH_DTYPES[method.compute_dtype or setup.dtype]
        storage = TORCH_DTYPES[method.quant_storage]
        return Linear4bit(base, compute, double_quant=method.double_quant, storage=storage)

    model = wrap(model, architecture, lambda name, layer: name != "lm_head", make)
    if method.prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return replace(model, kind, architecture, method, adapted(peft_layer(kind), method))


def adapted(layer: Any, method: Lora) -> Callable[[Any], Any]:
    """Makes peft's LoRA layer of a quantised one."""
    config = peft.LoraConfig(r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout)

    def make(base: Any) -> Any:
        made = layer(base, "default", config=config, r=method.r, lora_alpha=method.alpha)
        made.train()
        for parameter in (p for name, p in made.named_parameters() if "lora_" in name):
            parameter.data = parameter.data.to(TORCH_DTYPES[method.adapter_dtype or "fp32"])
        return made

    return make


def replace(model: Any, kind: type, architecture: Architecture, method: Any, make: Any) -> Any:
    """Put `make(module)` in the place of the targeted modules of a kind."""
    prefix = architecture.layer_path + "."
    for path, module in list(model.named_modules()):
        inside = path.startswith(prefix)
        number, _, name = path.removeprefix(prefix).partition(".") if inside else ("", "", path)
        if isinstance(module, kind) and method.targets_layer(name, int(number) if inside else None):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


def elements(model: Any) -> int:
    """Parameters of the model: a packed weight holds two a byte, scales are none."""
    known = stood_for(model)
    return sum(known.get(id(p), p.numel()) for p in model.parameters())
