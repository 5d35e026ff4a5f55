"""The training setup: everything about a step that is neither model, method nor device."""

import re
from dataclasses import fields
from math import lcm
from numbers import Real
from os import PathLike
from typing import Any

import numpy as np

from . import optimizers
from .errors import UserError, as_given, check_kind, one_of
from .program.dims import Dim
from .program.dtypes import FLOATING
from .program.lengths import Lengths, lengths_of
from .program.routing import exponent_of
from .program.sizes import positive, single
from .program.software import CURRENT, SoftwareStack
from .units import of_these
from .values import immutable

ATTENTION = ("sdpa", "eager", "flash2")
CHECKPOINT = ("none", "block", "block-reentrant")
KERNELS = ("torch", "liger", "cce", "liger+cce", "trl", "liger+trl")
FP8 = ("none", "tensorwise", "padded", "rowwise")  # recipes of `tape.packages.float8`
INT8 = ("none", "mixed")  # `tape.packages.int8_mixed`
QAT = re.compile(r"none|int8-int4:[1-9]\d{0,5}")  # of inputs, of weights, and weights that share a scale
EXPERTS = ("grouped_mm", "eager")  # `experts_implementation` of transformers
COMPILE = ("none", "default", "reduce-overhead")
ENGINES = ("torch", "deepspeed-zero3")
# each in a file of `perfmodel/recording/parallel/` or `deepspeed/`, stages 1 and 2 of ZeRO in one
PARALLEL = ("ddp", "fsdp2", "fsdp1", "zero1", "zero2", "zero3")
FSDP_UNITS = ("accelerate", "blocks", "adapters")
ROTATE = ("allgather", "alltoall")  # accelerate's `cp_comm_strategy`
ULYSSES = "ulysses"  # its `sp_size`
SCHEDULE = re.compile(r"gpipe|1f1b|interleaved:v=[1-9]\d?")  # of a pipeline (`recording.parallel.schedules`)
DDP = ("plain", "find-unused", "static-graph")
# each in a file of `perfmodel/objectives/`
OBJECTIVES = ("sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "prm", "grpo", "ppo", "asft", "ebft")
PAIRS = ("dpo", "orpo", "cpo", "simpo", "reward")  # those whose sample is a chosen and a rejected sequence
GENERATED = ("grpo", "ppo", "ebft")  # those whose sample is a prompt and what was generated behind it
REFERENCES = ("auto", "model", "adapter-off", "precomputed")
OFFLOAD = ("none", "optimizer", "params")
PACKING = ("none", "dense", "varlen", "flat")
WITHIN = ("varlen", "flat")  # those whose documents attend within themselves


@immutable
class Setup:
    """One optimizer step of a training loop.

    Attributes:
        batch: samples of a micro-batch; an int or an integer array (a grid). Of an objective on pairs a sample is
            one: two sequences.
        seq: tokens per sequence; the batch is dense. An int or an integer array.
        dtype: dtype of the base weights: bf16, fp16 or fp32.
        amp: 16-bit dtype of `torch.autocast`, or None; under DeepSpeed, of the model itself.
        optimizer: one of `optimizer_names()`; adamw is PyTorch's default form on the device, or DeepSpeed's FusedAdam
            under that engine.
        grad_accum: micro-batches per optimizer step.
        checkpoint: none, block (non-reentrant, per block) or block-reentrant.
        attention: sdpa, eager or flash2 (the flash-attn package).
        clip_grad: whether the gradient norm is clipped.
        cuda_graphs: whether the whole step is captured in a CUDA graph, so that one launch dispatches it.
        kernels: torch; liger, Liger's fused RMSNorm, rotary positions, SwiGLU and linear cross entropy; cce, cut cross
            entropy for the head and its loss; trl, TRL's fused head with SFTTrainer's loss; liger+cce or liger+trl,
            that and the rest of Liger's.
        compile: what `torch.compile` does to the model: none, default (fused kernels), or reduce-overhead (the same,
            and forward and backward are each a CUDA graph).
        fp8: how products of linear layers run in 8-bit floats, as accelerate converts a model with torchao: none, or a
            recipe of `perfmodel.tape.packages.float8`. The first and the last linear layer stay as they are.
        int8: how products of the linear layers of blocks run in 8-bit integers: none, or mixed, torchao's
            `Int8MixedPrecisionTrainingConfig` with weights that stay in `dtype`.
        qat: torchao's fake quantisation of linear layers, the head too: none, or int8-int4:GROUP, of inputs to 8 bit
            token by token and of weights to 4 bit in groups of that many.
        padded: whether some samples of a batch are padded to `seq`: then sdpa gets an explicit mask, which costs it the
            flash kernel, copies of the grouped keys and values, and the causal saving.
        routing: how evenly the routers of a mixture of experts load them: balanced, or zipf:EXPONENT, by which the
            share of an expert falls with its rank.
        experts: how a mixture runs its experts, as transformers names it (`experts_implementation`): grouped_mm, or
            eager, a loop over those that are hit, which transformers 4 always ran.
        objective: what is trained for (`OBJECTIVES`): sft, or the loss of a trainer of its own.
        prompt: tokens of a sequence that are its prompt, None for half of them, where the rest was generated.
        reference: where the log-probabilities of the reference come from that dpo, kto and grpo compare with: a frozen
            model, the model without its adapters, or a table made before; auto: without adapters where there are
            adapters, else a frozen model; for grpo none.
        stack: versions of the software that it runs under (`program.software`): torch=2.6,cuda=12.4,…; they decide
            which kernel attention gets, the dtype of PEFT's adapters, how much of a list of tensors one launch takes.
        in_backward: whether a weight is updated as soon as its gradient is complete, which is freed then: without
            clipping, one micro-batch a step.
        images: images of a sample (`perfmodel.tracing` alone has them); their tokens are among its `seq`.
        image_size: height and width of an image in pixels, before the model's processor resizes it.
        gpus: GPUs of the job (on a CPU: processes), all nodes together; an int or an integer array. `batch` is that of
            one of them.
        nodes: over how many nodes they spread; None: as few as hold them.
        node: what they stand in (`perfmodel.Node`); None: the node that has GPUs of the device.
        parallel: what several GPUs do (`perfmodel.recording.parallel`): ddp, every one has the whole model; fsdp2 and
            fsdp1, each keeps a shard of every parameter; zero1, zero2 and zero3, DeepSpeed's, each keeps a part of the
            optimizer states, of the gradients too, of the weights too. Of one GPU it changes nothing unless something
            is offloaded.
        ddp: what DDP knows of the graph: plain, that every parameter gets a gradient; find-unused, nothing, so that it
            looks for those that get none in every step (`find_unused_parameters`); static-graph, that every step's is
            the first one's. PyTorch's and accelerate's default is plain, that of transformers' Trainer find-unused
            where nothing is checkpointed and around PEFT's models.
        reshard: whether FSDP frees a block's weights behind its forward pass and gathers them again backward
            (FULL_SHARD; FSDP2's `reshard_after_forward`), or leaves them gathered in between (SHARD_GRAD_OP).
        fsdp_units: what FSDP2 gathers together: accelerate, each block, the embedding, the last norm with the head; or
            blocks, each block, and all else, which is freed behind the forward pass, too; or adapters, each half of
            each LoRA by itself, and the rest as blocks.
        reduce_dtype: what FSDP reduces gradients in (`reduce_dtype` of its mixed precision); None: the dtype that
            weights are gathered in, as accelerate has it.
        sync_each_batch: whether gradients are exchanged for every micro-batch (accelerate's option of that name,
            Composer under FSDP), not once a step: a rank then never holds whole ones.
        overlap: whether Megatron's gradients are exchanged beside backward, and weights gathered a bucket ahead of
            their use (its overlap_grad_reduce and overlap_param_gather), not behind it and behind the update.
        shard_group: GPUs of a group that FSDP's shards lie over (all, where there are no more): every group has the
            whole model, gradients are reduced inside of a group and then across groups. Of `tp` GPUs that share layers
            it counts one. None: all GPUs are one.
        offload: what lives in the host's memory (`perfmodel.recording.parallel.offload`): none; optimizer, masters,
            states and gradients of DeepSpeed's ZeRO, which the host's cores update; params, the weights too, of ZeRO-3
            and of FSDP.
        tp: tensor-parallel ranks, of which each has a part of every layer; they work on the same samples.
        sequence_parallel: whether between those layers each has a part of every sequence (`tape.packages.sequence`).
        pp: pipeline ranks, of which each has some of the blocks; `grad_accum` micro-batches go through all of them.
        pp_schedule: in which order (`recording.parallel.schedules`): 1f1b, gpipe, or interleaved:v=CHUNKS of blocks on
            each rank.
        cp: context-parallel ranks, which share every sequence: each has a part of its tokens.
        cp_rotate: how keys and values get to all of them: allgather, or alltoall, from rank to rank; or ulysses, where
            ranks share the heads within attention in place of the tokens.
        engine: what runs the step: torch, or deepspeed-zero3 (`perfmodel.recording.deepspeed`);
            a method may name its own.
        packing: what lies in a row of `seq` tokens: none, one sample; dense, documents behind one another under one
            causal mask; varlen, documents that attend within themselves (position ids restart and there is no mask);
            flat, the samples of a micro-batch behind one another in one row, as many tokens as they have.
        lengths: how long documents are (`program.lengths`): MEAN:P95, a file, or integers; `seq` is what they are cut
            to. None: all have `seq` tokens. Without packing a micro-batch is padded to its longest sample, and the
            answer is the mean over micro-batches.
        group_by_length: whether samples of similar length come together in a micro-batch.
    """

    batch: Dim = 1
    seq: Dim = 512
    dtype: str = "bf16"
    amp: str | None = None
    optimizer: str = "adamw"
    grad_accum: int = 1
    checkpoint: str = "none"
    attention: str = "sdpa"
    clip_grad: bool = True
    cuda_graphs: bool = False
    padded: bool = False
    kernels: str = "torch"
    compile: str = "none"
    fp8: str = "none"
    int8: str = "none"
    qat: str = "none"
    gpus: Dim = 1
    nodes: int | None = None
    node: str | None = None
    parallel: str = "ddp"
    ddp: str = "plain"
    reshard: bool = True
    fsdp_units: str = "accelerate"
    reduce_dtype: str | None = None
    sync_each_batch: bool = False
    overlap: bool = False
    shard_group: int | None = None
    offload: str = "none"
    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    pp_schedule: str = "1f1b"
    cp: int = 1
    cp_rotate: str = "allgather"
    engine: str = "torch"
    routing: str = "balanced"
    experts: str = "grouped_mm"
    objective: str = "sft"
    prompt: int | None = None
    reference: str = "auto"
    packing: str = "none"
    lengths: Lengths | None = None
    group_by_length: bool = False
    stack: SoftwareStack = CURRENT
    in_backward: bool = False
    images: int = 0
    image_size: tuple[int, int] = (448, 448)

    def __post_init__(self) -> None:
        for name, check in (("batch", positive), ("seq", positive), ("gpus", positive), ("grad_accum", single)):
            object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_choices()
        if self.amp is not None and self.dtype not in ("fp32", self.amp):
            raise UserError(f"amp {self.amp} goes with dtype fp32 or {self.amp}, got {self.dtype}")
        if self.attention == "flash2" and self.computes_in == "fp32":
            raise UserError("attention flash2 needs a 16-bit dtype; use sdpa with fp32")
        if self.prompt is not None and single("prompt", self.prompt) >= np.min(self.seq):
            raise UserError(f"prompt {self.prompt} leaves nothing of seq {np.min(self.seq)} to a completion")
        if self.in_backward and (self.clip_grad or self.grad_accum > 1 or self.compile != "none"):
            accumulates = "grad_accum 1" if self.grad_accum > 1 else "compile none"
            other = "no clipping (--no-clip-grad)" if self.clip_grad else accumulates
            raise UserError(f"in_backward goes with {other}: each gradient is gone before the next one is there")
        exponent_of(self.routing)
        object.__setattr__(self, "stack", SoftwareStack.of(self.stack))
        object.__setattr__(self, "image_size", self._checked_image_size())
        self._check_ranks()
        object.__setattr__(self, "lengths", lengths_of(self.lengths))
        if self.lengths is not None and self.packing == "none" and self.seq_multiple > 1:
            ranks = f"cp {self.cp}" if self.cp > 1 else f"tp {self.tp} with sequence_parallel"
            raise UserError(f"lengths: {ranks} shares samples of one length; leave out --lengths, or use packing dense")
        self._check_packing()

    def _check_choices(self) -> None:
        """Raise `UserError` for words that nothing is called, and flags that are neither true nor false."""
        for name, choices in (
            ("dtype", FLOATING), ("checkpoint", CHECKPOINT), ("attention", ATTENTION), ("kernels", KERNELS),
            ("compile", COMPILE), ("fp8", FP8), ("int8", INT8), ("engine", ENGINES), ("objective", OBJECTIVES),
            ("reference", REFERENCES), ("packing", PACKING), ("experts", EXPERTS), ("parallel", PARALLEL),
            ("ddp", DDP), ("offload", OFFLOAD), ("cp_rotate", (*ROTATE, ULYSSES)), ("fsdp_units", FSDP_UNITS),
        ):  # fmt: skip
            one_of(name, getattr(self, name), choices)
        for name, choices in (("amp", ("bf16", "fp16")), ("reduce_dtype", FLOATING)):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), choices)
        if not (isinstance(self.optimizer, str) and optimizers.is_optimizer(self.optimizer)):
            one_of("optimizer", self.optimizer, optimizers.optimizer_names())
        for name in FLAGS:  # "no" is true; a number is what it is (clip_grad 0.0)
            check_kind(name, getattr(self, name), (bool, np.bool_, Real, type(None)), "True or False")
        if not (isinstance(self.qat, str) and QAT.fullmatch(self.qat)):
            raise UserError(f"qat {as_given(self.qat)} is unknown: use none or int8-int4:GROUP, such as int8-int4:32")
        if not (isinstance(self.pp_schedule, str) and SCHEDULE.fullmatch(self.pp_schedule)):
            raise UserError(f"pp_schedule {as_given(self.pp_schedule)} is unknown: use 1f1b, gpipe or interleaved:v=2")
        check_kind("node", self.node, (type(None), str, PathLike), "a name or the path of a TOML")

    def _checked_image_size(self) -> tuple[int, ...]:
        """Height and width of images, which JSON has as a list."""
        size = tuple(self.image_size) if isinstance(self.image_size, (list, tuple)) else ()
        counts = zip((self.images, *size), (0, 1, 1), strict=False)
        if len(size) != 2 or not all(isinstance(n, (int, np.integer)) and n >= least for n, least in counts):
            got = f"{as_given(self.images)} of {as_given(self.image_size)}"
            raise UserError(f"images are counted from 0, height and width (image_size) from 1: got {got}")
        return size

    def _check_ranks(self) -> None:
        """Raise `UserError` where the job's GPUs are no groups as they are asked for."""
        gpus = np.asarray(self.gpus)
        for name in ("tp", "pp", "cp"):
            if (ranks := single(name, getattr(self, name))) != 1 and np.any(gpus % ranks):
                raise UserError(f"{name} {ranks} does not divide the {of_these(np.max(gpus), 'GPU')} of the job")
        if np.any(gpus % (self.tp * self.pp * self.cp)):
            shared = ", ".join(f"{name} {n}" for name in ("tp", "pp", "cp") if (n := getattr(self, name)) > 1)
            raise UserError(f"{shared} do not divide the {of_these(np.max(gpus), 'GPU')} of the job together")
        if self.sequence_parallel and self.tp == 1:
            raise UserError("sequence_parallel is of layers that tensor-parallel ranks share: give tp, too")
        if self.shard_group is not None:
            group, sharing = single("shard_group", self.shard_group), gpus // (self.tp * self.pp)
            if group < 2 or np.any((sharing > group) & (sharing % group > 0)):
                of = "" if self.tp == 1 else f" (of {self.tp} that share layers)"
                of += "" if self.pp == 1 else f" (of {self.pp} stages)"
                raise UserError(
                    f"shard_group {group}: the {np.max(sharing)} GPUs of the job{of} are no groups of so many"
                )
        if self.nodes is not None and single("nodes", self.nodes) > np.min(gpus):
            raise UserError(f"nodes {self.nodes} are more than the {of_these(np.min(gpus), 'GPU')} of the job")

    def _check_packing(self) -> None:
        if self.unpads and self.compile != "none":
            raise UserError("padded batches with attention flash2 (unpadding) are not modelled with compile; use sdpa")
        if self.packing == "none":
            return
        if self.objective != "sft":
            raise UserError(f"packing {self.packing}: sequences of {self.objective} are not packed; use packing none")
        if self.padded or self.group_by_length:
            other = "padded" if self.padded else "group_by_length"
            raise UserError(f"packing {self.packing} leaves no padding: give one of packing and {other}")
        if self.within_documents and self.compile != "none":
            raise UserError(f"packing {self.packing} with compile {self.compile} is not modelled; use packing dense")

    @property
    def computes_in(self) -> str:
        """The dtype of matrix products: autocast's, or that of the weights."""
        return self.amp or self.dtype

    @property
    def qat_group(self) -> int | None:
        """Values of a row of a weight that share a scale in fake quantisation; None without it."""
        return None if self.qat == "none" else int(self.qat.partition(":")[2])

    @property
    def loops_experts(self) -> bool:
        """Whether a mixture loops over its experts."""
        return self.experts == "eager" or self.stack.loops_experts

    def uses(self, whose: str) -> bool:
        """Whether kernels of liger's, cce's or trl's are asked for."""
        return whose in self.kernels.split("+")

    @property
    def within_documents(self) -> bool:
        """Whether tokens of packed documents see their own document only."""
        return self.packing in WITHIN

    @property
    def unpads(self) -> bool:
        """Whether attention is over the tokens that are no padding: flash-attn takes no mask."""
        return self.padded and self.attention == "flash2"

    @property
    def replicas(self) -> Dim:
        """How many GPUs, or groups of `tp` times `pp` times `cp` of them, work on samples of their own."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def shares_heads(self) -> bool:
        """Whether ranks that share a sequence share heads within attention."""
        return self.cp > 1 and self.cp_rotate == ULYSSES

    @property
    def seq_multiple(self) -> int:
        """What `seq` is a multiple of, where ranks share the tokens of a sequence; 1 where any length goes."""
        parts = self.cp if self.cp == 1 or self.shares_heads else 2 * self.cp
        return lcm(parts, self.tp if self.sequence_parallel else 1)

    @property
    def shape(self) -> tuple[Dim, Dim]:
        """Rows and tokens of a row that the model gets: one row of all where documents are found in one row only.

        So flash-attn gets them (`_is_packed_sequence` of transformers/modeling_flash_attention_utils.py), and so
        `DataCollatorWithFlattening` lays out a micro-batch.
        """
        if self.packing == "flat":
            return 1, self.tokens // self.grad_accum
        if self.packing == "varlen" and self.attention == "flash2":
            return 1, self.batch * self.seq
        return self.sequences, self.seq // self.cp

    @property
    def of_sample(self) -> int:
        """Sequences of a sample: two of a pair."""
        return 2 if self.objective in PAIRS else 1

    @property
    def sequences(self) -> Dim:
        """Sequences of a micro-batch."""
        return self.batch * self.of_sample

    @property
    def tokens(self) -> Dim:
        """Tokens of one optimizer step that are no padding."""
        if self.lengths is None or self.packing in ("dense", "varlen"):
            return self.sequences * self.seq * self.grad_accum
        counted = np.rint(self.sequences * self.lengths.mean(self.seq)).astype(np.int64) * self.grad_accum
        return counted if counted.ndim else int(counted)

    @property
    def prompt_tokens(self) -> Dim:
        """Tokens of a sequence that are its prompt."""
        return (self.seq + 1) // 2 if self.prompt is None else self.prompt

    @property
    def explicit_mask(self) -> bool:
        """Whether sdpa gets a mask: compiled code cannot look whether there is padding (`_ignore_causal_mask_sdpa`).

        That is of models that get an attention mask, as from transformers' and TRL's collators. Without one the packed
        sequences that the positions might hold make a mask, unless there is a cache (`_preprocess_mask_arguments`).
        """
        return self.padded or self.compile != "none"

    @property
    def images_in_words(self) -> str:
        """How many images a sample has, and how large they are."""
        return f"{of_these(self.images, 'image')} of {' x '.join(map(str, self.image_size))} pixels a sample"

    def as_dict(self) -> dict[str, Any]:
        """The setup as plain values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "lengths": self.lengths.spec if self.lengths else None, "stack": self.stack.as_dict()}


FLAGS = tuple(f.name for f in fields(Setup) if f.type is bool)
