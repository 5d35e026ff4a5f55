"""What of Megatron-Core's program needs a GPU, and what stands for it on a CPU. Only for a process of its own.

PyTorch's and Megatron-Core's modules are changed for good: whatever asks for CUDA gets the CPU, what `torch.compile` or
another package makes one kernel of is noted as one, and Transformer Engine's modules are those of `engine`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from . import engine
from .recorder import KernelRecorder, as_kernel

CPU = torch.device("cpu")
STATE = torch.zeros(16, dtype=torch.uint8)  # of random numbers
QUIET = ("manual_seed", "synchronize", "empty_cache", "set_rng_state", "set_device")


class OnCpu(TorchFunctionMode):
    """Whoever asks for a tensor on a GPU gets one here; its type is told as a GPU's, as by `Tensor.type`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        out = func(*args, **kwargs)
        return out.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(out, str) else out


def without_cuda() -> OnCpu:
    """Answer for a GPU; to be called before Megatron-Core is imported, which decides by what it finds."""
    torch.compile, dist.all_gather_object = _compiled, _gathered_objects  # type: ignore[assignment]
    anything: dict[str, Any] = {"current_device": lambda: CPU, "get_device_capability": lambda *_: (9, 0)}
    anything |= dict.fromkeys(QUIET, lambda *_, **__: None)
    for name, value in anything.items():
        setattr(torch.cuda, name, value)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = _no_state
    module: Any = ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = engine.weight_product
    sys.modules[module.__name__] = module
    return OnCpu()


def _no_state(*_: Any, **__: Any) -> torch.Tensor:
    return STATE


def _gathered_objects(objects: list[Any], mine: Any, group: Any = None) -> None:
    objects[:] = [mine] * len(objects)


def _compiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """`jit_fuser`: one kernel, whatever the compiler makes of it."""
    if function is None:
        return _compiled

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [t for x in args for t in (x if isinstance(x, tuple) else (x,)) if isinstance(t, torch.Tensor)]
        return as_kernel(f"jit_fuser::{function.__name__}", given, lambda: function(*args, **kwargs))

    return run


def engine_parts() -> Callable[..., Any]:
    """Put Transformer Engine's parts into Megatron-Core; returns the layer spec of a GPT (whether it norms heads)."""
    import megatron.core.extensions.transformer_engine as extensions
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.identity_op import IdentityOp

    for name in dir(extensions):  # whose bases are stand-ins of Megatron-Core's own, and every object's class
        if name.startswith("TE") and "Linear" in name:
            setattr(extensions, name, type(name, (), {}))
    extensions.TELayerNormColumnParallelLinear = engine.EngineNormLinear
    extensions.TERowParallelLinear = engine.EngineRowLinear
    layers.HAVE_TE, layers.get_dummy_wgrad = True, engine.dummy_gradient
    rope_utils.fused_apply_rotary_pos_emb = _rotary
    transformer_block.LayerNormImpl = engine.EngineNorm
    random._set_cuda_rng_state, random._get_cuda_rng_state = lambda *_, **__: None, _no_state
    random.CudaRNGStatesTracker.fork = _fork

    def spec(head_norms: bool) -> Any:
        made = get_gpt_layer_local_spec(normalization="RMSNorm")
        parts, attention = made.submodules, made.submodules.self_attention.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.mlp.submodules.linear_fc1 = attention.linear_qkv = engine.EngineNormLinear
        parts.mlp.submodules.linear_fc2 = attention.linear_proj = engine.EngineRowLinear
        attention.core_attention = engine.EngineAttention
        if head_norms:
            attention.q_layernorm = attention.k_layernorm = engine.EngineNorm
        return made

    return spec


def _rotary(x: torch.Tensor, angles: torch.Tensor, **_: Any) -> Any:
    return engine.FusedRotary.apply(x, angles)  # type: ignore[no-untyped-call]


@contextmanager
def _fork(self: Any, name: str = "") -> Iterator[None]:
    yield


def lists_of_apex() -> None:
    """The norm of all gradients and their scaling, each one kernel for all; AdamW one for a group."""
    from megatron.core.optimizer import clip_grads, optimizer

    def norm(chunk: int, flag: Any, lists: Any, per_tensor: bool, *_: Any) -> Any:
        def run() -> Any:
            return torch.linalg.vector_norm(torch.stack([t.norm() for t in lists[0]])).reshape(1)

        return as_kernel("_foreach_norm.Scalar", lists[0], run), None

    def scale(chunk: int, flag: Any, lists: Any, factor: Any) -> None:
        def run() -> None:
            for source, target in zip(*lists, strict=True):
                target.copy_(source * factor)

        as_kernel("_foreach_mul_.Tensor", lists[0], run, into=lists[1])

    clip_grads.l2_norm_impl = norm
    clip_grads.multi_tensor_scale_impl = optimizer.multi_tensor_scale_impl = scale
    plain: Any = torch.optim.AdamW
    fused = {"__init__": lambda self, *args, **options: plain.__init__(self, *args, fused=True, **options)}
    torch.optim.AdamW = type("AdamW", (plain,), fused)  # type: ignore[assignment,misc]


def bridge() -> Any:
    """Megatron-Bridge's LoRA, which imports Transformer Engine, and asks for its version.

    Raises:
        ImportError: megatron-bridge is not installed.
    """
    import megatron

    torch_part: Any = ModuleType("transformer_engine.pytorch")
    for name in ("Linear", "LayerNormLinear"):
        setattr(torch_part, name, type(name, (), {}))
    torch_part.ops = type("ops", (), {"Sequential": type("Sequential", (), {})})
    whole: Any = ModuleType("transformer_engine")
    whole.pytorch = torch_part
    sys.modules |= {whole.__name__: whole, torch_part.__name__: torch_part}
    found = find_spec("megatron.bridge")
    if found is None:
        raise ImportError("megatron-bridge is not installed")
    package: Any = ModuleType("megatron.bridge")  # without what it imports at first, all its models
    package.__path__ = found.submodule_search_locations
    sys.modules[package.__name__] = megatron.bridge = package
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.lora import LoRA

    utils.version = lambda package: "2.11.0"
    return LoRA


def note_waits(recorder: KernelRecorder) -> None:
    """Have a recorder know when compute waits for collectives; before Megatron-Core is imported, as it takes a copy."""
    c10d: Any = dist.distributed_c10d

    class Work:
        def __init__(self, work: Any, ranks: int) -> None:
            self.work, self.ranks = work, ranks

        def wait(self) -> Any:
            recorder.wait(self.ranks)
            return self.work.wait()

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, group: Any = None, async_op: bool = False, **options: Any) -> Any:
            before, ranks = len(recorder.collectives), dist.get_world_size(group)
            work = function(*args, group=group, async_op=async_op, **options)
            if not async_op and len(recorder.collectives) > before:  # under a manager it is only noted down
                recorder.wait(ranks)
            return work if work is None else Work(work, ranks)

        return run

    for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(dist, name, noting(getattr(c10d, name)))

    @contextmanager
    def coalescing(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        with c10d._coalescing_manager(group, device, async_ops) as manager:
            yield manager
        if async_ops:
            manager.wait = Work(SimpleNamespace(wait=manager.wait), group.size()).wait
        else:
            recorder.wait(group.size())

    dist._coalescing_manager = coalescing  # type: ignore[attr-defined]
