"""What DDP knows of the graph (`Setup.ddp`) as the tools tell it.

Sources: transformers' trainer.py (`_build_accelerator_args`), LLaMA-Factory's hparams/parser.py, Axolotl's
core/builders/causal.py and utils/config/__init__.py.
"""

from typing import Any

from .keys import Keys

TRL, FACTORY = "Transformers/TRL", "LLaMA-Factory"
ENDS = {  # what is answered where PyTorch ends in an error with what a file asks for (`recording.parallel.ddp_search`)
    "find-unused": "without DDP's search for parameters that have no gradient, which ends in an error with reentrant "
    "checkpoints (ddp_find_unused_parameters)",
    "static-graph": "without DDP's static graph, which ends in an error where micro-batches are accumulated "
    "(ddp_static_graph)",
}


def asked(tool: str, keys: Keys, setup: dict[str, Any]) -> str:
    """What a file tells DDP."""
    if keys.values.get("ddp_static_graph"):
        return "static-graph"
    return "find-unused" if _searches(tool, keys, setup) else "plain"


def that_runs(ddp: str, setup: dict[str, Any]) -> tuple[str, list[str]]:
    """The same of a setup of several GPUs, as far as it runs, and what is to be said where it does not."""
    ends = {
        "find-unused": setup.get("checkpoint") == "block-reentrant", "static-graph": setup.get("grad_accum", 1) > 1
    }  # fmt: skip
    if setup["parallel"] != "ddp":
        return "plain", []
    return ("plain", [ENDS[ddp]]) if ends.get(ddp) else (ddp, [])


def _searches(tool: str, keys: Keys, setup: dict[str, Any]) -> bool:
    """Whether it looks for parameters without a gradient: so by default where nothing is checkpointed.

    And beside peft's adapters, but for LLaMA-Factory's. Axolotl never asks for it by itself.
    """
    given = keys.values.get("ddp_find_unused_parameters")
    if given is not None or tool not in (TRL, FACTORY):
        return bool(given)
    adapts = keys.values.get("use_peft") if tool == TRL else keys.text("finetuning_type", "lora") == "lora"
    return tool == TRL if adapts else setup["checkpoint"] == "none"
