"""What DDP knows of the graph (`Setup.ddp`) as the tools tell it.

Sources: transformers' trainer.py (`_build_accelerator_args`), LLaMA-Factory's hparams/parser.py, Axolotl's
core/builders/{causal,rl}.py and utils/config/__init__.py.
"""

from typing import Any

from .axolotl_kernels import GEMMA_4
from .keys import Keys

ASKED = "ddp_find_unused_parameters"
TRL, FACTORY = "Transformers/TRL", "LLaMA-Factory"
ENDS = {  # what is answered where PyTorch ends in an error with what a file asks for (`recording.parallel.ddp_search`)
    "find-unused": "without DDP's search for parameters that have no gradient, which ends in an error with reentrant "
    "checkpoints (ddp_find_unused_parameters)",
    "static-graph": "without DDP's static graph, which ends in an error where micro-batches are accumulated "
    "(ddp_static_graph)",
}


def asked(tool: str, keys: Keys, setup: dict[str, Any]) -> str:
    """What a file tells DDP: nothing where TRL's PPO makes its own `Accelerator` (experimental/ppo/ppo_trainer.py)."""
    if setup.get("objective") == "ppo":
        return "plain"
    if keys.values.get("ddp_static_graph"):
        return "static-graph"
    searches = tool in SEARCHES and SEARCHES[tool](keys, setup)
    return "find-unused" if searches else "plain"


def that_runs(ddp: str, setup: dict[str, Any]) -> tuple[str, list[str]]:
    """The same of a setup of several GPUs, as far as it runs, and what is to be said where it does not."""
    ends = {
        "find-unused": setup.get("checkpoint") == "block-reentrant", "static-graph": setup.get("grad_accum", 1) > 1
    }  # fmt: skip
    if setup["parallel"] != "ddp":
        return "plain", []
    return ("plain", [ENDS[ddp]]) if ends.get(ddp) else (ddp, [])


def by_trainer(given: Any, wrapped: bool, setup: dict[str, Any]) -> bool:
    """Whether DDP searches: by transformers' default where nothing is checkpointed, and always in another class.

    Args:
        given: what the arguments say (`ddp_find_unused_parameters`), None if they say nothing.
        wrapped: whether the model is in such a class, as peft's.
    """
    return bool(given) if given is not None else wrapped or setup["checkpoint"] == "none"


def _in_trl(keys: Keys, setup: dict[str, Any]) -> bool:
    """As the Trainer."""
    return by_trainer(keys.values.get(ASKED), bool(keys.values.get("use_peft")), setup)


def _in_llama_factory(keys: Keys, setup: dict[str, Any]) -> bool:
    """As the Trainer, but not beside LoRA unless the file asks for it (hparams/parser.py).

    A model with a value head is as little transformers' own as one with adapters (model/loader.py).
    """
    kind = keys.text("finetuning_type", "lora")
    if kind == "lora":
        return bool(keys.values.get(ASKED))
    return by_trainer(keys.values.get(ASKED), kind == "oft" or keys.text("stage") == "rm", setup)


def _in_axolotl(keys: Keys, setup: dict[str, Any]) -> bool:
    """Only where the file asks for it, and with Gemma 4 (core/builders/causal.py, `normalize_config`).

    The builder of `rl` hands the key to no trainer, so that transformers' default holds (core/builders/rl.py).
    """
    if keys.values.get("rl"):
        return by_trainer(None, bool(keys.values.get("adapter")), setup)
    given = keys.values.get(ASKED)
    if given is None and GEMMA_4.search(str(keys.values.get("base_model"))):
        return keys.values.get("activation_offloading") is not True
    return bool(given)


SEARCHES = {"Axolotl": _in_axolotl, FACTORY: _in_llama_factory, TRL: _in_trl}
