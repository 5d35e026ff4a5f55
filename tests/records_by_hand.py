"""Records written by hand: each is made from a prediction, so that a perfect model is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from perfmodel.architectures import Config
from perfmodel.devices.host import Host
from perfmodel.prediction.predict import predict
from perfmodel.setup import Setup
from validate.measuring import records
from validate.measuring.cells import Cell

TINY = Config(
    {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False,
    },
    "by hand", "tiny",
)  # fmt: skip
DEVICE = {"cpu": "cpu-epyc-genoa-2c", "cuda": "l4"}
METHODS = ("full", "lora:r=4", "ia3")
Record = dict[str, Any]
Change = Callable[[list[Record]], object]


def environment(device: str = "cpu") -> Record:
    """A machine of that kind."""
    found: Record = {"kind": "environment", "id": "here", "device": device, "host": {"cpu": "a CPU"}}
    return {**found, "gpu": {"name": "NVIDIA L4"}} if device == "cuda" else found


def visit(cell: Cell, device: str = "cpu", host: str | Host = "default") -> Record:
    """What a perfectly predicted visit leaves behind: two timed steps, as many calls and bytes as predicted."""
    p = predict(cell.config, cell.method, cell.setup, DEVICE[device], host=host)
    assert p.step is not None
    calls: dict[str, dict[str, int]] = {"forward": {}, "backward": {}, "optimizer": {}}
    for part, op, times in p.step.ops():
        if not op.view:
            calls[part.phase][op.name] = calls[part.phase].get(op.name, 0) + times
    seconds = {name: [float(p.time.phases[name])] * 2 for name in calls} | {"step": [float(p.time.phases["total"])] * 2}
    found: Record = {
        "kind": "visit", "id": cell.id, "round": 0, "environment": "here", "cell": cell.as_dict(), "status": "ok",
        "seconds": seconds, "memory": {"peak": int(p.memory.peak)}, "calls": calls,
    }  # fmt: skip
    return found


def written(path: Path, change: Change = lambda visits: None, device: str = "cpu") -> Path:
    """A file of records of tiny steps, changed by `change`."""
    cells = [Cell(TINY, method, Setup(batch=2, seq=16, dtype="fp32")) for method in METHODS]
    visits = [visit(cell, device) for cell in cells]
    change(visits)
    for record in (environment(device), *visits):
        records.append_records(path, record)
    return path
