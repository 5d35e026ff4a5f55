"""MPT as llm-foundry trains it, in plain torch, with flash-attn's cross entropy as custom ops that compute the same.

Written from llm-foundry's modeling_mpt.py, attention.py (`triton_flash_attn_fn`, without padding), blocks.py, ffn.py,
norm.py and from flash-attn 1.0.9 (losses/cross_entropy.py), not from the tape: training only, checkpoints by block.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from perfmodel.tracing.packages.flash_attn import flash_attn_func

T = torch.Tensor
IGNORED = -100


@torch.library.custom_op("xentropy::forward", mutates_args=())
def losses_of(logits: T, labels: T) -> tuple[T, T]:
    """The loss and the log-sum-exp of every row, in fp32."""
    wide = logits.float()
    lse = wide.logsumexp(-1)
    return lse - wide.gather(-1, labels.clamp(min=0)[:, None])[:, 0], lse


@losses_of.register_fake
def _(logits: T, labels: T) -> tuple[T, T]:
    return tuple(logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("xentropy::backward", mutates_args=())
def gradient_of(g: T, logits: T, lse: T, labels: T) -> T:
    """(softmax - one-hot) times the gradient of each row's loss."""
    hit = F.one_hot(labels.clamp(min=0), logits.shape[-1])
    return ((torch.exp(logits.float() - lse[:, None]) - hit) * g[:, None]).to(logits.dtype)


@gradient_of.register_fake
def _(g: T, logits: T, lse: T, labels: T) -> T:
    return torch.empty_like(logits)


class SoftmaxCrossEntropyLoss(torch.autograd.Function):
    """Saves the logits; their gradient is new memory (`inplace_backward` is off)."""

    @staticmethod
    def forward(ctx: Any, logits: T, labels: T) -> T:
        losses, lse = losses_of(logits, labels)
        losses.masked_fill_(labels == IGNORED, 0)
        ctx.save_for_backward(logits, lse, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: T) -> Any:
        logits, lse, labels = ctx.saved_tensors
        grad_losses = grad_losses.contiguous()
        grad_losses.masked_fill_(labels == IGNORED, 0)
        return gradient_of(grad_losses, logits, lse, labels), None


def cross_entropy(logits: T, labels: T) -> T:
    """The mean over labels that count."""
    return SoftmaxCrossEntropyLoss.apply(logits, labels).sum() / (labels != IGNORED).sum()


class LanguageCrossEntropy(nn.Module):
    """Sums the loss and the labels that count."""

    def __init__(self) -> None:
        super().__init__()
        self.sum_loss, self.total_items = torch.tensor(0.0), torch.tensor(0)

    def update(self, output: T, target: T) -> None:
        target = target.view(-1)
        losses = F.cross_entropy(output.view(target.shape[0], -1), target, ignore_index=IGNORED, reduction="sum")
        self.total_items += (target != IGNORED).sum()
        self.sum_loss += losses


class LPLayerNorm(nn.LayerNorm):
    def forward(self, x: T) -> T:
        kind, weight, bias = x.device.type, self.weight, self.bias
        if torch.is_autocast_enabled(kind):
            x, weight, bias = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight, bias))
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.d_model
        self.heads, self.clip = config.n_heads, config.clip_qkv
        self.Wqkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: T) -> T:
        qkv = self.Wqkv(x)
        if self.clip:
            qkv = qkv.clamp(min=-self.clip, max=self.clip)
        q, k, v = (y.view(*y.shape[:-1], self.heads, -1) for y in qkv.split(x.shape[-1], dim=2))
        del qkv
        return self.out_proj(flash_attn_func(q, k, v, causal=True).view(x.shape))


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, 4 * config.d_model)
        self.down_proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: T) -> T:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = LPLayerNorm(config.d_model), LPLayerNorm(config.d_model)
        self.attn, self.ffn = Attention(config), MLP(config)

    def forward(self, x: T) -> T:
        a = self.norm_1(x)
        b = self.attn(a)
        x = x + b
        m = self.norm_2(x)
        n = self.ffn(m)
        return x + n


class Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = LPLayerNorm(config.d_model)


class Config(PreTrainedConfig):
    model_type = "mpt"


class Mpt(PreTrainedModel, GenerationMixin):
    """The causal model: call it with input_ids and labels."""

    config_class = Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = Decoder(config)
        self.reentrant: bool | None = None
        self.seen: Any = None

    def get_input_embeddings(self) -> Any:
        return self.transformer.wte

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any) -> None:
        """Every block; its input needs a gradient, as under PEFT."""
        self.reentrant = activation_checkpointing_kwargs["use_reentrant"]
        self.transformer.wte.register_forward_hook(lambda module, inputs, out: out.requires_grad_(True))

    def forward(self, input_ids: T, labels: T, **kwargs: Any) -> CausalLMOutput:
        model, seq = self.transformer, input_ids.shape[1]
        x = model.wte(input_ids)
        pos = torch.arange(0, seq, dtype=torch.long, device=input_ids.device).unsqueeze(0)
        x = x + model.wpe(pos)
        for block in model.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        x = model.norm_f(x)
        logits = F.linear(x, model.wte.weight)
        self.seen = logits, labels
        targets = torch.roll(labels, shifts=-1)
        targets[:, -1] = IGNORED
        loss = cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        return CausalLMOutput(loss=loss, logits=logits)

    def measure(self, amp: torch.dtype | None) -> None:
        """Composer's `_eval_train_metrics` behind backward: cross entropy, and perplexity, which is its exponential."""
        logits, labels = self.seen
        with torch.no_grad(), torch.autocast(labels.device.type, amp) if amp else nullcontext():
            labels[:, :-1] = labels[:, 1:].clone()
            labels[:, -1] = IGNORED
            for _ in range(2):
                LanguageCrossEntropy().update(logits, labels)


def make(values: dict[str, Any], dtype: torch.dtype) -> Mpt:
    """A model on the meta device."""
    flat = {k: v for k, v in values.items() if k not in ("model_type", "attn_config")}
    config = Config(**flat, clip_qkv=values.get("attn_config", {}).get("clip_qkv"))
    with torch.device("meta"):
        return Mpt(config).to(dtype)
