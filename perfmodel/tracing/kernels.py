"""Models that train with kernels of packages which a trace on the CPU cannot run; needs no torch.

transformers falls back to its own PyTorch code where a package is missing (`is_fast_path_available` and the like in the
models' files): that code is what a trace sees. It makes many more calls than the kernels.
"""

from ..architectures import Config
from ..errors import UserError

PACKAGES = {  # by the type of a model
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "granitemoehybrid", "zamba2",
                     "nemotron_h"), "mamba-ssm and causal-conv1d"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear",
                     "olmo_hybrid"), "flash-linear-attention and causal-conv1d"),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), "causal-conv1d"),
}  # fmt: skip

BY_TOKEN = ("mamba", "falcon_mamba", "jamba")  # their PyTorch code scans a sample token by token
LONGEST_SCAN = 512  # tokens: a few blocks of that length take a minute to trace


def check_scan(config: Config, seq: int) -> None:
    """Raise `UserError` where a program has too many calls to be traced, which no other program would be like."""
    kind = config.values.get("model_type")  # none of diffusers' models has one
    if kind in BY_TOKEN and seq > LONGEST_SCAN:
        raise UserError(
            f"{config.name} cannot be traced at {seq} tokens: without the kernels of {PACKAGES[kind]} its program goes "
            f"over a sample token by token; up to {LONGEST_SCAN} can"
        )


def without_kernels(model_type: str | None) -> str:
    """What is to be said of a trace of a model of that type, empty if its program needs no such package."""
    package = PACKAGES.get(model_type or "")
    return f"transformers' own PyTorch code, without the kernels of {package}" if package else ""
