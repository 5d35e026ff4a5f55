"""The fields of the form in Gradio, and the choices that they hold."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..architectures import from_config, load, model_names
from ..architectures.names import name_order
from ..devices import profile
from ..errors import UserError
from ..optimizers import optimizer_names
from ..setup import CHECKPOINT, DTYPES, PARALLEL
from .choices import Choices, chosen_fields, of_form

METHODS = (
    "full", "lora:r=8", "lora:r=16,targets=all-linear", "lora:r=32,targets=q_proj+v_proj",
    "lora:implementation=unsloth", "qlora:r=16,targets=all-linear", "dora:r=16", "paca:r=16", "top_k:k=8", "galore",
    "ia3", "bitfit",
)  # fmt: skip
GPUS = (1, 2, 4, 8, 16, 32, 64)
# fields of a setup that have one in the form
TYPED = ("gpus", "parallel", "batch", "seq", "grad_accum", "dtype", "checkpoint", "optimizer")
COUNTS = ("gpus", "batch", "seq", "grad_accum")
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
    """The values of the form's fields."""
    fields = chosen_fields(c.setup)
    further = " ".join(f"{name}={value}" for name, value in fields.items() if name not in TYPED)
    typed = [getattr(c.setup, name) for name in TYPED]
    for name, most in (("batch", MOST_BATCH), ("seq", MOST_SEQ)):
        value = getattr(c.setup, name)
        typed[TYPED.index(name)] = gr.Slider(value=value, maximum=max(most, value))
    return [c.model, c.device, gr.Dropdown(choices=_offered(c.methods), value=list(c.methods)), *typed, further,
            c.samples, c.epochs, c.price]  # fmt: skip


def _offered(chosen: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*METHODS, *chosen)))


def of_fields(*values: Any) -> Choices:
    """The choices that the form's fields hold, in their order."""
    model, device, methods, *rest = values
    typed = dict(zip(TYPED, rest, strict=False))
    for name in COUNTS:
        typed[name] = str(typed[name]).removesuffix(".0")
    return of_form(model, device, methods or (), typed, *rest[len(TYPED) :])


def fields_of_form() -> list[Any]:
    """The fields, as `FIELDS` names them."""
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
    batch = gr.Slider(1, MOST_BATCH, value=first.setup.batch, step=1, label="Batch, samples a GPU")
    seq = gr.Slider(1, MOST_SEQ, value=first.setup.seq, step=1, label="Tokens per sample")
    with gr.Row():
        accum = gr.Number(1, label="Micro-batches a step", precision=0, minimum=1, min_width=90)
        dtype = gr.Dropdown(list(DTYPES), value="bf16", label="Base weights", min_width=90)
    with gr.Row():
        checkpoint = gr.Dropdown(list(CHECKPOINT), value="none", label="Checkpointing", min_width=90)
        optimizer = gr.Dropdown(list(optimizer_names()), value="adamw", label="Optimizer", min_width=90)
    with gr.Row():
        samples = gr.Number(first.samples, label="Samples", precision=0, minimum=1, min_width=80)
        epochs = gr.Number(first.epochs, label="Epochs", minimum=0.01, min_width=80)
        price = gr.Number(None, label="Dollars a GPU hour", info="empty: list price", minimum=0, min_width=110)
    further = gr.Textbox("", label="Further settings", info="as on the command line: kernels=liger lengths=400:1200",
                         max_length=1000)  # fmt: skip
    setup = [gpus, parallel, batch, seq, accum, dtype, checkpoint, optimizer]
    fields: list[Any] = [model, device, methods, *setup, further, samples, epochs, price]
    for field, name in zip(fields, FIELDS, strict=True):
        field.elem_id = name
    return fields
