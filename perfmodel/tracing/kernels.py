"""Models that train with kernels of packages which a trace on the CPU cannot run; needs no torch.

transformers falls back to its own PyTorch code where a package is missing (`is_fast_path_available` and the like in the
models' files): that code is what a trace sees. It makes many more calls than the kernels.
"""

PACKAGES = {  # by the type of a model
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "granitemoehybrid", "zamba2",
                     "nemotron_h"), "mamba-ssm and causal-conv1d"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear",
                     "olmo_hybrid"), "flash-linear-attention and causal-conv1d"),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), "causal-conv1d"),
}  # fmt: skip

BY_TOKEN = ("mamba", "falcon_mamba", "jamba")  # their PyTorch code scans a sample token by token


def without_kernels(model_type: str | None) -> str:
    """What is to be said of a trace of a model of that type, empty if its program needs no such package."""
    package = PACKAGES.get(model_type or "")
    return f"transformers' own PyTorch code, without the kernels of {package}" if package else ""
