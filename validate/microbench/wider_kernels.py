"""Makes the cases of the wider blocks run; importing this registers them."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from perfmodel.tracing.programs.dtypes import TORCH_DTYPES
from perfmodel.tracing.programs.updates import make_optimizer

from .designs import MicroCase
from .kernels import BUILDERS, Call, Ring, gemm

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


def copies(case: MicroCase, device: str) -> tuple[Call, int]:
    """Between host and device, or within the device."""
    n = case["elements"]
    there = torch.ones(n, device=device)
    here = torch.ones(n, device="cpu")
    if case.op == "to_device_pinned":
        here = here.pin_memory()
    target = torch.empty_like(there)
    calls: dict[str, Call] = {
        "to_device": lambda i: target.copy_(here),
        "to_device_pinned": lambda i: target.copy_(here, non_blocking=True),
        "to_host": lambda i: here.copy_(there),
        "within": lambda i: target.copy_(there),
    }
    return calls[case.op], 1


def backends(case: MicroCase, device: str) -> tuple[Call, int]:
    """One backend of scaled_dot_product_attention; the backward pass follows from the forward's.

    Raises:
        RuntimeError: this backend does not take such operands here.
    """
    b, s, d, heads = (case[name] for name in ("batch", "seq", "head_dim", "heads"))
    rings = [Ring(b, s, heads, d, dtype=case.dtype, device=device, of=3) for _ in range(3)]
    inputs = [[ring[i].transpose(1, 2) for ring in rings] for i in range(len(rings[0].copies))]
    backend = BACKENDS[case.op]

    def forward(i: int) -> torch.Tensor:
        with sdpa_kernel(backend):
            q, k, v = inputs[i % len(inputs)]
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    if not case.backward:
        return forward, 1
    for parts in inputs:
        for part in parts:
            part.requires_grad_()
    outputs = [forward(i) for i in range(len(inputs))]
    grad = torch.ones_like(outputs[0])

    def backward(i: int) -> object:
        i = i % len(inputs)
        return torch.autograd.grad(outputs[i], inputs[i], grad, retain_graph=True)

    return backward, 1


def lists(case: MicroCase, device: str) -> tuple[Call, int]:
    """A step of an optimizer, or clipping, over a list of tensors that have gradients."""
    kind = TORCH_DTYPES[case.dtype]
    tensors = [torch.nn.Parameter(torch.ones(case["elements"], dtype=kind)) for _ in range(case["tensors"])]
    for t in tensors:
        t.grad = torch.full_like(t, 1e-3)
    if case.op == "clip":
        return lambda i: torch.nn.utils.clip_grad_norm_(tensors, 1.0, foreach=True), 1
    update = make_optimizer(tensors, case.op)
    return lambda i: update.step(), 1


BUILDERS.update(
    {"copies": copies, "gemm unaligned": gemm, "attention backends": backends, "optimizer lists": lists}
)  # fmt: skip
