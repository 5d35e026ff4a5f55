"""Visitors with a number each that is in all that they ask, and the answers that the library gives to it alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from perfmodel.app import several
from perfmodel.app.answers import answer_html, map_of, plan_everywhere
from perfmodel.app.choices import Choices, of_query, setup_fields, to_query
from perfmodel.app.uploads import of_file
from perfmodel.app.written import as_command, as_config
from perfmodel.errors import UserError
from perfmodel.setup import Setup

MODELS = ("gpt2", "llama-3.2-1b", "tinyllama-1.1b", "qwen2.5-0.5b")
DEVICES = ("l40s", "a100-80gb-sxm", "h100-sxm", "t4")
SHARES = {name: "none" if value is None else value for name, value in setup_fields().items() if name in several.FIELDS}
FIELDS = 16 + len(several.FIELDS)  # of the form, and the part of several GPUs
EVERYWHERE = 20  # of so many visitors one looks at every GPU, which takes seconds
MARKUP = "<img src=x onerror=alert(1)>"
HOSTILE = f"{MARKUP}\x1b[31m\r\n"


@dataclass(frozen=True)
class Question:
    """What is asked of a function of the page, and what has to come back.

    Attributes:
        first: place of the first value of the answer that is looked at; before it stand fields of the form.
        answer: the values from there on.
    """

    name: str
    values: list[Any]
    answer: list[str]
    first: int = 0
    query: str = ""
    event: Any = None

    def wrong(self, given: Any) -> str:
        """What is wrong with an answer; empty if nothing is."""
        if given is None:
            return f"{self.name}: the page failed"
        found = given[self.first : self.first + len(self.answer)]
        differing = [i for i, (a, b) in enumerate(zip(found, self.answer, strict=False)) if a != b]
        if len(found) != len(self.answer) or differing:
            return f"{self.name}: values {differing} of {len(found)} are another's"
        return f"{self.name}: markup of a name" if any("<img" in str(value) for value in given) else ""


def choices_of(number: int) -> Choices:
    """What a visitor chooses: no two the same."""
    setup = Setup(batch=1 + number % 8, seq=64 + number, checkpoint=("none", "block")[number % 2])
    methods = ("full", f"lora:r={1 + number % 64}")
    return Choices(MODELS[number % 4], DEVICES[number // 4 % 4], methods, setup, samples=1000 + number)


def form_of(c: Choices, methods: list[str] | None = None) -> list[Any]:
    """The fields of the form, as a browser sends them."""
    s = c.setup
    return [c.model, c.device, methods or list(c.methods), s.gpus, s.parallel,
            *(SHARES[name] for name in several.FIELDS), s.batch, s.seq, s.grad_accum, s.dtype,
            s.checkpoint, s.optimizer, "", c.samples, c.epochs, c.price]  # fmt: skip


def framed(html: str) -> str:
    return f'<div class="pm">{html}</div>'


def _wrong(error: UserError) -> str:
    return framed(f'<p class="wrong" role="alert">{escape(str(error))}</p>')


def shown(c: Choices) -> list[str]:
    """Answer, command, config and query of choices."""
    return [framed(answer_html(c)), as_command(c), as_config(c), to_query(c)]


def questions_of(number: int) -> Iterator[Question]:
    """What a visitor asks, again and again: fields, a link, files, and what cannot be answered."""
    c = choices_of(number)
    form, own = form_of(c), shown(c)
    yield Question("changed", form, own)
    yield Question("map_drawn", form, [framed(map_of(c))])
    linked = of_query(to_query(replace(c, samples=5000 + number)))
    yield Question("opened", [], [*shown(linked), ""], FIELDS, to_query(linked) + "&utm=%3Cimg%20src=x%3E%0d%0aX:%20y")
    name = f"{number} {HOSTILE}.yaml"
    text = f"base_model: gpt2\nadapter: lora\nlora_target_linear: true\nlora_r: {1 + number % 64}\n"
    text += f"sequence_len: {64 + number}\n"
    text += "micro_batch_size: 1\ngradient_checkpointing: false\n"
    dropped, said = of_file(name, text, c)
    told = framed(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in said)}</ul>")
    yield Question("dropped", form, [*shown(dropped), told], FIELDS, event={"name": name, "text": text})
    bad = form_of(c, ["full", f"lora:targets={MARKUP}{number}"])
    yield Question("changed", bad, [refusal(c, bad[2]), "", ""])
    if number % EVERYWHERE == 0:
        yield Question("everywhere", form, [framed(plan_everywhere(c))])


def refusal(c: Choices, methods: list[str]) -> str:
    """The complaint about methods that nobody has."""
    try:
        answer_html(replace(c, methods=tuple(methods)))
    except UserError as error:
        return _wrong(error)
    raise AssertionError(f"{methods} were answered")
