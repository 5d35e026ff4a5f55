"""What several processes of a training run share, as its Trainer and its launcher have it.

Sources: transformers' trainer.py (`_build_accelerator_args`) and training_args.py (5.24), accelerate's
utils/launch.py (`setup_fsdp_env`) and parallelism_config.py (1.16).
"""

import os
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..imports import Imported, ddp
from ..imports.mesh import CUT_WHEN_LOADED, MESH, OF_MESH

FSDP, FSDP_ASKED = "FSDP_", "ACCELERATE_USE_FSDP"  # in the environment: accelerate's options, and whether they count
ON_NODE = "LOCAL_WORLD_SIZE"  # processes on this node (torchrun)
TRL = "trl."  # the package whose trainers keep adapters and checkpoints as they want them
REPLICATED = "one GPU, not nn.DataParallel over {}"


def keys_of_launcher(arguments: Any) -> dict[str, Any]:
    """What a launcher or an object decides, as keys of a training config."""
    given: dict[str, Any] = {}
    mixed = getattr(arguments, "mixed_precision", "no")
    if mixed in ("bf16", "fp16"):
        given[mixed] = True
    if (plugin := getattr(arguments, "deepspeed_plugin", None)) is not None:
        given["deepspeed"] = plugin.deepspeed_config
    if os.environ.get(FSDP_ASKED) == "true" and not arguments.fsdp:
        found = {k.removeprefix(FSDP).lower(): v for k, v in os.environ.items() if k.startswith(FSDP)}
        offloads = {"cpu_offload": found.pop("offload_params", "false")}  # as the arguments call it
        given |= {"fsdp": True, "fsdp_config": {"version": 1, "auto_wrap_policy": "NO_WRAP", **found, **offloads}}
    if (mesh := getattr(arguments, MESH, None)) is not None:
        sizes = {name: getattr(mesh, name, None) for name in (*OF_MESH, "cp_backend")}
        sizes["cp_comm_strategy"] = getattr(getattr(mesh, "cp_handler", None), "cp_comm_strategy", None)
        given[MESH] = {name: value for name, value in sizes.items() if value is not None}
    return given


def on_its_processes(found: Imported, arguments: Any, model: Any, method: str) -> Imported:
    """What the arguments of a run say of all its processes, in the place of one.

    Args:
        method: what the model trains, as `predict` takes it.

    Raises:
        UserError: forms that contradict each other, or that are not modelled.
    """
    by_trl = any(kind.__module__.startswith(TRL) for kind in type(arguments).__mro__)
    wrapped = hasattr(model, "get_base_model")  # in a class that is not transformers' own
    form, gpus = found.asks(), int(arguments.world_size)
    if (tp := int(getattr(model, "tp_size", None) or 1)) > 1:
        form = replace(form, tp=tp, on_mesh=tuple(words for words in form.on_mesh if words != CUT_WHEN_LOADED))
    graph = "static-graph" if getattr(arguments, "ddp_static_graph", None) else "plain"
    if graph == "plain" and ddp.by_trainer(getattr(arguments, ddp.ASKED, None), wrapped, found.setup):
        graph = "find-unused"
    own = replace(found, ddp=graph, method=method if by_trl else None)
    several = own.on_several(form).over((gpus,))
    on_node = int(os.environ.get(ON_NODE, gpus))
    if gpus % on_node:
        raise UserError(f"{ON_NODE} {on_node} does not divide the {gpus} processes")
    return replace(several, setup={**several.setup, "gpus": gpus, "nodes": gpus // on_node})
