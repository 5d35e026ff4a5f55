"""A real model cut over tensor-parallel ranks, as transformers' `tp_plan` and peft do it.

PyTorch's optimizers and clipping over lists refuse a mixture of plain and cut parameters, which these models have: they
run parameter by parameter, and without clipping.
"""

import re
from typing import Any

from perfmodel.setup import Setup

ROWS = re.compile(r".*(o_proj|down_proj)\.lora_A\.default")


def cut_model(model: Any, setup: Setup, mesh: Any) -> Any:
    """The base model, a part of whose layers lies on this rank of a mesh of those that share them.

    A head that shares the embedding's weight does so again once both are cut, as when a model is loaded.
    """
    from torch.nn import Parameter
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is words.weight
    if tied:
        head.weight = Parameter(head.weight.detach().clone())
    model._device_mesh, model._tp_size = mesh, setup.tp
    model.config.distributed_config = config = DistributedConfig(tp_size=setup.tp)
    plan, _, _ = model._resolve_parallel_plans(config)
    model = apply_tensor_parallelism(model, mesh, plan)
    if tied:
        head.weight = words.weight
    return model


def mend_adapters(model: Any, setup: Setup) -> Any:
    """peft 0.21 gives an adapter's first weight the width of a rank's input; transformers 5.24 expects the whole's."""
    for name, module in model.named_modules():
        if ROWS.fullmatch(name):
            module.in_features *= setup.tp
    return model
