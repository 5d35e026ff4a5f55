"""What a user can turn without changing what is learned: the choices that `advise` searches.

Every knob keeps the samples of an optimizer step: a smaller micro-batch comes with more accumulation, and GPUs that
share layers or have some of them each, which work on fewer micro-batches at a time, with more of both. Another
optimizer form or fused kernels compute the same update up to rounding; adapters in 16 bit and 8-bit states round more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any

import numpy as np

from .. import optimizers
from ..architectures import Architecture
from ..devices.alignment import WIDE
from ..methods import Method
from ..recording.parallel.offload import updates_on_host
from ..setup import PARALLEL, Setup
from .splits import Load, Split, micro_batches, ways_to_cut

FORMS = {"ddp": "DDP", "fsdp2": "FSDP2", "fsdp1": "FSDP1"}
OF_FSDP = ("fsdp2", "fsdp1")
GROUPS = (2, 4, 8)  # GPUs that shards may lie over, where there are more: powers of two within a node
STAGES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3"}
TILE = 64  # columns of the narrowest tile that loses nothing; what NVIDIA's and Karpathy's examples pad to


@dataclass(frozen=True)
class KnobPosition:
    """One position of a knob: what it is called, and the fields of model, setup and method that it sets.

    Attributes:
        load: what it loads a GPU with, where positions are so many that not all are tried.
    """

    label: str
    setup: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    load: Load | None = None

    def applied(self, model: Architecture, setup: Setup, method: Method) -> tuple[Architecture, Setup, Method]:
        """Model, setup and method with this choice."""
        model = replace(model, **self.model) if self.model else model
        return model, replace(setup, **self.setup), replace(method, **self.method)


Knob = tuple[KnobPosition, ...]  # the first choice leaves everything as it is


def knobs(architecture: Architecture, setup: Setup, method: Method) -> list[Knob]:
    """The knobs that a method has in a setup; a search turns the last first (`perfmodel.questions.advice`)."""
    found = [memory_knob(architecture, setup), _parallel(setup), _optimizer(setup), _kernels(architecture, setup)]
    found += [_messages(architecture, setup), _attention(architecture, setup)]
    found += [_compile(architecture, setup, method), _experts(architecture, setup), _vocabulary(architecture, setup)]
    if getattr(method, "inner", "") != "full":  # full weights of some blocks: nothing of an adapter to choose
        found += [_adapter_dtype(setup, method), _implementation(method), _storage(setup, method)]
    return [knob for knob in found if len(knob) > 1]


KEEP = KnobPosition("")
NOT_COMPILED = KnobPosition("no torch.compile", {"compile": "none"})


def in_half_of(half: str, setup: Setup) -> KnobPosition:
    """The 16-bit dtype that a GPU has units for in the place of bf16, which PyTorch emulates there."""
    if half == "bf16" or setup.computes_in != "bf16":
        return KEEP
    changes = {"amp": half} if setup.amp else {"dtype": half}
    return KnobPosition(f"{half}, which it has units for, in the place of bf16", changes)


def offloading(setup: Setup) -> Iterator[KnobPosition]:
    """What may live in the host's memory, where nothing fits into the GPU's: slower than what does.

    With it goes what is not modelled beside it: torch.compile, and an optimizer that the host's cores do not run.
    """
    if setup.offload != "none" or setup.engine != "torch":
        return
    several = not np.all(np.equal(setup.gpus, 1))
    for form, what in (("zero2", "optimizer"), ("zero3", "params"), *([("fsdp2", "params")] if several else [])):
        words = "weights and optimizer" if what == "params" else "optimizer"
        labels = [f"{(FORMS | STAGES)[form]} with {words} offloaded"]
        changes = {**_changes(setup, form), "offload": what}
        if not updates_on_host(setup.optimizer, fsdp=form in OF_FSDP):
            labels.append(f"AdamW in the place of {setup.optimizer}")
            changes["optimizer"] = "adamw"
        if setup.compile != "none":
            labels.append(NOT_COMPILED.label)
            changes |= NOT_COMPILED.setup
        yield KnobPosition(", ".join(labels), changes)


def memory_knob(architecture: Architecture, setup: Setup) -> Knob:
    """Checkpointing, micro-batch with its gradients, and what GPUs have of layers together: each pays for the others.

    Positions of another cut say what they load a GPU with, so that a search need not try all; the lightest comes first.
    """
    choices = []
    for cut in ways_to_cut(architecture, setup):
        own = cut == Split.of(setup)
        samples, left = divmod(setup.batch * setup.grad_accum * cut.tp * cut.pp, setup.tp * setup.pp)
        if left:  # no micro-batches of as many samples
            continue
        found = list(micro_batches(setup, samples))
        for batch, accum in found if own else sorted(found):
            if cut.pp > accum and setup.pp_schedule == "1f1b":  # it has as many micro-batches as stages, or more
                continue
            checkpoints = list(dict.fromkeys((setup.checkpoint, "none", "block")))
            if not own:
                checkpoints.sort(key="none".__eq__, reverse=batch > 1)
            for checkpoint, each in product(checkpoints, _reducing(setup) if own and accum > 1 else ({},)):
                changes = {**asdict(cut), "batch": batch, "grad_accum": accum, "checkpoint": checkpoint, **each}
                changes = {name: value for name, value in changes.items() if value != getattr(setup, name)}
                load = None if own else Load(cut, batch, checkpoint)
                choices.append(KnobPosition(", ".join(_in_words(changes, cut, batch, accum)), changes, load=load))
    return tuple(choices)


def _reducing(setup: Setup) -> Iterator[dict[str, bool]]:
    """When gradients are reduced: as asked for, or of FSDP in every micro-batch, so that no whole ones are kept."""
    yield {}
    if setup.parallel in OF_FSDP and not np.all(np.equal(setup.gpus, 1)) and not setup.sync_each_batch:
        yield {"sync_each_batch": True}


def _in_words(changes: Mapping[str, Any], cut: Split, batch: int, accum: int) -> Iterator[str]:
    """What a position of the memory knob changes."""
    if "tp" in changes:
        yield f"tensor parallel {cut.tp}" if cut.tp > 1 else "no tensor parallel"
    if "sequence_parallel" in changes and cut.tp > 1:
        yield "sequence parallel" if cut.sequence_parallel else "no sequence parallel"
    if "pp" in changes:
        yield f"a pipeline of {cut.pp}" if cut.pp > 1 else "no pipeline"
    if "checkpoint" in changes:
        yield "no activation checkpointing" if changes["checkpoint"] == "none" else "activation checkpointing"
    if "batch" in changes or "grad_accum" in changes:
        yield f"micro-batches of {batch} x {accum} accumulated"
    if "sync_each_batch" in changes:
        yield "gradients reduced in every micro-batch"


def _parallel(setup: Setup) -> Knob:
    """Forms, those of FSDP in each of its layouts."""
    if np.all(np.equal(setup.gpus, 1)):
        return (KEEP,)
    found = {layout: words for form in PARALLEL for layout, words in _layouts(setup, form)}
    found.pop((setup.parallel, setup.reshard, setup.shard_group), None)
    positions = [KnobPosition(words, _changes(setup, *layout)) for layout, words in found.items()]
    if setup.fsdp_units == "adapters":
        positions.append(KnobPosition("adapters gathered with their blocks", {"fsdp_units": "blocks"}))
    return (KEEP, *positions)


def _messages(architecture: Architecture, setup: Setup) -> Knob:
    """Of Megatron's program: whether messages go beside compute."""
    if not architecture.of_megatron or np.all(np.equal(setup.gpus, 1)):
        return (KEEP,)
    label = "messages behind compute" if setup.overlap else "--overlap"
    return (KEEP, KnobPosition(label, {"overlap": not setup.overlap}))


def _layouts(setup: Setup, form: str) -> Iterator[tuple[tuple[str, bool, int | None], str]]:
    """((form, `Setup.reshard`, `Setup.shard_group`), how it is called) of each way to lay a form out."""
    name = FORMS.get(form, form)
    yield (form, True, None), name
    if form not in OF_FSDP:
        return
    gpus = setup.gpus // setup.pp
    groups = [n for n in GROUPS if isinstance(gpus, int) and n < gpus and gpus % n == 0]
    for group in (None, *groups):
        where = name if group is None else f"{name} in groups of {group}"
        if group is not None:
            yield (form, True, group), where
        yield (form, False, group), f"{where} with weights left gathered"


def _changes(setup: Setup, form: str, reshard: bool = True, group: int | None = None) -> dict[str, Any]:
    """What of a setup another form changes; what only some forms have goes with them."""
    of_forms = {
        "reshard": reshard, "shard_group": group, "reduce_dtype": setup.reduce_dtype if form in OF_FSDP else None,
        "sync_each_batch": setup.sync_each_batch and not form.startswith("zero"),
        "fsdp_units": setup.fsdp_units if form == "fsdp2" else "accelerate",
    }  # fmt: skip
    return {"parallel": form, **{name: value for name, value in of_forms.items() if getattr(setup, name) != value}}


def _storage(setup: Setup, method: Method) -> Knob:
    """What holds weights of 4 bits: of bytes every GPU has all, floats can be cut."""
    if getattr(method, "quant_storage", "") != "u8" or np.all(np.equal(setup.gpus, 1)):
        return (KEEP,)
    held = setup.computes_in
    return (KEEP, KnobPosition(f"4-bit weights held in {held}", method={"quant_storage": held}))


def _optimizer(setup: Setup) -> Knob:
    """Other forms of AdamW; another optimizer is the user's choice, which learns otherwise (but see `offloading`)."""
    if not setup.optimizer.startswith("adamw"):
        return (KEEP,)
    labels = {"adamw-fused": "fused AdamW", "adamw-8bit": "8-bit AdamW"}
    names = [name for name in labels if name in optimizers.optimizer_names() and name != setup.optimizer]
    return (KEEP, *(KnobPosition(labels[name], {"optimizer": name}) for name in names))


def _kernels(architecture: Architecture, setup: Setup) -> Knob:
    if setup.uses("liger"):
        return (KEEP,)
    if "liger" in architecture.traits.fused:
        return (KEEP, KnobPosition("Liger kernels", {"kernels": "liger+cce" if setup.uses("cce") else "liger"}))
    if setup.uses("cce") or not architecture.traits.cut_loss:
        return (KEEP,)
    return (KEEP, KnobPosition("cut cross entropy", {"kernels": "cce"}))  # where it is not modelled, it falls out


def _attention(architecture: Architecture, setup: Setup) -> Knob:
    """Eager attention is worth a look in fp16, which one trains in before Ampere: sdpa fuses no grouped heads there."""
    both, grouped = {"eager", "sdpa"} <= {*architecture.traits.attention}, architecture.kv_heads != architecture.heads
    if setup.attention == "eager" and both:
        return (KEEP, KnobPosition("SDPA attention", {"attention": "sdpa"}))
    if setup.attention == "sdpa" and both and grouped and setup.computes_in == "fp16":
        return (KEEP, KnobPosition("eager attention", {"attention": "eager"}))
    return (KEEP,)


def _compile(architecture: Architecture, setup: Setup, method: Method) -> Knob:
    if setup.compile != "none":
        return (KEEP, NOT_COMPILED)
    if setup.objective != "sft" or architecture.stacked_names() or method.breaks_graphs:
        return (KEEP,)
    return (KEEP, KnobPosition("torch.compile", {"compile": "default"}))


def _experts(architecture: Architecture, setup: Setup) -> Knob:
    if setup.experts != "eager" or not architecture.stacked_names():
        return (KEEP,)
    return (KEEP, KnobPosition("grouped products of experts", {"experts": "grouped_mm"}))


def _vocabulary(architecture: Architecture, setup: Setup) -> Knob:
    """Rows of logits at multiples of 16 bytes, in whole tiles (`perfmodel.devices.alignment`)."""
    if architecture.vocab % WIDE == 0 or architecture.classifier or (setup.dtype == "fp32" and setup.amp is None):
        return (KEEP,)
    vocab = -(-architecture.vocab // TILE) * TILE
    label = f"a vocabulary of {vocab} (resize_token_embeddings, pad_to_multiple_of={TILE})"
    return (KEEP, KnobPosition(label, model={"vocab": vocab}))


def _adapter_dtype(setup: Setup, method: Method) -> Knob:
    """PEFT's default keeps adapters in fp32 beside a 16-bit base (`SoftwareStack.upcasts_adapters`)."""
    given = getattr(method.under(setup.stack, setup.dtype), "adapter_dtype", None)
    if setup.dtype == "fp32" or not _has(method, "adapter_dtype") or given:
        return (KEEP,)
    label = f"adapters in {setup.dtype} (autocast_adapter_dtype=False)"
    return (KEEP, KnobPosition(label, method={"adapter_dtype": setup.dtype}))


def _implementation(method: Method) -> Knob:
    labels = {
        "axolotl": "Axolotl's fused LoRA", "unsloth": "Unsloth's fused LoRA", "lorafusion": "LoRAFusion's kernels",
    }  # fmt: skip
    present = getattr(method, "implementation", None)
    drops = getattr(method, "dropout", 0.0) > 0  # Axolotl's draw one mask for layers that share an input
    names = [n for n in getattr(method, "implementations", ()) if n in labels and n != present]
    names = [n for n in names if not (drops and "axolotl" in (n, present))]
    return (KEEP, *(KnobPosition(labels[name], method={"implementation": name}) for name in names))


def _has(method: Method, name: str) -> bool:
    return any(f.name == name for f in fields(method))
