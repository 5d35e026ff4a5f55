"""LoRA-Pro in plain torch: the gradients of a pair whose product comes nearest to Adam's direction for the full weight.

Written from the paper's theorem and the description of its authors' code (2407.18242), steady steps only.
"""

import math
from typing import Any

import torch
from reference import as_lora, program, updater

from perfmodel.architectures import Architecture
from perfmodel.methods.lora_pro import LoraPro
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models

BETA1, BETA2, EPS, DELTA = 0.9, 0.999, 1e-8, 1e-8


def inverse(gram: Any, dtype: Any) -> Any:
    """(G + δI)⁺ in fp32, cast."""
    return torch.linalg.pinv(gram + DELTA * torch.eye(gram.shape[0], device=gram.device)).to(dtype)


def off_b(b: Any, b_inv: Any, grad: Any, a_inv: Any, s: float) -> Any:
    """The part of B's gradient that lies off B's columns, in the metric of A."""
    projector = torch.eye(b.shape[0], device=b.device, dtype=b.dtype) - b @ b_inv @ b.T
    return (1 / s**2) * (projector @ grad @ a_inv)


def sylvester(a: Any, b: Any, c: Any) -> Any:
    """X with AX + XB = C."""
    if a.dtype is torch.bfloat16:
        a, b, c = (x.to(torch.float32) for x in (a, b, c))
    b = -b
    of_a, u = torch.linalg.eig(a)
    of_b, v = torch.linalg.eig(b)
    f = torch.linalg.solve(u, (c + 0j) @ v)
    y = f / (of_a[:, None] - of_b[None, :])
    x = u @ y @ torch.linalg.inv(v)
    return x.real if all(torch.isreal(m.flatten()[0]) for m in (a, b, c)) else x


class LoraProUpdate:
    """Adjusted gradients, then SGD."""

    def __init__(self, pairs: list[tuple[Any, Any]], s: float, lr: float = 1e-3) -> None:
        self.pairs, self.s = pairs, s
        self.sgd = torch.optim.SGD([p for pair in pairs for p in pair], lr=lr, foreach=True)
        self.state: dict[int, dict[str, Any]] = {i: {} for i in range(len(pairs))}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """One update of all pairs."""
        self.steps += 1
        for i, (a, b) in enumerate(self.pairs):
            self.adjust(self.state[i], a, b)
        self.sgd.step()

    def adjust(self, state: dict[str, Any], a: Any, b: Any) -> None:
        """Replace the gradients of one pair."""
        s = self.s
        gram_a, gram_b = a @ a.T, b.T @ b
        a_inv, b_inv = inverse(gram_a, a.dtype), inverse(gram_b, a.dtype)
        grad_a = (1 / s**2) * b_inv @ a.grad
        grad_b = off_b(b, b_inv, b.grad, a_inv, s)
        full = s * b @ grad_a + s * grad_b @ a
        _denom, g = self.adam(state, full, b.dtype)  # lives as long as the pair is worked on
        a.grad, b.grad = s * b.T @ g, s * g @ a.T
        x = sylvester(b.T @ b, a @ a.T, -(1 / s**2) * b_inv @ a.grad @ a.T)
        x = torch.tensor(x, device=a.device, dtype=b.dtype)
        grad_a = (1 / s**2) * b_inv @ a.grad + x @ a
        grad_b = off_b(b, b_inv, b.grad, a_inv, s) - b @ x
        a.grad, b.grad = grad_a, grad_b

    def adam(self, state: dict[str, Any], grad: Any, dtype: Any) -> tuple[Any, Any]:
        """The denominator and Adam's direction for the full gradient."""
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(grad)
        state["exp_avg"].lerp_(grad, 1 - BETA1)
        square = state["exp_avg_sq"].mul_(BETA2)
        square.addcmul_(grad.to(torch.bfloat16), grad.to(torch.bfloat16), value=1 - BETA2)
        denom = (square.sqrt() / math.sqrt(1 - BETA2**self.steps)).add_(EPS)
        return denom, ((state["exp_avg"] / (1 - BETA1**self.steps)) / denom).to(dtype)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.sgd.zero_grad(set_to_none)


@program(LoraPro)
def _lora_pro(model: Any, method: LoraPro, architecture: Architecture, setup: Setup) -> Any:
    return models.apply_method(model, as_lora(method), architecture)


@updater(LoraPro)
def _lora_pro_update(model: Any, form: str, method: LoraPro) -> Any:
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    return LoraProUpdate(list(zip(adapters[::2], adapters[1::2], strict=True)), method.alpha / method.r)
