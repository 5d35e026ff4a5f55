"""What `torch.compile` makes of a real model for a GPU, found out without one.

Dynamo, AOTAutograd and Inductor's passes run on the CPU, on a small real model. Where Inductor would lower a graph, the
tensors of the graph are declared to be CUDA's, and its scheduler decides for Triton what is fused; before any code is
written, the kernels are read off and the graph is run as it is. Of the CPU remain attention and its copies of grouped
keys and values, as on the tape of a CPU.

    python -m validate.oracle.inductor llama '{"hidden_size": 256, …}' lora batch=2 seq=512

prints the counts as JSON. Inductor's modules are changed for good: run it in a process of its own.
"""

import copy
import json
import sys
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._inductor import compile_fx, graph, scheduler
from torch._inductor.runtime import hints
from torch.utils._pytree import tree_map

from perfmodel.architectures import Config, from_config
from perfmodel.errors import UserError
from perfmodel.prediction.predict import resolve
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models

GPU: dict[str, Any] = {  # an H100, as `torch.cuda.get_device_properties` describes it
    "type": "cuda", "index": 0, "multi_processor_count": 132, "cc": 90, "major": 9, "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "warp_size": 32,
}  # fmt: skip
OF_CUDA: dict[str, Any] = {
    "name": "NVIDIA H100", "minor": 0, "total_memory": 80 << 30, "L2_cache_size": 50 << 20, "gcnArchName": "",
    "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
}  # fmt: skip


@dataclass
class Kernels:
    """What the compiled program consists of.

    Attributes:
        generated: Triton kernels by phase.
        extern: names of the calls that stay kernels of a library, by phase.
        saved: bytes that forward keeps for backward, parameters and inputs aside.
    """

    generated: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    extern: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    saved: int = 0


class _Read(Exception):
    """The scheduler has decided: nothing more is wanted of Inductor."""


_library: Any = torch.library.Library("oracle", "DEF")  # type: ignore[no-untyped-call]
_QKV, _REST = "Tensor q, Tensor k, Tensor v", "*, Tensor? attn_mask=None, float? scale=None"
_library.define(f"sdpa({_QKV}, float p=0.0, bool causal=False, {_REST}) -> (Tensor, Tensor)")
_GRAD = f"Tensor g, {_QKV}, Tensor out, Tensor lse, float p, bool causal, {_REST}"
_library.define(f"sdpa_backward({_GRAD}) -> (Tensor, Tensor, Tensor)")


def _like(x: torch.Tensor) -> torch.Tensor:
    """(batch, heads, seq, head_dim) laid out with the sequence first, as attention kernels write it."""
    _, h, s, d = x.shape
    return torch.empty_strided(x.shape, (s * h * d, d, h * d, 1), dtype=x.dtype, device=x.device)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
    b, h, s, _ = q.shape
    return _like(q), torch.empty_strided((b, h, s), (h * s, 1, h), dtype=torch.float32, device=q.device)


def _sdpa_backward(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **more: Any) -> Any:
    return _like(q), _like(k), _like(v)


torch.library.register_fake("oracle::sdpa", _sdpa, lib=_library)
torch.library.register_fake("oracle::sdpa_backward", _sdpa_backward, lib=_library)
_OF_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: torch.ops.oracle.sdpa.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: torch.ops.oracle.sdpa_backward.default,
}


def _on_gpu(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cuda:0")
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")


def _fake_mode(inputs: Any) -> Any:
    return torch._guards.detect_fake_mode(inputs)


class _Lowering(graph.GraphLowering):
    """Inductor's lowering of a graph whose tensors it takes for a GPU's."""

    def __init__(self, gm: Any, example_inputs: Any = None, *args: Any, **options: Any) -> None:
        with _fake_mode(example_inputs):
            for node in gm.graph.nodes:
                node.target = _OF_CPU.get(node.target, node.target)
                node.meta |= {"val": tree_map(_on_gpu, node.meta["val"])} if "val" in node.meta else {}
                node.args, node.kwargs = tree_map(_device, node.args), tree_map(_device, node.kwargs)
            example_inputs = [_on_gpu(x) for x in example_inputs]
        gm.recompile()
        super().__init__(gm, example_inputs, *args, **options)

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        with _fake_mode(args):
            args = tuple(_on_gpu(x) for x in args)
        return super().run(*args)


def _device(x: Any) -> Any:
    return _on_gpu(x) if isinstance(x, torch.device) else x


def _prepare() -> None:
    """Have Inductor believe in a GPU and in Triton, and forget its caches."""
    inductor_config.fx_graph_cache = False
    functorch_config.enable_autograd_cache = False
    properties = hints.DeviceProperties(**GPU)
    patches: list[tuple[Any, str, Any]] = [
        (hints.DeviceProperties, "create", classmethod(lambda cls, device: properties)),
        (torch.cuda, "get_device_properties", lambda *device: SimpleNamespace(**GPU, **OF_CUDA)),
        (torch.cuda, "get_device_capability", lambda *device: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (compile_fx, "_check_triton_bf16_support", lambda lowering: None),
        (compile_fx, "GraphLowering", _Lowering),
        (scheduler, "has_triton", lambda *device: True),
    ]
    for owner, name, value in patches:
        setattr(owner, name, value)


def count_kernels(config: Config, method: str, setup: Setup) -> Kernels:
    """Compile forward and backward of a model and count its kernels."""
    _prepare()
    found = Kernels()
    architecture, bound = resolve(config, method)
    model = models.apply_method(models.build_model(config, setup, device="cpu"), bound, architecture).train()

    def inner(gm: Any, inputs: Any, **options: Any) -> Any:
        _read(copy.deepcopy(gm), inputs, options, found)

        def run(args: list[Any]) -> Any:
            out = gm.forward(*args)
            args.clear()
            return out

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    compiled: Any = torch.compile(
        model, backend=lambda gm, inputs: compile_fx.compile_fx(gm, inputs, inner_compile=inner)
    )
    ids = torch.zeros(int(setup.batch), int(setup.seq), dtype=torch.int64)
    loss = compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    return found


def _read(gm: Any, inputs: Any, options: dict[str, Any], found: Kernels) -> None:
    """Let Inductor schedule one graph and add its kernels."""
    backward = bool(options.get("is_backward"))
    phase = "backward" if backward else "forward"

    def decided(self: scheduler.Scheduler) -> None:
        for node in self.nodes:
            kind = type(node).__name__
            if kind == "ExternKernelSchedulerNode":
                found.extern[phase] += not type(node.node).__name__.startswith("MultiOutput")
            elif kind != "NopKernelSchedulerNode":
                found.generated[phase] += 1
        raise _Read

    if backward:
        kept = [n for n in gm.graph.find_nodes(op="placeholder") if not n.name.startswith(("primals", "tangents"))]
        found.saved += sum(n.meta["val"].nbytes for n in kept if isinstance(n.meta["val"], torch.Tensor))
    scheduler.Scheduler.codegen = decided  # type: ignore[method-assign]
    try:
        compile_fx.compile_fx_inner(gm, inputs, **options)
    except Exception as error:
        if not _is_read(error):
            raise


def _is_read(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _Read) or isinstance(getattr(error, "inner_exception", None), _Read):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(arguments: list[str]) -> None:
    """Count for a config and a method given on the command line."""
    kind, values, method, *sizes = arguments
    config = Config({"model_type": kind, **json.loads(values)}, kind, kind)
    from_config(config)
    options: Any = {name: int(value) for name, value in (size.split("=") for size in sizes)}
    print(json.dumps(asdict(count_kernels(config, method, Setup(**options)))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
