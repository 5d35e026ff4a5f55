"""What methods and programs must know of a model type besides its dims: its traits, in one place."""

from ..values import immutable
from .norms import Norm

LIKE = {"vera": "lora", "c3a": "lora", "vblora": "adalora"}  # tables that are mostly copies of another one


@immutable
class Targets:
    """The linear layers that a family of methods adapts where a user names none; None: there is no default.

    Source: the TRANSFORMERS_MODELS_TO_…_TARGET_MODULES_MAPPING of peft/utils/constants.py (PEFT 0.21), by model type.

    Attributes:
        lora: …_LORA_…, of which most methods' tables are copies.
        vera, c3a: …_VERA_… and …_C3A_…, where they differ from it.
        adalora: …_ADALORA_….
        vblora: …_VBLORA_…, where it differs from that.
        fourierft: …_FOURIERFT_….
        beft: …_BEFT_….
        ia3, feedforward: …_IA3_…, and …_IA3_FEEDFORWARD_MODULES_…, whose inputs are scaled.
        s2ft: what reads heads and channels, as the authors' `o_ratio` and `d_ratio` choose them (not PEFT's).
    """

    lora: tuple[str, ...] | None = None
    vera: tuple[str, ...] | None = None
    c3a: tuple[str, ...] | None = None
    vblora: tuple[str, ...] | None = None
    adalora: tuple[str, ...] | None = None
    fourierft: tuple[str, ...] | None = None
    beft: tuple[str, ...] | None = None
    ia3: tuple[str, ...] | None = None
    feedforward: tuple[str, ...] | None = None
    s2ft: tuple[str, ...] | None = None

    def of(self, family: str) -> tuple[str, ...] | None:
        """The targets of a family of methods."""
        found: tuple[str, ...] | None = getattr(self, family)
        return getattr(self, LIKE[family]) if found is None and family in LIKE else found


@immutable
class Traits:
    """What a model type is like, whatever its dims.

    Attributes:
        head: "causal" (every token from those before it), "masked" (masked language model) or "seq2seq" (an encoder's
            tokens, and a decoder that reads the labels).
        norm: the form of its norms (`norms.py`).
        norms: the names of its norms in the module tree, each without the path before it.
        targets: default targets by family of methods.
        conv1d: whether the linear layers of its blocks are transformers' `Conv1D`, weights (n_in, n_out).
        by_matmul: whether they are modules of its own that run `x @ W.T` (Falcon's).
        attention: the implementations that its program has, of the setup's.
        reentrant: those of them with which reentrant checkpoints are modelled.
        fused: what else brings fused kernels that are modelled for it: liger, axolotl, unsloth, lorafusion.
        cut_loss: whether cut cross entropy is modelled for its language model's head.
        stacked: pairs of a layer of transformers 4 and the parameter of experts or router that it is in transformers 5:
            where the layer is a target, PEFT's LoRA adapts the parameter.
        four_dims: the linear layers whose input has four dimensions, as not all that adapts or packs layers takes them.
        heads: the classifiers that may be in the place of its language model's head: "sequence", "token".
        token_head: of a causal model's classifier of tokens, its name and whether its logits are cast to fp32.
        packs: whether documents packed into a row, which attend within themselves, are modelled for it.
        cache: how PEFT fills transformers' cache for it, "whole" or "by layer" (Gemma's); None: it takes no such cache.
        dropout_modules: its rates of dropout that are modules (`nn.Dropout`): those that TRL switches off.
    """

    head: str
    norm: Norm
    norms: tuple[str, ...]
    targets: Targets = Targets()
    conv1d: bool = False
    by_matmul: bool = False
    attention: tuple[str, ...] = ("sdpa", "eager", "flash2")
    reentrant: tuple[str, ...] = ("sdpa", "eager", "flash2")
    fused: tuple[str, ...] = ()
    cut_loss: bool = False
    stacked: tuple[tuple[str, str], ...] = ()
    four_dims: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    token_head: tuple[str, bool] = ("score", True)
    packs: bool = False
    cache: str | None = "whole"
    dropout_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.head not in ("causal", "masked", "seq2seq"):
            raise ValueError(f"the head of an architecture is causal, masked or seq2seq, not {self.head!r}")
