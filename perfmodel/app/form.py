"""The fields of the form in Gradio, and the choices that they hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ..architectures import from_config, load, model_names
from ..architectures.names import name_order
from ..devices import profile
from ..errors import UserError
from ..optimizers import optimizer_names
from ..program.dtypes import FLOATING
from ..setup import CHECKPOINT, PARALLEL
from . import several
from .choices import Choices, chosen_fields, of_form, setup_fields

METHODS = (
    "full", "lora:r=8", "lora:r=16,targets=all-linear", "lora:r=32,targets=q_proj+v_proj",
    "lora:implementation=unsloth", "qlora:r=16,targets=all-linear", "dora:r=16", "paca:r=16", "top_k:k=8", "galore",
    "ia3", "bitfit",
)  # fmt: skip
GPUS = (1, 2, 4, 8, 16, 32, 64)
# fields of a setup that have one in the form
TYPED = ("gpus", "parallel", *several.FIELDS, "batch", "seq", "grad_accum", "dtype", "checkpoint", "optimizer")
COUNTS = ("gpus", "nodes", *several.COUNTS, "batch", "seq", "grad_accum")
LABELS = {
    "nodes": "Nodes", "node": "Node", "tp": "Tensor parallel", "pp": "Pipeline", "cp": "Context parallel",
    "pp_schedule": "Pipeline's order", "cp_rotate": "Keys, values by", "ddp": "DDP's graph", "offload": "Offloaded",
}  # fmt: skip
OF_NONE = {"nodes": "fewest", "node": "usual", "offload": "nothing"}
MOST_BATCH, MOST_SEQ = 128, 16384  # of the sliders; what a link or a file has beyond them moves their ends
FIELDS = ("model", "device", "methods", *TYPED, "further", "samples", "epochs", "price")


def models_of_the_tape() -> list[str]:
    """The bundled models that need no trace."""
    found = []
    for name in sorted(model_names(), key=name_order):
        try:
            from_config(load(name))
        except UserError:
            continue
        found.append(name)
    return found


def in_form(c: Choices) -> list[Any]:
    """The values of the form's fields, and the part of several GPUs, open where something of it is chosen."""
    fields = chosen_fields(c.setup)
    further = " ".join(f"{name}={value}" for name, value in fields.items() if name not in TYPED)
    typed = {name: getattr(c.setup, name) for name in TYPED}
    deciding = {"device": c.device, **typed}
    chosen = {name: typed[name] for name in several.FIELDS}
    typed |= dict(zip(several.FIELDS, _shown_fields(deciding, chosen), strict=True))
    for name, most in (("batch", MOST_BATCH), ("seq", MOST_SEQ)):
        typed[name] = gr.Slider(value=typed[name], maximum=max(most, typed[name]))
    part = _part(deciding, bool(several.FIELDS & fields.keys()))
    return [c.model, c.device, gr.Dropdown(choices=_offered(c.methods), value=list(c.methods)), *typed.values(),
            further, c.samples, c.epochs, c.price, part]  # fmt: skip


def shown_fields(*values: Any) -> list[Any]:
    """The fields of several GPUs and their part, as the fields that decide over them have it.

    Args:
        values: of `several.DECIDING`, behind them of `several.FIELDS`.
    """
    deciding = dict(zip(several.DECIDING, values, strict=False))
    chosen = dict(zip(several.FIELDS, values[len(several.DECIDING) :], strict=True))
    return [*_shown_fields(deciding, chosen), _part(deciding)]


def _shown_fields(deciding: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Any]:
    means, found = several.offered(deciding), []
    for name, value in chosen.items():
        if name not in means:
            found.append(gr.Dropdown(visible=False))
            continue
        offers = means[name]
        kept = several.AS_USUAL if value is None else value
        if kept not in offers:
            offers, kept = (offers, offers[0]) if name in several.CLOSED else ((*offers, kept), kept)
        found.append(gr.Dropdown(choices=_labelled(name, offers), value=kept, visible=True))
    return found


def _labelled(name: str, offers: Sequence[Any]) -> list[Any]:
    return [(OF_NONE.get(name, str(value)) if value == several.AS_USUAL else str(value), value) for value in offers]


def _part(deciding: Mapping[str, Any], opened: bool | None = None) -> Any:
    """The part of several GPUs: there where something in it means something; opened or not, or as it is."""
    shown = {"visible": bool(several.offered(deciding))}
    return gr.Accordion(**shown) if opened is None else gr.Accordion(**shown, open=opened)


def _offered(chosen: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*METHODS, *chosen)))


def of_fields(*values: Any) -> Choices:
    """The choices that the form's fields hold, in their order."""
    model, device, methods, *rest = values
    typed = dict(zip(TYPED, rest, strict=False))
    for name in COUNTS:
        typed[name] = str(typed[name]).removesuffix(".0")
    typed = several.meant(typed, {"device": device, **typed})
    return of_form(model, device, methods or (), typed, *rest[len(TYPED) :])


def fields_of_form() -> tuple[list[Any], Any]:
    """The fields, as `FIELDS` names them, and the part of several GPUs that folds some of them."""
    first = Choices()
    profiles = map(profile.load, sorted(profile.names(), key=name_order))
    devices = [(p.name, p.slug) for p in profiles if p.kind == "cuda"]
    model = gr.Dropdown(models_of_the_tape(), value=first.model, label="Model")
    device = gr.Dropdown(devices, value=first.device, label="GPU")
    methods = gr.Dropdown(
        list(METHODS), value=list(first.methods), multiselect=True, allow_custom_value=True,
        label="Methods, baseline first", info="Choose, or type such as lora:r=64,targets=q_proj+v_proj",
    )  # fmt: skip
    with gr.Row():
        gpus = gr.Dropdown(list(GPUS), value=1, allow_custom_value=True, label="GPUs", min_width=90)
        parallel = gr.Dropdown(list(PARALLEL), value="ddp", label="Parallel form", min_width=90)
    with gr.Accordion("Several GPUs", open=False, visible=False, elem_id="several") as part:
        shares = _fields_of_several()
    batch = gr.Slider(1, MOST_BATCH, value=first.setup.batch, step=1, label="Batch, samples a GPU")
    seq = gr.Slider(1, MOST_SEQ, value=first.setup.seq, step=1, label="Tokens per sample")
    with gr.Row():
        accum = gr.Number(1, label="Micro-batches", precision=0, minimum=1, min_width=90)
        dtype = gr.Dropdown(list(FLOATING), value="bf16", label="Base weights", min_width=90)
    with gr.Row():
        checkpoint = gr.Dropdown(list(CHECKPOINT), value="none", label="Checkpointing", min_width=90)
        optimizer = gr.Dropdown(list(optimizer_names()), value="adamw", label="Optimizer", min_width=90)
    with gr.Row():
        samples = gr.Number(first.samples, label="Samples", precision=0, minimum=1, min_width=80)
        epochs = gr.Number(first.epochs, label="Epochs", minimum=0.01, min_width=80)
        price = gr.Number(None, label="$/GPU h", minimum=0, min_width=80, placeholder="list")
    further = gr.Textbox("", label="Further settings", info="as on the command line: kernels=liger lengths=400:1200",
                         max_length=1000)  # fmt: skip
    setup = [gpus, parallel, *shares, batch, seq, accum, dtype, checkpoint, optimizer]
    fields: list[Any] = [model, device, methods, *setup, further, samples, epochs, price]
    for field, name in zip(fields, FIELDS, strict=True):
        field.elem_id = name
    return fields, part


def _fields_of_several() -> list[Any]:
    """The fields of `several.FIELDS`, of which one GPU has none."""
    usual = {name: several.AS_USUAL if value is None else value for name, value in setup_fields().items()}
    found = []
    for names in several.ROWS:
        with gr.Row():
            found += [
                gr.Dropdown(
                    _labelled(name, [usual[name]]), value=usual[name], label=LABELS[name], min_width=90, visible=False,
                    allow_custom_value=True,  # else Gradio fails where another field was changed just before
                )
                for name in names
            ]  # fmt: skip
    return found
