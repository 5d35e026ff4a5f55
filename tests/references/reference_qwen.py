"""Qwen of 2023 in plain torch, and flash-attn's kernels as custom ops that compute the same.

Written from its authors' modeling_qwen.py and from flash-attn 2.3.3 (ops/layer_norm.py, layers/rotary.py), not from the
tape: training only, one checkpoint a block.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from perfmodel.tracing.packages.flash_attn import flash_attn_func

T = torch.Tensor


@torch.library.custom_op("dropout_layer_norm::dropout_add_ln_fwd", mutates_args=())
def norm_forward(x: T, weight: T) -> tuple[T, T, T]:
    """Normed rows, and a mean (unused) and 1/rms of every row."""
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + 1e-6)
    return (x.float() * rstd[:, None] * weight.float()).to(x.dtype), torch.zeros_like(rstd), rstd


@norm_forward.register_fake
def _(x: T, weight: T) -> tuple[T, T, T]:
    statistics = [x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x), *statistics


@torch.library.custom_op("dropout_layer_norm::dropout_add_ln_bwd", mutates_args=())
def norm_backward(dz: T, x: T, mean: T, rstd: T, weight: T) -> tuple[T, T, T]:
    """Gradients of x, the weight and a bias that is not there."""
    g, normed = dz.float() * weight.float(), x.float() * rstd[:, None]
    dx = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.float() * normed).sum(0).to(weight.dtype), torch.zeros_like(weight)


@norm_backward.register_fake
def _(dz: T, x: T, mean: T, rstd: T, weight: T) -> tuple[T, T, T]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


class DropoutAddLayerNorm(torch.autograd.Function):
    """Saves x, the weight and the statistics."""

    @staticmethod
    def forward(ctx: Any, x: T, weight: T) -> T:
        x = x.contiguous()
        z, mean, rstd = norm_forward(x.view(-1, x.shape[-1]), weight)
        ctx.save_for_backward(x, weight, mean, rstd)
        return z.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dz: T) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        dz = dz.contiguous()
        dx, dweight, _ = norm_backward(dz.view(-1, x.shape[-1]), x.view(-1, x.shape[-1]), mean, rstd, weight)
        return dx.view(x.shape), dweight


@torch.library.custom_op("flash_rotary::apply_rotary", mutates_args=())
def apply_rotary(x: T, cos: T, sin: T) -> T:
    """Both halves of every head turned; cos and sin (seq, head_dim/2)."""
    first, second = x.chunk(2, -1)
    c, s = cos[None, :, None], sin[None, :, None]
    return torch.cat((first * c - second * s, second * c + first * s), -1)


@apply_rotary.register_fake
def _(x: T, cos: T, sin: T) -> T:
    return torch.empty_like(x)


class ApplyRotary(torch.autograd.Function):
    """Saves the tables as they came; copies the gradient before it turns it back."""

    @staticmethod
    def forward(ctx: Any, x: T, cos: T, sin: T) -> T:
        ctx.save_for_backward(cos, sin)
        return apply_rotary(x, cos.contiguous(), sin.contiguous())

    @staticmethod
    def backward(ctx: Any, do: T) -> Any:
        cos, sin = ctx.saved_tensors
        # the kernel takes a flag for the other direction; the tables are what it reads
        return _turned_back(do.clone(), cos.contiguous(), sin.contiguous()), None, None


def _turned_back(do: T, cos: T, sin: T) -> T:
    if isinstance(do, torch._subclasses.FakeTensor):
        return apply_rotary(do, cos, sin)
    return apply_rotary(do, cos, -sin)


class RMSNorm(nn.Module):
    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.weight, self.fused = nn.Parameter(torch.ones(width)), fused

    def forward(self, x: T) -> T:
        if self.fused:
            return DropoutAddLayerNorm.apply(x, self.weight)
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


def rotated(t: T, cos: T, sin: T, *, fused: bool) -> T:
    """(batch, seq, heads, head_dim) at its positions; cos and sin (1, seq, 1, head_dim) in fp32."""
    width = cos.shape[-1]
    x = t.float()
    if fused:
        halves = (table.squeeze(0).squeeze(1)[:, : width // 2] for table in (cos, sin))
        return ApplyRotary.apply(x, *halves).type_as(t)
    turned, passed = x[..., :width], x[..., width:]
    first, second = turned.view(*turned.shape[:-1], 2, width // 2).unbind(-2)
    half = torch.cat((-second, first), -1)
    return torch.cat(((turned * cos) + (half * sin), passed), -1).type_as(t)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.fused = config.num_attention_heads, config.fused
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)

    def forward(self, x: T, mask: T, cos: T, sin: T) -> T:
        split = self.c_attn(x).split(x.shape[-1], dim=2)
        q, k, v = (y.view(*y.shape[:-1], self.heads, -1) for y in split)
        q, k = (rotated(t, cos, sin, fused=self.fused) for t in (q, k))
        if self.fused:
            return self.c_proj(flash_attn_func(q, k, v, causal=True).contiguous().view(x.shape))
        seq = q.shape[1]
        causal = torch.tril(torch.ones((seq, seq), dtype=torch.bool, device=q.device)).view(1, 1, seq, seq)
        q, k, v = (y.permute(0, 2, 1, 3) for y in (q, k, v))
        mask = mask.expand(-1, -1, seq, -1).masked_fill(~causal, torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return self.c_proj(out.contiguous().view(x.shape))


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size // 2
        self.w1, self.w2 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: T) -> T:
        a1 = self.w1(x)
        return self.c_proj(a1 * F.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (RMSNorm(config.hidden_size, fused=config.fused) for _ in range(2))
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: T, mask: T, cos: T, sin: T) -> T:
        x = self.attn(self.ln_1(x), mask, cos, sin) + x
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, fused=config.fused)
        self.register_buffer("cos", torch.empty(1, config.positions, 1, config.kv_channels), persistent=False)
        self.register_buffer("sin", torch.empty(1, config.positions, 1, config.kv_channels), persistent=False)


class Config(PreTrainedConfig):
    model_type = "qwen"


class Qwen(PreTrainedModel, GenerationMixin):
    """The causal model: call it with input_ids, attention_mask and labels."""

    config_class = Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reentrant: bool | None = None

    def get_input_embeddings(self) -> Any:
        return self.transformer.wte

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any) -> None:
        """Every block; its input needs a gradient (finetune.py: `enable_input_require_grads`)."""
        self.reentrant = activation_checkpointing_kwargs["use_reentrant"]
        self.transformer.wte.register_forward_hook(lambda module, inputs, out: out.requires_grad_(True))

    def forward(self, input_ids: T, attention_mask: T, labels: T, **kwargs: Any) -> CausalLMOutput:
        model, seq = self.transformer, input_ids.shape[1]
        torch.arange(0, seq, dtype=torch.long, device=input_ids.device)
        mask = attention_mask.view(len(input_ids), -1)[:, None, None, :].to(dtype=self.lm_head.weight.dtype)
        mask = (1.0 - mask) * torch.finfo(mask.dtype).min
        x = model.wte(input_ids)
        cos, sin = model.cos[:, :seq], model.sin[:, :seq]
        for block in model.h:
            if self.reentrant is None:
                x = block(x, mask, cos, sin)
            else:
                x = checkpoint(block, x, mask, cos, sin, use_reentrant=self.reentrant)
        logits = self.lm_head(model.ln_f(x))
        kept, target = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        return CausalLMOutput(loss=F.cross_entropy(kept.view(-1, kept.shape[-1]), target.view(-1)), logits=logits)


def make(values: dict[str, Any], dtype: torch.dtype, positions: int, *, fused: bool) -> Qwen:
    """A model on the meta device, its tables in fp32."""
    config = Config(**{k: v for k, v in values.items() if k != "model_type"}, fused=fused, positions=positions)
    with torch.device("meta"):
        model = Qwen(config).to(dtype)
        for name in ("cos", "sin"):
            setattr(model.transformer, name, getattr(model.transformer, name).float())
    return model
