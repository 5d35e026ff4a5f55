"""ResLoRA in plain torch, as its authors' layers compute it in training: modules keep what later blocks ask for."""

from collections import defaultdict
from typing import Any

import torch
from reference import program, sizes, wrap
from torch import nn

from perfmodel.architectures import Architecture
from perfmodel.methods.reslora import ResLora
from perfmodel.setup import Setup


class ResLinear(nn.Module):
    """A linear layer whose adapter reaches back to the same layer of earlier blocks (`previous`)."""

    def __init__(self, base: Any, method: ResLora) -> None:
        super().__init__()
        n, m = sizes(base)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base, self.method, self.scaling = base, method, method.alpha / method.r
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.zeros(method.r, n, **like)),
            nn.Parameter(torch.zeros(m, method.r, **like)),
        )
        self.dropout = nn.Dropout(method.dropout) if method.dropout else nn.Identity()
        self.previous: list[ResLinear] = []  # a list hides the module from the module tree
        self.input = self.xa = None

    def earlier(self) -> list[Any]:
        found, module = [], self
        while module.previous and len(found) != self.method.pre_num:
            module = module.previous[0]
            found.append(module)
        return found

    def adapter(self, x: Any, extra: Any = None) -> Any:
        xa = self.dropout(x) @ self.lora_A.transpose(0, 1)
        if self.method.shortcut == "ms":
            self.xa = xa
        return ((xa if extra is None else xa + extra) @ self.lora_B.transpose(0, 1)) * self.scaling

    def forward(self, x: Any) -> Any:
        result, kind, flag = self.base(x), self.method.shortcut, self.method.merge_flag
        if kind == "is":
            if flag == 4:
                torch.norm(x, p="fro").item()
            self.input = x
            result += self.adapter(x + (self.previous[0].input if self.previous else x))
        elif kind == "bs":
            for module in (self, *self.earlier()):
                result += module.adapter(x)
        else:
            extra = torch.zeros_like(self.previous[0].xa) if self.previous else None
            for module in self.earlier():
                extra += module.xa
            result += self.adapter(x, extra)
            if flag:
                torch.norm(self.xa if flag == 4 else x, p="fro").item()
        return result


@program(ResLora)
def _reslora(model: Any, method: ResLora, architecture: Architecture, setup: Setup) -> Any:
    wrap(model, architecture, method.targets_layer, lambda base: ResLinear(base, method))
    chains: dict[str, list[ResLinear]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, ResLinear):
            chain = chains[name.removeprefix(architecture.layer_path + ".").partition(".")[2]]
            module.previous = chain[-1:]
            chain.append(module)
    return model
