"""Training configs of PEFT, Transformers, TRL, Axolotl and LLaMA-Factory as what `predict` takes."""

from .keys import NO_TRAINING
from .read import DIFFERS, Imported, read, read_alone
from .values import values_alone

__all__ = ["DIFFERS", "NO_TRAINING", "Imported", "read", "read_alone", "values_alone"]
