"""Times of single layers against LoRAFusion's profile of Llama-3.1-8B and -70B on an H100.

Its simulator measured models of one to four layers under a CUDA graph, and took what a layer adds: PEFT's LoRA (r=16,
dropout 0.1, all linears, adapters in bf16), flash attention, and Liger's norm, rotation and SwiGLU, but PyTorch's loss
(CentML/lorafusion, lorafusion/simulator/mono.py). Each figure was measured twice, in `configs` and `configs-backup`;
the two runs differ by 1 to 18 %. Nothing is fitted to them.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from perfmodel import methods
from perfmodel.architectures import from_config, load
from perfmodel.devices import price, profile
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.resources import DATA, read_rows
from perfmodel.setup import Setup

FILE = DATA / "published" / "lorafusion_layers.csv"
METHOD = "lora:r=16,dropout=0.1,targets=all-linear,adapter_dtype=bf16"
LAYERS = 4
MEAN_LIMIT = 0.12  # mean |relative error| of all times


@dataclass(frozen=True)
class Layer:
    """A measured time: of a layer or of everything around the layers (`head`), forward or both ways."""

    source: str
    device: str
    model: str
    component: str
    batch: int
    seq: int
    seconds: float

    @property
    def id(self) -> str:
        """The row's name."""
        return f"{self.model} {self.component} {self.batch} x {self.seq}"

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return component_seconds(self.device, self.model, self.batch, self.seq)[self.component] / self.seconds - 1


def published_layers(path: Path = FILE) -> list[Layer]:
    """All published figures."""
    return read_rows(path, _row)


def _row(r: dict[str, str]) -> Layer:
    size = int(r["batch"]), int(r["seq"])
    return Layer(r["source"], r["device"], r["model"], r["component"], *size, float(r["time_s"]))


@cache
def component_seconds(device: str, model: str, batch: int, seq: int) -> dict[str, float]:
    """Seconds by component; the device's clock alone, as under a CUDA graph."""
    inside = _seconds(_step(device, model, batch, seq, "liger"), device)
    around = _seconds(_step(device, model, batch, seq, "torch"), device)  # the loss is PyTorch's
    forward, backward = inside["blocks", "forward"], inside["blocks", "backward"]
    head = sum(t for (name, _), t in around.items() if name != "blocks")
    return {"layer_fwd": forward, "layer_fwd_bwd": forward + backward, "head_fwd_bwd": head}


def _step(device: str, model: str, batch: int, seq: int, kernels: str) -> Step:
    architecture = replace(from_config(load(model)), layers=LAYERS)
    method = methods.parse(METHOD).bind(architecture)
    setup = Setup(batch=batch, seq=seq, attention="flash2", kernels=kernels)
    return build(architecture, method, setup, "cuda", profile.load(device).compute_capability)


def _seconds(step: Step, device: str) -> dict[tuple[str, str], float]:
    """Device seconds by part and phase; of the blocks, one that is neither the first nor the last."""
    seconds: dict[tuple[str, str], float] = {}
    for part, _ in step.parts():
        if part.phase == "optimizer" or (part.name == "blocks" and part.repeat == 1):
            continue
        key = part.name, part.phase
        seconds[key] = seconds.get(key, 0.0) + float(price.durations(part.ops, profile.load(device)).sum())
    return seconds


def summarise_layers(layers: list[Layer]) -> dict[str, float]:
    """Mean |relative error| by component, and of all."""
    by: dict[str, list[float]] = {}
    for layer in layers:
        by.setdefault(layer.component, []).append(abs(layer.error))
    by["all"] = [error for errors in by.values() for error in errors]
    return {key: float(np.mean(errors)) for key, errors in by.items()}
