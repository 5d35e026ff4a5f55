"""Training configs of PEFT, Transformers, TRL, Axolotl and LLaMA-Factory as what `predict` takes."""

from .read import Imported, read

__all__ = ["Imported", "read"]
