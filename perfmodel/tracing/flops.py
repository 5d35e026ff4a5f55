"""FLOPs as PyTorch counts them, with formulas where it counts none."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of a call by the formulas of `FlopCounterMode`, whose own hooks would keep recomputed graphs alive."""
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`FlopCounterMode` counts the CPU's fused attention as 0; give it the formula of the CUDA kernels."""
    return int(sdpa_flop_count(q, _grouped(q, k), _grouped(q, v)))  # type: ignore[no-untyped-call]


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _cpu_attention_backward_flops(
    g: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(g, q, _grouped(q, k), _grouped(q, v)))  # type: ignore[no-untyped-call]


@register_flop_formula(aten.addmm_)
def _addmm_in_place_flops(total: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`FlopCounterMode` counts the form that adds in place as 0."""
    return int(2 * a[0] * a[1] * b[1])


@register_flop_formula(aten._grouped_mm)
def _grouped_mm_flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`FlopCounterMode` counts products by expert as 0; whatever expert a row goes to, it is a row of one product."""
    rows, other = (a[0], a[1]) if len(b) == 3 else (b[0], a[0])
    return int(2 * rows * other * b[-1])


def _grouped(q: Any, kv: Any) -> Any:
    return (kv[0], q[1], *kv[2:])
