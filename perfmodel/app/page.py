"""The page in Gradio: fields of a form in, HTML of `answers` out; nothing is reckoned here."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..architectures import from_config, load, model_names
from ..architectures.names import name_order
from ..devices import profile
from ..errors import UserError
from ..optimizers import optimizer_names
from ..report.theme import CHARTS, FONT, PALETTE, variables
from ..setup import CHECKPOINT, DTYPES, PARALLEL
from .answers import answer, map_of, plan_everywhere
from .choices import Choices, chosen_fields, of_form, of_query, to_query
from .guard import Guard
from .uploads import of_file
from .written import as_command, as_config

FOLDER = Path(__file__).parent
WAITING, AT_ONCE = 64, 2  # requests that may wait, and that run together
METHODS = (
    "full", "lora:r=8", "lora:r=16,targets=all-linear", "lora:r=32,targets=q_proj+v_proj",
    "lora:implementation=unsloth", "qlora:r=16,targets=all-linear", "dora:r=16", "paca:r=16", "top_k:k=8", "galore",
    "ia3", "bitfit",
)  # fmt: skip
GPUS = (1, 2, 4, 8, 16, 32, 64)
# fields of a setup that have one in the form
TYPED = ("gpus", "parallel", "batch", "seq", "grad_accum", "dtype", "checkpoint", "optimizer")
DROP = """<label class="area">Drop a training config here, or press to choose one: YAML of Axolotl or LLaMA-Factory,
TRL's or Transformers' arguments, PEFT's adapter_config.json. It is read in memory and stored nowhere.
<input type="file" accept=".yaml,.yml,.json" aria-label="Training config"/></label>"""
SHARE = """(query) => {
  history.replaceState(null, "", "?" + query);
  if (window.parent !== window) window.parent.postMessage({queryString: query, hash: ""}, "https://huggingface.co");
  return location.href;
}"""


def css() -> str:
    """The page's style: the report's palette and charts, by Gradio's own switch between light and dark."""
    keys = "".join(f".pm .key.f-{name}{{background:var(--{name})}}" for name in PALETTE)
    own = (FOLDER / "page.css").read_text(encoding="utf-8")
    return f":root{{{variables()}}}.dark{{{variables(dark=True)}}}{own}{CHARTS}{keys}"


def theme() -> Any:
    """Gradio's plain theme in the fonts that the reader has: nothing is fetched from elsewhere."""
    fonts = [font.strip().strip('"') for font in FONT.split(",")]
    return gr.themes.Base(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])


def models() -> list[str]:
    """The bundled models that need no trace."""
    found = []
    for name in sorted(model_names(), key=name_order):
        try:
            from_config(load(name))
        except UserError:
            continue
        found.append(name)
    return found


def framed(html: str) -> str:
    """HTML of an answer within the page's style."""
    return f'<div class="pm">{html}</div>'


def wrong(error: UserError) -> str:
    """A complaint; whatever it quotes is escaped."""
    return framed(f'<p class="wrong" role="alert">{escape(str(error))}</p>')


def shown(c: Choices) -> list[Any]:
    """What the page shows for choices: answer, command, config, query."""
    try:
        return [framed(answer(c)), as_command(c), as_config(c), to_query(c)]
    except UserError as error:
        return [wrong(error), "", "", to_query(c)]


def in_form(c: Choices) -> list[Any]:
    """The values of the form's fields."""
    fields = chosen_fields(c.setup)
    further = " ".join(f"{name}={value}" for name, value in fields.items() if name not in TYPED)
    typed = [getattr(c.setup, name) for name in TYPED]
    return [c.model, c.device, gr.Dropdown(choices=_offered(c.methods), value=list(c.methods)), *typed, further,
            c.samples, c.epochs, c.price]  # fmt: skip


def _offered(chosen: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*METHODS, *chosen)))


def of_fields(*values: Any) -> Choices:
    """The choices that the form's fields hold, in their order."""
    model, device, methods, *rest = values
    typed = dict(zip(TYPED, rest, strict=False))
    for name in ("gpus", "batch", "seq", "grad_accum"):
        typed[name] = str(typed[name]).removesuffix(".0")
    return of_form(model, device, methods or (), typed, *rest[len(TYPED) :])


def changed(*values: Any) -> list[Any]:
    """A field was changed."""
    try:
        return shown(of_fields(*values))
    except UserError as error:
        return [wrong(error), "", "", gr.skip()]


def _part(draw: Callable[[Choices], str]) -> Callable[..., str]:
    def of_values(*values: Any) -> str:
        try:
            return framed(draw(of_fields(*values)))
        except UserError as error:
            return wrong(error)

    return of_values


drawn, everywhere = _part(map_of), _part(plan_everywhere)


def opened(request: gr.Request) -> list[Any]:
    """The page was opened, perhaps by a link."""
    try:
        c, said = of_query(str(request.query_params or "")), ""
    except UserError as error:
        c, said = Choices(), wrong(error)
    return [*in_form(c), *shown(c), said]


def dropped(event: gr.EventData, *values: Any) -> list[Any]:
    """A file was dropped: its text has come with the event."""
    name, text = str(event.name), event.text
    try:
        if not isinstance(text, str):
            raise UserError(f"{name[:80]}: larger than 1 MiB, so not what is read here")
        c, said = of_file(name, text, of_fields(*values))
    except UserError as error:
        return [*[gr.skip()] * (len(values) + 4), wrong(error)]
    told = "".join(f"<li>{escape(line)}</li>" for line in said)
    return [*in_form(c), *shown(c), framed(f"<ul>{told}</ul>")]


def form() -> list[Any]:
    """The fields, in the order of `in_form`."""
    first = Choices()
    devices = [(profile.load(name).name, name) for name in sorted(profile.names(), key=name_order)]
    model = gr.Dropdown(models(), value=first.model, label="Model")
    device = gr.Dropdown(devices, value=first.device, label="GPU")
    methods = gr.Dropdown(
        list(METHODS), value=list(first.methods), multiselect=True, allow_custom_value=True,
        label="Methods, baseline first", info="Choose, or type such as lora:r=64,targets=q_proj+v_proj",
    )  # fmt: skip
    with gr.Row():
        gpus = gr.Dropdown(list(GPUS), value=1, allow_custom_value=True, label="GPUs", min_width=90)
        parallel = gr.Dropdown(list(PARALLEL), value="ddp", label="Parallel form", min_width=90)
    batch = gr.Slider(1, 128, value=first.setup.batch, step=1, label="Batch, samples a GPU")
    seq = gr.Slider(16, 16384, value=first.setup.seq, step=1, label="Tokens per sample")
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
    return [model, device, methods, gpus, parallel, batch, seq, accum, dtype, checkpoint, optimizer, further, samples,
            epochs, price]  # fmt: skip


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="perfmodel", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>What does a fine-tuning step cost?</h1>", elem_classes="pm")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                fields = form()
                drop = gr.HTML(DROP, elem_id="drop", js_on_load=(FOLDER / "drop.js").read_text(encoding="utf-8"))
                said = gr.HTML("", elem_id="said")
            with gr.Column(scale=5, min_width=340):
                told = gr.HTML("", elem_id="told")
                map_ = gr.HTML("", elem_id="map")
                every = gr.Button("The job on every GPU", elem_id="every")
                everything = gr.HTML("", elem_id="everywhere")
                link = gr.Textbox(label="Link to share", buttons=["copy"], interactive=False, elem_id="link")
                command = gr.Code(label="As command", language="shell", elem_id="command", interactive=False)
                config = gr.Code(label="As config (TRL)", language="yaml", elem_id="config", interactive=False)
                query = gr.Textbox(visible=False)
        results = [told, command, config, query]
        bound: dict[str, Any] = {"queue": True, "api_visibility": "private", "show_progress": "hidden"}
        starts = [
            gr.on([field.input for field in fields], changed, fields, results, trigger_mode="always_last", **bound),
            page.load(opened, None, [*fields, *results, said], **bound),
            drop.submit(dropped, fields, [*fields, *results, said], **bound),
        ]
        for start in starts:
            start.then(None, [query], [link], js=SHARE)
            start.then(drawn, fields, [map_], trigger_mode="always_last", **bound)
        every.click(everywhere, fields, [everything], **bound)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE, api_open=False)


def serve(
    address: str | None = None, port: int | None = None, *, browser: bool = False, wait: bool = True
) -> gr.Blocks:
    """Build the page and answer requests.

    Args:
        address: that it binds to; None: what Gradio's environment says, as on Spaces, else loopback.
        browser: whether to open one.
        wait: until it is ended.
    """
    from starlette.middleware import Middleware

    page = build()
    page.launch(
        server_name=address, server_port=port, inbrowser=browser, share=False, quiet=not wait, show_error=False,
        css=css(), theme=theme(), footer_links=[], ssr_mode=False, prevent_thread_lock=not wait,
        app_kwargs={"middleware": [Middleware(Guard)]}, enable_monitoring=False,
    )  # fmt: skip
    return page
