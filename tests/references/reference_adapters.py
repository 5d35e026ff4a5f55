"""Bottleneck adapters in plain torch, written from their papers, as modules around those of transformers.

Houlsby et al. (arXiv 1902.00751, section 2.1): "The adapter is always applied directly to the output of the sub-layer,
after the projection back to the input size, but before adding the skip connection back", with a skip connection inside.
Pfeiffer et al. (arXiv 2005.00052, section 3.1): A(h, r) = U(ReLU(D(h))) + r behind the feed-forward sublayer, r its
output and h what follows it: r plus the skip connection, normalised in a post-norm model.
"""

from typing import Any

import torch
from torch import nn

from perfmodel.architectures import Architecture
from perfmodel.methods.bottleneck import Bottleneck
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES

ACTIVATIONS = {"relu": nn.functional.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}
NORMS = ("norm", "LayerNorm", "ln_1", "ln_2", "ln_f")
SUBLAYERS = {  # the last module of each sublayer, and the block's norm before the MLP, which sees the skip connection
    "llama": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
    "gpt2": ("attn.resid_dropout", "mlp.dropout", "ln_2"),
    "gpt_neo": ("attn.attention.resid_dropout", "mlp.dropout", "ln_2"),
    "opt": ("self_attn.out_proj", "fc2", "final_layer_norm"),
    "bert": ("attention.output.dropout", "output.dropout", None),
    "gpt_neox": ("post_attention_dropout", "post_mlp_dropout", "post_attention_layernorm"),
    "gpt_bigcode": ("attn.resid_dropout", "mlp.dropout", "ln_2"),
    "mpt": ("attn.out_proj", "ffn.down_proj", "norm_2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h", "input_layernorm"),
}


class Adapter(nn.Module):
    """down, activation, up; no skip connection."""

    def __init__(self, width: int, method: Bottleneck, dtype: Any) -> None:
        super().__init__()
        like = {"dtype": dtype, "device": "meta"}
        self.down, self.up = nn.Linear(width, method.r, **like), nn.Linear(method.r, width, **like)
        self.activation = ACTIVATIONS[method.activation]

    def forward(self, h: Any) -> Any:
        dtype = h.dtype
        inner = self.down(h.to(self.down.weight.dtype))
        return self.up(self.activation(inner)).to(dtype)


class Serial(nn.Module):
    """x + adapter(x) behind a module (Houlsby)."""

    def __init__(self, base: Any, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Any) -> Any:
        x = self.base(x)
        return x + self.adapter(x)


class Skip:
    """Remembers what the block's skip connection carries."""

    def __init__(self) -> None:
        self.held: Any = None

    def keep(self, module: Any, arguments: Any) -> None:
        """A forward pre-hook of the module that reads the skip connection."""
        self.held = arguments[0]

    def take(self) -> Any:
        """What was kept, given away."""
        held, self.held = self.held, None
        return held


class Parallel(nn.Module):
    """x + adapter(h) behind a module, h = x + skip, normalised in a post-norm model (Pfeiffer)."""

    def __init__(self, base: Any, adapter: Adapter, skip: Skip, norm: Any) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter
        self.skip, self.norm = skip, [norm]  # in a list: it is the block's module, not ours

    def forward(self, x: Any) -> Any:
        x = self.base(x)
        h = x + self.skip.take()
        if self.norm[0] is not None:
            h = self.norm[0](h)
        return x + self.adapter(h)


def apply(model: Any, method: Bottleneck, architecture: Architecture) -> Any:
    """The model with its adapters; everything else is frozen, but for the norms where they train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method.norms and any(n in name for n in NORMS))
    attention, mlp, before = SUBLAYERS[architecture.model_type]
    for i, block in enumerate(model.get_submodule(architecture.layer_path)):
        if method.layers_to_transform is not None and i not in method.layers_to_transform:
            continue
        for path in (attention, mlp) if method.name == "houlsby" else (mlp,):
            adapter = Adapter(architecture.hidden, method, _dtype(method, model))
            parent, _, leaf = path.rpartition(".")
            base = block.get_submodule(path)
            if method.name == "houlsby":
                made: Any = Serial(base, adapter)
            else:
                made = Parallel(base, adapter, *_skip(block, before))
            setattr(block.get_submodule(parent), leaf, made)
    return model


def _dtype(method: Bottleneck, model: Any) -> torch.dtype:
    return TORCH_DTYPES[method.adapter_dtype] if method.adapter_dtype else next(model.parameters()).dtype


def _skip(block: Any, before: str | None) -> tuple[Skip, Any]:
    """Where the skip connection is seen, and the norm that follows the sum."""
    skip = Skip()
    if before is not None:
        block.get_submodule(before).register_forward_pre_hook(skip.keep)
        return skip, None
    block.intermediate.register_forward_pre_hook(skip.keep)
    return skip, block.output.LayerNorm
