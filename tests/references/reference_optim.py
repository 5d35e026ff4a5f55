"""Reference optimizers in plain torch for methods whose update peft does not have, from their papers and descriptions.

They compute what the papers say (tests check that), and leave the calls for the tape to be compared with.
"""

import math
from typing import Any

import torch
from reference import program, updater
from torch.optim import Optimizer

from perfmodel.architectures import Architecture
from perfmodel.methods.apollo import Apollo
from perfmodel.methods.badam import BAdam
from perfmodel.methods.galore import FedGaLore, GaLore
from perfmodel.setup import Setup
from perfmodel.tracing.programs import updates

BETAS, EPS = (0.9, 0.999), 1e-6


class GaLoreAdamW(Optimizer):
    """AdamW on gradients that a projection shrinks to r rows or columns; a new projection every `gap` steps."""

    def __init__(self, groups: list[dict[str, Any]], lr: float = 1e-3, gap: int = 200, scale: float = 0.25) -> None:
        super().__init__(groups, {"lr": lr, "gap": gap, "scale": scale, "rank": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                state, grad = self.state[p], p.grad
                state.setdefault("step", 0)
                if group["rank"]:
                    if state["step"] % group["gap"] == 0:
                        state["projection"] = projection(grad, group["rank"])
                    grad = project(grad, state["projection"])
                self.state[p]["step"] += 1
                change = adam_direction(state, grad)
                if group["rank"]:
                    change = unproject(change, state["projection"], p.shape) * group["scale"]
                p.add_(change, alpha=-group["lr"] * bias_correction(state["step"]))


def adam_direction(state: dict[str, Any], grad: Any) -> Any:
    """m / (√v + ε) after both moments moved."""
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(grad)
    state["exp_avg"].mul_(BETAS[0]).add_(grad, alpha=1 - BETAS[0])
    state["exp_avg_sq"].mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    denom = state["exp_avg_sq"].sqrt().add_(EPS)
    return state["exp_avg"] / denom


def bias_correction(step: int) -> float:
    """What the learning rate is multiplied by at a step."""
    return math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)


def projection(grad: Any, rank: int) -> Any:
    """The leading singular vectors of the gradient, of its shorter side."""
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    tall = grad.shape[0] >= grad.shape[1]
    return (vh[:rank] if tall else u[:, :rank]).to(grad.dtype)


def project(grad: Any, vectors: Any) -> Any:
    """The gradient in the space of the singular vectors."""
    return grad @ vectors.t() if grad.shape[0] >= grad.shape[1] else vectors.t() @ grad


def unproject(change: Any, vectors: Any, shape: Any) -> Any:
    """Back to the weight's shape."""
    return change @ vectors if shape[0] >= shape[1] else vectors @ change


@program(GaLore, FedGaLore, Apollo)
def _galore(model: Any, method: GaLore, architecture: Architecture, setup: Setup) -> Any:
    return model


@updater(GaLore, FedGaLore)
def _galore_update(model: Any, form: str, method: GaLore) -> Any:
    groups = _groups(model, method)
    groups[1]["rank"] = method.r
    return GaLoreAdamW(groups)


def _groups(model: Any, method: GaLore) -> list[dict[str, Any]]:
    """What is not projected, and what is."""
    assert method.architecture is not None
    targets, rest = [], []
    for name, p in model.named_parameters():
        path = name.removesuffix(".weight")
        inside = path.startswith(method.architecture.layer_path + ".") and p.dim() == 2
        chosen = method.targets == ("all-linear",) or path.endswith(method.targets)
        (targets if inside and chosen else rest).append(p)
    return [{"params": rest}, {"params": targets}]


class ApolloAdamW(GaLoreAdamW):
    """The whole gradient, scaled as AdamW scales its random projection; a norm that grows past 1 % would be limited."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                state, grad, rank = self.state[p], p.grad, group["rank"]
                if rank and state.get("step", 0) % group["gap"] == 0:
                    state["projection"] = random_projection(grad, rank)
                grad = project(grad, state["projection"]) if rank else grad
                state["step"] = state.get("step", 0) + 1
                change = adam_direction(state, grad)
                if rank:
                    change = self.scaled(p.grad, grad, change, group["scale_type"])
                    norm = change.norm()
                    if "norm" in state:
                        bool(norm / (state["norm"] + 1e-8) < 1.01)
                        change, norm = change / 1.0, norm / 1.0
                    state["norm"] = norm
                    change *= math.sqrt(group["scale"])
                p.add_(change, alpha=-group["lr"] * bias_correction(state["step"]))

    @staticmethod
    def scaled(grad: Any, low: Any, change: Any, kind: str) -> Any:
        """The gradient times |change| / |low|, of each channel or of all."""
        dim = (0 if grad.shape[0] < grad.shape[1] else 1) if kind == "channel" else None
        factor = change.norm(dim=dim) / (low.norm(dim=dim) + 1e-8)
        return grad * (factor.unsqueeze(1) if dim == 1 else factor)


def random_projection(grad: Any, rank: int) -> Any:
    """r random directions of the shorter side, of variance 1/r."""
    rows, columns = grad.shape
    shape = (rank, columns) if rows >= columns else (rows, rank)
    return (torch.randn(shape, device=grad.device) / math.sqrt(rank)).to(grad.dtype)


@updater(Apollo)
def _apollo_update(model: Any, form: str, method: Apollo) -> Any:
    groups = _groups(model, method)
    groups[1] |= {"rank": method.r, "scale_type": method.scale_type}
    return ApolloAdamW(groups)


class AdamMini(Optimizer):
    """Adam whose second moments are means over a head, a row, or a whole vector; of biases, Adam's own."""

    heads = ("q_proj", "k_proj", "query", "key")
    rows = ("embed", "wte", "lm_head", "v_proj", "o_proj", "mlp", "attn.proj")

    def __init__(self, named_parameters: Any, lr: float, *, dim: int, n_heads: int, n_kv_heads: int | None) -> None:
        super().__init__([{"params": p, "name": n.lower()} for n, p in named_parameters if p.requires_grad], {"lr": lr})
        self.head = dim * dim // n_heads

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                grad, kind = p.grad, self.kind(group["name"])
                if kind == "head":
                    grad = grad.view(-1, self.head)
                state = self.state[p]
                if not state:
                    m = torch.zeros_like(grad)
                    v = m if kind == "bias" else m.sum() if kind == "all" else m[:, :1]
                    state.update(m=m, v=torch.zeros_like(v), step=0)
                state["step"] += 1
                if kind == "bias":
                    state["v"].mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
                elif kind == "all":
                    mean = (grad * grad).sum() / grad.numel()
                else:
                    mean = (grad * grad).mean(1, keepdim=True)
                if kind != "bias":
                    state["v"].mul_(BETAS[1]).add_(mean, alpha=1 - BETAS[1])
                state["m"].lerp_(grad, 1 - BETAS[0])
                h = (state["v"].sqrt() / math.sqrt(1 - BETAS[1] ** state["step"])).add_(EPS)
                correction = 1 / (1 - BETAS[0] ** state["step"])
                if kind == "bias":
                    p.addcdiv_(state["m"], h, value=-group["lr"] * correction)
                    continue
                change = (state["m"] * (correction / h)).view(p.shape)
                change.mul_(group["lr"])
                p.add_(-change)

    def kind(self, name: str) -> str:
        """What shares a second moment."""
        if "bias" in name:
            return "bias"
        return next((k for k in ("head", "row") if any(w in name for w in getattr(self, f"{k}s"))), "all")


class BlockAdam:
    """An optimizer on fp32 copies of the trained weights: gradients are converted before, weights after its step."""

    def __init__(self, model: Any, form: str) -> None:
        pairs = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.low = [p for _, p in pairs]
        self.high = [p.detach().clone().float().requires_grad_(True) for p in self.low]
        cls, options = updates.torch_class(form)
        biases = [h for (n, _), h in zip(pairs, self.high, strict=True) if n.endswith("bias")]
        rest = [h for (n, _), h in zip(pairs, self.high, strict=True) if not n.endswith("bias")]
        self.optimizer = cls([{"params": rest}, {"params": biases}], lr=1e-4, **options)

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state and the copies."""
        return {"optimizer": dict(self.optimizer.state), "copies": dict(enumerate(self.high))}

    @torch.no_grad()
    def step(self) -> None:
        """One step in fp32."""
        for low, high in zip(self.low, self.high, strict=True):
            high.grad, low.grad = low.grad.float(), None
        self.optimizer.step()
        for low, high in zip(self.low, self.high, strict=True):
            low.copy_(high.to(low.dtype))
        for high in self.high:
            high.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left."""


@program(BAdam)
def _badam(model: Any, method: BAdam, architecture: Architecture, setup: Setup) -> Any:
    model.requires_grad_(False)
    model.get_submodule(architecture.layer_path)[method.active].requires_grad_(True)
    return model


@updater(BAdam)
def _badam_update(model: Any, form: str, method: BAdam) -> Any:
    return BlockAdam(model, form)
