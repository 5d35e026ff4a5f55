"""Will LoRA make my training step faster, by how much, why, and what should I run instead?

>>> from perfmodel import predict
>>> p = predict("llama-3.2-3b", "lora:r=32,targets=q_proj+v_proj", device="l40s", batch=4, seq=210)
>>> p.trainable_params
9175040
"""

from typing import TYPE_CHECKING, Any

from .compare import Comparison, compare
from .errors import UserError
from .predict import Prediction, predict
from .setup import Setup
from .speedup import SpeedUp

if TYPE_CHECKING:
    from .advise import Advice, advise
    from .explanation import Explanation, explain
    from .modules import predict_module
    from .sweep import Sweep, sweep

_LATER = {  # name -> its file, imported on first use
    "Advice": "advise", "advise": "advise", "Explanation": "explanation", "explain": "explanation",
    "Sweep": "sweep", "predict_module": "modules", "sweep": "sweep",
}  # fmt: skip

__all__ = [
    "Advice", "Comparison", "Explanation", "Prediction", "Setup", "SpeedUp", "Sweep", "UserError", "advise", "compare",
    "explain", "predict", "predict_module", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return found
