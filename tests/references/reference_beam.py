"""BeamLoRA in plain torch: the gated layer, and the replacement of weak ranks, as the authors' code does both."""

from functools import partial
from typing import Any

import torch
from reference import program, sizes, wrap
from torch import nn

from perfmodel.architectures import Architecture
from perfmodel.methods.beamlora import BeamLora
from perfmodel.setup import Setup
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES


def share(gate: Any) -> Any:
    """softmax(g/τ) over the ranks, (1, r)."""
    return torch.softmax(gate / 0.05, dim=-1)


def importance(gate: Any) -> Any:
    """softmax(g/τ)·r, (1, r)."""
    return share(gate) * gate.shape[1]


class BeamLinear(nn.Module):
    """A linear layer whose low-rank product is weighed rank by rank."""

    def __init__(self, base: Any, method: BeamLora) -> None:
        super().__init__()
        n, m = sizes(base)
        dtype = TORCH_DTYPES[method.adapter_dtype or "fp32"]
        like = {"dtype": dtype, "device": base.weight.device}
        self.base, self.scaling = base, method.alpha / method.r
        self.lora_A, self.lora_B = (
            nn.Linear(n, method.r, bias=False, **like),
            nn.Linear(method.r, m, bias=False, **like),
        )
        self.lora_gate = nn.Parameter(torch.zeros(1, method.r, **like))
        self.lora_dropout = nn.Dropout(method.dropout) if method.dropout else nn.Identity()

    def forward(self, x: Any) -> Any:
        result = self.base(x)
        dtype = result.dtype
        x = x.to(self.lora_A.weight.dtype)
        low = self.lora_A(self.lora_dropout(x)) * share(self.lora_gate) * self.lora_gate.shape[1]
        result = result + self.lora_B(low) * self.scaling
        return result.to(dtype)


@program(BeamLora)
def _beamlora(model: Any, method: BeamLora, architecture: Architecture, setup: Setup) -> Any:
    wrap(model, architecture, method.targets_layer, partial(BeamLinear, method=method))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.kept_bytes = sum(3 * p.numel() * p.element_size() for p in trained)  # adapters and both moments, copied
    return model


def replace_ranks(model: Any) -> None:
    """Every layer's strongest half of the ranks, as copied before, takes the place of the weak ones (AdamW's moments
    too); which half is weak depends on data, so the indices are made up."""
    layers = [m for m in model.modules() if isinstance(m, BeamLinear)]
    scores = torch.cat([importance(m.lora_gate).view(-1) for m in layers])
    values, _ = scores.sort(descending=True)
    assert (values.cumsum(0) > 0.95 * len(scores)).shape == scores.shape
    for m in layers:
        replace_in(m)


def replace_in(m: BeamLinear) -> None:
    """Rows of A, columns of B, both moments of each; gates share their value."""
    a, b, gate = m.lora_A.weight, m.lora_B.weight, m.lora_gate
    n = (gate.shape[1] + 1) // 2
    importance(gate).topk(n, dim=1)
    weak, strong = torch.empty(n, dtype=torch.long), torch.empty(n, dtype=torch.long)
    old_a, old_b = torch.empty_like(a), torch.empty_like(b)
    for rows in (a, torch.empty_like(a), torch.empty_like(a)):
        rows[weak, :] = old_a[strong, :]
    for columns in (b, torch.empty_like(b), torch.empty_like(b)):
        columns[:, weak] = old_b[:, strong]
    half = (gate[:, weak] + gate[:, strong]) * 0.5
    gate[:, weak] = half
    gate[:, strong] = half
    for moment in (torch.empty_like(gate), torch.empty_like(gate)):
        moment.zero_()
