"""Will LoRA make my training step faster, by how much, why, and what should I run instead?

>>> from perfmodel import predict
>>> p = predict("llama-3.2-3b", "lora:r=32,targets=q_proj+v_proj", device="l40s", batch=4, seq=210)
>>> p.trainable_params
9175040
"""

from .advise import Advice, advise
from .compare import Comparison, SpeedUp, compare
from .errors import UserError
from .predict import Prediction, predict
from .setup import Setup
from .sweep import Sweep, sweep

__all__ = [
    "Advice",
    "Comparison",
    "Prediction",
    "Setup",
    "SpeedUp",
    "Sweep",
    "UserError",
    "advise",
    "compare",
    "predict",
    "sweep",
]
