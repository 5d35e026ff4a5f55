"""Tensors of the stand-in: fake ones that live on the CPU for PyTorch and on "cuda:0" for whoever asks.

(On a build without CUDA autograd cannot run back through tensors that really are of that device.)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function
from torch.utils._pytree import tree_map

from perfmodel.tracing import cuda_forms
from perfmodel.tracing.calls import op_of

from .gpu import Gpu

aten = torch.ops.aten
MARK = "launch of the stand-in"  # spans of the trace in which the device is given its work
CUDA = torch.device("cuda", 0)
NAMES_ONLY = (torch.device, torch._C._nn._parse_to)  # read the name of a device, and make nothing there
ENABLED = {
    "flash": torch.backends.cuda.flash_sdp_enabled, "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled, "math": torch.backends.cuda.math_sdp_enabled,
}  # fmt: skip
MOVES_DATA_IN = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_")  # may take operands of the CPU


def tensors_in(x: Any) -> Iterator[torch.Tensor]:
    """The tensors of a call's arguments or results; PyTorch's own walk is slow, and this runs at every call."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(part)


class Device(FakeTensorMode):
    """Runs every ATen call on the device's tensors, without data, on a `Gpu`'s clocks and in its memory."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.gpu = gpu
        self.inside = False  # of a call: what PyTorch does to find its outcome is not the program's
        self.no_infinity: Any = None  # the answer to "is any value infinite?"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or func.namespace == "prim":  # "prim::device" asks, it runs nothing
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        _same_device(func, args, kwargs)
        self.inside = True
        try:
            with self.mark():
                return self._run(func, types, args, kwargs)
        finally:
            self.inside = False

    def mark(self) -> AbstractContextManager[Any]:
        """A span of the trace in which the device may be given work."""
        return record_function(f"{MARK} {len(self.gpu.launches)}") if self.gpu.profiling else nullcontext()

    def copy(self, direction: str, x: torch.Tensor) -> None:
        """A copy of a tensor over the bus."""
        with self.mark():
            self.gpu.copy(direction, x.numel() * x.element_size())

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        outputs = [t for t in tensors_in(out) if isinstance(t, FakeTensor)]
        for t in outputs:
            self.gpu.allocate(t.untyped_storage())
        if func is aten.any.default:
            self.no_infinity = id(out)
        if direction := _across(func, args):
            self.gpu.copy(direction, args[1].numel() * args[1].element_size())
        elif func.namespace == "aten":
            inputs = list(tensors_in((args, kwargs)))
            written = [*outputs, *_written(func, args, kwargs)]
            op = op_of(func, inputs, list({id(t): t for t in written}.values()), (args, kwargs), cuda=True)
            self.gpu.run(op, backward=torch._C._current_graph_task_id() != -1)
        return out

    def _read(self, x: Any) -> Any:
        """A value that the program asks for, as a dense batch without infinite values has it."""
        self.copy("DtoH", x)
        return 1 if x.dtype != torch.bool else id(x) != self.no_infinity


def _across(func: Any, args: Any) -> str:
    """The direction of a copy into a tensor that lies elsewhere; empty for any other call."""
    if func is not aten.copy_.default or isinstance(args[0], FakeTensor) == isinstance(args[1], FakeTensor):
        return ""
    return "HtoD" if isinstance(args[0], FakeTensor) else "DtoH"


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The operands that a call writes into."""
    names = enumerate(func._schema.arguments)
    writes = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in names if a.is_write]
    return list(tensors_in(writes))


def _same_device(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse what a GPU refuses: an operand with dims that lies on the CPU."""
    tensors = list(tensors_in((args, kwargs)))
    elsewhere = [t for t in tensors if t.dim() and not isinstance(t, FakeTensor)]
    base = func._schema.name.removeprefix("aten::")
    if elsewhere and len(elsewhere) < len(tensors) and base not in MOVES_DATA_IN:
        raise RuntimeError(f"Expected all tensors to be on the same device: {base} got cuda:0 and cpu")


class Placing(TorchFunctionMode):
    """Lets tensors be made on, moved to and asked about the device "cuda"."""

    def __init__(self, device: Device, capability: str) -> None:
        self.device = device
        functional = torch.nn.functional
        plain = (functional.dropout, functional.scaled_dot_product_attention)
        with cuda_forms.cuda_forms(capability):  # which kernels the GPU takes
            forms = (functional.dropout, _by_backend(functional.scaled_dot_product_attention))
        self.forms: dict[Any, Callable[..., Any]] = dict(zip(plain, forms, strict=True))
        self.asked: dict[Any, Callable[[Any], Any]] = {
            torch.Tensor.is_cuda.__get__: lambda t: isinstance(t, FakeTensor),  # type: ignore[attr-defined]
            torch.Tensor.is_cpu.__get__: lambda t: not isinstance(t, FakeTensor),  # type: ignore[attr-defined]
            torch.Tensor.get_device: lambda t: 0 if isinstance(t, FakeTensor) else -1,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NAMES_ONLY or isinstance(func, torch._ops.OpOverload):  # operators are the device's business
            return func(*args, **kwargs)
        if self.device.inside:  # `with torch.device("cuda")` reaches in here too
            wanted = _device(kwargs.get("device"))
            here = {"device": torch.device("cpu")} if wanted and wanted.type == "cuda" else {}
            return func(*args, **{**kwargs, **here})
        if func in self.asked:
            return self.asked[func](args[0])
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            return self._moved(args[0], torch.Tensor.to, (args[0], CUDA), {})
        if func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist) and isinstance(args[0], FakeTensor):
            return getattr(self._fetched(args[0]), func.__name__)()
        named = [d for d in (_device(x) for x in (*args, kwargs.get("device"))) if d is not None]
        if named:
            return self._moved(args[0] if args else None, func, args, kwargs, named[0].type)
        if any(isinstance(x, FakeTensor) for x in tensors_in((args, kwargs))):
            with self.device:  # for what a call makes on its way
                return self.forms.get(func, func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _moved(self, first: Any, func: Any, args: Any, kwargs: Any, kind: str = "cuda") -> Any:
        """A call that names a device."""
        if kind == "cpu":
            return func(*args, **kwargs) if not isinstance(first, FakeTensor) else self._fetched(first)
        if kind != "cuda":
            return func(*args, **kwargs)
        here = tree_map(lambda x: torch.device("cpu") if _device(x) else x, (args, kwargs))
        with self.device:
            if isinstance(first, torch.Tensor) and not isinstance(first, FakeTensor):
                sent = torch.empty_strided(first.size(), first.stride(), dtype=first.dtype)
                self.device.copy("HtoD", first)
                return func(sent, *here[0][1:], **here[1])
            return func(*here[0], **here[1])

    def _fetched(self, x: Any) -> torch.Tensor:
        self.device.copy("DtoH", x)
        return torch.ones(x.shape, dtype=x.dtype)


def _by_backend(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Attention by the kernel that is preferred, or by the one that `sdpa_kernel` leaves."""

    def chosen(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        allowed = [name for name, enabled in ENABLED.items() if enabled()]
        if len(allowed) == len(ENABLED):
            return attention(query, *args, **kwargs)
        if allowed != ["math"] and allowed != ["efficient"] and query.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError("No available kernel. Aborting execution.")
        with patch.object(cuda_forms, "_choose", lambda *operands: allowed[0]):
            return attention(query, *args, **kwargs)

    return chosen


def _device(x: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(x, torch.device):
        return x
    if isinstance(x, str) and x.partition(":")[0] in ("cuda", "cpu"):
        return torch.device(x)
    return None
