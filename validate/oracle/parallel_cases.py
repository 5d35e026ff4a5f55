"""What `perfmodel validate counts --parallel` compares: ranks of programs of several GPUs. Needs no torch."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from perfmodel.architectures import Config, from_config
from perfmodel.architectures.llama import CUT, SHARING_TOKENS, STAGED
from perfmodel.setup import DDP, Setup

from .cases import MIXTURES, NO_DROPOUT, SMALL, Case, fitting, with_targets

FORMS = ("ddp", "fsdp2")
ZERO = ("zero1", "zero2", "zero3")
WAYS: tuple[dict[str, Any], ...] = (
    {"parallel": "ddp"}, {"parallel": "fsdp2"}, {"parallel": "fsdp2", "offload": "params"},
    {"parallel": "fsdp2", "reshard": False}, {"parallel": "fsdp2", "gpus": 4, "shard_group": 2},
    {"parallel": "fsdp2", "gpus": 6, "shard_group": 3, "reshard": False, "offload": "params"},
)  # fmt: skip
REDUCED: tuple[dict[str, Any], ...] = (  # in another dtype than that of the gradients
    {"reduce_dtype": "fp32"}, {"reduce_dtype": "fp32", "gpus": 4, "shard_group": 2}, {"reduce_dtype": "bf16"},
    {"reduce_dtype": "fp32", "sync_each_batch": True, "grad_accum": 3}, {"reduce_dtype": "fp32", "offload": "params"},
    {"reduce_dtype": "fp16", "gpus": 3, "reshard": False}, {"sync_each_batch": True, "gpus": 4, "shard_group": 2},
)  # fmt: skip
BY_BLOCKS: tuple[dict[str, Any], ...] = (  # all else in one unit
    {}, {"offload": "params"}, {"reshard": False}, {"gpus": 4, "shard_group": 2, "reduce_dtype": "fp32"},
)  # fmt: skip
BY_HALVES = ("lora:r=4", "lora:r=2,targets=all-linear,adapter_dtype=bf16", "rslora:r=3")  # of LoRAs, units, too
OFFLOADED = (("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "params"))
MODELS = ("llama", "gpt2", "gemma2", "qwen3_moe")
OWN_LOSS_MODELS = ("llama", "qwen3")
METHODS = (
    "full",
    "lora:r=4",
    "lora:r=2,targets=all-linear,dropout=0.1,adapter_dtype=bf16",
    "dora:r=4",
    "qlora:r=4,quant_storage=bf16",
    "qlora:r=4",
    "top_k:k=1",
    "top_k:k=2,inner=lora",
)
VIRTUAL = ("prefix_tuning:tokens=6", "p_tuning:tokens=6")
TENSOR_METHODS = ("full", "lora:r=4", "lora:r=2,targets=all-linear,dropout=0.1,adapter_dtype=bf16")
SEQUENCE_METHODS = ("full", "lora:r=8,targets=all-linear", "lora:r=4", "lora:r=4,targets=o_proj+down_proj")
MANY_BUCKETS: dict[str, Any] = {  # DDP fills several (of 1 MiB, then 25)
    **SMALL["llama"], "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096,
}  # fmt: skip
COMPILED_MODELS = ("llama", "qwen2", "mistral", "qwen3", "gemma", "phi", "olmo2", "granite")
STAGED_METHODS = ("full", "lora:r=4", "lora:r=2,targets=all-linear,dropout=0.1", "dora:r=4", "top_k:k=2")
SCHEDULES = (  # of a pipeline, with its ranks and micro-batches
    ("1f1b", 2, 3), ("interleaved:v=2", 2, 4), ("gpipe", 2, 2), ("1f1b", 3, 5), ("interleaved:v=2", 3, 6),
    ("1f1b", 2, 2), ("gpipe", 3, 1), ("interleaved:v=3", 2, 3),
)  # fmt: skip
MESHES: tuple[tuple[int, int, dict[str, Any]], ...] = (  # groups of so many shards, and who shares what beside them
    (1, 2, {"tp": 2}), (2, 2, {"tp": 2}), (2, 4, {"cp": 2}), (1, 3, {"tp": 2}), (3, 2, {"cp": 2}), (2, 3, {"tp": 2}),
    (1, 2, {"tp": 2, "cp": 2}), (2, 4, {"tp": 2, "cp": 2}),
)  # fmt: skip
# What replicas of stages do, how many there are, and who shares what beside them
STAGE_WAYS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {"parallel": "fsdp2"}), (2, {"parallel": "fsdp2", "reshard": False}), (1, {"tp": 2}),
    (3, {"parallel": "fsdp2", "reshard": False, "dtype": "fp32", "amp": "bf16"}), (1, {"dtype": "fp32", "amp": "bf16"}),
    (4, {"parallel": "fsdp2", "shard_group": 2, "dtype": "bf16", "amp": "bf16"}), (2, {"parallel": "fsdp2", "tp": 2}),
    (2, {"dtype": "bf16", "amp": "bf16"}), (3, {"parallel": "fsdp2", "dtype": "fp32"}),
    (1, {"tp": 2, "sequence_parallel": True}), (2, {"parallel": "fsdp2", "cp": 2, "reshard": False}),
    (1, {"parallel": "fsdp2", "cp": 2, "cp_rotate": "alltoall", "dtype": "fp32", "amp": "bf16"}),
    (2, {"parallel": "fsdp2", "reshard": False, "tp": 2, "sequence_parallel": True}),
)  # fmt: skip
RANKS = (2, 3, 4, 5, 8)  # also such as divide no dim
CHECKPOINTS = ("none", "block", "block-reentrant")
PRECISIONS: tuple[dict[str, Any], ...] = (
    {"dtype": "bf16"}, {"dtype": "fp32", "amp": "bf16"}, {"dtype": "fp32"}, {"dtype": "bf16", "amp": "bf16"},
)  # fmt: skip
BASE = Setup(batch=2, seq=17)


def rank_models() -> Iterator[Config]:
    """Small models, with the head's weight its own and shared."""
    for name in MODELS:
        values = {**SMALL, **MIXTURES}[name] | NO_DROPOUT.get(name, {})
        for tied in (False, True):
            yield Config({**values, "tie_word_embeddings": tied}, name, f"{name}-{'tied' if tied else 'untied'}")


def rank_grid(which: str) -> Iterator[Case]:
    """Every form with every model and method: "quick" in one setup each, which go through all options in turn;
    "standard" in five; "all" in every one.
    """
    for i, config in enumerate(rank_models()):
        for j, method in enumerate(METHODS):
            for k, way in enumerate(WAYS):
                setups = every() if which == "all" else varied(5 * i + 3 * j + 2 * k, 1 if which == "quick" else 5)
                for setup in setups:
                    yield _case(config, method, replace(setup, **way))

        for j, method in enumerate(("full", "lora:r=2,targets=all-linear", "dora:r=4")):
            for k, way in enumerate(REDUCED):
                if which == "quick" and (i + j + k) % 6:
                    continue
                for setup in every() if which == "all" else varied(5 * i + 7 * j + k, 1 if which == "quick" else 3):
                    yield _case(config, method, replace(setup, parallel="fsdp2", **way))
        for j, method in enumerate(("full", "lora:r=2,targets=all-linear", "qlora:r=4", "top_k:k=1")):
            for k, way in enumerate(BY_BLOCKS):
                if which == "quick" and (i + j + k) % 6:
                    continue
                for setup in every() if which == "all" else varied(5 * i + 3 * j + k, 1 if which == "quick" else 3):
                    yield _case(config, method, replace(setup, parallel="fsdp2", fsdp_units="blocks", **way))

        for j, (method, way) in enumerate(product(BY_HALVES, BY_BLOCKS)):
            if which == "quick" and (i + j) % 6:
                continue
            for setup in every() if which == "all" else varied(5 * i + 3 * j, 1 if which == "quick" else 3):
                if setup.checkpoint != "block-reentrant":
                    yield _case(config, method, replace(setup, parallel="fsdp2", fsdp_units="adapters", **way))

    for k, method in enumerate(("full", "lora:r=32,targets=all-linear", "top_k:k=3", "lora:r=32,targets=all-linear")):
        for setup in varied(k, 1 if which == "quick" else 5):
            for ddp in ("plain", "find-unused"):
                setup = replace(setup, batch=1, seq=3, parallel="ddp", ddp=ddp)
                yield _case(Config(MANY_BUCKETS, "llama", "llama-large"), method, setup)
    for k, method in enumerate(("full", "lora:r=4")):  # blocks of MPT get a float that FSDP2 casts
        for setup in varied(3 + k, 1 if which == "quick" else 5):
            for form in FORMS:
                yield _case(Config(SMALL["mpt"], "mpt", "mpt"), method, replace(setup, parallel=form))
    for k, method in enumerate(VIRTUAL):  # tokens and a cache of their own for every block
        for setup in varied(k, 2 if which == "quick" else 5):
            for form in FORMS:
                config = Config({**SMALL["llama"], "num_hidden_layers": 6}, "llama", "llama-6")
                if (
                    setup.amp is None or form == "ddp" or not method.startswith("prefix")
                ):  # else PyTorch ends in an error
                    yield _case(config, method, replace(setup, parallel=form, checkpoint="none"))
    yield from own_loss_grid(which)
    yield from tensor_grid(which)
    yield from mesh_grid(which)
    yield from sequence_grid(which)
    yield from ring_grid(which)


def own_loss_grid(which: str) -> Iterator[Case]:
    """Heads whose loss reads their weight, in every form; with LoRA TRL's gathers one of its own by itself."""
    for i, (name, tied) in enumerate((name, tied) for name in OWN_LOSS_MODELS for tied in (False, True)):
        config = Config({**SMALL[name], "tie_word_embeddings": tied}, name, f"{name}-{'tied' if tied else 'untied'}")
        for j, (kernels, method) in enumerate(product(("trl", "cce"), ("full", "lora:r=4", "top_k:k=1"))):
            for k, way in enumerate((*WAYS, *({**way, "fsdp_units": "blocks"} for way in WAYS[1:]))):
                apart = method.startswith("lora") and not tied and way.get("fsdp_units") != "blocks"
                if (which == "quick" and (i + j + k) % 3) or (apart and (kernels == "cce" or "offload" in way)):
                    continue  # PyTorch ends in an error, or the head is the host's
                for setup in varied(5 * i + 3 * j + 2 * k, {"quick": 1, "standard": 3, "all": 12}[which]):
                    setup = replace(setup, attention="sdpa", kernels=kernels, **way)
                    if setup.dtype == "fp32" and kernels == "cce" and (setup.amp is None or setup.parallel == "ddp"):
                        setup = replace(setup, dtype="bf16")
                    yield _case(config, method, setup)


def compiled_grid(which: str) -> Iterator[Case]:
    """Compiled ranks of both forms that have them.

    Under DDP without checkpoints: there AOTAutograd runs the last block's last product again, which is not modelled.
    """
    ways: tuple[dict[str, Any], ...] = (
        {"parallel": "ddp"}, {"parallel": "fsdp2"},
        {"parallel": "fsdp2", "reshard": False, "gpus": 4, "shard_group": 2},
        {"parallel": "fsdp2", "fsdp_units": "blocks", "reduce_dtype": "fp32"},
    )  # fmt: skip
    methods = ("full", "lora:r=4", "lora:r=2,targets=all-linear", "top_k:k=2")
    for i, name in enumerate(COMPILED_MODELS):
        config = Config({**SMALL[name], "tie_word_embeddings": i % 2 > 0, "num_hidden_layers": 4 + i % 3}, name, name)
        for j, method in enumerate(methods):
            for k, way in enumerate(ways):
                if which == "quick" and (i + j + k) % 3:
                    continue
                for setup in varied(5 * i + 3 * j + 2 * k, 5 if which == "all" else 1):
                    checkpoint = "none" if way["parallel"] == "ddp" else setup.checkpoint
                    yield _case(config, method, replace(setup, compile="default", **{"checkpoint": checkpoint, **way}))
    large = Config({**MANY_BUCKETS, "tie_word_embeddings": False}, "llama", "llama-large")
    for k, method in enumerate(("full", "lora:r=32,targets=all-linear")):  # graphs that are cut
        for ddp in ("plain", "find-unused"):
            precision = PRECISIONS[k + (ddp == "plain")]
            setup = replace(BASE, batch=1, seq=3, gpus=2, compile="default", ddp=ddp, **precision)
            yield _case(large, method, setup)
    yield from compiled_layers_grid(which)


def compiled_layers_grid(which: str) -> Iterator[Case]:
    """Compiled ranks that share layers, or tokens between them, too; without checkpoints, which PyTorch cannot compile.

    Not equal are dropout before adapters, whose masks are kept otherwise, the order of one product in full fine-tuning
    beside norms of heads, and what Seed-OSS keeps (`README.md`).
    """
    grids = (tensor_grid, sequence_grid, mesh_grid)
    shared = [case for grid in grids for case in grid("standard") if is_compiled_alike(case)]
    for case in shared[::13] if which == "quick" else shared:
        yield replace(case, setup=replace(case.setup, compile="default", checkpoint="none", amp=None))


def is_compiled_alike(case: Case) -> bool:
    """Whether PyTorch compiles it, as the tape has it."""
    setup, heads = case.setup, case.config.values["model_type"] in ("qwen3", "gemma3_text", "exaone4")
    several = setup.replicas > 1 and (setup.sequence_parallel or setup.parallel != "fsdp2")
    apart = "dropout" in case.method or (heads and case.method == "full")
    return not (several or apart or setup.tp == 1 or setup.cp > 1 or case.config.values["model_type"] == "seed_oss")


def zero_grid(which: str) -> Iterator[Case]:
    """As `rank_grid`, of DeepSpeed's ZeRO: the whole model in 16 bits.

    A mixture under ZeRO-3 is left out: its block is a leaf, whose gradients come together once its backward is through,
    which is not modelled.
    """
    for i, config in enumerate(rank_models()):
        for j, method in enumerate(("full", "lora:r=4", "lora:r=16,targets=all-linear")):
            for k, (parallel, offload) in enumerate((*((stage, "none") for stage in ZERO), *OFFLOADED)):
                setups = every() if which == "all" else varied(5 * i + 3 * j + 2 * k, 1 if which == "quick" else 5)
                for setup in setups:
                    if parallel != "zero3" or config.values["model_type"] not in MIXTURES:
                        casts: dict[str, Any] = {"dtype": "bf16", "amp": None}
                        yield _case(config, method, replace(setup, parallel=parallel, offload=offload, **casts))
    yield from heads_grid(which)


def heads_grid(which: str) -> Iterator[Case]:
    """Ranks that share every sequence by Ulysses, over ZeRO's stages in turn."""
    for i, name in enumerate(STAGED):
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": None}
        config = Config({**SMALL[name], **heads, "tie_word_embeddings": i % 2 == 0}, name, name)
        for j, method in enumerate(("full", "lora:r=4", "lora:r=16,targets=all-linear")):
            for k, setup in enumerate(varied(5 * i + 3 * j, {"quick": 1, "standard": 3, "all": 12}[which])):
                ranks, stage = (2, 4)[(i + j) % 2], ZERO[(i + j + k) % 3]
                several = {
                    "gpus": ranks * (1 + setup.gpus % 2),
                    "cp": ranks,
                    "cp_rotate": "ulysses",
                    "seq": 256 * ranks,
                }
                casts: dict[str, Any] = {"dtype": "bf16", "amp": None}
                yield _case(config, method, replace(setup, parallel=stage, **several, **casts))


def tensor_grid(which: str) -> Iterator[Case]:
    """Its part of tensor parallel, with the architectures and methods that have it.

    PyTorch's fused update and clipping refuse what these models mix, so it is updated parameter by parameter.
    """
    for i, name in enumerate(CUT):
        heads = {"num_key_value_heads": 2} if name == "gemma" else {}  # which shares one otherwise
        for j, method in enumerate(TENSOR_METHODS):
            values = {**SMALL[name], **NO_DROPOUT.get(name, {}), **heads, "tie_word_embeddings": (i + j) % 2 == 0}
            config = Config(values, name, f"{name}-{'un' * ((i + j) % 2)}tied")
            setups = every() if which == "all" else varied(5 * i + 3 * j, 1 if which == "quick" else 5)
            for setup in setups:
                ranks = 4 if setup.gpus > 3 and config.values["num_key_value_heads"] % 4 == 0 else 2
                plain: dict[str, Any] = {"dtype": "bf16", "amp": None, "clip_grad": False, "optimizer": "adamw-loop"}
                yield _case(config, method, replace(setup, **plain, gpus=ranks, tp=ranks))


def mesh_grid(which: str) -> Iterator[Case]:
    """Its part of shards, over groups too, beside ranks that share layers or sequences: accelerate's mesh."""
    for i, name in enumerate(STAGED):
        config = Config({**SMALL[name], "tie_word_embeddings": False, "sliding_window": None}, name, f"{name}-untied")
        for j, method in enumerate(TENSOR_METHODS):
            for k, setup in enumerate(varied(5 * i + 3 * j, {"quick": 1, "standard": 3, "all": 12}[which])):
                groups, group, several = MESHES[(2 * i + j + k) % len(MESHES)]
                if name in CUT or "tp" not in several:
                    replicas, shared = groups * group, prod(several.values())
                    plain: dict[str, Any] = {"amp": None, "clip_grad": False, "optimizer": "adamw-loop"}
                    plain |= {"dtype": "bf16", "parallel": "fsdp2", "gpus": replicas * several.get("tp", 1)}
                    plain |= {"shard_group": group if groups > 1 else None, "seq": 24 * shared, "reshard": k % 2 == 0}
                    yield _case(config, method, replace(setup, **plain, **several))


def sequence_grid(which: str) -> Iterator[Case]:
    """Its part of ranks that share tokens, too: all parameters are DTensors, which lists and clipping take."""
    forms = ("adamw-foreach", "adamw-loop", "adamw-fused")
    for i, name in enumerate(SHARING_TOKENS):
        for j, method in enumerate(SEQUENCE_METHODS):
            tied = (i + j) % 2 == 0
            config = Config({**SMALL[name], "tie_word_embeddings": tied}, name, f"{name}-{'un' * (not tied)}tied")
            for k, setup in enumerate(every() if which == "all" else varied(5 * i + 3 * j, {"quick": 1}.get(which, 5))):
                ranks = 4 if setup.gpus > 3 and config.values["num_key_value_heads"] % 4 == 0 else 2
                shared: dict[str, Any] = {"gpus": ranks, "tp": ranks, "sequence_parallel": True, "seq": 4 * ranks}
                casts: dict[str, Any] = {"dtype": ("bf16", "fp32")[(i + j) % 4 == 3], "amp": None, "ddp": "plain"}
                rest: dict[str, Any] = {"optimizer": forms[(i + j + k) % 3], "batch": 1 + (i + k) % 2}
                if (i + 2 * j + k) % 3 == 2:  # shards of 2 or 3, one group or two of them
                    several = {"parallel": "fsdp2", "gpus": ranks * (2, 3, 4)[(j + k) % 3], "reshard": j % 2 == 0}
                    shared |= several | {"shard_group": 2 if (j + k) % 3 == 2 else None}
                rest["attention"] = ("sdpa", "eager")[(i + j + k) % 5 == 4]
                yield _case(config, method, replace(setup, **shared, **casts, **rest))


def pipeline_grid(which: str) -> Iterator[Case]:
    """Stages of a pipeline: every architecture and method that has them, in schedules, lengths and replicas in turn."""
    for i, name in enumerate(STAGED):
        for j, method in enumerate(STAGED_METHODS):
            for k in range({"quick": 1, "standard": 3, "all": 12}[which]):
                n = 5 * i + 7 * j + k
                schedule, ranks, micros = SCHEDULES[n % len(SCHEDULES)]
                setup = replace(
                    BASE, dtype=("bf16", "fp32")[n % 2], optimizer="adamw-foreach", clip_grad=n % 5 != 4,
                    checkpoint=("none", "block")[n // 2 % 2], gpus=ranks * (1 + n // 3 % 2), pp=ranks,
                    pp_schedule=schedule, grad_accum=micros,
                )  # fmt: skip
                layers = {"num_hidden_layers": 6 + n % 3, "tie_word_embeddings": False}
                config = Config({**SMALL[name], **layers}, name, name)
                yield _case(config, method, setup)
    yield from stage_mesh_grid(which)


def stage_mesh_grid(which: str) -> Iterator[Case]:
    """Its part whose replicas have shards, whose layers or sequences several share, and in mixed precision."""
    for i, name in enumerate(STAGED):
        layers = {"num_hidden_layers": 6 + i % 3, "tie_word_embeddings": False, "sliding_window": None}
        config = Config({**SMALL[name], **layers}, name, name)
        for j, method in enumerate(STAGED_METHODS):
            for k in range({"quick": 1, "standard": 4, "all": 2 * len(STAGE_WAYS)}[which]):
                n = 5 * i + 8 * j + k
                replicas, way = STAGE_WAYS[n % len(STAGE_WAYS)]
                tokens = "sequence_parallel" in way
                cut = method in (SEQUENCE_METHODS if tokens and name in SHARING_TOKENS else TENSOR_METHODS)
                if "tp" in way and not (cut and (name in SHARING_TOKENS or not tokens)):
                    tokens, (replicas, way) = False, STAGE_WAYS[(n + i + 1) % 2]
                shared = way.get("tp", 1)
                plain: dict[str, Any] = {"clip_grad": False, "optimizer": "adamw-loop"} if shared > 1 else {}
                plain = {"seq": 24} if tokens or "cp" in way else plain
                schedule, ranks, micros = SCHEDULES[(n + i + 3 * j + k) % len(SCHEDULES)]
                base: dict[str, Any] = {"optimizer": "adamw-foreach", "clip_grad": n % 4 != 3, **plain, **way}
                setup = replace(
                    BASE, **base, checkpoint=("none", "block")[n // 2 % 2], pp=ranks,
                    gpus=ranks * replicas * shared * way.get("cp", 1),
                    pp_schedule=schedule, grad_accum=micros,
                )  # fmt: skip
                yield _case(config, method, setup)


def ring_grid(which: str) -> Iterator[Case]:
    """Ranks that share every sequence, over FSDP2, with the architectures and methods that have stages."""
    for i, name in enumerate(STAGED):
        config = Config({**SMALL[name], "tie_word_embeddings": False, "sliding_window": None}, name, name)
        for j, method in enumerate(STAGED_METHODS):
            for setup in varied(5 * i + 3 * j, {"quick": 1, "standard": 5, "all": 12}[which]):
                ranks = 2 + (i + j) % 3
                several = {"parallel": "fsdp2", "cp": ranks, "gpus": ranks * (1 + setup.gpus % 2), "seq": 12 * ranks}
                rotate = ("allgather", "alltoall")[setup.gpus % 2]
                yield _case(config, method, replace(setup, **several, cp_rotate=rotate, reshard=(i + j) % 3 > 0))


def _case(config: Config, method: str, setup: Setup) -> Case:
    architecture = from_config(config)
    if method.startswith("qlora") and setup.dtype == "fp32":  # a base in few bits is beside 16-bit weights
        setup = replace(setup, dtype="bf16", amp=None)
    setup = replace(setup, ddp=_that_runs(setup))
    if config.values["model_type"] in MIXTURES:
        method = method.replace("targets=all-linear", "targets=q_proj+v_proj")  # no adapter of experts has dropout
    return Case(config, with_targets(method, architecture), fitting(setup, architecture.traits))


def _that_runs(setup: Setup) -> str:
    """What DDP is told of the graph, plain where PyTorch ends in an error with it (`recording.parallel.ddp_search`)."""
    if setup.parallel != "ddp" or setup.replicas == 1 or (setup.ddp == "static-graph" and setup.grad_accum > 1):
        return "plain"
    return "plain" if setup.ddp == "find-unused" and setup.checkpoint == "block-reentrant" else setup.ddp


def varied(first: int, count: int) -> Iterator[Setup]:
    """So many setups that go through all options in turn."""
    for k in range(first, first + count):
        yield replace(
            BASE, **PRECISIONS[k % 4], gpus=RANKS[k % 5], checkpoint=CHECKPOINTS[k % 3],
            grad_accum=(1, 3, 2)[k // 2 % 3], clip_grad=k % 5 != 4, ddp=DDP[k // 3 % 3],
        )  # fmt: skip


def every() -> Iterator[Setup]:
    """All of them."""
    for gpus in RANKS:
        for precision in PRECISIONS:
            for checkpoint in CHECKPOINTS:
                for accum in (1, 3):
                    for clip in (True, False):
                        for ddp in DDP:
                            yield replace(
                                BASE, **precision, gpus=gpus, checkpoint=checkpoint, grad_accum=accum, clip_grad=clip,
                                ddp=ddp,
                            )  # fmt: skip
