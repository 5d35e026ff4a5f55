"""Megatron-Core's data parallelism: gradients in one fp32 buffer, summed, or scattered to a distributed optimizer.

Every gradient is added to the buffer as it comes. Behind the last micro-batch the buffer goes out bucket by bucket, of
40 million elements or more, each as soon as its last gradient is there; what every rank has of a norm's gradient where
ranks share tokens is summed over those. Then the norm is taken, and AdamW updates fp32 masters: all of them, or with
the distributed optimizer (`--parallel zero1`) this rank's part, behind which the bf16 weights are gathered.

On one GPU, too, this is how it trains.

Source: megatron-core 0.16.1, distributed/{distributed_data_parallel,param_and_grad_buffer,finalize_model_grads}.py,
optimizer/{optimizer,distrib_optimizer,clip_grads}.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ...methods.parts.base import Method
from ...optimizers.parts.lists import ListRecorder, specs_of
from ...optimizers.parts.ops import in_place, read_item
from ...optimizers.parts.update import Update, copy_in, existing
from ...program.dims import Dim, decide
from ...program.op import Attrs, Op, Spec
from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.core import record, tape
from ...tape.packages.megatron import Shared, add_to_main, main_gradient, send_sum, wait
from ...tape.pointwise import cat
from ...tape.shape import view
from ...tape.tensor import Parameter, Tensor
from .collectives import SENT, all_reduce, exchange
from .form import WholeUnits
from .messages import Coming, Ready, coming, interleaved

METHODS = ("full", "lora")
# What of a setup its program was modelled with
KNOWN: dict[str, tuple[object, ...]] = {
    "dtype": ("bf16",), "amp": (None,), "optimizer": ("adamw",), "attention": ("sdpa",), "kernels": ("torch",),
    "compile": ("none",), "fp8": ("none",), "int8": ("none",), "qat": ("none",), "objective": ("sft",),
    "packing": ("none", "dense"), "lengths": (None,), "padded": (False,), "engine": ("torch",),
    "cuda_graphs": (False,), "in_backward": (False,), "offload": ("none",), "parallel": ("ddp", "zero1"), "pp": (1,),
    "cp": (1,), "ddp": ("plain",), "sync_each_batch": (False,), "shard_group": (None,), "reduce_dtype": (None,),
}  # fmt: skip
LEAST, PER_RANK = 40_000_000, 1_000_000  # elements of a bucket: at least, and of each rank
ALIGNED = 64  # elements that a parameter starts at a multiple of in the distributed optimizer's buffer
# Names of a block's parameters in the order in which modules register them
ORDER = ("linear_proj", "linear_qkv", "q_layernorm", "k_layernorm", "linear_fc1", "linear_fc2")


def check_megatron(setup: Setup, method: Method) -> None:
    """Raise `UserError` where Megatron-Core's program is not modelled with a setup or a method."""
    if method.name not in METHODS or getattr(method, "implementation", "peft") != "peft":
        raise UserError(f"method {method.spec()}: in Megatron-Core's program {' and '.join(METHODS)} are modelled")
    if getattr(method, "modules_to_save", ()) or getattr(method, "dropout", 0.0):
        what = "modules_to_save" if getattr(method, "modules_to_save", ()) else "dropout"
        raise UserError(f"method {method.name}: {what} in Megatron-Core's program is not modelled; leave it out")
    for name, known in KNOWN.items():
        if (value := getattr(setup, name)) not in known:
            use = " or ".join(f"{name} {v}" for v in known if v is not None)
            raise UserError(
                f"{name} {value}: not modelled in Megatron-Core's program; {f'use {use}' if use else 'leave it out'}"
            )
    if setup.sequence_parallel and np.any(np.asarray(setup.seq) % setup.tp):
        raise UserError(
            f"sequence_parallel: tp {setup.tp} cuts the tokens of a sequence; use a multiple of it for --seq"
        )


class MainGradients(WholeUnits):
    """The hooks of Megatron's own DistributedDataParallel, and its optimizer.

    Args:
        ranks: those that have samples of their own.
        shared: those that share layers.
        distributed: whether each keeps a part of masters and moments.
    """

    shares_norm = False
    inside = False

    def __init__(self, ranks: Ranks, shared: Shared, *, distributed: bool) -> None:
        self.ranks, self.shared = ranks, shared
        self.several = decide(ranks.size > 1)
        self.distributed = distributed and self.several
        self.reduces = True
        self.ready: list[Ready] = []

    @property
    def everyone(self) -> Ranks | None:
        """Those that have samples of their own."""
        return self.ranks if self.several else None

    def begin(self) -> None:
        """Gradients go into the buffer, and are followed if they are exchanged."""
        self.ready.clear()
        current = tape()
        current.on_gradient, current.after_gradient = add_to_main, self._arrived

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block runs as it would alone."""
        return run(x)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Nothing is hooked."""
        return outputs

    def end_of_backward(self) -> None:
        """Buckets go where their last gradient is; then norms' gradients are summed over ranks that share tokens."""
        current = tape()
        current.on_gradient = current.after_gradient = None
        if not self.reduces:
            return
        exchanging, parts = current.parts.pop(), list(current.parts)
        if self.several:
            order = coming(parts, self.ready)
            current.parts[:] = interleaved(parts, self.ready, self._buckets(order), self._sent)
        current.parts.append(exchanging)
        if self.several:
            wait()
        partial = [r.parameter for r in self.ready if r.parameter.kind == "norm" and r.parameter.used]
        if self.shared.tokens and partial:
            self._sum_norms(partial)

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """Every rank has all weights."""
        return parameters

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """The buffer of fp32 gradients, which is there for good."""
        return existing((sum(p.numel * p.count for p in parameters if p.used),), "fp32").nbytes

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update:
        """Clipping by the norm over all ranks, AdamW on fp32 masters, and the bf16 weights from those."""
        update = Update(tape(), "adamw-fused", parameters)
        weights = update.parameters
        if clips:
            self._clip(update, self._grads(weights))
        masters = [copy_in(p, "fp32") for p in self._mine(weights)]
        for master in masters:
            update.state(master)
        update.group(masters)
        old, of = specs_of(masters), [Spec("bf16", m.shape, m.count) for m in masters]
        ListRecorder(update.part())("_foreach_copy_", of + old, of)
        if self.distributed:
            mine = existing((sum(m.numel * m.count for m in masters),), "bf16")
            exchange("c10d::_allgather_base_", mine, existing((mine.numel * self.ranks.size,), "bf16"), self.ranks)
            wait()
        buffer = existing((sum(p.numel * p.count for p in weights),), "fp32")
        tape().begin("zero_grad", "optimizer")
        record("zero_", (buffer,), (buffer,))
        return update

    def _mine(self, weights: Sequence[Parameter]) -> Sequence[Parameter]:
        """What this rank updates: its part of all, or all."""
        if not self.distributed:
            return weights
        total = sum(p.numel * p.count for p in weights)
        return [Parameter("part", (-(-total // self.ranks.size),), "bf16", kind="weight", trainable=True)]

    def _grads(self, weights: Sequence[Parameter]) -> list[Spec]:
        return [Spec("fp32", p.shape, p.count) for p in self._mine(weights)]

    def _clip(self, update: Update, grads: list[Spec]) -> None:
        """`get_grad_norm_fp32` and `clip_grad_by_total_norm_fp32`; the host reads the norm."""
        part = update.tape.begin("clip", "optimizer")
        op = ListRecorder(part)
        op("_foreach_norm.Scalar", grads, [Spec("fp32", ())])
        total = existing((1,), "fp32")
        in_place("pow_.Scalar", total)
        across = self._of_norm()
        if decide(across.size > 1):
            send_sum(total, across)
            wait()
        read_item(total)
        op("_foreach_mul_.Tensor", [*grads, Spec("fp32", ())], grads)

    def _of_norm(self) -> Ranks:
        """The ranks whose parts of the norm are summed: those that share layers, of parts of the buffer all."""
        return Ranks(self.shared.ranks.size * self.ranks.size) if self.distributed else self.shared.ranks

    def _arrived(self, p: Parameter) -> None:
        main_gradient(p)
        current = tape()
        current.part.host.gradients += 1
        self.ready.append(Ready(current.part, len(current.part.ops), p))

    def _sent(self, elements: Dim) -> list[Op]:
        """The message of a bucket, scaled by the number of ranks before it is summed."""
        if not self.distributed:
            return [all_reduce(elements, "fp32", self.ranks)]
        whole, part = Spec("fp32", (elements,)), Spec("fp32", (elements // self.ranks.size,))
        scatter = Op("c10d::_reduce_scatter_base_", (whole,), (part,), whole.nbytes, part.nbytes,
                     attrs=Attrs(ranks=self.ranks), runs=SENT)  # fmt: skip
        return [scatter]

    def _buckets(self, order: Sequence[Coming]) -> dict[int, list[Dim]]:
        """The buckets that go out behind each gradient, by its number in the order in which they come."""
        place = {id_of(c): i for i, c in enumerate(order)}
        limit = max(LEAST, PER_RANK * int(np.max(self.ranks.size)))
        found: dict[int, list[Dim]] = {}
        elements: Dim = 0
        last = 0
        for c in sorted(order, key=_registered, reverse=True):
            elements, last = elements + c.parameter.numel, max(last, place[id_of(c)])
            if decide(elements >= limit):
                found.setdefault(last, []).append(elements)
                elements, last = 0, 0
        if decide(elements > 0):
            found.setdefault(last, []).append(elements)
        return found

    def _sum_norms(self, norms: Sequence[Parameter]) -> None:
        """`_allreduce_non_tensor_model_parallel_grads`: all in one message, and copied back."""
        each = [existing(p.shape, "fp32") for p in norms for _ in range(p.count)]
        flat = cat([view(x, (x.numel,)) for x in each], 0)
        send_sum(flat, self.shared.ranks)
        wait()
        for x in each:
            record("copy_", (x, existing(x.shape, "fp32")), (x,))


def id_of(c: Coming) -> tuple[int, int]:
    """What tells a gradient from all others."""
    return id(c.parameter), c.layer


def _registered(c: Coming) -> tuple[int, int, int, int]:
    """Where a parameter comes among all as modules register them."""
    name = c.parameter.name
    if not name.startswith("decoder.layers"):
        return (0 if c.parameter.embeds else 2, "output" in name, 0, 0)
    number = c.layer + int(name.split(".")[2])
    module = next(i for i, known in enumerate(ORDER) if known in name)
    return (1, number, module, "linear_out" in name or (name.endswith(".weight") and "adapter" not in name))
