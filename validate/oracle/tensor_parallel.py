"""A real model cut over tensor-parallel ranks, as transformers' `tp_plan` and peft do it.

PyTorch's optimizers and clipping over lists refuse a mixture of plain and cut parameters, which these models have: they
run parameter by parameter, and without clipping.
"""

import re
from types import SimpleNamespace
from typing import Any

from perfmodel.setup import Setup

HEAD = {"lm_head": "colwise_gather_output"}  # `_tp_plan` of the classes with a language model's head
ROWS = re.compile(r".*(o_proj|down_proj)\.lora_A\.default")


def cut_model(model: Any, setup: Setup, mesh: Any) -> Any:
    """The base model, a part of whose layers lies on this rank of a mesh of those that share them."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    styles = {**{f"model.{name}": style for name, style in model.config.base_model_tp_plan.items()}, **HEAD}
    found = {name: styles[style] for name, _ in model.named_modules() if (style := _of_any_block(name)) in styles}
    modules = dict(model.named_modules())
    plan = {f"{name}.{p}": how for name, how in found.items() for p, _ in modules[name].named_parameters(recurse=False)}
    model._device_mesh = mesh
    model._tp_plan = styles  # what peft cuts adapters by
    model.config.distributed_config = SimpleNamespace(tp_size=setup.tp)
    return apply_tensor_parallelism(model, mesh, {**plan, **found})


def mend_adapters(model: Any, setup: Setup) -> Any:
    """peft 0.21 gives an adapter's first weight the width of a rank's input; transformers 5.24 expects the whole's."""
    for name, module in model.named_modules():
        if ROWS.fullmatch(name):
            module.in_features *= setup.tp
    return model


def _of_any_block(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
