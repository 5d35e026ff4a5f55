"""Which of several GPUs share layers, sequences or shards, as a file gives the sizes of their mesh.

Axolotl and LLaMA-Factory v1 have them among their own keys; accelerate in a section of its launcher's file, and the
Trainer in a training config's, which accelerate takes too. Source: accelerate/parallelism_config.py (1.15).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import UserError
from ..resources import mapping
from ..setup import ROTATE, ULYSSES, WITHIN
from .keys import NOTHING, Keys

MESH = "parallelism_config"
OF_MESH = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
OF_SP = "sp_"  # how accelerate's keys of DeepSpeed's Ulysses begin
TP = ("tensor_parallel_size", "tp_size")  # of training tools, which load the model cut as it says
CUT_WHEN_LOADED = "layers cut by a tp_plan with which the program loads the model: accelerate itself cuts none"
APART = "batches of their own for any number of GPUs, not one that they share (split_batches)"
ONE_GROUP = "shards over all GPUs, not within groups of them"
OWN_SAMPLES = "samples of its own for every GPU"
WITHOUT_CP = f"{OWN_SAMPLES}, without context parallel"
WITHOUT_ULYSSES = f"{OWN_SAMPLES}, not Ulysses' attention over sequences that they share"
# Sizes among a training tool's own keys, and what is answered where one is larger than 1
OWN = {
    "context_parallel_size": f"{OWN_SAMPLES}, not ring-flash-attn's attention over sequences that they share",
    "sequence_parallel_degree": f"{OWN_SAMPLES}, not ring-flash-attn's attention over sequences that they share",
    "cp_size": WITHOUT_ULYSSES, "dp_replicate_size": ONE_GROUP, "mp_replicate_size": ONE_GROUP,
    "expert_parallel_size": "without expert parallel",
}  # fmt: skip
HOLD_FLOATS = ("Axolotl", "LLaMA-Factory", "LLaMA-Factory v1")  # tools, what is packed in 4 bits
CUT_WEIGHTS = ("fsdp1", "fsdp2", "zero3")
OF_ULYSSES = ("sdpa", "flash2")  # attention that is modelled with it
UNCUT = "the logits in memory, without cut cross entropy"
UNFUSED_HEAD = "the logits in memory, without TRL's fused head"
NOT_LIGER = "PyTorch's kernels, not Liger's, which are not modelled with context parallel"
# Of packed documents under accelerate's context parallel (accelerate/big_modeling.py, `_attach_context_parallel_hooks`)
MASK_DROPPED = "attention across packed documents, as accelerate has it, without the mask that it makes and drops"


@dataclass(frozen=True)
class Mesh:
    """What sizes ask for.

    Attributes:
        tp, cp: GPUs that share every layer, every sequence.
        cp_rotate: as `Setup` names it.
        shard_group: as `Setup` names it.
        group: GPUs over which Axolotl shards, with those that share layers and sequences; on more of them it makes
            several such groups (utils/distributed.py, `_get_parallel_config_kwargs`). 1: all.
        unlike: what is answered instead of the others.
    """

    tp: int
    cp: int
    cp_rotate: str
    shard_group: int | None
    group: int
    unlike: tuple[str, ...]


def mesh_of(keys: Keys, *, shards: bool) -> Mesh:
    """The mesh of a training tool's own keys, and of `parallelism_config`.

    Args:
        shards: whether something is sharded, so that groups of shards make a difference.

    Raises:
        UserError: a size that is no positive integer, or what accelerate refuses.
    """
    said, section = Keys({}, keys.origin), _section(keys)
    sizes, cp_rotate = _sizes(section), ROTATE[0]
    tp = max(sizes["tp_size"], *(keys.count(key, 1) for key in TP))
    shard_group = _shard_group(keys, sizes) if shards else None
    grouped = shards and shard_group is None
    for key, answered in OWN.items():
        if keys.count(key, 1) > 1 and (grouped or answered != ONE_GROUP):
            said.differ(answered, key)
    if sizes["cp_size"] > 1:
        section.one_of("cp_backend", {"torch": True}, True)
        cp_rotate = section.one_of("cp_comm_strategy", {word: word for word in ROTATE}, cp_rotate)
    elif sizes["sp_size"] > 1:
        cp_rotate = ULYSSES
    for key, answered in (("dp_replicate_size", ONE_GROUP), ("tp_size", CUT_WHEN_LOADED)):
        if sizes[key] > 1 and (grouped or answered != ONE_GROUP):
            said.differ(answered, key)
    known = ("cp_backend", "cp_comm_strategy")
    unknown = [key for key in section.unread() if key not in known and not key.startswith(OF_SP)]
    if unknown:
        said.differ("keys that are unknown here", *unknown)
    shards_over, shared = (keys.count(key, 1) for key in ("dp_shard_size", "context_parallel_size"))
    group = shards_over * tp * shared if shards and shards_over > 1 else 1
    return Mesh(
        tp, max(sizes["cp_size"], sizes["sp_size"]), cp_rotate, shard_group, group, tuple(said.told_differences())
    )


def _shard_group(keys: Keys, sizes: Mapping[str, int]) -> int | None:
    """GPUs of a group of shards, where one is named and nothing that is not modelled shares its ranks.

    Axolotl makes as many groups as there are GPUs for; of accelerate's and LLaMA-Factory v1's sizes there are several
    only where replicas are named, too. Those that share a sequence have shards of their own.
    """
    shared = [keys.count(key, 1) for key, answered in OWN.items() if answered != ONE_GROUP]
    if max(*shared, sizes["sp_size"]) > 1:
        return None
    named = [keys.count("dp_shard_size", 1)]
    named += [keys.count("mp_shard_size", 1)] if keys.count("mp_replicate_size", 1) > 1 else []
    named += [sizes["dp_shard_size"] * sizes["cp_size"]] if sizes["dp_replicate_size"] > 1 else []
    return next((size for size in named if size > 1), None)


def check_launch(keys: Keys, gpus: int | None, parallel: str | None) -> None:
    """Refuse sizes of a launcher with which accelerate ends in an error (`_validate_accelerator`).

    Args:
        gpus: of all nodes together; None where the file does not say it.

    Raises:
        UserError: sizes that are not those of the GPUs, or that leave FSDP none.
    """
    section = _section(keys)
    sizes = _sizes(section)
    if keys.get(MESH) in NOTHING or sizes["sp_size"] > 1:
        return  # DeepSpeed makes groups of its own for Ulysses
    told, found = ", ".join(f"{key} {n}" for key, n in sizes.items() if n > 1), prod(sizes.values())
    if found > 1 and gpus not in (None, found):
        raise UserError(f"{section.origin}: {told} are {found} GPUs, and num_processes says {gpus}: make them as many")
    if parallel == "fsdp2" and sizes["dp_shard_size"] * sizes["cp_size"] == 1:
        raise UserError(f"{section.origin}: FSDP has no GPUs to shard over: give dp_shard_size")


def _section(keys: Keys) -> Keys:
    """accelerate's section, whose keys may have its name as a prefix."""
    origin = f"{keys.origin}: {MESH}"
    given = mapping(keys.get(MESH) or {}, origin)
    return Keys({str(key).removeprefix(f"{MESH}_"): value for key, value in given.items()}, origin)


def _sizes(section: Keys) -> dict[str, int]:
    """The sizes of accelerate's section (`ParallelismConfig.__post_init__`)."""
    sizes = {key: section.count(key, 1) for key in OF_MESH}
    if sizes["cp_size"] > 1 and sizes["sp_size"] > 1:
        raise UserError(f"{section.origin}: cp_size and sp_size exclude each other: leave one of them out")
    shared = sizes["tp_size"] > 1 or sizes["cp_size"] > 1
    if shared and sizes["dp_replicate_size"] > 1 and sizes["dp_shard_size"] == 1:
        raise UserError(f"{section.origin}: dp_replicate_size beside tp_size or cp_size needs a dp_shard_size")
    return sizes


def that_shares(cp: int, cp_rotate: str, setup: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Fields of a setup whose GPUs share sequences, as far as that is modelled with the rest of it.

    Packed documents attend to each other then, in rows that are full to their end like any others.

    Returns:
        The fields, and of each that is another than the file's what is said.
    """
    if cp == 1:
        return {}, []
    *plain, own = setup.get("kernels", "torch").split("+")
    if own in ("cce", "trl"):
        kernels = {"kernels": plain[0] if plain else "torch"}
        shared, said = that_shares(cp, cp_rotate, {**setup, **kernels})
        without = ("kernels", UNCUT if own == "cce" else UNFUSED_HEAD)
        return (kernels | shared, [*said, without]) if shared else ({}, said)
    within = setup.get("packing") in WITHIN
    if cp_rotate == ULYSSES:
        by_zero = str(setup.get("parallel")).startswith("zero") and setup.get("attention", "sdpa") in OF_ULYSSES
        if not by_zero or within or setup.get("objective", "sft") != "sft" or setup.get("kernels") == "liger":
            return {}, [("cp", f"{WITHOUT_ULYSSES} (sp_size)")]
        return {"cp": cp, "cp_rotate": cp_rotate, "packing": "none"}, []
    if setup.get("objective", "sft") != "sft" or (within and setup["batch"] > 1):
        return {}, [("cp", f"{WITHOUT_CP} (cp_size)")]
    said = [("packing", f"{MASK_DROPPED} (cp_size)")] if within else []
    said += [("kernels", f"{NOT_LIGER} (cp_size)")] if setup.get("kernels") == "liger" else []
    return {"cp": cp, "cp_rotate": cp_rotate, "packing": "none", "kernels": "torch"}, said


def in_groups(group: int, gpus: Sequence[int], told: Sequence[str]) -> bool:
    """Whether so many GPUs shard within groups of a size, which nothing says yet."""
    return group > 1 and any(n != group for n in gpus) and not any(said.startswith(ONE_GROUP) for said in told)


def splits(keys: Keys) -> bool:
    """Whether accelerate's part of a training config has GPUs share each batch."""
    config = keys.values.get("accelerator_config")
    return isinstance(config, dict) and bool(config.get("split_batches"))


def with_own_part(setup: Mapping[str, Any], gpus: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """A setup whose batch so many GPUs share, and what is said where each of several numbers of them would.

    Those that have the same samples are one (accelerate/data_loader.py, `BatchSamplerShard`).

    Raises:
        UserError: a batch that they cannot share.
    """
    if len(set(gpus)) > 1:
        return dict(setup), [APART]
    batch, parts = setup["batch"], max(1, gpus[0] // (setup.get("tp", 1) * setup.get("cp", 1)))
    if batch % parts:
        raise UserError(f"split_batches: a batch of {batch} cannot be shared by {parts} GPUs: give a multiple")
    return {**setup, "batch": batch // parts}, []


def groups_shards(setup: Mapping[str, Any]) -> bool:
    """Whether shards over groups of GPUs are modelled with the rest of a setup."""
    alone = setup["tp"] == 1 and "cp" not in setup
    return alone or setup.get("objective", "sft") == "sft"


def held_as_floats(tool: str, setup: Mapping[str, Any], method: str | None) -> str | None:
    """The method on GPUs that cut weights: tools hold what is packed in 4 bits as floats, which alone can be cut.

    Axolotl in bf16 (loaders/model.py, `_set_quantization_config`), LLaMA-Factory in the dtype that it computes in
    (model/model_utils/quantization.py, v1/plugins/model_plugins/quantization.py).
    """
    held = {"Axolotl": "bf16"}.get(tool, setup.get("amp") or setup.get("dtype"))
    packs = method is not None and method.partition(":")[0] == "qlora" and "quant_storage" not in method
    if not packs or tool not in HOLD_FLOATS or setup.get("parallel") not in CUT_WEIGHTS:
        return method
    return f"{method}{',' if ':' in str(method) else ':'}quant_storage={held}"
