"""What only a trace can answer: models whose type the tape does not know, in the setups that a trace can follow."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..imports import Imported

TRACED = "by a trace of the real program"  # what the first line of such an answer says

ANY = "any"  # value but the one that is answered
# A setup that a training config asks for and no trace can follow: field, value, what is answered, and how it is said.
INSTEAD = (
    ("kernels", "liger", "torch", "without Liger's kernels"),
    ("kernels", "liger+cce", "cce", "without Liger's kernels"),
    ("kernels", "liger+trl", "trl", "without Liger's kernels"),
    ("compile", "default", "none", "without torch.compile"),
    ("compile", "reduce-overhead", "none", "without torch.compile"),
    ("fp8", ANY, "none", "products in bf16, not in fp8 (fp8)"),
    ("qat", ANY, "none", "without fake quantisation (qat)"),
    ("experts", "eager", "grouped_mm", "experts as transformers runs them by default (experts_implementation)"),
    ("engine", "deepspeed-zero3", "torch", "one GPU, without ZeRO-3"),
)
# The same of what several GPUs are asked for.
OF_SEVERAL = (
    ("cp", ANY, 1, "sequences not shared by GPUs (context parallel)"),
    ("tp", ANY, 1, "layers not shared by GPUs (tensor parallel)"),
    ("fsdp_units", "adapters", "blocks", "adapters gathered with their blocks, not by themselves"),
)
FULL = ("full", "galore", "apollo", "badam")  # methods that train every weight
TOWER = "vision tower"
# By the type of a model, modules that training configs name otherwise than its program, their names in it, and why.
RENAMED = {
    "voxtral": ("language_model.model", "model.language_model", "its name in transformers 5.24"),
    "gemma3n_text": ("model.language_model", "model", "its name in the text decoder alone"),
}
# Types whose latent attention gives a layer four dimensions in transformers 5.24 (`expand_kv`).
LATENT = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash",
    "minicpm3", "mistral4", "youtu",
}  # fmt: skip
# Types whose classes in transformers 5.24 have no flash-attn (`_supports_flash_attn`).
WITHOUT_FLASH = {"deepseek_v4", "gemma4", "gemma4_unified", "glm_moe_dsa", "llama4", "mamba", "mllama", "mpt"}
HEAD_WITHIN = {"llama4"}  # types whose head lies in a language model within: no trace has cut cross entropy for them
# Types whose stacked experts PEFT adapts where their layers of transformers 4 are named (`_convert_peft_config_moe`).
EXPERTS_BY_LAYER = {
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "minimax", "minimax_m2", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
}  # fmt: skip
OF_TEXT = "batches of text"  # how data/configs/ says that images are left out
# so that the towers of all GPUs run, behind the tokens of the first sample and masked (data/collator.py, `fake_images`)
ADDED_IMAGE = f"{OF_TEXT}, without the image of 64 x 64 pixels that LLaMA-Factory adds to each"
OF_EXPERTS = r"[=+](all-linear|([\w.]+\.)?((gate|up|down)_proj|w[123]))\b"
DROPOUT = r",dropout=[\d.e-]+"
FUSED = r"implementation=\w+,?"


def traced_type(model: str | None) -> str:
    """The type of a model that only a trace can answer for, empty if the tape knows it, or if there is none.

    Raises:
        UserError: no such model.
    """
    from ..architectures import has_form, load

    if model is None:
        return ""
    kind = load(model).values.get("model_type")
    return "" if not isinstance(kind, str) or has_form(kind) else kind


def otherwise(model: str, found: "Imported") -> list[str]:
    """How the traced program of a model differs from that of a training config's tool, all packages installed."""
    from ..architectures import load
    from ..architectures.tasks import CLASSIFIERS
    from ..imports.fallbacks import as_kept, in_16_bit, in_part, of_another_task, unbalanced, unpacked
    from ..tracing.kernels import without_kernels

    config = load(model)
    frozen = found.frozen if "vision_config" in config.values else ()
    part, experts = in_part(config.note), in_16_bit(found, stacked=_stacks(config.values))
    dtypes = (unpacked(model, found), experts, as_kept(found))
    loads = unbalanced(found, str(config.values.get("model_type")), stacked=_stacks(config.values))
    named = str(config.values.get("architectures"))
    task = of_another_task(found, next((of for end, of in CLASSIFIERS.items() if end in named), None))
    told = (without_kernels(traced_type(model), found.tool), _thawed(found, frozen), part, *dtypes, loads, task)
    image = _added_image(found) if "vision_config" in config.values else ""
    return [words for words in (*told, _clamped(model, found.method or ""), image) if words]


def _added_image(found: "Imported") -> str:
    """What a tool adds to batches of text for a vision tower, where they are not said to be of text anyway."""
    told = any(said.startswith(OF_TEXT) for said in found.differences)
    return ADDED_IMAGE if found.tool == "LLaMA-Factory" and not told else ""


def _clamped(model: str, method: str) -> str:
    """What is said of layers that stay in 16 bit (`tracing/programs/low_bit.py`, CLAMPED)."""
    in_few_bits = method.startswith(("qlora", "lora_8bit")) and traced_type(model) in ("gemma3n", "gemma3n_text")
    return "AltUp's coefficients in 16 bit, without which transformers' program fails" if in_few_bits else ""


def _stacks(values: dict[str, Any]) -> bool:
    """Whether a config.json is of a mixture whose experts transformers 5 stacks."""
    text = values.get("text_config", values)
    return bool(text.get("num_experts_per_tok")) and not values.get("linear_experts")


def _thawed(found: "Imported", frozen: Sequence[str]) -> str:
    """What a trace does to the parts of a model that a tool leaves frozen."""
    method = found.method or ""
    if method.partition(":")[0] in FULL and frozen:
        return f"the {' and the '.join(frozen)} trained too, in {found.setup['dtype']}"
    # LLaMA-Factory leaves the frozen tower out of `all` (model_utils/misc.py, `find_all_linear_modules`)
    return "adapters on the vision tower too" if "all-linear" in method and TOWER in frozen else ""


def followed(options: dict[str, Any], of_config: set[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The options as a trace can follow them, and how those of a training config do that differ.

    Args:
        of_config: those that the config gave; what is typed stays, and is refused.
    """
    from ..imports.mesh import UNCUT, UNFUSED_HEAD
    from ..tracing.setups import OBJECTIVES, takes_cut_loss

    made, said = dict(options), []
    if "attention" in of_config and made["attention"] == "flash2" and _lacks_flash(made):
        made["attention"] = "sdpa"
        said.append(("attention", "PyTorch's attention, not flash-attn"))
    gpus = made.get("gpus") or 1
    several = (max(gpus) if isinstance(gpus, Sequence) else gpus) > 1
    for name, asked, instead, words in (*INSTEAD, *(OF_SEVERAL if several else ())):
        if name in of_config and made.get(name) != instead and asked in (ANY, made.get(name)):
            made[name] = instead
            said.append((name, words))
    if "kernels" in of_config and made.get("kernels") in ("cce", "trl"):
        cuts, sft = made["kernels"] == "cce", made["objective"] == "sft"
        fits = takes_cut_loss(made["dtype"], made["objective"]) if cuts else sft
        if not fits or traced_type(made["model"]) in HEAD_WITHIN:
            made["kernels"] = "torch"
            said.append(("kernels", (UNCUT if cuts else UNFUSED_HEAD) if sft else ""))
    if "objective" in of_config and made.get("objective") in OBJECTIVES[1:]:
        said.append(("objective", "without what its trainer logs"))
    return made, said


def _lacks_flash(options: dict[str, Any]) -> bool:
    """Whether no trace of a model has flash-attn: in towers of images it takes ragged rows."""
    return bool(options.get("images")) or traced_type(options["model"]) in WITHOUT_FLASH


def of_peft_alone(method: str, model: str) -> tuple[str, list[str]]:
    """A training config's method as PEFT runs it on a model of the installed transformers, and how it differs."""
    from .. import methods
    from ..architectures import load
    from ..imports.fallbacks import beside_packed
    from ..methods.lora import Lora
    from ..methods.lora_8bit import Lora8bit

    plain = re.sub(FUSED, "", method).rstrip(",:")
    said = [] if plain == method else ["without fused kernels for adapters"]
    old, new, why = RENAMED.get(traced_type(model), ("", "", ""))
    if old and f"=/{old}." in plain:
        plain = plain.replace(f"=/{old}.", f"=/{new}.")
        said.append(f"{old} as {new}, {why}")
    by_layer = traced_type(model) in EXPERTS_BY_LAYER
    if by_layer and isinstance(made := methods.parse(plain), Lora):
        kept, gone = beside_packed(made)
        plain, said = (kept.spec(), [*said, gone]) if gone else (plain, said)
    if by_layer and re.search(OF_EXPERTS, plain) and re.search(DROPOUT, plain):
        plain = re.sub(DROPOUT, "", plain)
        said.append("adapters without dropout, which PEFT's of stacked experts cannot have")
    if plain.startswith(Lora8bit.name) and load(model).values.get("model_type") in LATENT:
        said.append(Lora8bit.told_of_four_dims)
    return plain, said
