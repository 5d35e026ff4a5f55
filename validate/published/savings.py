"""DRAM traffic of one linear layer with LoRA, PEFT's calls against LoRAFusion's fused kernels.

Nsight Compute measured reads and writes of forward and backward on an H100 (data/published/lorafusion_traffic.csv).
Nothing is fitted to them.
"""

import csv
from dataclasses import dataclass

from perfmodel.devices import profile
from perfmodel.devices.traffic import dram_bytes
from perfmodel.program.dims import contiguous_strides, product
from perfmodel.resources import DATA
from perfmodel.tape import engine
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.linalg import linear
from perfmodel.tape.packages.lora_kernels import lorafusion_linear
from perfmodel.tape.pointwise import add, dropout, mul
from perfmodel.tape.tensor import Parameter, Storage, Tensor

FILE = DATA / "published" / "lorafusion_traffic.csv"
POINTS_LIMIT = 0.03  # predicted against measured share that is saved
SAMPLES = 32  # the benchmark runs its tokens as a batch of so many
DROPOUT, SCALE = 0.1, 16.0


@dataclass(frozen=True)
class Saving:
    """A measured square layer; figures in bytes of DRAM read and written, forward and backward."""

    source: str
    device: str
    tokens: int
    width: int
    rank: int
    torch: float
    fused: float

    def predicted(self, *, fused: bool) -> float:
        """Predicted bytes."""
        hardware = profile.load(self.device).hardware
        return float(sum(dram_bytes(op, hardware) for part in _record(self, fused).parts for op in part.ops))

    @property
    def share(self) -> float:
        """Share of the traffic that fusing saves, as measured."""
        return 1 - self.fused / self.torch

    @property
    def predicted_share(self) -> float:
        """The same, predicted."""
        return 1 - self.predicted(fused=True) / self.predicted(fused=False)


def published_savings() -> list[Saving]:
    """All published figures."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return [
            Saving(
                r["source"], r["device"], int(r["tokens"]), int(r["width"]), int(r["rank"]), float(r["torch_bytes"]),
                float(r["fused_bytes"]),
            )
            for r in csv.DictReader(file)
        ]  # fmt: skip


def _record(layer: Saving, fused: bool) -> Tape:
    """Forward and backward of the layer, as the benchmark runs it: in bf16, the layer's input needs a gradient."""
    tape, n = Tape("cuda", "9.0"), layer.width
    with recording(tape):
        tape.begin("layer", "forward")
        x = _leaf((SAMPLES, layer.tokens // SAMPLES, n), needs_grad=True)
        shapes = {"weight": (n, n), "a": (layer.rank, n), "b": (n, layer.rank)}
        w, a, b = (Parameter(k, s, "bf16", kind="weight", trainable=k != "weight") for k, s in shapes.items())
        if fused:
            y = lorafusion_linear(x, w, a, b, None, DROPOUT)
        else:
            y = add(linear(x, w), mul(linear(linear(dropout(x, DROPOUT), a), b), SCALE))
        tape.backward_of(tape.part)
        engine.run_backward(y, _leaf(y.shape, needs_grad=False))
    return tape


def _leaf(shape: tuple[int, ...], *, needs_grad: bool) -> Tensor:
    """A bf16 tensor that was there before."""
    x = Tensor(shape, "bf16", contiguous_strides(shape), product(shape), Storage(0, None))
    x.requires_grad = needs_grad
    return x
