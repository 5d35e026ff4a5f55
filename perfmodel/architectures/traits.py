"""What methods and programs must know of a model type besides its dims: its traits, in one place."""

from dataclasses import dataclass

from .norms import Norm


@dataclass(frozen=True)
class Targets:
    """The linear layers that a family of methods adapts where a user names none; None: there is no default.

    Source: the TRANSFORMERS_MODELS_TO_…_TARGET_MODULES_MAPPING of peft/utils/constants.py (PEFT 0.21), by model type.

    Attributes:
        lora: …_LORA_…, of which most methods' tables are copies.
        adalora: …_ADALORA_…, and …_VBLORA_…, which has the same entries.
        fourierft: …_FOURIERFT_….
        beft: …_BEFT_….
        ia3, feedforward: …_IA3_…, and …_IA3_FEEDFORWARD_MODULES_…, whose inputs are scaled.
        s2ft: what reads heads and channels, as the authors' `o_ratio` and `d_ratio` choose them (not PEFT's).
    """

    lora: tuple[str, ...] | None = None
    adalora: tuple[str, ...] | None = None
    fourierft: tuple[str, ...] | None = None
    beft: tuple[str, ...] | None = None
    ia3: tuple[str, ...] | None = None
    feedforward: tuple[str, ...] | None = None
    s2ft: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Traits:
    """What a model type is like, whatever its dims.

    Attributes:
        head: "causal" (every token from those before it) or "masked" (masked language model).
        norm: the form of its norms (`norms.py`).
        norms: the names of its norms in the module tree, each without the path before it.
        targets: default targets by family of methods.
        conv1d: whether the linear layers of its blocks are transformers' `Conv1D`, weights (n_in, n_out).
        attention: the implementations that its program has, of the setup's.
        fused: what else brings fused kernels that are modelled for it: liger, unsloth, lorafusion.
        stacked: pairs of a layer of transformers 4 and the parameter of experts or router that it is in transformers 5:
            where the layer is a target, PEFT's LoRA adapts the parameter.
        cache: how PEFT fills transformers' cache for it, "whole" or "by layer" (Gemma's); None: it takes no such cache.
    """

    head: str
    norm: Norm
    norms: tuple[str, ...]
    targets: Targets = Targets()
    conv1d: bool = False
    attention: tuple[str, ...] = ("sdpa", "eager", "flash2")
    fused: tuple[str, ...] = ()
    stacked: tuple[tuple[str, str], ...] = ()
    cache: str | None = "whole"

    def __post_init__(self) -> None:
        if self.head not in ("causal", "masked"):
            raise ValueError(f"the head of an architecture is causal or masked, not {self.head!r}")
