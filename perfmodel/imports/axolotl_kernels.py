"""Which attention and which fused kernels an Axolotl file asks for (utils/schemas, loaders/patch_manager.py)."""

import re

from ..errors import UserError
from ..methods.lora import TOGETHER
from ..methods.parts.targeted import ALL_LINEAR, is_pattern
from .fields import ALL_FUSED, ALL_OF_LIGER, FLASH, FLASH_2_FOR_3, FUSES, SDPA_FOR_FLEX
from .keys import Keys

GEMMA_4 = re.compile(r"gemma-?4", re.IGNORECASE)
GEMMA_4_FUSED = "without the fused kernel around attention"  # on by itself there (`_apply_model_specific_patches`)
NO_PLUGIN = "PyTorch's kernels: Axolotl reads liger_* with its LigerPlugin alone"
LIGER = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy")
OTHERS_OF_LIGER = ("liger_layer_norm", "liger_rms_norm_gated", "liger_cross_entropy")
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "fp8": None, "sage": None, **FLASH}
ATTENTION_INSTEAD = {"xformers": "attention of PyTorch, not xformers'", "flex_attention": SDPA_FOR_FLEX}
SWITCHES = {  # older switches and the implementation that each stands for (LEGACY_ATTN_FLAG_TO_IMPL)
    "xformers_attention": "xformers", "sage_attention": "sage", "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager",
}  # fmt: skip
FUSED_EXPERTS = ("scattermoe", "sonicmoe")
PLUGINS = {  # a plugin's class, and what is answered instead of a step with it; None: its own keys say it
    "CutCrossEntropyPlugin": None, "LigerPlugin": None,
    "SwanLabPlugin": None, "LMEvalPlugin": None, "KernelsPlugin": None, "ExpertParallelPlugin": None,
    "LLMCompressorPlugin": None, "KDPlugin": None, "MoraPlugin": None, "NemoGymPlugin": None, "DenseMixerPlugin": None,
    "DiffusionPlugin": "a causal step, not masked diffusion's: attention one way, a loss on every token",
}  # fmt: skip
# What is on where a plugin stands alone (integrations/*/args.py): keys that switch it off, or say it themselves
BY_THEMSELVES = {
    "DenseMixerPlugin": "dense_mixer", "DiffusionPlugin": "diffusion", "NemoGymPlugin": "nemo_gym_enabled",
}  # fmt: skip
OF_ANOTHER_KIND = {
    "HatcheryPlugin": "training at a service", "NemoGymPlugin": "a GRPO step", "DenseMixerPlugin": "DenseMixer",
    "GrokfastPlugin": "Grokfast's filter of gradients",
}  # fmt: skip
FUSED = {  # whose kernels for adapters, and the keys that ask for them
    "axolotl": ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
    "unsloth": ("unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o"),
}
UNFUSED = re.compile("paddleocr", re.IGNORECASE)  # a model that Axolotl fuses no adapters of (model_support)
PLAIN_ADAPTERS = ("rl", "nvfp4_merge_aware", "trust_remote_code")  # keys beside which no kernels come by themselves


def asked_attention(keys: Keys) -> str | None:
    """The implementation of attention by its newer name; Gemma 4's of two kinds has flash-attn (utils/schemas)."""
    asked = [implementation for key, implementation in SWITCHES.items() if keys.flag(key)]
    asked += ["flash_attention_2"] if keys.values.get("gemma4_hybrid_attn_impl") else []
    return keys.text("attn_implementation") or (asked[0] if asked else None)


def attention_of_axolotl(keys: Keys) -> str:
    """The implementation as a setup names it; what is answered instead of another is said.

    Raises:
        UserError: one that is not modelled.
    """
    keys.exclude("flash_attention", "eager_attention")
    if GEMMA_4.search(str(keys.get("base_model"))):
        keys.differ(GEMMA_4_FUSED)
    word = asked_attention(keys)
    key = "attn_implementation" if "attn_implementation" in keys else next((k for k in SWITCHES if k in keys), "")
    if word in ATTENTION_INSTEAD:
        keys.differ(ATTENTION_INSTEAD[word], key)
        return "sdpa"
    if word is None:
        return "sdpa"
    found = ATTENTION.get(word)
    if found is None:
        raise UserError(f"{keys.origin}: {key} {word!r} is not modelled; use flash_attention_2, sdpa or eager")
    if found == "flash2" and "3" in word:
        keys.differ(FLASH_2_FOR_3, key)
    return found


def _plugins(keys: Keys) -> set[str]:
    """The classes of plugins."""
    return {plugin.rsplit(".", 1)[-1] for plugin in keys.names("plugins")}


def diffuses(keys: Keys) -> bool:
    """Whether the step is masked diffusion's: by its keys, or by its plugin alone."""
    return bool(keys.values.get("diffusion")) or "DiffusionPlugin" in _plugins(keys)


def cuts_loss(keys: Keys) -> bool:
    """Whether cut cross entropy is on, as it is by its plugin alone."""
    return "CutCrossEntropyPlugin" in _plugins(keys) and keys.values.get("cut_cross_entropy") is not False


def kernels_of_axolotl(keys: Keys) -> str:
    """Liger's kernels and cut cross entropy where their plugins are on; what else plugins change is said."""
    names = _plugins(keys)
    for name in sorted(names):
        said, own = PLUGINS.get(name, f"without the plugin {name}"), keys.values.get(BY_THEMSELVES.get(name, ""))
        if name in OF_ANOTHER_KIND and own is not False:
            raise UserError(f"{keys.origin}: plugins: {name}: {OF_ANOTHER_KIND[name]} is not modelled; remove it")
        if said is not None and own is not False and not (name == "DiffusionPlugin" and own):
            keys.differ(said, "plugins")
            keys.used.add(BY_THEMSELVES.get(name, "plugins"))
    cut = cuts_loss(keys)
    if cut:
        keys.used.add("cut_cross_entropy")
    whole = LIGER[:-1] if cut else LIGER  # but for its loss
    on = [key for key in whole if keys.flag(key) or (key == "liger_glu_activation" and keys.flag("liger_swiglu"))]
    beside = [key for key in OTHERS_OF_LIGER if keys.flag(key)]
    keys.used.add("liger_use_token_scaling")
    if "LigerPlugin" not in names or not on:
        if "LigerPlugin" in names and beside:
            keys.differ("without Liger's kernels", *beside)
        elif on or beside:
            keys.differ(NO_PLUGIN, *on, *beside)
        return "cce" if cut else "torch"
    if len(on) < len(whole):
        missing = [key for key in whole if key not in on]
        keys.differ(f"{ALL_OF_LIGER} ({', '.join(missing)} too)")
    return "liger+cce" if cut else "liger"


def fused_adapters(keys: Keys, method: str, targets: tuple[str, ...], *, upcast: bool) -> str | None:
    """Whose fused kernels adapters run in: Axolotl's own, or Unsloth's, to which older versions gave no dropout and no
    4-bit base.

    Args:
        upcast: whether norms are in fp32, what goes into a layer with them.
    """
    asked = {whose: [key for key in names if keys.flag(key)] for whose, names in FUSED.items()}
    whose, on = next(((whose, found) for whose, found in asked.items() if found), ("axolotl", []))
    if not on and not (_fuses_by_default(keys) and _fusible(targets)):
        return None
    plain = method != "qlora" and keys.number("lora_dropout") == 0
    if method not in FUSES or upcast or not (plain or whose == "axolotl"):
        keys.differ("without fused kernels for adapters" + ("" if on else ", Axolotl's default"), *on)
        return None
    if on and len(on) < len(FUSED[whose]):
        keys.differ(ALL_FUSED, *on)
    return whose


def _fusible(targets: tuple[str, ...]) -> bool:
    """Whether some layers that a kernel fuses may all have adapters (`apply_lora_kernel_patches`)."""
    alone = targets[:1] == (ALL_LINEAR,) or any(map(is_pattern, targets))
    named = {target.rpartition(".")[2] for target in targets}
    return alone or any(set(layers) <= named for layers in TOGETHER.values())


def _fuses_by_default(keys: Keys) -> bool:
    """Whether Axolotl switches its kernels on by itself (utils/schemas/config.py, `check_auto_enable_lora_kernels`)."""
    values = keys.values
    said = any(values.get(key) is not None for key in (*FUSED["axolotl"], "lora_embedding_kernel"))
    eight = values.get("adapter") == "lora" and values.get("load_in_8bit")
    fsdp_1 = values.get("fsdp_config") is not None and str(values.get("fsdp_version")) != "2"
    plain = any(values.get(key) for key in PLAIN_ADAPTERS) or UNFUSED.search(str(values.get("base_model")))
    return not (said or eight or fsdp_1 or plain)


def experts_of_axolotl(keys: Keys) -> str:
    """The setup's `experts`; the table tells of those that are not modelled."""
    asked = keys.values.get("experts_implementation")
    if asked is None and any(name.endswith("KernelsPlugin") for name in keys.names("plugins")):
        # the plugin's own default (integrations/kernels/args.py, `check_experts_implementation`)
        fused = any(keys.values.get(f"use_{name}") for name in FUSED_EXPERTS)
        asked = None if fused or keys.values.get("expert_backend") in FUSED_EXPERTS else "eager"
    if asked != "eager":
        return "grouped_mm"
    keys.used.add("experts_implementation")
    return "eager"
