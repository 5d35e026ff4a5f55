"""Models that train with kernels of packages which a trace on the CPU cannot run; needs no torch.

Where such a package can be imported transformers takes the function of it, whatever the device, and else its own
PyTorch code (`use_kernel_func_from_hub_with_fallback` of integrations/hub_kernels.py): that code is what a trace sees.
It makes many more calls than the kernels.
"""

PACKAGES = {  # by the type of a model
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "granitemoehybrid", "zamba",
                     "zamba2", "nemotron_h"), "mamba-ssm and causal-conv1d"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp",
                     "qwen4_exp_text", "kimi_linear", "olmo_hybrid", "bailing_hybrid", "glm5_next", "glm5_next_text",
                     "lara_mini"), "flash-linear-attention and causal-conv1d"),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl", "lfm3", "inkling_text", "inkling_mm_model", "inkling2",
                     "inkling2_text", "inkling2_loop", "inkling2_loop_text"), "causal-conv1d"),
    "rwkv": "kernels-community/rwkv", "xlstm": "xlstm",  # by ways of their own
}  # fmt: skip

BY_TOKEN = ("mamba", "falcon_mamba", "jamba")  # their PyTorch code scans a sample token by token
# Types with which a tool refuses to run beside their package, so that PyTorch's code is the file's step, too
# (`_check_model_requirements` of Axolotl's loaders/model.py)
NEVER = {"Axolotl": ("lfm2",)}


def without_kernels(model_type: str | None, tool: str = "") -> str:
    """What is to be said of a trace of a model of that type, empty if its program needs no such package.

    Args:
        tool: whose training config it is, where it is one's.
    """
    package = PACKAGES.get(model_type or "")
    if package is None or model_type in NEVER.get(tool, ()):
        return ""
    return f"transformers' own PyTorch code, without the kernels of {package}"
