"""What becomes of a config's step on its model: what the model has no program of, and names that only it explains."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .. import methods
from ..architectures import load
from ..architectures.base import Architecture
from ..architectures.names import bundled_for
from ..errors import UserError
from ..methods.lora import FUSED_BY, Lora
from ..methods.lora_8bit import Lora8bit
from ..methods.lora_gptq import LoraGptq
from ..methods.parts.quantised import QuantisedLora
from ..methods.parts.targeted import ALL_LINEAR, Targeted, unmatched
from ..methods.qlora import QLora
from ..recording.checks import OF_OWN_LOSS, check_own_loss
from ..recording.converted import check_converted
from ..recording.parallel.form import BESIDE_HALVES, COMPILED, COMPILED_METHODS, CUT, check_halves
from ..recording.pipeline import METHODS as STAGED
from ..setup import Setup
from .ddp import TRL
from .fields import CASTING, DTYPES, NOT_FP8, NOT_QAT, ON_GPTQ
from .llama_factory_v1 import OWN_LOSS
from .mesh import UNCUT, UNFUSED_HEAD
from .read import Imported

BY_MODULE = ("Axolotl", "LLaMA-Factory", "LLaMA-Factory v1")  # they name every `nn.Linear` (`find_all_linear_names`, …)

# Models on which a tool puts Liger's kernels alone, and does not (v1/plugins/model_plugins/kernels/liger_kernel_ops.py;
# model/model_utils/liger_kernel.py)
LIGER_OF = {"LLaMA-Factory v1": ("qwen3", "qwen3_moe")}
WITHOUT_LIGER = {"LLaMA-Factory": ("smollm3",)}
# What is said of such a loss that is not modelled, without Liger's kernels and with
OWN_LOSSES = {
    "cce": (UNCUT, "Liger's loss, not cut cross entropy"), "trl": (UNFUSED_HEAD, "Liger's loss, not TRL's fused head"),
}  # fmt: skip
READS_SHARD = "PyTorch's kernels: under accelerate's FSDP2 a fused loss finds the head of an adapted model in shards"
BY_BITSANDBYTES = "bnb"  # in names of repositories
ON_PACKED = ("lora", "rslora", "qlora", "lora_8bit")  # methods that find the base as its repository packs it
WORDS_OF_BITS = {"2bit": 2, "3bit": 3, "8bit": 8, "8bits": 8, "int8": 8}  # in names of repositories; else 4
# Of a model whose linear layers are of a class of its own (`check_replaced`)
NOT_QUANTISED = "no layer in few bits: transformers passes over those of the model's own class"
ALL_UPCAST = "embeddings and norms in fp32 as peft's preparation leaves the rest, not in 16 bit"
OF_EXPERT = re.compile(r"(.*\.)?((gate|up|down)_proj|w[123])")  # layers of transformers 4, now in weights of experts
BESIDE_PACKED = "no adapters on experts in few bits, for which PEFT takes {}"
UNBALANCED = "without the loss that balances experts, which TRL adds unless router_aux_loss_coef is 0"
# Mixtures whose forward pass has no such loss (transformers, modeling_*.py without `load_balancing_loss_func`)
WITHOUT_BALANCE = (
    "afmoe", "deepseek_v2", "deepseek_v3", "gemma4", "gemma4_unified", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "kimi_linear", "lfm2_moe", "llama4", "mistral3", "mistral4", "nemotron_h",
)  # fmt: skip
TASKS = {  # PEFT's words for what has another head than a language model, and the heads (`Classifier.of`)
    "SEQ_CLS": "sequence", "TOKEN_CLS": "token", "QUESTION_ANS": "question", "FEATURE_EXTRACTION": "none",
}  # fmt: skip
OWN_HEAD = "the head and the loss that the model's config names, not those of {} (task_type)"
# Its list of linear layers leaves out `embed_out`, as the head of GPT-NeoX was called before transformers 5
HEADLESS = "no adapter on the head, on which Axolotl puts one for GPT-NeoX"  # loaders/adapter.py
PARTS = ("the text decoder alone of a vision-language model", "without its audio tower")  # as data/models/ notes them


@dataclass(frozen=True)
class Fallback:
    """A value in the place of what a config asks for.

    Attributes:
        option: of a command.
        said: what the first line says of it; empty where it is what the tool itself runs.
    """

    option: str
    value: Any
    said: str = ""


def fallbacks(found: Imported, architecture: Architecture) -> Iterator[Fallback]:
    """Where the step of a config has another form on its model."""
    traits, asked = architecture.traits, found.setup.get("attention")
    if asked not in (None, *traits.attention):
        instead = traits.attention[0]
        yield Fallback("attention", instead, f"{instead} attention, not {asked}, which is not modelled for the model")
    yield from _of_kernels(found, architecture)
    for option, said in (("fp8", NOT_FP8), ("qat", NOT_QAT)):
        if found.setup.get(option, "none") != "none" and not _converts(found, option, architecture):
            yield Fallback(option, "none", f"{said} ({option})")
    if found.setup.get("compile", "none") != "none" and architecture.stacked_names():
        yield Fallback("compile", "none", "without torch.compile, which is not modelled for mixtures of experts")
    if found.setup.get("experts", "grouped_mm") != "grouped_mm" and not architecture.stacked_names():
        yield Fallback("experts", "grouped_mm")
    if part := in_part(architecture.note):
        yield Fallback("model", found.model, part)
    if kept := as_kept(found):
        yield Fallback("model", found.model, kept)
    if task := of_another_task(found, architecture.classifier.of if architecture.classifier else None):
        yield Fallback("method", found.method, task)
    if unlike := unbalanced(found, architecture.model_type, stacked=bool(architecture.stacked_names())):
        yield Fallback("model", found.model, unlike)
    if found.setup.get("fsdp_units") == "adapters" and not _has_halves(found):
        yield Fallback("fsdp_units", "blocks", "adapters gathered with their blocks, not by themselves")
    if found.method is not None:
        yield from _of_method(found, methods.parse(found.method), architecture)


def _of_kernels(found: Imported, architecture: Architecture) -> Iterator[Fallback]:
    asked = found.setup.get("kernels", "torch")
    kept, said = asked.split("+"), []
    if "liger" in kept:
        known = LIGER_OF.get(found.tool)
        if known is not None and architecture.model_type not in known:
            kept, said = kept[1:], [OWN_LOSS]
        elif architecture.model_type in WITHOUT_LIGER.get(found.tool, ()):
            kept = kept[1:]
        elif "liger" not in architecture.traits.fused:
            kept, said = kept[1:], ["PyTorch's kernels, not Liger's, which are not modelled for the model"]
    if kept[-1:] in (["liger"], ["cce"]) and _head_in_shards(found, architecture):
        kept, said = [], [READS_SHARD]
    own = kept[-1] if kept and kept[-1] in OWN_LOSSES else ""
    if own and (why := _without_own_loss(found, architecture, own)) is not None:
        kept = kept[:-1]
        said += [OWN_LOSSES[own][bool(kept)]] if why else []
    if (left := "+".join(kept) or "torch") != asked:
        yield Fallback("kernels", left, "; ".join(said))


def _has_halves(found: Imported) -> bool:
    """Whether halves of LoRAs that are units of their own are modelled with what a config trains."""
    fields = (*BESIDE_HALVES, "gpus", "dtype", "amp")
    try:
        setup = Setup(**{name: found.setup[name] for name in fields if name in found.setup})
        check_halves(setup, methods.parse(found.method or "full"))
    except UserError:
        return False
    return True


def _head_in_shards(found: Imported, architecture: Architecture) -> bool:
    """Whether the head of PEFT's model lies in shards where a loss reads it, as accelerate has FSDP2's units."""
    setup = found.setup
    form = setup.get("parallel", "ddp"), setup.get("fsdp_units", "accelerate")
    several = np.max(setup.get("gpus", 1)) > 1 and form == ("fsdp2", "accelerate")
    return several and not architecture.tied and isinstance(methods.parse(found.method or "full"), Targeted)


def _without_own_loss(found: Imported, architecture: Architecture, own: str) -> bool | None:
    """Whether it is to be said that a loss is not modelled: not where its tool does without; None where it is."""
    if found.setup.get("objective", "sft") != "sft":
        return False  # a loss on logits
    setup = Setup(**{name: found.setup[name] for name in OF_OWN_LOSS if name in found.setup} | {"kernels": own})
    try:
        check_own_loss(architecture, methods.parse(found.method or "full"), setup)
    except UserError:
        return True
    return None


def in_part(note: str) -> str:
    """What a bundled config lacks of the model, by its note; empty if it is whole."""
    return next((words for words in PARTS if words in note), "")


def _converts(found: Imported, option: str, architecture: Architecture) -> bool:
    """Whether torchao's linear layers are modelled for the model and what a config trains of it."""
    setup = Setup(**{name: found.setup[name] for name in (option, "engine", "compile")})
    try:
        check_converted(architecture, methods.parse(found.method or "full"), setup)
    except UserError:
        return False
    return True


def unpacked(model: str, found: Imported) -> str:
    """What is said of a base that a repository keeps packed and that a config's method does not pack again."""
    meant = bundled_for(model)
    if meant is None or not meant.packed:
        return ""
    method = methods.parse(found.method or "full")
    if isinstance(method, QuantisedLora):
        return "" if BY_BITSANDBYTES in meant.packed else f"{method.title}, not on {'-'.join(meant.packed)} weights"
    if found.tool == "LLaMA-Factory" and meant.packed == ("fp8",):
        return ""  # it dequantises such weights (model_utils/quantization.py)
    return f"weights in {found.setup.get('dtype') or Setup.dtype}, not {'-'.join(meant.packed)}"


def _on_packed(found: Imported, method: methods.Method, architecture: Architecture) -> Lora | None:
    """PEFT's LoRA on a base that its repository's name says GPTQ or bitsandbytes made: whatever bits a file asks for,
    the checkpoint's own config counts (transformers/quantizers/auto.py, `merge_quantization_configs`)."""
    meant = bundled_for(found.model or "")
    if meant is None or not isinstance(method, Lora) or method.name not in ON_PACKED:
        return None
    bits = next((WORDS_OF_BITS[word] for word in meant.packed if word in WORDS_OF_BITS), 4)
    shared = _shared(method)
    if "gptq" in meant.packed and not architecture.stacked_names():
        return LoraGptq(**shared | {"implementation": "peft"}, bits=bits)
    made: type[QLora] | type[Lora8bit] = QLora if bits == 4 else Lora8bit
    if BY_BITSANDBYTES not in meant.packed or isinstance(method, made):
        return None
    if found.tool == TRL and found.setup.get("objective", "sft") in CASTING and method.adapter_dtype is None:
        shared["adapter_dtype"] = "bf16"
    return made(**shared | {"implementation": method.implementation if made is QLora else "peft"})


def _not_fused(found: Imported, method: Lora, architecture: Architecture) -> str:
    """Where fused kernels for adapters are not modelled (`recording.parallel.form`); empty where they are."""
    if method.implementation == "peft":
        return ""
    if method.implementation not in architecture.traits.fused:
        return "for the model"
    setup = found.setup
    if np.max(setup.get("gpus", 1)) == 1:
        return ""
    if np.max(setup.get("tp", 1)) > 1 and method.name in CUT:
        return "on layers that GPUs share"
    if np.max(setup.get("pp", 1)) > 1 and method.name in STAGED:
        return "in stages of a pipeline"
    compiles = setup.get("compile", "none") != "none" and setup.get("parallel", "ddp") in COMPILED
    return "compiled on several GPUs" if compiles and method.name in COMPILED_METHODS else ""


def _shared(method: Lora) -> dict[str, Any]:
    """The options that LoRA and its kin have in common."""
    return {f.name: getattr(method, f.name) for f in fields(Lora) if f.init}


def as_kept(found: Imported) -> str:
    """What is said of weights that a tool leaves in the dtype of the checkpoint, as a bundled config knows it.

    Of 16 bits each without autocast they take the same time; under another one they are cast in every product.
    """
    meant = bundled_for(found.model or "") if found.as_kept else None
    if meant is None or meant.packed:
        return ""
    values, dtype = load(meant.name).values, found.setup.get("dtype")
    kept = DTYPES.get(str(values.get("dtype") or values.get("torch_dtype")), dtype)
    alike = kept == dtype or (kept != "fp32" and found.setup.get("amp") is None)
    return "" if alike else f"weights in {dtype}, not in {kept} as the checkpoint has them"


def unbalanced(found: Imported, model_type: str, *, stacked: bool) -> str:
    """What is said where a tool adds a loss on the loads of experts.

    Args:
        stacked: whether the model has experts.
    """
    return UNBALANCED if found.balances and stacked and model_type not in WITHOUT_BALANCE else ""


def of_another_task(found: Imported, head: str | None) -> str:
    """What is said of an adapter for another task than the model's config names.

    Args:
        head: of what the model is a classifier, None if it is none.
    """
    return "" if TASKS.get(found.task) in (None, head) else OWN_HEAD.format(found.task)


def in_16_bit(found: Imported, *, stacked: bool) -> str:
    """What is said of a tool that leaves experts in fp32.

    Args:
        stacked: whether the model has experts that are no linear layers, which bitsandbytes passes over.
    """
    return f"experts in {found.setup.get('dtype')}, not in fp32" if found.upcasts and stacked else ""


def beside_packed(method: Lora) -> tuple[Lora, str]:
    """A method without those targets that PEFT takes for weights of experts in few bits, and what is said of it.

    Axolotl adapts such weights, too (monkeypatch/moe_quant.py), which is not modelled.
    """
    packed = isinstance(method, QuantisedLora) and method.experts
    gone = [target for target in method.targets if packed and OF_EXPERT.fullmatch(target)]
    if not 0 < len(gone) < len(method.targets):
        return method, ""
    kept = tuple(target for target in method.targets if target not in gone)
    return replace(method, targets=kept), BESIDE_PACKED.format(", ".join(gone))


def _of_method(found: Imported, method: methods.Method, architecture: Architecture) -> Iterator[Fallback]:
    said = ""
    packed = _on_packed(found, method, architecture)
    if packed and isinstance(method, Lora):
        unlike = method.implementation != packed.implementation
        told = [ON_GPTQ.format(packed.bits, packed.group_size)] if isinstance(packed, LoraGptq) else []
        told += [f"peft's adapters, not {FUSED_BY[method.implementation]}'s"] if unlike else []
        method, said = packed, "; ".join(told)
        if not said:
            yield Fallback("method", method.spec())
    elif in_place := unpacked(found.model or "", found):
        yield Fallback("model", found.model, in_place)
    if experts := in_16_bit(found, stacked=bool(architecture.stacked_names())):
        yield Fallback("model", found.model, experts)
    if not isinstance(method, Lora):
        return
    if isinstance(method, QuantisedLora) and method.by_bitsandbytes and architecture.traits.by_matmul:
        method, said = Lora(**_shared(method)), NOT_QUANTISED
        if found.upcasts:
            yield Fallback("dtype", "fp32", ALL_UPCAST)
    if found.tool == "Axolotl" and method.targets == (ALL_LINEAR,) and architecture.model_type == "gpt_neox":
        yield Fallback("method", found.method, HEADLESS)
    if architecture.traits.four_dims and method.told_of_four_dims:
        yield Fallback("method", found.method, method.told_of_four_dims)
    changes: dict[str, Any] = {}
    if unfused := _not_fused(found, method, architecture):
        changes["implementation"] = "peft"
        said = f"peft's adapters, not {FUSED_BY[method.implementation]}'s, which are not modelled {unfused}"
    if isinstance(method, QuantisedLora) and method.experts and not architecture.stacked_names():
        changes["experts"] = False
    found_none = unmatched(method.targets, architecture)  # of several names PEFT leaves such out
    if 0 < len(found_none) < len(method.targets):
        changes["targets"] = tuple(name for name in method.targets if name not in found_none)
    if method.targets == (ALL_LINEAR,) and architecture.traits.stacked and found.tool in BY_MODULE:
        changes["targets"] = tuple(dict.fromkeys(name.rpartition(".")[2] for name in architecture.linear_names()))
    made = replace(method, **changes)
    if architecture.traits.stacked:
        made, gone = beside_packed(made)
        said = "; ".join(filter(None, (said, gone)))
    if changes or said:
        yield Fallback("method", made.spec(), said)
