"""Real programs: a model of transformers, a method on it, and the optimizer, as one trains them in PyTorch.

`choose` finds the class that a config stands for. A family is one of transformers' auto classes with the inputs of a
training step; each has a file of its own. `models` and `tuners_of_peft` put a method of the tape on a model through
peft, `references` does in plain torch what peft lacks, `adapt` takes any model or adapter_config.json, `stacks` finds
the blocks that run alike, `updates` is the optimizer.
"""

from .choose import build_model, config_of, family_of, notes_of, types
from .family import Family

__all__ = ["Family", "build_model", "config_of", "family_of", "notes_of", "types"]
