"""torchao's AdamW with 8-bit, 4-bit or fp8 states (transformers' `adamw_torch_8bit` and `adamw_torch_4bit`).

A Python loop over tensors, each updated by a graph of `torch.compile`. What is read and written is what Inductor's
scheduler makes of it for a GPU (torch 2.13, torchao 0.18: optim/adam.py, quant_utils.py): the largest value of each
block, then, with it, the update and the codes, then the new scales. On the way the scaled moments are written in fp32
(not for fp8), with 4-bit states also the first step of the search for a code, as 64-bit integers. Blocks have 256
elements, as the Trainer makes them. Tensors below 4,096 elements, or of a size that blocks do not divide, keep moments
of their own dtype and take one kernel.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ..program.dims import Dim, decide
from ..program.op import Attrs
from ..tape.core import new_tensor, record
from ..tape.tensor import Parameter, Tensor
from .parts.ops import advance_counter
from .parts.update import Parameters, Update, gradient, optimizer

SMALLEST = 4096  # elements (`_new_buffer`)
FILLING = 64 * 132  # blocks that fill the SMs of an H100 (torch/_inductor/ir.py, `Reduction.num_splits`)


class Form(NamedTuple):
    """How a state is kept.

    Attributes:
        bits: of a code.
        block: elements that share an fp32 scale.
        entries: of the map from codes to values; fp8 needs none.
    """

    bits: int
    block: int
    entries: int


FORMS = {"ao-adamw-8bit": Form(8, 256, 256), "ao-adamw-4bit": Form(4, 256, 16), "ao-adamw-fp8": Form(8, 256, 0)}


def _step(update: Update, parameters: Parameters, decay: bool, *, form: Form) -> None:
    for p in parameters:
        part = update.part(p.count)
        part.compiled = True
        part.host.graphs = 1
        _tensor(update, p, form)


def _tensor(update: Update, p: Parameter, form: Form) -> None:
    advance_counter(update.host_counter(p))
    if decide(p.numel >= SMALLEST) and decide(p.numel % form.block == 0):
        _quantised(update, p, form)
    else:
        tensors = (p, update.state(p), update.state(p))
        _kernel("pointwise", (p.numel, 1), (gradient(p), *tensors), tensors)


def _quantised(update: Update, p: Parameter, form: Form) -> None:
    """A tensor with two moments as codes and scales."""
    blocks, grad = p.numel // form.block, gradient(p)
    codes = _two(lambda: update.state(p, (p.numel * form.bits // 8,), "u8"))
    scales = _two(lambda: update.state(p, (blocks,), "fp32"))
    maps = _two(lambda: update.state(p, (form.entries,), "fp32")) if form.entries else []
    largest = _two(lambda: new_tensor((blocks,), "fp32"))
    scaled = _two(lambda: new_tensor(p.shape, "fp32")) if form.entries else []
    known = (grad, *codes, *scales, *maps)
    if form.bits == 4:
        begun = _two(lambda: new_tensor(p.shape, "i64"))
        if decide(blocks >= FILLING):
            _kernel("rows", (blocks, form.block), (p, *known), (p, *largest, *scaled, *begun))
        else:
            _by_halves(blocks, form.block, known, largest)
            _kernel("pointwise", (p.numel, 1), (p, *known, *largest), (p, *scaled, *begun))
        for code, *found in zip(codes, maps, scaled, begun, strict=True):
            _kernel("pointwise", (code.numel, 1), found, (code,))
    else:
        _kernel("rows", (blocks, form.block), known, (*largest, *scaled))
        _kernel("pointwise", (p.numel, 1), (p, *known, *(scaled or largest)), (p, *codes))
    for scale, new in zip(scales, largest, strict=True):
        _kernel("pointwise", (blocks, 1), (new,), (scale,))


def _by_halves(blocks: Dim, block: Dim, known: Sequence[Tensor], largest: Sequence[Tensor]) -> None:
    """Few blocks: the largest of each half first, so that there is work for all SMs."""
    halves = _two(lambda: new_tensor((blocks, 2), "fp32"))
    _kernel("rows", (2 * blocks, block // 2), known, halves)
    for half, whole in zip(halves, largest, strict=True):
        _kernel("rows", (blocks, 2), (half,), (whole,))


def _two(make: Callable[[], Tensor]) -> list[Tensor]:
    return [make(), make()]


def _kernel(kind: str, loops: tuple[Dim, Dim], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    record(f"inductor::{kind}", inputs, outputs, Attrs(loops=loops))


for _name, _form in FORMS.items():
    optimizer(_name)(partial(_step, form=_form))
