"""Whether DDP looks in every step for parameters that have no gradient (`find_unused_parameters`), by tool."""

from typing import Any

from .axolotl_kernels import GEMMA_4
from .keys import Keys

ASKED = "ddp_find_unused_parameters"


def by_trainer(keys: Keys, wrapped: bool, setup: dict[str, Any]) -> bool:
    """transformers' default: where nothing is checkpointed, and always in another class (`_build_accelerator_args`).

    Args:
        wrapped: whether the model is in such a class, as peft's.
    """
    given = keys.values.get(ASKED)
    return bool(given) if given is not None else wrapped or setup["checkpoint"] == "none"


def in_trl(keys: Keys, setup: dict[str, Any]) -> bool:
    """As the Trainer."""
    return by_trainer(keys, bool(keys.values.get("use_peft")), setup)


def in_llama_factory(keys: Keys, setup: dict[str, Any]) -> bool:
    """As the Trainer, but not beside LoRA unless the file asks for it (hparams/parser.py).

    A model with a value head is as little transformers' own as one with adapters (model/loader.py).
    """
    kind = keys.text("finetuning_type", "lora")
    if kind == "lora":
        return bool(keys.values.get(ASKED))
    return by_trainer(keys, kind == "oft" or keys.text("stage") == "rm", setup)


def in_axolotl(keys: Keys, setup: dict[str, Any]) -> bool:
    """Only where the file asks for it, and with Gemma 4 (core/builders/causal.py, `normalize_config`).

    The builder of `rl` hands the key to no trainer, so that transformers' default holds (core/builders/rl.py).
    """
    if keys.values.get("rl"):
        return by_trainer(keys.but(**{ASKED: None}), bool(keys.values.get("adapter")), setup)
    given = keys.values.get(ASKED)
    if given is None and GEMMA_4.search(str(keys.values.get("base_model"))):
        return keys.values.get("activation_offloading") is not True
    return bool(given)
