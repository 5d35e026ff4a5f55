"""What Axolotl makes of the experts of a real model: weights in few bits, or linear layers.

In 4 or 8 bit (`quantize_moe_experts`) a parametrisation dequantises a weight where it is read; while its module runs it
is read once. The calls are those of bitsandbytes' kernels or of stand-ins of them, whichever are registered.
Source: axolotl/monkeypatch/moe_quant.py, bitsandbytes/nn/parametrize.py (`replace_parameter_4bit`).
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ...tape.packages.quantized import BLOCK, NESTED_BLOCK


class Dequantised(nn.Module):
    """`Bnb4bitParametrization`; its scales are parameters, so that a trace finds them.

    Attributes:
        stands_for: how many parameters of the model each of its tensors holds.
    """

    def __init__(self, weight: Any, *, double_quant: bool) -> None:
        super().__init__()
        blocks, device = -(-weight.numel() // BLOCK), weight.device

        def scale(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.shape, self.dtype, self.double_quant = list(weight.shape), weight.dtype, double_quant
        self.absmax = scale(blocks, dtype=torch.uint8 if double_quant else torch.float32)
        if double_quant:
            self.nested_absmax, self.nested_quant_map = scale(-(-blocks // NESTED_BLOCK)), scale(256)
            self.offset = scale()
        self.stands_for = {name: 0 for name, _ in self.named_parameters()}

    @torch.no_grad()
    def forward(self, values: Any) -> Any:
        """The weight, (experts, …)."""
        ops, absmax = torch.ops.bitsandbytes, self.absmax
        if self.double_quant:
            absmax = ops.dequantize_blockwise(absmax, self.nested_absmax, self.nested_quant_map)
            absmax += self.offset
        return ops.dequantize_4bit(values, absmax, self.shape, self.dtype)


class Rows(nn.Module):
    """`Bnb8bitParametrization`: fp32 from 8 bit, row by row."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        stats = torch.empty(weight.shape[:-1].numel(), device=weight.device)
        self.row_stats = nn.Parameter(stats, requires_grad=False)
        self.stands_for = {"row_stats": 0}

    @torch.no_grad()
    def forward(self, values: Any) -> Any:
        """The weight, (experts, …)."""
        rows = values.reshape(-1, values.shape[-1]) * self.row_stats.view(-1, 1) * (1 / 127)
        return rows.reshape(values.shape)


class LinearExperts(nn.Module):
    """Llama 4's experts as linear layers, one after another (axolotl/monkeypatch/models/llama4/modeling.py)."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.act_fn = stacked.num_experts, stacked.hidden_size, stacked.act_fn
        dtype = stacked.down_proj.dtype

        def layers(n_in: int, n_out: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(n_in, n_out, bias=False, dtype=dtype) for _ in range(self.num_experts))

        self.gate_projs = layers(self.hidden_size, stacked.expert_dim)
        self.up_projs = layers(self.hidden_size, stacked.expert_dim)
        self.down_projs = layers(stacked.expert_dim, self.hidden_size)

    def forward(self, hidden_states: Any) -> Any:
        """(experts · tokens, hidden) → the same: every expert sees all tokens, times their scores."""
        hidden_states = hidden_states.view(self.num_experts, -1, self.hidden_size)
        next_states = torch.zeros_like(hidden_states)
        for i in range(self.num_experts):
            expert_input = hidden_states[i]
            gate = self.gate_projs[i](expert_input)
            up = self.up_projs[i](expert_input)
            next_states[i] = self.down_projs[i](up * self.act_fn(gate))
        return next_states.view(-1, self.hidden_size)


def linearise_experts(model: Any) -> None:
    """Put linear layers in the place of a Llama 4's stacked experts."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Llama4TextExperts":
            model.set_submodule(path, LinearExperts(module))


def quantise_experts(model: Any, *, bits: int, double_quant: bool = True) -> None:
    """Put every weight of experts of a model into 4 or 8 bit."""
    for path, module in list(model.named_modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim < 3 or "expert" not in f"{path}.{name}".lower():
                continue
            shape = weight.shape if bits == 8 else ((weight.numel() + 1) // 2, 1)
            packed = torch.zeros(shape, dtype=torch.int8 if bits == 8 else torch.uint8, device=weight.device)
            setattr(module, name, nn.Parameter(packed, requires_grad=False))
            made = Rows(weight) if bits == 8 else Dequantised(weight, double_quant=double_quant)
            parametrize.register_parametrization(module, name, made, unsafe=True)
            module.parametrizations[name].stands_for = {"original": weight.numel()}
            module.register_forward_pre_hook(_cache)
            module.register_forward_hook(_forget, always_call=True)


def _cache(module: Any, inputs: Any) -> None:
    parametrize._cache_enabled += 1


def _forget(module: Any, inputs: Any, output: Any) -> None:
    parametrize._cache_enabled -= 1
    if not parametrize._cache_enabled:
        parametrize._cache = {}
