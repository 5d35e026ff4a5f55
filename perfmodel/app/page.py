"""The page in Gradio: fields of a form in, HTML of `answers` out; nothing is reckoned here."""

import ctypes
import gc
import os
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import UserError
from ..report.theme import CHARTS, FONT, PALETTE, variables
from . import several
from .answers import answer_html, map_of, plan_everywhere
from .choices import Choices, of_query, to_query
from .form import FIELDS, fields_of_form, in_form, of_fields, shown_fields
from .guard import AT_ONCE, WAITING, Guard
from .uploads import of_file
from .written import as_command, as_config

FOLDER = Path(__file__).parent
M_ARENA_MAX = -8  # of malloc.h: how many heaps, of which each thread that answers fills one of its own
VISITORS = 160  # of whom Gradio remembers which sliders were extended; 160 KB each
REMEMBERED = "GRADIO_ANALYTICS_MAX_EVENTS"  # it makes a table of so many past questions, whenever one is answered
DROP = """<label class="area">Drop a training config here, or press to choose one: YAML of Axolotl or LLaMA-Factory,
TRL's or Transformers' arguments, PEFT's adapter_config.json, accelerate's or DeepSpeed's own. It is read in memory and
stored nowhere.
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


def framed(html: str) -> str:
    """HTML of an answer within the page's style."""
    return f'<div class="pm">{html}</div>'


def wrong(error: UserError) -> str:
    """A complaint; whatever it quotes is escaped."""
    return framed(f'<p class="wrong" role="alert">{escape(str(error))}</p>')


def shown(c: Choices) -> list[Any]:
    """What the page shows for choices: answer, command, config, query."""
    try:
        return [framed(answer_html(c)), as_command(c), as_config(c), to_query(c)]
    except UserError as error:
        return [wrong(error), "", "", to_query(c)]


def changed(*values: Any) -> list[Any]:
    """A field was changed."""
    try:
        return shown(of_fields(*values))
    except UserError as error:
        return [wrong(error), "", "", gr.skip()]


def map_drawn(*values: Any) -> str:
    """The map of the fields; empty where they have no answer, which stands above it."""
    try:
        return framed(map_of(of_fields(*values)))
    except UserError:
        return ""


def everywhere(*values: Any) -> str:
    """The job of the fields on every GPU."""
    try:
        return framed(plan_everywhere(of_fields(*values)))
    except UserError as error:
        return wrong(error)


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
        return [*[gr.skip()] * (len(values) + 5), wrong(error)]
    told = "".join(f"<li>{escape(line)}</li>" for line in said)
    return [*in_form(c), *shown(c), framed(f"<ul>{told}</ul>")]


def _to_copy(label: str, name: str) -> Any:
    return gr.Textbox(label=label, buttons=["copy"], interactive=False, elem_id=name, elem_classes="code", max_lines=40)


def build_page() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="perfmodel", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>What does a fine-tuning step cost?</h1>", elem_classes="pm")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                fields, part = fields_of_form()
                drop = gr.HTML(DROP, elem_id="drop", js_on_load=(FOLDER / "drop.js").read_text(encoding="utf-8"))
                said = gr.HTML("", elem_id="said")
            with gr.Column(scale=5, min_width=340):
                told = gr.HTML("", elem_id="told")
                map_ = gr.HTML("", elem_id="map")
                every = gr.Button("The job on every GPU", elem_id="every")
                everything = gr.HTML("", elem_id="everywhere")
                link = _to_copy("Link to share", "link")
                command = _to_copy("As command", "command")
                config = _to_copy("As config (TRL)", "config")
                query = gr.Textbox(visible=False)
        results = [told, command, config, query]
        bound: dict[str, Any] = {"queue": True, "api_visibility": "private", "show_progress": "hidden"}
        starts = [
            gr.on([field.input for field in fields], changed, fields, results, trigger_mode="always_last", **bound),
            page.load(opened, None, [*fields, part, *results, said], **bound),
            drop.submit(dropped, fields, [*fields, part, *results, said], **bound),
        ]
        for start in starts:
            start.then(None, [query], [link], js=SHARE)
            start.then(map_drawn, fields, [map_], trigger_mode="always_last", **bound)
        named = dict(zip(FIELDS, fields, strict=True))
        deciding = [named[name] for name in several.DECIDING]
        shares = [named[name] for name in several.FIELDS]
        gr.on([field.input for field in deciding], shown_fields, [*deciding, *shares], [*shares, part],
              trigger_mode="always_last", **bound)  # fmt: skip
        every.click(everywhere, fields, [everything], **bound)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE, api_open=False)


def forget_session(queue: Any, session: str) -> None:
    """Drop the empty queues of a session that has all its answers: Gradio keeps them, some for ever."""
    if not queue.pending_event_ids_session.get(session):
        queue.pending_event_ids_session.pop(session, None)
        queue.pending_messages_per_session.pop(session, None)


def serve(address: str | None = None, port: int | None = None, *, browser: bool = False) -> gr.Blocks:
    """Build the page and answer requests, in threads of their own: `block_thread` of what is returned waits.

    Args:
        address, port: that it binds to; None: what Gradio's environment says, as on Spaces, else loopback and 7860.
        browser: whether to open one.

    Raises:
        OSError: the port is taken.
    """
    from starlette.middleware import Middleware

    os.environ.setdefault(REMEMBERED, "1")
    with suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    page = build_page()
    guard = Middleware(Guard, done=lambda session: forget_session(page._queue, session))
    page.launch(
        server_name=address, server_port=port, inbrowser=browser, share=False, quiet=True, show_error=False,
        css=css(), theme=theme(), footer_links=[], ssr_mode=False, prevent_thread_lock=True,
        app_kwargs={"middleware": [guard]}, enable_monitoring=False, state_session_capacity=VISITORS,
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # a page's modules and fields are no garbage: what visitors leave is looked for the sooner
    return page
