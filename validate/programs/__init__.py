"""Real programs of transformers: the class that a config stands for, and what one training step feeds it.

A family is one of transformers' auto classes with the inputs of a training step; each has a file of its own.
"""

from .choose import build, config_of, family_of, types
from .family import Family

__all__ = ["Family", "build", "config_of", "family_of", "types"]
