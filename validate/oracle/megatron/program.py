"""Megatron-Core's own program of a rank, a step of it recorded: `real_rank` runs it in a process of its own.

Real are GPTModel, Float16Module, DistributedDataParallel, the schedule, the finalizing of gradients, the optimizers,
and Megatron-Bridge's LoRA; what needs a GPU is in `stand_ins`. The process group is torch's fake one, so what a rank
gets from others is wrong; nothing of the program depends on it but whether gradients are clipped, which they are.
"""

import gc
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.setup import Setup
from perfmodel.tracing.trace import Signature

from .. import parallel
from ..cases import Case
from . import stand_ins
from .recorder import KernelRecorder, Waited

BUCKET = 20_000  # elements of a bucket of gradients, at least: so few that a small model has several
SETUP = (
    "batch", "seq", "gpus", "tp", "sequence_parallel", "parallel", "grad_accum", "checkpoint", "overlap",
)  # fmt: skip
LAST_LINES = 3000  # characters of what a program that failed says


@dataclass
class RealRank:
    """What a rank did in a step.

    Attributes:
        calls: by phase.
        collectives, waits: in their order.
        multiplied: phase and FLOPs of each product, in their order.
        peak: live bytes at the most.
        total, trainable: parameters of the model on all ranks that share layers.
    """

    calls: dict[str, Counter[Signature]]
    collectives: list[parallel.Collective]
    waits: list[Waited]
    multiplied: list[tuple[str, int]]
    peak: int
    total: int
    trainable: int


def real_rank(case: Case) -> RealRank:
    """Run the program of a case's first rank in a fresh process.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    setup = {name: getattr(case.setup, name) for name in SETUP}
    asked = {"config": case.config.values, "method": case.method, "setup": setup}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{asked}: {done.stderr[-LAST_LINES:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return RealRank(
        calls={phase: Counter({_frozen(call): n for call, n in calls}) for phase, calls in found.pop("calls").items()},
        collectives=[parallel.Collective(*c) for c in found.pop("collectives")],
        waits=[Waited(*w) for w in found.pop("waits")],
        multiplied=[(phase, flops) for phase, flops in found.pop("multiplied")],
        **found,
    )


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, list) else x


def recorded_rank(case: Case) -> RealRank:
    """Run the second step of a case's program here, for which the process must be a fresh one."""
    if any(name.startswith("megatron.") for name in sys.modules):
        raise RuntimeError("Megatron-Core is imported already: it would not see what stands for a GPU")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    recorder = KernelRecorder()
    stand_ins.note_waits(recorder)
    with stand_ins.without_cuda(), parallel.process_group("megatron", case.setup.gpus):
        model, step = _program(case, recorder)
        step()
        if model.use_forward_hook:  # the first step needs no weights of others
            model.enable_forward_pre_hook()
        there = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
        recorder.hold(t for t in there if t.device.type == "cpu" and t.dtype != torch.uint8)  # states of random numbers
        recorder.recording = True
        step()
        return _found(recorder, model, case.setup.tp)


def _found(recorder: KernelRecorder, model: Any, ranks: int) -> RealRank:
    numels = [
        (p.numel() * (ranks if getattr(p, "tensor_model_parallel", False) else 1), p.requires_grad)
        for p in model.parameters()
    ]
    return RealRank(
        calls=recorder.trace.calls, collectives=recorder.collectives, waits=recorder.waits,
        multiplied=recorder.multiplied, peak=recorder.trace.peak, total=sum(n for n, _ in numels),
        trainable=sum(n for n, trains in numels if trains),
    )  # fmt: skip


def _program(case: Case, recorder: KernelRecorder) -> tuple[Any, Callable[[], None]]:
    """The model under DistributedDataParallel, and a step."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.module import Float16Module

    setup = case.setup
    spec = stand_ins.engine_parts()
    stand_ins.lists_of_apex()
    parallel_state.initialize_model_parallel(setup.tp, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config, model = _model(case, spec)
    distributed = setup.parallel == "zero1"
    gathers = setup.overlap and distributed
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=setup.overlap, overlap_param_gather=gathers,
        use_distributed_optimizer=distributed, check_for_nan_in_grad=True, bucket_size=BUCKET,
    )  # fmt: skip
    model = DistributedDataParallel(config, options, Float16Module(config, model))
    options = OptimizerConfig(
        optimizer="adam", lr=1e-5, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16, clip_grad=1e-6,
        use_distributed_optimizer=distributed, overlap_param_gather=gathers,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(options, [model], use_gloo_process_groups=False)
    config.no_sync_func, config.grad_scale_func = model.no_sync if setup.overlap else None, optimizer.scale_loss
    config.finalize_model_grads_func = _in_phase(recorder, "backward", finalize_model_grads)
    schedules.forward_step = _in_phase(recorder, "forward", schedules.forward_step)
    schedules.backward_step = _in_phase(recorder, "backward", schedules.backward_step)
    forward = _forward_step(case)
    if model.use_forward_hook:
        model.disable_forward_pre_hook(param_sync=False)

    def step() -> None:
        with recorder.observe("optimizer"):
            model.zero_grad_buffer()
            optimizer.zero_grad()
        schedules.forward_backward_no_pipelining(
            forward_step_func=forward, data_iterator=iter(()), model=[model], num_microbatches=setup.grad_accum,
            seq_length=setup.seq, micro_batch_size=setup.batch,
        )  # fmt: skip
        with recorder.observe("optimizer"):
            optimizer.step()

    return model, step


def _in_phase(recorder: KernelRecorder, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        with recorder.observe(phase):
            return function(*args, **options)

    return run


def _model(case: Case, spec: Callable[..., Any]) -> tuple[Any, Any]:
    """The config of a GPT and the GPT of a rank, as Megatron-Bridge makes it of a config of transformers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
    from megatron.core.transformer.transformer_config import TransformerConfig

    a: Any = from_config(case.config)
    recomputes = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=a.layers, hidden_size=a.hidden, ffn_hidden_size=a.intermediate, num_attention_heads=a.heads,
        num_query_groups=a.kv_heads, kv_channels=a.head_dim, add_qkv_bias=a.qkv_bias, qk_layernorm=a.head_norms,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, tensor_model_parallel_size=case.setup.tp,
        sequence_parallel=case.setup.sequence_parallel, use_cpu_initialization=True, gradient_accumulation_fusion=True,
        bias_activation_fusion=True, bias_dropout_fusion=True, apply_rope_fusion=True, cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native", deallocate_pipeline_outputs=True,
        **(recomputes if case.setup.checkpoint != "none" else {}),
    )  # fmt: skip
    model = GPTModel(
        config, spec(a.head_norms), a.vocab, case.setup.seq, position_embedding_type="rope",
        share_embeddings_and_output_weights=a.tied,
    )  # fmt: skip
    method: Any = methods.parse(case.method)
    if method.name == "full":
        return config, model
    targets = {"target_modules": list(method.targets)} if method.targets else {}
    model = stand_ins.bridge()(dim=method.r, alpha=2 * method.r, **targets)([model], training=True)[0]
    for name, p in model.named_parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(p)
        if "linear_out" in name:
            p.data.fill_(0.01)  # as after some steps: of zeros no gradient would reach the other half
    return config, model


def _forward_step(case: Case) -> Callable[..., Any]:
    """`forward_step` of Megatron-Bridge (training/gpt_step.py), with its masked loss of the next tokens."""
    ids = torch.zeros(case.setup.shape, dtype=torch.int64)
    mask, places = torch.ones(case.setup.shape), torch.arange(int(case.setup.seq)).expand(case.setup.shape)

    def loss_of(output: torch.Tensor) -> Any:
        loss = torch.sum(output.view(-1).float() * mask.view(-1).float())
        tokens = mask.view(-1).float().sum().clone().detach().to(torch.int)
        return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}

    def forward(data: Iterator[Any], model: Any) -> Any:
        return model(input_ids=ids, position_ids=places, attention_mask=None, labels=ids), loss_of

    return forward


def _main(asked: dict[str, Any]) -> None:
    """Run what was asked for, and print what was found."""
    config = Config(asked["config"], "megatron", "megatron")
    found = recorded_rank(Case(config, asked["method"], Setup(**asked["setup"])))
    calls = {phase: list(calls.items()) for phase, calls in found.calls.items()}
    print("\n" + json.dumps({**vars(found), "calls": calls}))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
