"""Sequence parallel's reference beside the program that it stands for: NeMo Automodel's, where that is installed."""

from collections import Counter

import pytest

pytest.importorskip("peft")


from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.methods.lora import Lora
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models, updates
from validate.oracle import parallel
from validate.oracle.cases import SMALL, Case


@pytest.mark.parametrize("method", ["full", "lora:r=4,targets=q_proj+o_proj+up_proj+down_proj"])
def test_shared_tokens_are_those_of_nemo_automodel(method: str) -> None:
    """The program that is compared is what people run, where it is installed: but for a copy of the ids."""
    plans = pytest.importorskip("nemo_automodel.components.distributed.optimized_tp_plans")
    styles = pytest.importorskip("nemo_automodel.components.distributed.parallel_styles")
    lora = pytest.importorskip("nemo_automodel.components._peft.lora")
    setup = Setup(batch=2, seq=16, gpus=2, tp=2, sequence_parallel=True, optimizer="adamw-foreach", grad_accum=2)
    config = Config({**SMALL["llama"], "tie_word_embeddings": False}, "llama", "llama")
    bound = methods.parse(method).bind(from_config(config))
    with parallel.process_group("tp", 2):
        ours = parallel.traced_rank(Case(config, method, setup), setup.optimizer)
        model = models.build_model(config, setup, device="cpu")
        if isinstance(bound, Lora):
            targets = [f"*.{target}" for target in bound.targets]
            lora.apply_lora_to_linear_modules(model, lora.PeftConfig(target_modules=targets, dim=4, alpha=8))
        trains = {name: p.requires_grad for name, p in model.named_parameters()}
        head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        plan = {**plans._parallelize_llama(model, True), "lm_head": head}
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {name: styles.translate_to_lora(style) for name, style in plan.items()})
        for name, p in model.named_parameters():
            p.requires_grad = trains[name]
        theirs = parallel.trace_rank(model.train(), setup, updates.make(model, setup.optimizer, bound))
    assert theirs.collectives == ours.collectives
    for phase, calls in theirs.trace.calls.items():
        more = Counter(calls)
        more.subtract(ours.trace.calls[phase])
        assert {call[0]: n for call, n in more.items() if n} == ({"clone": 2} if phase == "forward" else {})
