"""Peak memory: segments compose as (Δ, peak), Δ what one leaves behind, peak the most it holds at once.

Two segments in sequence: (Δ₁+Δ₂, max(p₁, Δ₁+p₂)). A segment repeated n times: (n·Δ, p + (n-1)·max(Δ, 0)).
"""

from typing import Any, NamedTuple

from ..program.dims import Dim, larger
from ..program.part import Group, Part
from ..recording.record import held_bytes
from ..recording.step import Step
from ..values import immutable


@immutable
class Memory:
    """Bytes that PyTorch allocates (`max_memory_allocated`).

    `gradients` are those that a rank keeps (of ZeRO-1 and 2 its part). `activations` is what the peak holds beyond
    weights, gradients and optimizer state: saved activations, logits, temporaries of the optimizer. `low` and `high`
    bound what the allocator reserves for it, fragmentation included. `host` is what is kept for it in the host's
    memory, page-locked: offloaded weights, states and gradients. `buffers` is what NCCL keeps for the groups that a GPU
    exchanges with, beside the allocator (`perfmodel.network.buffers`).
    """

    weights: Dim
    gradients: Dim
    optimizer: Dim
    activations: Dim
    peak: Dim
    low: Any
    high: Any
    host: Dim = 0
    buffers: Dim = 0

    @classmethod
    def of(cls, built: Step) -> "Memory":
        """What a step takes."""
        peak = peak_bytes(built)
        low, high = reserved_bounds(peak, built.device)
        elsewhere = built.setup.in_backward or built.setup.offload != "none"  # freed, or in the host's memory
        kept = () if elsewhere else built.parameters
        gradients = sum(p.nbytes * p.count for p in kept if p.used)
        if built.form is not None:
            gradients = built.form.gradient_bytes(kept)
        rest = built.weight_bytes + gradients + built.state_bytes
        activations = larger(peak - rest, 0)
        return cls(built.weight_bytes, gradients, built.state_bytes, activations, peak, low, high, built.host_bytes)


class Segment(NamedTuple):
    """Net change of live bytes, and the highest point above the start."""

    delta: Dim = 0
    peak: Dim = 0

    def then(self, other: "Segment") -> "Segment":
        """This segment followed by another."""
        return Segment(self.delta + other.delta, larger(self.peak, self.delta + other.peak))

    def repeated(self, n: int) -> "Segment":
        """This segment n times in a row."""
        return Segment(self.delta * n, self.peak + larger(self.delta, 0) * (n - 1)) if n else Segment()


def part_segment(part: Part) -> Segment:
    """A part with its repeats."""
    return Segment(part.delta, part.peak).repeated(part.repeat)


def of_group(group: Group) -> Segment:
    """A group with its repeats."""
    total = Segment()
    for part in group.parts:
        total = total.then(part_segment(part))
    return total.repeated(group.repeat)


def step_segment(step: Step) -> Segment:
    """A whole step, from an empty set of activations and gradients."""
    total = Segment()
    for group in step.groups:
        total = total.then(of_group(group))
    return total


WORKSPACE = 2 * 8_519_680  # B: cuBLAS and cuBLASLt workspaces (torch.cuda docs, CUBLAS_WORKSPACE_CONFIG: 8.1 MiB each)
CONTEXT = 0.5e9  # B of device memory outside the allocator: CUDA context and kernels (nvidia-smi, A100: 0.4-0.6 GB)
# Of the peak, what the allocator reserves on top at the most in steady state; the highest of 54 published peaks that no
# fit saw (fms-acceleration, QLoRA) lies 11 % above the live bytes.
FRAGMENTATION = 0.12


def peak_bytes(step: Step) -> Dim:
    """Highest live bytes of the step: weights, optimizer state, what the method keeps, and what the tape allocates."""
    return step.weight_bytes + step.state_bytes + held_bytes(step) + step_segment(step).peak


def reserved_bounds(peak: Dim, device: str) -> tuple[Dim, Dim]:
    """What the allocator reserves for a peak of live bytes, between no and much fragmentation."""
    workspace = WORKSPACE if device == "cuda" else 0
    return peak + workspace, peak * (1 + FRAGMENTATION) + workspace


def fits(peak: Dim, capacity: float, device: str, buffers: Dim = 0) -> Dim:
    """Whether the step runs in a device memory of `capacity` bytes, with the context and a tight allocator."""
    return reserved_bounds(peak, device)[0] <= reservable(capacity, device, buffers)


def reservable(capacity: float, device: str, buffers: Dim = 0) -> Any:
    """Bytes of a device memory that the allocator can have: all but CUDA's context and NCCL's buffers."""
    return capacity - (CONTEXT if device == "cuda" else 0.0) - buffers


def room(capacity: float, device: str, buffers: Dim = 0) -> Any:
    """The highest peak that fits into a device memory of `capacity` bytes."""
    return reservable(capacity, device, buffers) - (WORKSPACE if device == "cuda" else 0)
