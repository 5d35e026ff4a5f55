"""What several GPUs do, as a file says it: DeepSpeed's stages, FSDP, sizes of a mesh. How many there are `--gpus` says.

Without it the answer is that of one GPU (`fields.engine`, `fields.fsdp`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..recording.parallel.offload import updates_on_host
from ..resources import mapping
from .keys import NOTHING, Keys
from .meanings import judge, meanings_of
from .mesh import ONE_GROUP, OWN_SAMPLES, mesh_of
from .micro_batches import agreed, numbers, of_all

STAGES = ("ddp", "zero1", "zero2", "zero3")
OFFLOADS = ("offload_optimizer", "offload_param")
OFFLOADED = "without offloading"
TO_HOST = "offloaded to the host's memory, not to NVMe"
STATES_TOO = "optimizer states offloaded like the weights"
PAGE_LOCKED = "offloaded to page-locked memory"
ALL_REDUCED = "DDP, not DeepSpeed's own exchange of gradients (stage 0)"
NOT_HERE = "DDP, not DeepSpeed, whose config is not here and whose name says no stage (deepspeed)"
BY_NAME = "ZeRO-{} as the file's name says, its other options as usual (deepspeed)"
AUTO_TP = "layers cut as PyTorch does it, not by DeepSpeed's AutoTP"
# What DeepSpeed does where a key of `zero_optimization` is not there (runtime/zero/config.py), and at which stages
BUCKET, THRESHOLD = 500_000_000, 100_000  # elements
ABSENT = {"reduce_bucket_size": (BUCKET, (1, 2, 3)), "stage3_param_persistence_threshold": (THRESHOLD, (3,))}
SWITCHED_OFF = {
    "overlap_comm": "gradients exchanged beside backward",
    "reduce_scatter": "gradients exchanged as by default",
    "contiguous_gradients": "gradients copied into buckets to be exchanged",
}  # keys that are on as it is modelled, and what is answered where they are off
# What is off where no key speaks of it, and answered as if it were on: DeepSpeed's default at stages 1 and 2
# (`overlap_comm_valid`), and that of FSDP 1 (accelerate/utils/dataclasses.py)
OVERLAPPED = f"{SWITCHED_OFF['overlap_comm']}, which DeepSpeed does by default at stage 3 alone"
PREFETCHED = "the next unit gathered before a unit's backward, which FSDP 1 does not by default"
OF_MASTERS = "weights and states of the optimizer in fp32 beside those of 16 bit"
CHECKED = "gradients checked for infinities"
SUMMED = "gradients summed in the dtype of the weights"
# `ShardingStrategy` of FSDP1, by name and number (accelerate/utils/constants.py), and what is answered instead
STRATEGIES = {
    "full_shard": "", "shard_grad_op": "", "no_shard": "DDP, not FSDP's no_shard", "hybrid_shard": ONE_GROUP,
    "hybrid_shard_zero2": ONE_GROUP,
}  # fmt: skip
KEPT = ("shard_grad_op", "hybrid_shard_zero2")  # those under which weights stay gathered up to their backward pass
WORDS = ("auto_wrap", "offload")  # of `fsdp`, beside strategies
BY_BLOCKS = "wrapped block by block"
WRAPPED = ("transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap")
PART = re.compile(r"(Moe(Block|Layer)|MoE|MLP|Mlp|Experts?|Attention)$")  # in names of classes: of a block, not a whole
# Of DDP: what is modelled, and what is answered where a file has something else
DDP = {
    "ddp_bucket_cap_mb": (25, "buckets of 25 MiB"),
    "ddp_broadcast_buffers": (True, "buffers broadcast before forward passes"),
    "ddp_backend": ("nccl", "collectives of NCCL"),
}
ONCE = "gradients exchanged once a step, not for every micro-batch"


@dataclass(frozen=True)
class AskedForm:
    """What several GPUs do.

    Attributes:
        parallel: as `Setup` names it; None where nothing is said, which is DDP.
        tp, cp, cp_rotate: GPUs that share every layer, every sequence and how, as `Setup` names it.
        offload, reshard, shard_group: as `Setup` names them.
        setup: further fields of `Setup` that it decides.
        unlike: how the form that is modelled differs from the file's.
        besides: the same of whatever form is taken.
        on_mesh: the same of the sizes of a mesh, which one GPU has nothing of.
        group: as of `mesh.Mesh`.
        samples: of a step on all GPUs together, where they are what says how many each has.
    """

    parallel: str | None = None
    tp: int = 1
    cp: int = 1
    cp_rotate: str = "allgather"
    offload: str = "none"
    reshard: bool = True
    shard_group: int | None = None
    setup: dict[str, Any] = field(default_factory=dict)
    unlike: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    on_mesh: tuple[str, ...] = ()
    group: int = 1
    samples: int | None = None

    def as_typed(self, parallel: str | None = None, cp: int | None = None) -> "AskedForm":
        """What is typed in the place of what a file says, if anything is."""
        typed = self if cp is None else replace(self, cp=cp)
        if parallel in (None, self.parallel or "ddp"):
            return typed
        return replace(typed, parallel=parallel, offload="none", reshard=True, shard_group=None, unlike=())

    def under(self, launch: "AskedForm") -> "AskedForm":
        """A training file's form under that of its launcher, which counts where the file names none.

        Raises:
            UserError: they contradict each other.
        """
        pairs = ((self.parallel, launch.parallel), (self.tp, launch.tp), (self.cp, launch.cp))
        for mine, its in pairs:
            if mine not in (None, 1, its) and its not in (None, 1, "ddp"):
                raise UserError(f"the training config asks for {mine}, the launcher for {its}: leave one of them out")
        named, other = (launch, self) if self.parallel is None and launch.parallel else (self, launch)
        alike = (other.parallel or "ddp") == (named.parallel or "ddp")
        same = other.unlike if alike else ()
        offload = named.offload if named.offload != "none" or not same else other.offload
        shares_otherwise = any(words.startswith(OWN_SAMPLES) for words in self.on_mesh)
        sharing = self if self.cp > 1 or shares_otherwise else launch
        return AskedForm(
            named.parallel, max(self.tp, launch.tp), sharing.cp, sharing.cp_rotate, offload,
            named.reshard and (other.reshard or not alike), self.shard_group or launch.shard_group,
            {**agreed(self.setup, launch.setup), **self.setup}, tuple(dict.fromkeys((*named.unlike, *same))),
            tuple(dict.fromkeys((*self.besides, *launch.besides))),
            tuple(dict.fromkeys((*self.on_mesh, *launch.on_mesh))), samples=launch.samples,
        )  # fmt: skip


@dataclass(frozen=True)
class Zero:
    """What `deepspeed` holds: DeepSpeed's config, or the path of one.

    Attributes:
        stage: None where nothing says it.
        grouped: whether weights are updated in sub-groups of a size of their own.
        config: None where the file is not here; the name says the stage then, as in DeepSpeed's and the tools'
            examples (zero3.json, ds_z3_offload_config.json).
    """

    stage: int | None
    offloads: bool
    grouped: bool
    config: dict[str, Any] | None = None


SUB_GROUP = 1e9  # elements that DeepSpeed updates together by default, as is modelled
IN_SUB_GROUPS = "deepspeed_configs"  # Axolotl's folder: `"sub_group_size": 0` in each of its zero3*.json


def zero_of(keys: Keys) -> Zero | None:
    """What the key that holds DeepSpeed's config asks for; None if it is not there.

    Raises:
        UserError: neither a path nor a mapping, or a file that cannot be read.
    """
    value = keys.get("deepspeed")
    if value is None:
        return None
    if isinstance(value, str):
        named = keys.object_in(value)
        value = value if named is None else named
    if isinstance(value, dict):
        zero = value.get("zero_optimization")
        zero = zero if isinstance(zero, dict) else {}
        grouped = zero.get("sub_group_size", SUB_GROUP) != SUB_GROUP
        return Zero(zero.get("stage"), any(_offloads(zero.get(key)) for key in OFFLOADS), grouped, value)
    if not isinstance(value, str):
        raise keys.wrong("deepspeed", "a path or a mapping")
    name = Path(value).name.lower()
    found = re.search(r"z(?:ero)?[-_]?(?:stage)?[-_]?([0-3])", name)
    return Zero(int(found[1]) if found else None, "offload" in name, Path(value).parent.name == IN_SUB_GROUPS)


def _offloads(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") != "none"


def fsdp_options(keys: Keys) -> dict[str, Any]:
    """FSDP's options, by their names without `fsdp_`; `fsdp_config` holds them or, as Transformers', names a file."""
    options = keys.get("fsdp_config")
    if isinstance(options, str):
        options = keys.object_in(options)
    return without_prefix(options, "fsdp_") if isinstance(options, dict) else {}


def without_prefix(section: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """A section whose keys may have a prefix, without it."""
    return {str(key).removeprefix(prefix): value for key, value in section.items()}


def form_of(keys: Keys, fsdp_version: int = 2) -> AskedForm:
    """The form that a training config asks for.

    Args:
        fsdp_version: where the file names none; 2 is that of Transformers 5.

    Raises:
        UserError: a value of the wrong type, or that nobody knows.
    """
    zero, asked = zero_of(keys), [key for key in ("fsdp", "fsdp_config") if keys.get(key) not in NOTHING]
    if zero is not None and asked:
        raise UserError(f"{keys.origin}: deepspeed and {asked[0]} exclude each other: leave one of them out")
    if zero is not None:
        found = of_zero(zero, keys.origin)
    elif asked:
        words = keys.get("fsdp")
        words = words.split() if isinstance(words, str) else words if isinstance(words, list) else []
        version = {"version": keys.get("fsdp_version")} if keys.get("fsdp_version") else {}
        options = {"version": fsdp_version, **fsdp_options(keys), **version}
        found = of_fsdp(options, f"{keys.origin}: fsdp_config", [str(word) for word in words])
    else:
        other = [
            (key, answered)
            for key, (usual, answered) in DDP.items()
            if keys.values.get(key, usual) not in (None, usual)
        ]
        found = AskedForm(unlike=tuple(f"{answered} ({key})" for key, answered in other))
    return _on_mesh(found, keys)


def of_zero(zero: Zero, origin: str) -> AskedForm:
    """The form of DeepSpeed's config, whether it is here or only named."""
    if zero.config is not None:
        return of_deepspeed(zero.config, f"{origin}: deepspeed")
    if zero.stage is None:
        return AskedForm(unlike=(NOT_HERE,))
    offload = ("none", "optimizer", "optimizer", "params")[zero.stage] if zero.offloads else "none"
    return AskedForm(STAGES[zero.stage], offload=offload, unlike=(BY_NAME.format(zero.stage),))


def of_deepspeed(config: Mapping[str, Any], origin: str) -> AskedForm:
    """The form of DeepSpeed's own config.

    Raises:
        UserError: a value of the wrong type, or a stage that there is not.
    """
    zero = mapping(config.get("zero_optimization") or {}, f"{origin}: zero_optimization")
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in range(len(STAGES)):
        raise UserError(f"{origin}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    own = {key: value for key, value in zero.items() if key not in OFFLOADS or _offloads(value)}
    apart = {key: value for key, value in config.items() if key != "zero_optimization" and not _disabled(value)}
    keys = Keys({**apart, **{f"zero_optimization.{k}": v for k, v in own.items()}}, origin)
    keys.used.add("zero_optimization.stage")
    if stage == 0:
        keys.differ(ALL_REDUCED)
    table = meanings_of("deepspeed")
    for key, (usual, stages) in ABSENT.items():
        if stage in stages and key not in zero:
            keys.differ(f"{table.differs[f'zero_optimization.{key}']}, not DeepSpeed's {usual:,} elements")
    if stage in (1, 2) and zero.get("overlap_comm") is None:
        keys.differ(OVERLAPPED)
    for key, value in zero.items():
        name = f"zero_optimization.{key}"
        answered = SWITCHED_OFF.get(key) if value is False else table.differs.get(name) if value == 0 else None
        if answered:
            keys.differ(answered, name)
    keys.used.update(f"zero_optimization.{key}" for key in SWITCHED_OFF)
    setup: dict[str, Any] = {**numbers(keys)}
    if not any(value is True for value in _section(keys, "activation_checkpointing").values()):
        keys.used.add("activation_checkpointing")
    if keys.get("gradient_clipping") != "auto":
        setup["clip_grad"] = bool(keys.number("gradient_clipping"))  # nothing is clipped where the key is not there
    dtypes = [dtype for dtype in ("bf16", "fp16") if _section(keys, dtype).get("enabled") is True]
    if len(dtypes) > 1:
        raise UserError(f"{origin}: bf16 and fp16 exclude each other: leave one of them out")
    setup |= {"amp": dtypes[0]} if dtypes else {}
    _differ_in_dtypes(keys)
    tp = Keys(_section(keys, "tensor_parallel"), f"{origin}: tensor_parallel").count("autotp_size", 1)
    if tp > 1:
        keys.differ(AUTO_TP, "tensor_parallel")
    offload, samples = _offloaded(zero, stage, keys), of_all(keys)
    judge(keys, table)
    unlike = tuple(keys.told_differences())
    return AskedForm(STAGES[stage], tp, offload=offload, setup=setup, unlike=unlike, samples=samples)


def _offloaded(zero: Mapping[str, Any], stage: int, keys: Keys) -> str:
    """What DeepSpeed's config has in the host's memory, as `Setup` names it; what is answered otherwise is told."""
    states, weights = (zero.get(section) if _offloads(zero.get(section)) else None for section in OFFLOADS)
    if stage in (1, 2) and zero.get("cpu_offload") is True and states is None:  # as it was called before
        states = {"device": "cpu", "pin_memory": True}
        keys.used.add("zero_optimization.cpu_offload")
    if stage == 0 or (states is None and (weights is None or stage < 3)):
        return "none"
    for section, found in zip(OFFLOADS, (states, weights), strict=True):
        name = f"zero_optimization.{section}"
        if found is None or (section == "offload_param" and stage < 3):
            continue
        if found.get("device") == "nvme":
            keys.differ(TO_HOST, name)
        elif found.get("pin_memory") is not True:
            keys.differ(PAGE_LOCKED, name)
        if found.get("ratio", 1) != 1:
            keys.differ("all optimizer states offloaded", name)
        keys.used.add(name)
    if states is None:
        keys.differ(STATES_TOO)
    return "params" if weights is not None and stage == 3 else "optimizer"


def _differ_in_dtypes(keys: Keys) -> None:
    """Say what else sections of dtypes ask for (deepspeed/runtime/precision_config.py; engine.py, `get_data_types`)."""
    for dtype in ("bf16", "fp16"):
        section = _section(keys, dtype)  # those that are disabled are left out before
        if section.get(f"{dtype}_master_weights_and_grads"):
            keys.differ(OF_MASTERS, dtype)
        if section.get("check_grad_overflow") is False:
            keys.differ(CHECKED, dtype)
    if _section(keys, "data_types").get("grad_accum_dtype") == "fp32":
        keys.differ(SUMMED, "data_types")


def accumulation(keys: Keys) -> dict[str, Any]:
    """`gradient_accumulation_kwargs` of accelerate's part of a training config, which may be a path."""
    config = keys.values.get("accelerator_config")
    config = keys.object_in(config) if isinstance(config, str) else config
    options = config.get("gradient_accumulation_kwargs") if isinstance(config, dict) else None
    return options if isinstance(options, dict) else {}


def _disabled(section: Any) -> bool:
    return isinstance(section, dict) and (section.get("enabled") is False or section.get("disable") is True)


def _section(keys: Keys, key: str) -> dict[str, Any]:
    return mapping(keys.get(key) or {}, f"{keys.origin}: {key}")


def of_fsdp(options: Mapping[str, Any], origin: str, words: list[str]) -> AskedForm:
    """The form of FSDP's options, by their names without `fsdp_`.

    Args:
        words: those of Transformers' older `fsdp`, such as full_shard and auto_wrap.

    Raises:
        UserError: a value of the wrong type, or that nobody knows.
    """
    keys = Keys(options, origin)
    version = keys.count("version", 1)
    if version > 2:
        raise UserError(f"{origin}: version must be 1 or 2, got {version}")
    strategy = _strategy(keys, words)
    offloads = "offload" in words or any(_flag(keys, key) for key in ("offload_params", "cpu_offload"))
    if answered := STRATEGIES[strategy]:
        keys.differ(answered)
    if version == 1 and strategy != "no_shard" and options.get("backward_prefetch") is None:
        keys.differ(PREFETCHED)
    policy = keys.text("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    if policy != "TRANSFORMER_BASED_WRAP":
        keys.differ(BY_BLOCKS, "auto_wrap_policy")
    for key in (key for key in WRAPPED if any(map(PART.search, keys.names(key)))):
        keys.differ(BY_BLOCKS, key)
    keys.flag("activation_checkpointing")  # of the blocks, which is no matter of the form
    judge(keys, meanings_of("fsdp"))
    parallel = "ddp" if strategy == "no_shard" else f"fsdp{version}"
    if offloads and parallel == "ddp":
        keys.differ(OFFLOADED)
    offload = "params" if offloads and parallel != "ddp" else "none"
    return AskedForm(parallel, offload=offload, reshard=strategy not in KEPT, unlike=tuple(keys.told_differences()))


def _flag(keys: Keys, key: str) -> bool:
    """Whether something is switched on, or described."""
    found = keys.get(key)
    return keys.flag(key) if isinstance(found, (bool, str)) else bool(found)


def _strategy(keys: Keys, words: list[str]) -> str:
    """How FSDP shards: by word or number, or by whether weights are freed behind the forward pass."""
    names, found = list(STRATEGIES), "full_shard"
    asked = [word for word in words if word not in WORDS]
    asked += [str(keys.get(key)) for key in ("sharding_strategy", "reshard_after_forward") if keys.get(key) is not None]
    for word in asked:
        number = int(word) - 1 if word.isdecimal() else -1
        name = names[number] if 0 <= number < len(names) else word.lower()
        name = {"true": "full_shard", "false": "shard_grad_op"}.get(name, name)
        if name not in STRATEGIES:
            raise UserError(f"{keys.origin}: the strategy {word!r} is unknown: {nearest(name, names)}")
        found = name if name != "full_shard" else found
    return found


def _on_mesh(form: AskedForm, keys: Keys) -> AskedForm:
    """The form on the mesh that the keys give.

    Raises:
        UserError: as of `mesh_of`.
    """
    replicates = form.parallel in (None, "ddp")
    each = {"sync_each_batch": True} if accumulation(keys).get("sync_each_batch") else {}
    mesh = mesh_of(keys, shards=not replicates)
    return replace(
        form, tp=max(form.tp, mesh.tp), cp=mesh.cp, cp_rotate=mesh.cp_rotate, setup={**form.setup, **each},
        on_mesh=mesh.unlike, shard_group=mesh.shard_group, group=mesh.group,
    )  # fmt: skip


def offloadable(form: AskedForm, setup: Mapping[str, Any]) -> bool:
    """Whether what a form offloads is modelled with a setup's optimizer."""
    if form.offload == "none" or "optimizer" not in setup:
        return True
    return updates_on_host(setup["optimizer"], fsdp=str(form.parallel).startswith("fsdp"))
