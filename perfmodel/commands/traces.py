"""What only a trace can answer: models whose type the tape does not know, in the setups that a trace can follow."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..imports import Imported

TRACED = "by a trace of the real program"  # what the first line of such an answer says

# A setup that a training config asks for and no trace can follow: field, value, what is answered, and how it is said.
INSTEAD = (
    ("attention", "flash2", "sdpa", "PyTorch's attention, not flash-attn"),
    ("kernels", "liger", "torch", "without Liger's kernels"),
    ("compile", "default", "none", "without torch.compile"),
    ("compile", "reduce-overhead", "none", "without torch.compile"),
    ("engine", "deepspeed-zero3", "torch", "one GPU, without ZeRO-3"),
)
FULL = ("full", "galore", "apollo", "badam")  # methods that train every weight
TOWER = "vision tower"
# By the type of a model, modules that training configs name as older versions of transformers do, and their names now.
RENAMED = {"voxtral": ("language_model.model", "model.language_model")}
# Types whose latent attention gives a layer four dimensions in transformers 5.24 (`expand_kv`).
LATENT = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash",
    "minicpm3", "mistral4", "youtu",
}  # fmt: skip
# Types whose stacked experts PEFT adapts where their layers of transformers 4 are named (`_convert_peft_config_moe`).
EXPERTS_BY_LAYER = {
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "minimax", "minimax_m2", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
}  # fmt: skip
OF_EXPERTS = re.compile(r"[=+](all-linear|(gate|up|down)_proj|w[123])\b")
DROPOUT = re.compile(r",dropout=[\d.e-]+")
FUSED = re.compile(r"implementation=\w+,?")


def traced_type(model: str) -> str:
    """The type of a model that only a trace can answer for, empty if the tape knows it.

    Raises:
        UserError: no such model.
    """
    from ..architectures import has_form, load

    kind = load(model).values.get("model_type")
    return "" if not isinstance(kind, str) or has_form(kind) else kind


def otherwise(model: str, found: "Imported") -> list[str]:
    """How the traced program of a model differs from that of a training config's tool, all packages installed."""
    from ..architectures import load
    from ..imports.fallbacks import TEXT_ALONE, in_16_bit, unpacked
    from ..tracing.kernels import without_kernels

    config = load(model)
    frozen = found.frozen if "vision_config" in config.values else ()
    alone = TEXT_ALONE if TEXT_ALONE in config.note else ""
    experts = in_16_bit(found, stacked=_stacks(config.values))
    told = (without_kernels(traced_type(model)), _thawed(found, frozen), alone, unpacked(model, found), experts)
    return [words for words in told if words]


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
    from ..tracing.setups import OBJECTIVES

    made, said = dict(options), []
    for name, asked, instead, words in INSTEAD:
        if name in of_config and made.get(name) == asked:
            made[name] = instead
            said.append((name, words))
    if "objective" in of_config and made.get("objective") in OBJECTIVES[1:]:
        said.append(("objective", "without what its trainer logs"))
    return made, said


def of_peft_alone(method: str, model: str) -> tuple[str, list[str]]:
    """A training config's method as PEFT runs it on a model of the installed transformers, and how it differs."""
    plain = FUSED.sub("", method).rstrip(",:")
    said = [] if plain == method else ["without fused kernels for adapters"]
    old, new = RENAMED.get(traced_type(model), ("", ""))
    if old and f"=/{old}." in plain:
        plain = plain.replace(f"=/{old}.", f"=/{new}.")
        said.append(f"{old} as {new}, its name in transformers 5.24")
    if traced_type(model) in EXPERTS_BY_LAYER and OF_EXPERTS.search(plain) and DROPOUT.search(plain):
        plain = DROPOUT.sub("", plain)
        said.append("adapters without dropout, which PEFT's of stacked experts cannot have")
    if plain.startswith("lora_8bit") and traced_type(model) in LATENT:
        said.append("8-bit layers of four dimensions, as transformers 5.24 has them and bitsandbytes refuses")
    return plain, said
