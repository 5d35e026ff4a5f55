"""FLOPs of small models in closed form: what their linear layers, attention and head cost in forward and backward."""

from typing import Any

from helpers import by_phase, step_of

from perfmodel.recording.step import Step

T, BATCH, SEQ, R = 34, 2, 17, 3
LINEARS = {  # (inputs, outputs) of a block's linear layers; those before `first` read the block's normed input
    "llama": ([(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)], 3),
    "gpt2": ([(64, 192), (64, 64), (64, 256), (256, 64)], 1),
}
LAYERS, HEAD, ATTENTION = 3, 2 * T * 64 * 128, 2 * BATCH * SEQ * SEQ * 64


def products(name: str) -> list[tuple[int, int, bool]]:
    """(inputs, outputs, whether the input needs a gradient) of all linears of a model with a frozen embedding."""
    linears, first = LINEARS[name]
    return [(n, m, layer > 0 or i >= first) for layer in range(LAYERS) for i, (n, m) in enumerate(linears)]


def adapted_flops(name: str, forward: Any, backward: Any) -> tuple[int, int]:
    """FLOPs of forward and backward where every linear costs extra: forward(n, m), backward(n, m, needed)."""
    linears = products(name)
    return (
        sum(2 * T * n * m + forward(n, m) for n, m, _ in linears) + LAYERS * 2 * ATTENTION + HEAD,
        sum(2 * T * n * m * needed + backward(n, m, needed) for n, m, needed in linears)
        + LAYERS * 5 * ATTENTION + HEAD,
    )  # fmt: skip


def recorded(name: str, spec: str, **options: Any) -> Step:
    return step_of(name, spec, **{"batch": BATCH, "seq": SEQ, **options})


def flops_of(step: Step) -> tuple[int, int]:
    flops = by_phase(step)
    return flops["forward"], flops["backward"]
