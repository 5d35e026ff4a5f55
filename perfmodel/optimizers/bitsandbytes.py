"""The optimizers of bitsandbytes, as transformers' Trainer runs them: AdamW and Lion with 8-bit or 32-bit states.

One kernel and one synchronisation a tensor, in a Python loop. The package is no dependency: what is read and written
follows from its source (0.50: optim/optimizer.py, csrc/optimizers.cu), the calls from its op schemas. Large 8-bit
states are quantised in blocks of 256, each with an fp32 scale; tensors below 4,096 elements and, by the Trainer,
embeddings keep fp32 states. Paged states lie in CUDA's managed memory, outside PyTorch's allocator: they move over PCIe
when the device is full.
"""

from functools import partial

from ..program.dims import decide
from ..program.op import ON_HOST, Attrs
from ..tape.core import record
from ..tape.tensor import Parameter, Tensor
from .parts.update import Parameters, Update, gradient, optimizer

SMALLEST_8BIT = 4096  # elements (min_8bit_size)
SMALLEST_PAGED = 100_000  # elements (get_state_buffer)
BLOCK = 256  # elements that share an absmax
CODES = 256  # entries of a quantisation map
FORMS = {  # name: (states, bits, paged)
    "adamw-8bit": (2, 8, False),
    "paged-adamw-8bit": (2, 8, True),
    "paged-adamw": (2, 32, True),
    "lion": (1, 32, False),
    "lion-8bit": (1, 8, False),
}


def _step(update: Update, parameters: Parameters, decay: bool, *, states: int, bits: int, paged: bool) -> None:
    maps = [update.shared_state((CODES,), "fp32") for _ in range(states)] if bits == 8 else []
    for run in update.runs(parameters):
        for p in run:
            _update_tensor(update, p, states, maps, paged=paged)


def _update_tensor(update: Update, p: Parameter, states: int, maps: list[Tensor], *, paged: bool) -> None:
    """`prefetch_state`, `update_step` and `sync_gpu` of one tensor; its schema names all tensors as written."""
    quantised = bool(maps) and not p.embeds and decide(p.numel >= SMALLEST_8BIT)
    on_pages = paged and decide(p.numel >= SMALLEST_PAGED)
    moments = [update.state(p, dtype="u8" if quantised else "fp32", paged=on_pages) for _ in range(states)]
    if on_pages:
        for _ in moments:
            record("bitsandbytes::cprefetch", (), (), ON_HOST)
    if quantised:
        scales = [update.state(p, (-(-p.numel // BLOCK),), "fp32") for _ in range(states)]
        tensors = (gradient(p), p, *moments, *maps, *scales)
        record("bitsandbytes::optimizer_update_8bit_blockwise", tensors, tensors, Attrs(sync=True))
    else:
        tensors = (gradient(p), p, *moments)
        record("bitsandbytes::optimizer_update_32bit", tensors, tensors, Attrs(sync=True))


for _name, (_states, _bits, _paged) in FORMS.items():
    optimizer(_name)(partial(_step, states=_states, bits=_bits, paged=_paged))
