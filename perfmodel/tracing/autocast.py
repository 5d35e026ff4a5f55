"""torch.autocast as it is on a GPU, for traces on fake CPU tensors: it widens more calls than that of the CPU.

The lists are those of aten/src/ATen/autocast_mode.h (AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE), without losses and
functions that no model here calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_map

KEY = "AutocastCPU"
IN_FP32 = (  # calls whose operands are cast
    "acos", "asin", "cosh", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "group_norm",
    "cosine_similarity", "logsumexp", "nll_loss", "nll_loss2d", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div",
    "binary_cross_entropy_with_logits", "cdist",
)  # fmt: skip
TO_FP32 = ("softmax.int", "log_softmax.int", "cumsum", "cumprod", "sum", "sum.dim_IntList", "prod", "prod.dim_int")
HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let `torch.autocast("cpu")` cast what it casts on a GPU."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    asked = torch.is_autocast_enabled
    try:
        for names, rule in ((IN_FP32, _operands), (TO_FP32, _results)):
            for name in names:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", KEY):
                    library.impl(name, rule(_overload(name)), KEY)  # type: ignore[no-untyped-call]
        # what runs on a GPU asks for "cuda", or for no device and means it
        with patch.object(torch, "is_autocast_enabled", lambda device="cuda": asked("cpu")):
            yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def autocast_operands(*tensors: Any) -> tuple[Any, ...]:
    """Operands of a call that runs in 16 bit, cast where autocast is on."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    floating = [isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors]
    return tuple(t.to(dtype) if cast else t for t, cast in zip(tensors, floating, strict=True))


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _operands(op: Any) -> Callable[..., Any]:
    """The call on operands of fp32."""

    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return op(*tree_map(widened, args), **tree_map(widened, kwargs))

    return kernel


def _results(op: Any) -> Callable[..., Any]:
    """The call with a result of fp32, unless it names the dtype itself."""

    def kernel(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        said = any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
        kwargs |= {} if said or x.dtype not in HALVES else {"dtype": torch.float32}
        with _without_autocast():
            return op(x, *args, **kwargs)

    return kernel


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))
