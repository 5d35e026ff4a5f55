"""What stands behind the figures of a page: assumptions, accuracy, provenance."""

import re
from dataclasses import dataclass
from os import PathLike
from typing import Any

from .. import architectures, units
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..prediction.predict import Model, Prediction
from ..questions.sentences import notes_by_method

OPTIONS = {  # field of the setup -> what it is called
    "batch": "batch", "seq": "tokens per sample", "dtype": "base weights", "amp": "autocast", "optimizer": "optimizer",
    "grad_accum": "micro-batches per step", "checkpoint": "activation checkpointing", "attention": "attention",
    "clip_grad": "gradient clipping", "cuda_graphs": "CUDA graphs", "compile": "torch.compile",
    "padded": "padded batch", "objective": "objective", "reference": "reference model", "prompt": "tokens of prompts",
    "stack": "versions of software", "fp8": "8-bit floats", "int8": "8-bit integers", "qat": "fake quantisation",
    "experts": "form of experts", "engine": "engine", "gpus": "GPUs", "nodes": "nodes", "node": "kind of node",
    "parallel": "what several GPUs do", "ddp": "what DDP knows of the graph",
    "reshard": "weights freed behind the forward pass", "shard_group": "GPUs that shards lie over",
    "fsdp_units": "what FSDP2 gathers together",
    "reduce_dtype": "dtype that gradients are reduced in", "sync_each_batch": "gradients exchanged each micro-batch",
    "offload": "in the host's memory", "overlap": "Megatron's messages beside compute",
    "tp": "GPUs that share every layer", "sequence_parallel": "tokens shared between them",
    "pp": "GPUs that have some blocks each", "pp_schedule": "order of micro-batches through them",
    "cp": "GPUs that share every sequence", "cp_rotate": "how keys and values get to them",
    "kernels": "kernels of norms and loss", "routing": "load of experts", "packing": "packed documents",
    "lengths": "lengths of documents", "group_by_length": "batches of similar length",
    "in_backward": "updates inside backward", "images": "images of a sample",
    "image_size": "height and width of an image, pixels",
}  # fmt: skip
ORIGINS = {
    "fitted": "measured on this device", "sibling": "measured on a like device", "class": "defaults of its class",
}  # fmt: skip
BLOCKS = {
    "gemm.bf16": "GEMMs in 16 bit", "gemm.fp32": "GEMMs in fp32", "attention": "attention",
    "attention_cudnn": "cuDNN's attention", "pointwise": "memory-bound kernels", "grouped": "products by expert",
    "gemm.early": "16-bit products under CUDA before 12.6", "attention_bf16": "attention in 16 bit",
}  # fmt: skip
SHEET = {  # figure of the datasheet -> (name, unit)
    "sm_count": ("streaming multiprocessors", ""), "clock_hz": ("highest clock", "Hz"),
    "memory_bytes": ("memory", "B"), "memory_bandwidth": ("memory bandwidth", "B/s"), "l2_bytes": ("L2 cache", "B"),
    "fp32_flops": ("fp32 peak", "FLOP/s"), "tf32_flops": ("tf32 peak, dense", "FLOP/s"),
    "fp16_flops": ("fp16 peak, dense", "FLOP/s"), "bf16_flops": ("bf16 peak, dense", "FLOP/s"),
    "fp8_flops": ("fp8 peak, dense", "FLOP/s"), "int8_flops": ("int8 peak, dense", "FLOP/s"),
    "board_power": ("power limit", "W"), "idle_power": ("power without work", "W"),
    "memory_energy": ("energy of a byte of DRAM", "pJ"), "flop_energy": ("energy of an fp32 FLOP", "pJ"),
    "mma_energy": ("energy of a 16-bit FLOP of the tensor cores", "pJ"),
    "usable_bytes": ("memory that CUDA offers", "B"), "bus_bandwidth": ("bus to the host, one way", "B/s"),
}  # fmt: skip
GENERAL = (
    "One optimizer step of PyTorch on one GPU or on each of several, eager unless said; no data loading.",
    "The calls are those of the transformers and peft programs that the model is checked against, call by call.",
    "Quality is outside the model: it says what a step costs, not what it learns.",
)


@dataclass(frozen=True)
class Link:
    """A reference that a reader may follow; the page itself never does."""

    url: str
    text: str


def linked(text: str) -> Link | str:
    """A link if a text is an address alone, else the text."""
    match = re.fullmatch(r"https?://(?:www\.)?(\S+)", text.strip())
    return Link(text.strip(), match[1].rstrip("/")) if match else text


def assumptions(predictions: list[Prediction], by: Host) -> dict[str, Any]:
    """The setup in words, and what a reader must know about it."""
    setup = predictions[0].setup
    values = {**setup.as_dict(), "stack": setup.stack.words}
    rows = [(OPTIONS[name], _told(value)) for name, value in values.items() if name != "image_size" or values["images"]]
    notes = [*GENERAL, *notes_by_method(predictions)]
    return {"assumptions": [*rows, ("host", by.name)], "notes": notes}


def _told(value: Any) -> str:
    """A value of the setup as a reader would write it."""
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def accuracy(on: DeviceProfile) -> dict[str, Any]:
    """The errors of the device's price models on rows that no fit saw."""
    rows = [
        [
            BLOCKS.get(block, block),
            ORIGINS[origin],
            *(units.percent(on.residuals[block][k], 1) for k in ("mean", "median", "p90")),
        ]
        for block, origin in on.fitted.items()
    ]
    note = (
        "Relative errors of kernel times on measurements that were left out of every fit. They make the 90 % "
        "intervals; what both methods share cancels in their ratio. perfmodel validate published compares whole steps."
    )
    heads = ["price model", "from", "mean error", "median", "90th percentile"]
    return {"accuracy": {"heads": heads, "rows": rows, "style": "left2"}, "accuracy_note": note}


def provenance(model: Model, predictions: list[Prediction], on: DeviceProfile, by: Host) -> dict[str, Any]:
    """Where every figure of the device comes from, and the model's, the methods' and the host's sources."""
    sheet = [
        [name, units.count(value * (1e12 if unit == "pJ" else 1.0), unit), linked(on.sources.get(key, "not given"))]
        for key, (name, unit) in SHEET.items()
        if (value := getattr(on.hardware, key)) is not None
    ]
    blocks = [
        {"name": f"Prices of {BLOCKS.get(block, block)}", "facts": _facts(facts, ORIGINS[on.fitted[block]])}
        for block, facts in on.provenance.items()
    ]
    return {
        "datasheet": {
            "heads": [f"datasheet of {on.name}", "figure", "source"],
            "rows": sheet,
            "style": "sources",
        },
        "blocks": blocks,
        "origins": _origins(model, predictions, by),
    }


def _facts(facts: Any, origin: str) -> list[tuple[str, Any]]:
    told: list[tuple[str, Any]] = [("from", origin)]
    names = {"rows_fitted": "rows fitted", "rows_left_out": "rows left out"}
    for key, value in facts.items():
        if value != "":
            told.append((names.get(key, key), f"{value:,}" if isinstance(value, int) else linked(str(value))))
    return told


def _origins(model: Model, predictions: list[Prediction], by: Host) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    if isinstance(model, (str, PathLike)):
        model = architectures.load(str(model))
    if isinstance(model, architectures.Config):
        found.append((f"model {model.name}", linked(str(model.values.get("_source", model.origin)))))
    for p in predictions:
        assert p.step is not None
        found.append((p.method, linked(p.step.method.source)))
    return [*found, (f"host {by.name}", linked(by.source or "not given"))]
