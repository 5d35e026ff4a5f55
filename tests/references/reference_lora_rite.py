"""LoRA-RITE in plain torch: the same step for every factorisation of the product of a pair.

Written from the paper's algorithm and the description of its authors' optimizer with its defaults (2410.20625), also
what those compute without applying it (scalars, escape masses). Factors are handled in their long form (n or m, r).
"""

from typing import Any

import torch
from reference import as_lora, program, updater

from perfmodel.architectures import Architecture
from perfmodel.methods.lora_rite import LoraRite
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models

BETA1, BETA2, EPS, CLIP, SKIP = 0.9, 0.999, 1e-6, 1.0, 1.0
nan = torch.nan


class LoraRiteUpdate:
    """Pairs of A (r, n) and B (m, r)."""

    def __init__(self, pairs: list[tuple[Any, Any]], lr: float = 1e-3, *, traced: bool = False) -> None:
        self.pairs, self.lr, self.traced, self.steps, self.total = pairs, lr, traced, 0, 0.0
        self.state: dict[Any, dict[str, Any]] = {}
        self.first = {id(a) for a, _ in pairs}
        for p in (p for pair in pairs for p in pair):
            size, r = self.long(p).shape
            fp32 = {"dtype": torch.float32, "device": p.device}
            state = {"v": torch.zeros(r, r, **fp32), "c": torch.zeros(size, **fp32), "escape": 0.0, "trace": 0.0}
            self.state[p] = state | {name: torch.zeros(size, r, **fp32) for name in ("m", "basis")}

    def long(self, p: Any, x: Any = None) -> Any:
        """A tensor of a factor's shape (itself by default) with the rank last, and the other way round."""
        x = p if x is None else x
        return x.T if id(p) in self.first else x

    def skipped(self, condition: Any) -> bool:
        """Whether an update is to be skipped; a trace has no data to tell, and takes the ordinary step."""
        return not bool(condition) if self.traced else bool(condition)

    @torch.no_grad()
    def step(self) -> None:
        """One step on all pairs."""
        self.total, self.bases = 0.0, {}
        for a, b in self.pairs:
            self.unmagnify(a, b)
        norm = torch.sqrt(self.total)
        self.steps += 1
        for a, b in self.pairs:
            clip = CLIP if bool(norm > CLIP) else None
            self.precondition(a, b, norm, clip)
            self.precondition(b, a, norm, clip)
            for p in (a, b):
                self.state[p]["basis"] = self.bases.pop(p)

    def unmagnify(self, a: Any, b: Any) -> None:
        """QR of both factors, and gradients times the inverse of the other factor's R."""
        grads = {p: torch.nan_to_num(p.grad, nan, nan, nan).float() for p in (a, b)}
        for p in (a, b):
            self.bases[p], self.state[p]["rotation"] = torch.linalg.qr(self.long(p, p.float()))
        for p, other in ((a, b), (b, a)):
            grad = self.long(p, grads[p]) @ torch.linalg.pinv(self.state[other]["rotation"])
            rms = torch.nan_to_num(torch.sqrt(torch.mean(torch.pow(grad, 2))), nan, nan, nan)
            self.state[p]["grad"] = torch.zeros_like(grad) if self.skipped(rms > SKIP) else grad
            self.total += torch.linalg.norm(self.state[p]["grad"]) ** 2

    def precondition(self, p: Any, other: Any, norm: Any, clip: float | None) -> None:
        """Move one factor."""
        state, basis, old_basis = self.state[p], self.bases[other], self.state[other]["basis"]
        grad = state["grad"] if clip is None else state["grad"] / norm * clip
        beta1, beta2 = (b * (1 - b ** (self.steps - 1)) / (1 - b**self.steps) for b in (BETA1, BETA2))
        second = symmetric(grad.T @ grad / grad.shape[0])
        carried = carried_second(state["v"], basis.T @ old_basis)
        escape = 0.0 + beta2 * (escaped(carried, state["v"]) + state["escape"])
        state["escape"] = escape
        old_v, state["v"] = carried, symmetric((1 - beta2) * second + beta2 * carried)
        state["trace"] = (1 - beta2) * torch.trace(second) + beta2 * state["trace"]
        c = scalars(state["c"], old_v, state["v"], grad.T, escape, beta2)
        state["c"] = (c + 1e-8) / (torch.mean(c) + 1e-8)
        direction = torch.nan_to_num(grad @ symmetric(inverse_sqrt(symmetric(state["v"]))))
        state["m"] = (1 - beta1) * direction + beta1 * (state["m"] @ (basis.T @ old_basis).T)
        change = -self.lr * (state["m"] @ torch.linalg.pinv(self.state[other]["rotation"]).T)
        p.add_(self.long(p, change).to(p.dtype))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for p in self.state:
            p.grad = None


def symmetric(x: Any) -> Any:
    """The symmetric part."""
    return (x + x.T) / 2


def carried_second(v: Any, p: Any) -> Any:
    """The second moment in the new basis, and the traces that nothing uses."""
    carried = symmetric(p @ v @ p.T)
    _ = torch.trace(v), torch.trace(carried)
    return torch.nan_to_num(carried)


def escaped(carried: Any, v: Any) -> Any:
    """What the change of basis lost."""
    old, new = (torch.sort(torch.linalg.eigvalsh(x))[0] for x in (v, carried))
    eigen = torch.maximum(torch.max(old - new), torch.tensor(0).to(old))
    return torch.minimum(eigen, torch.maximum(torch.trace(v) - torch.trace(carried), torch.tensor(0).to(old)))


def scalars(c: Any, old_v: Any, v: Any, grad: Any, escape: Any, beta2: float) -> Any:
    """The scalar second moment of every column of a gradient (r, long)."""
    e = (escape + EPS**2) * torch.eye(v.shape[0], device=v.device)
    inverse = symmetric(torch.linalg.pinv(v + e))
    of_e = torch.nan_to_num(torch.maximum(torch.zeros_like(c), torch.trace(e @ inverse)))
    of_old = torch.nan_to_num(c * torch.maximum(torch.zeros_like(c), torch.trace(old_v @ inverse)))
    of_new = torch.nan_to_num(torch.maximum(torch.zeros_like(c), (inverse @ grad * grad).sum(dim=0)))
    return torch.nan_to_num((1 - beta2) * of_new + beta2 * of_old + of_e) / grad.shape[0]


def inverse_sqrt(x: Any) -> Any:
    """X^(-½)."""
    values, vectors = torch.linalg.eigh(x)
    values = 1 / (torch.sqrt(values + 0) + EPS)
    return symmetric(vectors * torch.unsqueeze(values, 0) @ vectors.T)


@program(LoraRite)
def _lora_rite(model: Any, method: LoraRite, architecture: Architecture, setup: Setup) -> Any:
    return models.apply_method(model, as_lora(method), architecture)


@updater(LoraRite)
def _lora_rite_update(model: Any, form: str, method: LoraRite) -> Any:
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    return LoraRiteUpdate(list(zip(adapters[::2], adapters[1::2], strict=True)), traced=True)
