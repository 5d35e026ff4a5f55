"""A real model cut by torch's `parallelize_module` with sequence parallel, all of its parameters DTensors.

The plan is that of NeMo Automodel 0.7 for transformers' Llama, and so are adapters (components/distributed/
optimized_tp_plans.py, parallel_styles.py, components/_peft/lora.py), but that the embedding keeps no copy of its ids,
and that the head's logits are gathered for the model's own loss, as PyTorch's tutorial of tensor parallelism does it;
Automodel's loss gathers them.
"""

from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from perfmodel.architectures import Architecture
from perfmodel.methods import Method
from perfmodel.methods.lora import Lora
from perfmodel.tracing.programs import models

SCATTERED: dict[str, Any] = {"output_layouts": Shard(1), "use_local_output": False}


class LinearLora(torch.nn.Linear):
    """A linear layer with LoRA beside it: y = x·Wᵀ + b + (α/r)·(x·Aᵀ)·Bᵀ."""

    lora_A: Any
    lora_B: Any

    @classmethod
    def on(cls, layer: Any, rank: int) -> None:
        """Put adapters beside a layer, in its dtype."""
        layer.lora_A = torch.nn.Linear(layer.in_features, rank, bias=False, dtype=layer.weight.dtype)
        layer.lora_B = torch.nn.Linear(rank, layer.out_features, bias=False, dtype=layer.weight.dtype)
        layer.__class__ = cls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer with its adapters, α/r before B."""
        adapted: torch.Tensor = super().forward(x) + self.lora_B(self.lora_A(x) * 2.0)
        return adapted


class CutByColumns(ColwiseParallel):
    """Cut by columns: an adapter's first weight by its rank, and what it makes is gathered."""

    def _partition_linear_fn(self, name: str, module: Any, mesh: Any) -> None:
        if name:
            return  # with the layer that it belongs to
        for part in with_adapters(module):
            cut(part, mesh, Shard(0))
        if isinstance(module, LinearLora):
            module.lora_A.register_forward_hook(lambda of, inputs, low: low.redistribute(mesh, [Replicate()]))


class CutByRows(RowwiseParallel):
    """Cut by rows: both weights of an adapter, too."""

    def _partition_linear_fn(self, name: str, module: Any, mesh: Any) -> None:
        if not name:
            for part in with_adapters(module):
                cut(part, mesh, Shard(1))


class GatheredBehind(SequenceParallel):
    """A norm of a rank's own tokens, behind which all tokens are gathered."""

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, module: Any, outputs: Any, mesh: Any) -> Any:
        return outputs.redistribute(mesh, [Replicate()])


def with_adapters(module: Any) -> list[Any]:
    """A linear layer, and the adapters beside it."""
    return [module, module.lora_A, module.lora_B] if isinstance(module, LinearLora) else [module]


def cut(module: Any, mesh: Any, how: Shard) -> None:
    """A rank's part of a linear layer."""
    for name, p in list(module.named_parameters(recurse=False)):
        part = distribute_tensor(p.data, mesh, [how])
        module.register_parameter(name, torch.nn.Parameter(part, requires_grad=p.requires_grad))


def share_tokens(model: Any, method: Method, architecture: Architecture, mesh: Any) -> Any:
    """A rank's part of a model with the method on it."""
    if isinstance(method, Lora):
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            block, _, rest = name.removeprefix("model.layers.").partition(".")
            if isinstance(module, torch.nn.Linear) and block.isdigit() and method.targets_layer(rest, int(block)):
                LinearLora.on(module, method.r)
    else:
        model = models.apply_method(model, method, architecture)
    of_block = {
        **{f"self_attn.{name}_proj": CutByColumns() for name in "qkv"},
        **{f"mlp.{name}_proj": CutByColumns() for name in ("gate", "up")},
        **{name: CutByRows(**SCATTERED) for name in ("self_attn.o_proj", "mlp.down_proj")},
        **{name: GatheredBehind() for name in ("input_layernorm", "post_attention_layernorm")},
    }
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **SCATTERED),
        **{f"model.layers.*.{name}": style for name, style in of_block.items()},
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    model = parallelize_module(model, mesh, plan)
    if tied:  # each module's was cut by itself (`ensure_tied_lm_head`)
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, p in model.named_parameters():  # a norm's are made anew, and would train
        p.requires_grad = trains[name]
    return model
