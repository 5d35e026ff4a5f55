"""Which tool a config file belongs to, and what it says as model, method and setup."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from .. import methods
from ..errors import UserError
from ..recording.parallel.form import ALONE, COMPILED, COMPILED_METHODS, OBJECTIVES
from ..resources import read_json
from . import adapter, axolotl, ddp, llama_factory, llama_factory_v1, packing, peft_benchmark, trainer
from .ddp import FACTORY, TRL
from .fields import (
    ACROSS_SAMPLES,
    ALL_FUSED,
    ALL_OF_LIGER,
    FLASH_2_FOR_3,
    FLASH_2_FOR_4,
    ONE_GPU,
    UNDER_ZERO_3,
    form_of_arguments,
    unknown_to,
    unscaled,
)
from .forms import OFFLOADED, ONCE, SWITCHED_OFF, AskedForm, offloadable
from .keys import Keys
from .meanings import Meanings, judge, meanings_of, refuse
from .mesh import ONE_GROUP, groups_shards, held_as_floats, in_groups, splits, that_shares, with_own_part
from .micro_batches import agreed
from .packing import NEVER_CUT, TAKEN_OUT, TO_A_MULTIPLE, TO_THE_LONGEST, UNKNOWN
from .trained_for import cut_otherwise
from .values import read_values, refuse_others, unquoted, values_alone

CUDA_GRAPHS = "reduce-overhead"  # the mode of torch.compile that has them

# What is said of a setup's field that holds no more where the field has another value
SAID_OF = {
    "attention": (FLASH_2_FOR_3, FLASH_2_FOR_4), "engine": (UNDER_ZERO_3,), "method": (ALL_FUSED,),
    "kernels": (ALL_OF_LIGER, llama_factory_v1.FUSED_LOSS, trainer.LIGERS_ACCURACY),
}  # fmt: skip
DIFFERS = "not the file's step as it is: "
ZERO_3 = "deepspeed-zero3"
ASK = "--gpus N beside it answers for N"
OF_ONE_GPU = (ONE_GPU, "autocast")  # how that begins which is said of one GPU alone: autocast in the place of casts
NOT_CAST = "adapters in fp32, not in the dtype of the weights as TRL keeps them under ZeRO-3"


@dataclass(frozen=True)
class Imported:
    """What a training config says.

    Attributes:
        tool: PEFT, Axolotl, LLaMA-Factory or Transformers/TRL.
        model: hub id or path, None if the file names none.
        method: as `predict` takes it, None if the file names none, or one without built-in form.
        setup: fields of `Setup`.
        ignored: keys that are known to matter neither for time nor for memory.
        notes: what a reader should know.
        differences: how the step that is answered differs from the file's.
        adapter: PEFT's adapter_config.json, where the file is one: what a trace takes.
        why_traced: why only a trace can answer, where the method has no built-in form.
        frozen: parts of a vision-language model that the tool leaves as they are.
        upcasts: whether the tool puts in fp32 what is not quantised, but for embeddings and norms.
        multiple: tokens to a multiple of which the tool pads rows without packing.
        job: options of `perfmodel plan`: epochs and the like.
        asks: tells what the file asks several GPUs to do; raises `UserError` where that is nothing that there is.
        ddp: what DDP knows of the graph, as `Setup` names it.
        traced: whether a trace answers.
        precise: whether it names its mixed precision, so that a launcher's does not count.
        samples: of a step on all GPUs together, where the tool counts those.
        splits: whether GPUs share each batch, as they do where accelerate is told so.
        of_engine: of the differences those of DeepSpeed's config, where one GPU runs its ZeRO-3.
        of_method: of the differences those of the method.
        task: what an adapter's own config says that it is for, in PEFT's word.
        as_kept: whether weights have the dtype in which the checkpoint keeps them, whatever is computed in.
        baseline: full fine-tuning as the tool runs it beside the same keys.
        balances: whether a loss on the loads of experts is added on models that have one.
    """

    tool: str
    model: str | None
    method: str | None
    setup: dict[str, Any]
    ignored: list[str]
    notes: list[str]
    differences: list[str] = field(default_factory=list)
    adapter: Path | None = None
    why_traced: str | None = None
    frozen: tuple[str, ...] = ()
    upcasts: bool = False
    multiple: int = 1
    job: dict[str, Any] = field(default_factory=dict)
    asks: Callable[[], AskedForm] = AskedForm
    ddp: str = "plain"
    traced: bool = False
    precise: bool = False
    as_kept: bool = False
    balances: bool = False
    samples: int | None = None
    splits: bool = False
    of_engine: tuple[str, ...] = ()
    of_method: tuple[str, ...] = ()
    task: str = ""
    baseline: str = "full"

    def with_seq(self) -> "Imported":
        """What it says where the length of samples is given."""
        return replace(self, differences=[d for d in self.differences if not d.startswith(NEVER_CUT)])

    def with_method(self) -> "Imported":
        """What it says where another method is given."""
        gone = (*self.of_method, *SAID_OF["method"])
        return replace(self, differences=[d for d in self.differences if not d.startswith(gone)])

    def with_lengths(self, *, padded: bool = True) -> "Imported":
        """What it says where the lengths of documents are given.

        Args:
            padded: whether samples are padded to one another, as without packing.
        """
        kept = [d for d in self.with_seq().differences if not d.startswith(UNKNOWN)]
        if padded and (self.setup.get("padded") or TAKEN_OUT in self.notes):
            kept.append(TO_THE_LONGEST)
        elif padded and self.multiple > 1:
            kept.append(TO_A_MULTIPLE.format(self.multiple))
        return replace(self, differences=kept)

    def across_samples(self, packing: str) -> "Imported":
        """What it says where attention within packed documents is not modelled, but across them."""
        said = f"{ACROSS_SAMPLES} (packing {packing})"
        return replace(self, differences=[*self.with_lengths(padded=False).differences, said])

    def replaced(self, said: Sequence[tuple[str, str]]) -> "Imported":
        """What it says where fields of its setup have other values.

        Args:
            said: each such field, and what is said in the place of what was said of it; may be empty.
        """
        gone = tuple(chain.from_iterable(SAID_OF.get(name, ()) for name, words in said if words))
        gone += self.of_engine if any(name == "engine" for name, _ in said) else ()
        kept = [d for d in self.differences if not d.startswith(gone)]
        return replace(self, differences=[*kept, *(words for _, words in said if words)])

    def under(self, form: AskedForm) -> dict[str, Any]:
        """Its setup where a form is asked for, of however many GPUs; `UserError` if they contradict each other."""
        setup = {**self.setup, **agreed(self.setup, form.setup, counted=self.samples is not None)}
        if self.tool == FACTORY and form.parallel == "fsdp2" and setup.get("checkpoint") == "block-reentrant":
            setup["checkpoint"] = "block"  # (model_utils/checkpointing.py, `prepare_model_for_training`)
        return setup

    def on_several(self, form: AskedForm) -> "Imported":
        """What it says of several GPUs that do what a form says, in the place of one."""
        setup = {**self.under(form), "parallel": form.parallel or "ddp", "tp": form.tp, "engine": "torch"}
        shared, instead = that_shares(form.cp, form.cp_rotate, setup)
        setup |= shared
        offloads = form.offload != "none" and "cp" not in shared and offloadable(form, setup)
        setup |= {"offload": form.offload if offloads else "none", "reshard": form.reshard}
        setup["shard_group"] = form.shard_group if groups_shards(setup) else None
        once = setup["offload"] != "none" and setup.pop("sync_each_batch", False)
        for name in unknown_to(setup["parallel"]):
            setup.pop(name, None)
        adapts = self.tool == TRL and self.method not in (None, "full") and setup["parallel"] == "zero3"
        if adapts and setup.get("checkpoint") == "block":
            setup["checkpoint"] = "block-reentrant"  # under ZeRO-3 (sft_trainer.py)
        setup["ddp"], unlike = ddp.that_runs(self.ddp, setup)
        uncast = adapts and "adapter_dtype" not in str(self.method) and setup.get("dtype") != "fp32"
        kept = [d for d in self.differences if not d.startswith((*OF_ONE_GPU, *self.of_engine))]
        said = [OFFLOADED] if form.offload != "none" and not offloads else []
        said += [ONCE] if once and not setup["parallel"].startswith("zero") else []
        said += [ONE_GROUP] if form.shard_group and not setup["shard_group"] and form.group == 1 else []
        said += cut_otherwise(setup, self.method) if self.tool == FACTORY else []
        besides = [*said, *form.besides, *form.on_mesh, *unlike, *([NOT_CAST] if uncast else []), *unscaled(setup)]
        told = dict.fromkeys([*kept, *form.unlike, *besides])
        held = held_as_floats(self.tool, setup, self.method)
        return replace(self, setup=setup, method=held, differences=list(told)).replaced(instead)

    def over(self, gpus: Sequence[int]) -> "Imported":
        """What it says where so many GPUs, or each of several numbers of them, share the samples of a step."""
        over_all = self.setup.get("parallel", "ddp") != "ddp" and not self.setup.get("shard_group")
        if over_all and in_groups(self.asks().group, gpus, self.differences):
            return replace(self, differences=[*self.differences, f"{ONE_GROUP} (dp_shard_size)"]).over(gpus)
        if self.splits:
            setup, said = with_own_part(self.setup, gpus)
            return replace(self, setup=setup, differences=[*self.differences, *said])
        if self.samples is None:
            return self
        if len(set(gpus)) > 1:
            return replace(self, differences=[*self.differences, llama_factory_v1.AS_MANY])
        micro_batches = max(1, self.samples // (self.setup["batch"] * gpus[0]))
        told = [words for words in self.differences if micro_batches > 1 or words != ONCE]
        return replace(self, setup={**self.setup, "grad_accum": micro_batches}, differences=told)

    @property
    def first_line(self) -> str:
        """What must stand in the first line of an answer; empty where it is for the file's own step."""
        told = [*self.differences, *([ASK] if self._spreads else [])]
        return DIFFERS + "; ".join(told) if told else ""

    @property
    def _spreads(self) -> bool:
        """Whether the file is of several GPUs, is answered for one, and could be for more."""
        alone = any(self.setup.get(n, usual) != usual for n, usual in ALONE.items() if n != "engine")
        alone |= self.setup.get("objective", "sft") not in OBJECTIVES
        alone |= not self.traced and self.setup.get("compile", "none") != "none" and not self.compiles(self.asks())
        return not alone and any(d.startswith(ONE_GPU) for d in self.differences)

    def compiles(self, form: AskedForm, gpus: int | None = None) -> bool:
        """Whether so many GPUs (None: of any number) have its step compiled in a form (`recording.parallel.form`)."""
        method, setup = methods.parse(self.method or "full"), self.setup
        known = method.name in COMPILED_METHODS and setup.get("compile") != CUDA_GRAPHS
        of_sft = setup.get("objective", "sft") == "sft" and setup.get("packing", "dense") == "dense"
        shares = form.cp > 1 or form.offload != "none"
        in_shape = gpus is not None and (gpus == form.tp or form.parallel == "fsdp2")  # beside layers that GPUs share
        cuts = form.tp == 1 or (in_shape and {**setup, **form.setup}.get("checkpoint", "none") == "none")
        return known and of_sft and cuts and not shares and (form.parallel or "ddp") in COMPILED


Reader = Callable[[Keys], tuple[str | None, str | None, dict[str, Any], list[str]]]


@dataclass(frozen=True)
class Tool:
    """A tool: what it is called, keys (or several at once) that only its files have, its reader, and its tables in
    data/configs/."""

    name: str
    marks: tuple[str, ...]
    reader: Reader
    tables: tuple[str, ...]

    def owns(self, values: dict[str, Any]) -> bool:
        """Whether a file belongs to it."""
        return any(all(part in values for part in mark.split()) for mark in self.marks)


TOOLS = (
    Tool("PEFT", adapter.MARKS, adapter.read, ("peft",)),
    Tool("LLaMA-Factory v1", llama_factory_v1.MARKS, llama_factory_v1.read, ("llama_factory_v1",)),
    Tool("Axolotl", axolotl.MARKS, axolotl.read, ("axolotl",)),
    Tool(FACTORY, llama_factory.MARKS, llama_factory.read, ("llama_factory", "transformers")),
    Tool(TRL, trainer.MARKS, trainer.read, ("transformers",)),
)
FORMS = {"Axolotl": axolotl.form_of_axolotl, "LLaMA-Factory v1": llama_factory_v1.form_of_llama_factory_v1}
PRECISE = ("Axolotl", "LLaMA-Factory v1")  # tools that take no precision from accelerate's config
# LLaMA-Factory's own beside a base in 16 bit, unless it is told not to (model/adapter.py, `init_adapter`)
BASELINES = {(FACTORY, half, False): "full:trained_dtype=fp32" for half in ("bf16", "fp16")}
PRECISION = ("bf16", "fp16", "pure_bf16")
BALANCING = ("dpo", "kto", "grpo")  # objectives whose trainers add the loss on the loads of experts
FROZEN = {"Axolotl": axolotl.frozen_on_request, FACTORY: llama_factory.frozen}


def read(path: str | Path) -> Imported:
    """Read a PEFT, Axolotl, LLaMA-Factory, TRL or Transformers config.

    Raises:
        UserError: a file that is none of these, a value of the wrong type, contradictory keys, what is not modelled.
    """
    path = Path(path)
    if (experiment := peft_benchmark.experiment_parameters(path)) is not None:
        return _of_experiment(path, experiment)
    return _imported(path, read_values(path), alone=False)


def read_alone(name: str, text: str) -> Imported:
    """Read a config from its text: no file is looked at, neither one that it names nor one beside its own place.

    Args:
        name: of the file; its ending says what the text is, and complaints begin with it.

    Raises:
        UserError: as of `read`.
    """
    path, values = values_alone(name, text)
    return _imported(path, values, alone=True)


def _imported(path: Path, values: dict[str, Any], *, alone: bool) -> Imported:
    """What the values of a file say."""
    refuse_others(path, values)
    found = next((tool for tool in TOOLS if tool.owns(values)), None)
    if found is None:
        raise UserError(
            f"{path}: not a config of PEFT, Axolotl, LLaMA-Factory, TRL or Transformers: it has none of the keys they "
            "need"
        )
    keys = Keys(unquoted(found.name, path, values), path.name, path.parts, alone=alone)
    if found.name == "PEFT":
        return _of_adapter(found.name, path, keys, meanings_of(*found.tables))
    return _of_training(found, keys)


def read_arguments(values: dict[str, Any], origin: str, usual: Collection[str] = ()) -> Imported:
    """What the arguments of a Trainer of transformers or TRL say.

    Args:
        usual: names of those that have their defaults, of which there is nothing to say.

    Raises:
        UserError: as of `read`.
    """
    keys = Keys(values, origin)
    keys.used.update(usual)
    return _of_training(TOOLS[-1], keys)


def _of_training(found: Tool, keys: Keys) -> Imported:
    """What the keys of a training config say."""
    values, table = keys.values, meanings_of(*found.tables)
    refuse(keys, table)
    model, method, setup, notes = found.reader(keys)
    frozen = FROZEN[found.name](keys) if found.name in FROZEN else ()
    balances = _balances(found.name, keys, str(setup.get("objective", "sft")))
    ignored = judge(keys, table)
    multiple = packing.MULTIPLES[found.name](keys) if found.name in packing.MULTIPLES else 1
    asks = partial(FORMS.get(found.name, form_of_arguments), keys)
    on_one = asks() if setup.get("engine") == ZERO_3 else AskedForm()  # DeepSpeed's config is that of one GPU, too
    setup |= agreed(setup, on_one.setup)
    of_engine = tuple(words for words in on_one.unlike if not words.startswith(SWITCHED_OFF["overlap_comm"]))
    return Imported(
        found.name, model, method, setup, ignored, notes,
        [*keys.told_differences(), *of_engine, *unscaled(setup)],
        frozen=frozen, upcasts=found.name == "Axolotl" and axolotl.upcasts(keys), multiple=multiple, asks=asks,
        job=table.of_job(values), of_engine=of_engine, of_method=tuple(keys.told_of_method()),
        ddp=ddp.asked(found.name, keys, setup),
        precise=found.name in PRECISE or any(values.get(key) is not None for key in PRECISION),
        as_kept=_as_kept(found.name, keys, setup, method), balances=balances,
        samples=llama_factory_v1.samples(keys) if found.name == "LLaMA-Factory v1" else None, splits=splits(keys),
        baseline=BASELINES.get((found.name, setup["dtype"], bool(values.get("pure_bf16"))), "full"),
    )  # fmt: skip


def _balances(tool: str, keys: Keys, objective: str) -> bool:
    """Whether a trainer of TRL's adds the loss on the loads of experts, as it does unless told not to.

    Source: trl/trainer/{sft,dpo,kto,grpo}_trainer.py, `aux_loss_enabled`. Axolotl's SFT has a trainer of its own.
    """
    if tool == TRL:
        asked = keys.number("router_aux_loss_coef", 0.001) != 0
        return asked and (objective in BALANCING or (objective == "sft" and trainer.is_of_trl(keys)))
    return tool == "Axolotl" and objective in BALANCING


def _as_kept(tool: str, keys: Keys, setup: dict[str, Any], method: str | None) -> bool:
    """Whether a model is loaded in the dtype of its checkpoint, and weights stay so.

    LLaMA-Factory does it (model/loader.py, v1/core/model_engine.py), but not by Unsloth, and puts in fp32 what trains;
    Axolotl where weights start at random (loaders/model.py, `_load_model_from_config`).
    """
    if tool == "Axolotl":
        return bool(keys.values.get("reinit_weights"))
    if tool == TRL:
        named = (keys.values.get("dtype"), keys.values.get("torch_dtype"))
        return "auto" in named or trainer.named_none(keys.values, "dtype")
    if keys.values.get("use_unsloth"):
        return False
    return (tool == FACTORY or (tool in PRECISE and method != "full")) and setup["dtype"] != "fp32"


def _of_adapter(tool: str, path: Path, keys: Keys, table: Meanings) -> Imported:
    """PEFT's own file: what the built-in form cannot say, a trace can."""
    try:
        model, method, setup, notes, rest = adapter.read_whole(keys, table)
    except adapter.NoBuiltIn as error:
        why = error.but("add --traced")
        adapter.differ_without_data(keys)
        base, differences = keys.text("base_model_name_or_path"), keys.told_differences()
        task = keys.text("task_type", "") or ""
        return Imported(tool, base, None, {}, [], [], differences, adapter=path, why_traced=why, task=task)
    if model is None and not keys.alone and (generation := peft_benchmark.generation_of(path)) is not None:
        model, setup = generation[0], setup | generation[1]
        return Imported(tool, model, method, setup, rest, notes, [peft_benchmark.ONLY_GENERATES], adapter=path)
    task = keys.text("task_type", "") or ""
    return Imported(tool, model, method, setup, rest, notes, adapter=path, task=task)


def _of_experiment(path: Path, keys: Keys) -> Imported:
    """An experiment of PEFT's method comparison: setup and model from its training, the method from the adapter."""
    setup = peft_benchmark.setup_of(keys)
    adapted = path.with_name(peft_benchmark.ADAPTER)
    tool, model, notes = "PEFT's method comparison", keys.text("model_id"), peft_benchmark.notes_of_batches(keys)
    images = f"{keys.origin}: a model of images has no built-in form: add --traced"
    only_traced = images if peft_benchmark.of_images(keys) else None
    values = read_json(adapted) if (adapts := adapted.is_file()) else {}
    peft_benchmark.differ_in_its_loop(keys, str(values.get("peft_type", "")).upper())
    if not adapts:
        return Imported(tool, model, "full", setup, [], notes, keys.told_differences(), why_traced=only_traced)
    made = _of_adapter(tool, adapted, Keys(values, adapted.name), meanings_of("peft"))
    known = made.method if only_traced is None else None
    method = peft_benchmark.experiment_method(keys, known) if known else None
    why = only_traced or made.why_traced
    if method is None and why is None:
        why = f"{keys.origin}: optimizer_type {keys.text('optimizer_type')!r} has no built-in form"
    if method is None:
        peft_benchmark.differ_in_a_trace(keys)
    of_trace = None if method else adapted  # a method that is known has its training's optimizer and dtypes in it
    differences = keys.told_differences() + (made.differences if of_trace else [])
    return Imported(tool, model, method, setup, made.ignored, notes, differences, of_trace, why)
