"""Real stages of a pipeline on their mesh.

The model is cut as torchtitan cuts one: the blocks of other stages are removed, so are the embedding, the last norm and
the head where another stage has them.
"""

from typing import Any

import torch
import torch.testing._internal.distributed.fake_pg  # whose collectives do nothing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.architectures.runs import Stage
from perfmodel.setup import Setup
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES

from .cases import Case
from .parallel import alone, checkpointed


class StageModule(torch.nn.Module):
    """What is left of a causal model on a stage: ids or hidden states in, hidden states or logits out."""

    def __init__(self, model: Any, stage: Stage) -> None:
        super().__init__()
        base, self.stage = model.model, stage
        base.layers = base.layers[stage.blocks.start : stage.blocks.stop]
        base.config.num_hidden_layers = len(stage.blocks)
        if not stage.first:
            base.embed_tokens = None
        if not stage.last:
            base.norm = torch.nn.Identity()
        self.base, self.head = base, model.lm_head if stage.last else torch.nn.Identity()

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One micro-batch."""
        given = {"input_ids": x} if self.stage.first else {"inputs_embeds": x}
        given |= {} if position_ids is None else {"position_ids": position_ids}
        out = self.base(**given, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.head(out)
        return logits


def stage_module(case: Case, stage: Stage, mesh: DeviceMesh) -> StageModule:
    """A stage of the model with the method on it."""
    architecture = from_config(case.config)
    method = methods.parse(case.method).bind(architecture)
    model = alone(case.config, case.setup, architecture, method, mesh)
    model.train()
    checkpointed(model, case.setup)
    module = StageModule(model.get_base_model() if hasattr(model, "get_base_model") else model, stage)
    if case.setup.amp and not (case.setup.parallel == "fsdp2" and case.setup.replicas * case.setup.cp > 1):
        module.forward = torch.autocast("cpu", TORCH_DTYPES[case.setup.amp])(module.forward)  # type: ignore[method-assign]
    return module


def mesh_of_stages(setup: Setup) -> DeviceMesh:
    """Stages by replicas, groups of them and those that share layers."""
    ranks = setup.replicas * setup.cp
    group = ranks if setup.shard_group is None else min(ranks, setup.shard_group)
    several = {"dp_replicate": ranks // group, "dp_shard": group, "tp": setup.tp}
    sizes = {"pp": setup.pp, **{name: n for name, n in several.items() if n > 1}}
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def shard_stages(modules: list[StageModule], setup: Setup, mesh: DeviceMesh) -> None:
    """Shards of each stage over its replicas, cut into units as torchtitan does it (distributed/fsdp.py)."""
    names = mesh.mesh_dim_names or ()
    over = mesh[tuple(name for name in names if name.startswith("dp"))]
    amp = {"param_dtype": TORCH_DTYPES[setup.amp], "reduce_dtype": torch.float32} if setup.amp else {}
    reduced = {"reduce_dtype": TORCH_DTYPES[setup.reduce_dtype]} if setup.reduce_dtype else {}
    precision = MixedPrecisionPolicy(**(amp | reduced), cast_forward_inputs=False)
    for module in modules:
        base, stage = module.base, module.stage
        for p in module.parameters():
            if p.requires_grad and amp:
                p.data = p.data.float()
        units = [*([base.embed_tokens] if stage.first else []), *base.layers]
        for unit in (*units, *([[base.norm, module.head]] if stage.last else [])):
            fully_shard(unit, mesh=over, mp_policy=precision, reshard_after_forward=setup.reshard)
        fully_shard(module, mesh=over, mp_policy=precision)
