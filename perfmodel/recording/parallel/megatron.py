"""Megatron-Core's data parallelism: gradients in one fp32 buffer, summed, or scattered to a distributed optimizer.

Every gradient is added to the buffer as it comes. Behind the last micro-batch the buffer goes out; what every rank has
of a norm's gradient where ranks share tokens is summed over those. Then the norm is taken, and AdamW updates fp32
masters: all of them, or with the distributed optimizer (`--parallel zero1`) this rank's part, of which the bf16 weights
are gathered. With `--overlap` buckets of 40 million elements or more go in the last micro-batch, each as soon as its
last gradient is there (`overlap_grad_reduce`), and weights are gathered in the next step's first forward pass, a bucket
ahead of where they are used (`overlap_param_gather`). Each bucket is looked through for NaN, as is the default.

On one GPU, too, this is how it trains.

Source: megatron-core 0.16.1, distributed/{distributed_data_parallel,param_and_grad_buffer,finalize_model_grads}.py,
optimizer/{optimizer,distrib_optimizer,clip_grads}.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ...methods.parts.base import Method
from ...optimizers.parts.lists import ListRecorder
from ...optimizers.parts.ops import in_place, read_item
from ...optimizers.parts.update import Update, copy_in, existing
from ...program.dims import Dim, decide
from ...program.op import Attrs, Op, Spec
from ...program.ranks import Ranks
from ...program.streams import COMPUTE, Run
from ...setup import Setup
from ...tape.core import record, tape
from ...tape.packages.megatron import LayerRanks, add_to_main, await_sent, main_gradient, send_sum
from ...tape.pointwise import cat
from ...tape.shape import view
from ...tape.tensor import Parameter, Tensor
from .collectives import ACROSS, EVENT
from .form import WholeUnits
from .messages import LayerGradient, ReadyGradient, gradients_in_order, interleaved

ARRIVED = Run(after=(ACROSS,))  # messages between replicas have a stream of their own
METHODS = ("full", "lora")
# What of a setup its program was modelled with
KNOWN: dict[str, tuple[object, ...]] = {
    "dtype": ("bf16",), "amp": (None,), "optimizer": ("adamw",), "attention": ("sdpa",), "kernels": ("torch",),
    "compile": ("none",), "fp8": ("none",), "int8": ("none",), "qat": ("none",), "objective": ("sft",),
    "packing": ("none", "dense"), "lengths": (None,), "padded": (False,), "engine": ("torch",),
    "cuda_graphs": (False,), "in_backward": (False,), "offload": ("none",), "parallel": ("ddp", "zero1"),
    "pp_schedule": ("1f1b",), "cp": (1,), "ddp": ("plain",), "sync_each_batch": (False,), "shard_group": (None,),
    "reduce_dtype": (None,), "reshard": (True,), "fsdp_units": ("accelerate",),
}  # fmt: skip
LEAST, PER_RANK = 40_000_000, 1_000_000  # elements of a bucket: at least, and of each rank
ALIGNED, ALIGNED_END = 64, 128  # elements that a parameter starts at a multiple of, and a bucket ends
OF_HEADS = ("q_layernorm.weight", "k_layernorm.weight")  # norms of which each rank has other heads
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
        stages: of a pipeline.
        distributed: whether each keeps a part of masters and moments.
        overlaps: whether messages go beside compute.
    """

    shares_norm = False
    inside = False

    def __init__(
        self, ranks: Ranks, shared: LayerRanks, stages: int = 1, *, distributed: bool, overlaps: bool
    ) -> None:  # fmt: skip
        self.ranks, self.shared, self.stages, self.overlaps = ranks, shared, stages, overlaps
        self.several = decide(ranks.size > 1)
        self.distributed = distributed and self.several
        self.reduces = True
        self.ready: list[ReadyGradient] = []
        self.unsent: list[Dim] = []  # elements of buckets that are exchanged behind all passes
        self.kept: dict[Any, Dim] = {}  # as of `Tape.kept`
        self.used: list[ReadyGradient] = []  # weights in the order in which the first forward pass uses them
        self.gathers = self.distributed and overlaps  # whether weights are still to be gathered

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

    def weight(self, p: Parameter) -> Tensor:
        """A weight is used, and its bucket is there; behind the first one of it the next is gathered."""
        if self.gathers and p.requires_grad:
            current = tape()
            self.used.append(ReadyGradient(current.part, len(current.part.ops), p))
        return p

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Buckets of the first forward pass are known now."""
        if self.gathers:
            self.gathers = False
            self._gather()
        return outputs

    def end_of_backward(self) -> None:
        """All that is exchanged behind a pass to which no other stage looks."""
        self.end_of_pass(beside=self.overlaps)
        self.finalize()

    def end_of_pass(self, *, beside: bool) -> None:
        """The buckets of a backward pass are known: they go where their last gradient is, if they go beside it.

        Of a pipeline's stages only the first one's do (`align_grad_reduce`): the others' go in the bubble behind them.
        """
        current = tape()
        current.on_gradient = current.after_gradient = None
        if not self.reduces:
            return
        exchanging, parts = current.parts.pop(), list(current.parts)
        order, sent = gradients_in_order(parts, self.ready), dict[int, list[Dim]]()
        place = {id_of(c): i for i, c in enumerate(order)}
        for bucket in self._buckets(order):
            sent.setdefault(max(place[id_of(c)] for c in bucket), []).append(self._elements(bucket))
        if beside:
            current.parts[:] = interleaved(parts, self.ready, sent, self._reduced)
        self.unsent = [] if beside else [n for buckets in sent.values() for n in buckets]
        current.parts.append(exchanging)
        self.kept = dict(current.kept)

    def finalize(self) -> None:
        """`finalize_model_grads`: what is unsent goes, and norms' gradients are summed over ranks that share tokens."""
        if not self.reduces:
            return
        tape().part.ops += [op for n in self.unsent for op in self._reduced(n)]
        if self.several:
            record("cuda::wait_event", (), (), EVENT, view=True, runs=ARRIVED)
        norms = [r.parameter for r in self.ready if r.parameter.kind == "norm"]
        partial = norms if self.shared.tokens else [p for p in norms if p.name.endswith(OF_HEADS)]
        if self.shared.several and partial:
            self._sum_norms(partial)

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """Every rank has all weights."""
        return parameters

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """The buffer of fp32 gradients, and what layers keep for good."""
        return self.gradient_bytes(parameters) + sum(self.kept.values())

    def gradient_bytes(self, parameters: Sequence[Parameter]) -> Dim:
        """The buffer of fp32 gradients, which is there for good."""
        return existing((self._padded([p for p in parameters if p.used]),), "fp32").nbytes

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update:
        """Clipping by the norm over all ranks, AdamW on fp32 masters, and the bf16 weights from those."""
        update = Update(tape(), "adamw-fused", parameters)
        weights = update.parameters
        if clips:
            self._clip(update, self._grads(weights))
        mine = self._mine(weights)
        masters = [copy_in(p, "fp32") for p in mine]
        for master in masters:
            update.state(master)
        for decays in (True, False):  # matrices do, vectors do not
            update.group([m for m in masters if (len(m.shape) > 1 or self.distributed) == decays], decay=decays)
        for run in update.runs(mine):
            for p in run:
                in_place("copy_", existing(p.shape, "bf16"), existing(p.shape, "fp32"))
        if self.distributed and not self.overlaps:
            gathered = self._weights(self._padded(weights))
            tape().part.ops += [gathered, Op("cuda::wait_event", (), (), 0, 0, view=True, attrs=EVENT, runs=ARRIVED)]
        buffer = existing((self._padded(weights),), "fp32")
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
            await_sent()
        read_item(total)
        op("_foreach_mul_.Tensor", [*grads, Spec("fp32", ())], grads)

    def _of_norm(self) -> Ranks:
        """The ranks whose parts of the norm are summed: those of one model, of parts of the buffer all."""
        of_model = self.shared.ranks.size * self.stages
        return Ranks(of_model * self.ranks.size if self.distributed else of_model)

    def _arrived(self, p: Parameter) -> None:
        main_gradient(p)
        current = tape()
        current.part.host.gradients += 1
        self.ready.append(ReadyGradient(current.part, len(current.part.ops), p))

    def _reduced(self, elements: Dim) -> list[Op]:
        """What is done about a bucket of gradients: the host looks for NaN; it is divided, and sent."""
        buffer, norm, flag = Spec("fp32", (elements,)), Spec("fp32", ()), Spec("bool", ())
        looked = [Op("linalg_vector_norm", (buffer,), (norm,), buffer.nbytes, norm.nbytes)]
        for name in ("isnan", "isinf"):
            looked.append(Op(name, (norm,), (flag,), norm.nbytes, flag.nbytes))
            looked.append(Op("_local_scalar_dense", (flag,), (), flag.nbytes, 0))
        if not self.several:
            return looked
        looked.append(Op("mul_.Tensor", (buffer,), (buffer,), buffer.nbytes, buffer.nbytes))
        if not self.distributed:
            return [*looked, self._message("allreduce_coalesced_", "fp32", elements, elements)]
        own = elements // self.ranks.size
        return [*looked, self._message("reduce_scatter_tensor_coalesced_", "fp32", elements, own)]

    def _message(self, name: str, dtype: str, given: Dim, made: Dim) -> Op:
        before, behind = Spec(dtype, (given,)), Spec(dtype, (made,))
        attrs, runs = Attrs(ranks=self.ranks), Run(ACROSS, after=(COMPUTE,))
        return Op(f"c10d::{name}", (before,), (behind,), before.nbytes, behind.nbytes, attrs=attrs, runs=runs)

    def _gather(self) -> None:
        """Where the first weight of a bucket is used it is waited for, and the next one is sent."""
        current, parts = tape(), list(tape().parts)
        by_part = {part: [r for r in self.used if r.part is part] for part in parts}
        order = [LayerGradient(r.parameter, k) for part in parts for k in range(part.repeat) for r in by_part[part]]
        buckets = self._buckets(order)
        bucket_of = {id_of(c): i for i, bucket in enumerate(buckets) for c in bucket}
        first: dict[int, int] = {}  # of each bucket, in the order in which they are used
        for i, c in enumerate(order):
            first.setdefault(bucket_of[id_of(c)], i)
        sizes = [self._elements(buckets[bucket]) for bucket in first]
        sent: dict[int, list[tuple[Dim, ...]]] = {}
        for n, place in enumerate(first.values()):
            sent.setdefault(place, []).append((sizes[0] if n == 0 else 0, sizes[n + 1] if n + 1 < len(sizes) else 0))
        made = list(interleaved(parts, self.used, sent, self._gathered))
        current.part.ops = made[-1].ops  # what comes goes there, too
        current.parts[:] = [*made[:-1], current.part]

    def _gathered(self, elements: tuple[Dim, ...]) -> list[Op]:
        """The first message of all, or none; the wait for what was sent; the next message, or none."""
        before, behind = ([self._weights(n)] if decide(np.all(np.greater(n, 0))) else [] for n in elements)
        return [*before, Op("cuda::wait_event", (), (), 0, 0, view=True, attrs=EVENT, runs=ARRIVED), *behind]

    def _weights(self, elements: Dim) -> Op:
        """The message of a bucket of weights."""
        return self._message("allgather_into_tensor_coalesced_", "bf16", elements // self.ranks.size, elements)

    def _elements(self, bucket: Sequence[LayerGradient]) -> Dim:
        """Of a bucket of the buffer: to a distributed optimizer parameters and its end lie at round numbers."""
        return self._padded([c.parameter for c in bucket], alone=True)

    def _padded(self, parameters: Sequence[Parameter], *, alone: bool = False) -> Dim:
        """Elements of a part of the buffer, `alone` of one layer each."""
        counts = [1 if alone else p.count for p in parameters]
        if not self.distributed:
            return sum(p.numel * n for p, n in zip(parameters, counts, strict=True))
        elements = sum(_up_to(p.numel, ALIGNED) * n for p, n in zip(parameters, counts, strict=True))
        return _up_to(elements, np.lcm(self.ranks.size, ALIGNED_END))

    def _buckets(self, gradients: Sequence[LayerGradient]) -> list[list[LayerGradient]]:
        """Parameters against the order in which modules register them, as many together as exceed a bucket's size."""
        limit = max(LEAST, PER_RANK * int(np.max(self.ranks.size))) if self.overlaps else np.inf
        found: list[list[LayerGradient]] = []
        bucket: list[LayerGradient] = []
        for c in sorted(gradients, key=_registered, reverse=True):
            bucket.append(c)
            if decide(sum(c.parameter.numel for c in bucket) >= limit):
                found.append(bucket)
                bucket = []
        return [*found, bucket] if bucket else found

    def _sum_norms(self, norms: Sequence[Parameter]) -> None:
        """`_allreduce_non_tensor_model_parallel_grads`: all in one message, and copied back."""
        each = [existing(p.shape, "fp32") for p in norms for _ in range(p.count)]
        flat = cat([view(x, (x.numel,)) for x in each], 0)
        send_sum(flat, self.shared.ranks)
        await_sent()
        for x in each:
            record("copy_", (x, existing(x.shape, "fp32")), (x,))


def main_gradients(setup: Setup) -> MainGradients:
    """What one of a setup's GPUs does about gradients."""
    shared, replicas = LayerRanks(Ranks(setup.tp), setup.sequence_parallel), Ranks(setup.replicas, setup.tp)
    distributed = setup.parallel == "zero1"
    return MainGradients(replicas, shared, setup.pp, distributed=distributed, overlaps=setup.overlap)


def id_of(c: LayerGradient) -> tuple[int, int]:
    """What tells a gradient from all others."""
    return id(c.parameter), c.layer


def _up_to(n: Dim, multiple: Any) -> Dim:
    return -(-n // multiple) * multiple


def _registered(c: LayerGradient) -> tuple[int, int, int, int]:
    """Where a parameter comes among all as modules register them."""
    name = c.parameter.name
    if not name.startswith("decoder.layers"):
        return (0 if c.parameter.embeds else 2, "output" in name, 0, 0)
    number = c.layer + int(name.split(".")[2])
    module = next(i for i, known in enumerate(ORDER) if known in name)
    return (1, number, module, "linear_out" in name or (name.endswith(".weight") and "adapter" not in name))
