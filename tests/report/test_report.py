"""The page, the pictures and the notebook's tables: offline, valid, complete, and safe against any name.

A report is sent on; it must open years later without a network and must not run what a model's name says.
"""

import re
import sys
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import config_of

from perfmodel import UserError, advise, compare, explain, plan, predict, units
from perfmodel.architectures import Config
from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.questions.anatomy import PARTS
from perfmodel.questions.crossover import Crossover
from perfmodel.questions.explanation import Bar
from perfmodel.questions.roofline import longest_kernels, roof
from perfmodel.report import exhibits, explained
from perfmodel.report.charts.roofline import GROUPS
from perfmodel.report.figures import figures, phase_table, setup_line
from perfmodel.report.page import report
from perfmodel.report.pictures import draw_explanation
from perfmodel.report.svg import typeset
from perfmodel.setup import Setup

METHODS = ("full", "lora:r=8,targets=all-linear", "top_k:k=4")
SETUP: dict[str, Any] = {"device": "a100-80gb-sxm", "batch": 4, "seq": 512}
MODEL = "tinyllama-1.1b"

PAGES: dict[str, dict[str, Any]] = {
    "two verdicts": {"model": MODEL, "methods": METHODS, **SETUP},
    "on a CPU, in fp32": {"model": "gpt2", "methods": ("full", "ia3"), "device": "cpu-epyc-genoa-2c", "dtype": "fp32",
                          "batch": 1, "seq": 64, "axes": ("batch",)},
    "nothing fits": {"model": "llama-3.1-8b", "methods": METHODS[:2], "device": "l4", "seq": 8192, "axes": ()},
    "the same twice": {"model": "bert-base", "methods": ("lora", "lora"), "device": "t4", "dtype": "fp32",
                       "amp": "fp16", "batch": 2, "seq": 64, "axes": ("size",)},
    "on 8 GPUs": {"model": "gpt2", "methods": METHODS, **SETUP, "gpus": 8, "parallel": "zero3", "offload": "params"},
}  # fmt: skip


@cache
def page(name: str) -> str:
    pytest.importorskip("jinja2")
    return report(**PAGES[name])


def parsed(html: str) -> ET.Element:
    """The page as a tree: it is written so that an XML parser, which forgives nothing, reads it too."""
    assert html.startswith("<!doctype html>")
    return ET.fromstring(html.removeprefix("<!doctype html>"))


def text_of(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


FETCHES = ("src", "srcset", "href", "xlink:href", "data", "poster", "action")


class References(HTMLParser):
    """Everything in a page that a browser would fetch or run, and the links that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "source", "video", "audio", "base", "use"):
            self.fetched.append(tag)
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(value or "")
            elif name in FETCHES or name.startswith("on") or "url(" in (value or ""):
                self.fetched.append(f"{tag} {name}")


def references(html: str) -> References:
    found = References()
    found.feed(html)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fetches_nothing(name: str) -> None:
    """It opens on a train, and tells nobody that it was opened."""
    found = references(page(name))
    assert found.fetched == []
    anchors = {f"#{e.get('id')}" for e in parsed(page(name)).iter() if e.get("id")}
    assert all(link.startswith(("https://", "http://")) or link in anchors for link in found.links)
    css = "".join(re.findall(r"<style>(.*?)</style>", page(name), flags=re.DOTALL))
    assert css
    assert not re.search(r"url\(|@import|https?:", css)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_valid(name: str) -> None:
    """Balanced, unique ids, headings in order, full table rows, pictures with a text for those who do not see them."""
    tree = parsed(page(name))
    assert tree.get("lang") == "en"
    assert text_of(tree.find("head/title") or ET.Element("none")) or tree.findtext("head/title")
    assert any(m.get("name") == "viewport" for m in tree.iter("meta"))
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    levels = [int(e.tag[1]) for e in tree.iter() if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    for table in tree.iter("table"):
        rows = [[int(cell.get("colspan", "1")) for cell in row] for row in table.iter("tr")]
        assert len({sum(row) for row in rows}) == 1, text_of(table)
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in tree.iter("svg"))
    for parent, allowed in (("ul", {"li"}), ("dl", {"div"}), ("tr", {"th", "td"})):
        assert all({child.tag for child in e} <= allowed for e in tree.iter(parent))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_holes(name: str) -> None:
    """A figure that is no number, or a template's variable, must not get into print."""
    told = text_of(parsed(page(name)).find("body") or ET.Element("none"))
    assert len(told) > 1000
    assert not re.search(r"\b(None|nan|inf|undefined)\b|\{\{|<built-in|object at 0x", told)


def test_a_page_has_everything() -> None:
    """Answer, figures, waterfalls, rooflines, memory, crossovers, assumptions, accuracy, sources."""
    tree = parsed(page("two verdicts"))
    body = text_of(tree)
    for s in compare(MODEL, METHODS, **SETUP).speedups:
        assert typeset(s.answer) in body
    sections = [e.get("id") for e in tree.iter("section")]
    assert sections == [
        "answer", "figures", "waterfall", "limits", "memory", "crossover", "assumptions", "accuracy", "provenance",
    ]  # fmt: skip
    contents = [a.get("href") for nav in tree.iter("nav") for a in nav.iter("a")]
    assert contents == [f"#{section}" for section in sections[1:]]
    on = profile.load(SETUP["device"])
    links = set(references(page("two verdicts")).links)
    assert {s for s in on.sources.values() if s.startswith("http") and " " not in s} <= links
    assert "dense bf16 peak" in body
    folded = [text_of(details) for details in tree.iter("details")]
    assert len(folded) == 2
    assert all("longest kernels" in table for table in folded)
    assert {"Batch, samples", "Sequence, tokens per sample", "Rank", "Number of target layers"} <= {
        text_of(h) for h in tree.iter("h3")
    }


@pytest.mark.parametrize("name", ["nothing fits", "on a CPU, in fp32"])
def test_sections_without_content_are_left_out(name: str) -> None:
    tree = parsed(page(name))
    ids = {e.get("id") for e in tree.iter("section")}
    assert ("crossover" in ids) == bool(PAGES[name]["axes"])
    assert {a.get("href") for nav in tree.iter("nav") for a in nav.iter("a")} == {f"#{i}" for i in ids - {"answer"}}
    assert not cells(tree), "a map needs both batch and length"


def cells(tree: ET.Element) -> list[str]:
    """What the cells of heat maps say on hovering."""
    return [text_of(r) for r in tree.iter("rect") if r.get("class", "").startswith("cell ")]


def test_the_heat_map_says_on_hovering_what_compare_says() -> None:
    """Of the first method whose verdict turns; drawn twice, for a desk and for a phone, and nothing has to be run."""
    said = cells(parsed(page("two verdicts")))
    wide = said[: len(said) // 2]
    assert len(said) == 2 * 81
    assert said == wide * 2
    for cell in (wide[0], wide[30], wide[-1]):
        match = re.fullmatch(r"batch ([\d,]+), ([\d,]+) tokens: ([\d.]+)x(, does not fit)?", cell)
        assert match, cell
        here = {"batch": int(match[1].replace(",", "")), "seq": int(match[2].replace(",", ""))}
        c = compare(MODEL, METHODS[:2], device=SETUP["device"], **here)
        assert match[3] == f"{c.speedups[0].ratio:.2f}"
        assert bool(match[4]) == (not c.predictions[1].fits)


def test_names_are_text_and_nothing_else() -> None:
    """A model's name comes from a file that somebody sent."""
    pytest.importorskip("jinja2")
    evil = '<script>alert("1")</script>&amp;<img src=x>'
    model = Config(config_of("llama").values, "here", evil)
    html = report(model, ("full", "lora"), device="l40s", batch=2, seq=16, axes=(), command=evil)
    assert references(html).fetched == []
    assert evil in text_of(parsed(html))
    assert evil in text_of(ET.fromstring(predict(model, device="l40s", seq=16)._repr_html_()))
    e = explain(model, "full", "lora", device="l40s", batch=2, seq=16, axes=())
    assert references(draw_explanation(e)).fetched == []


def test_a_grid_makes_no_page() -> None:
    with pytest.raises(UserError, match="single setup"):
        report(MODEL, METHODS, device="l40s", batch=2, seq=np.array([16, 32]))


def test_without_jinja_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja2 is an extra: who lacks it reads one line."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"pip install 'perfmodel\[report\]'"):
        report(MODEL, ("full", "lora"), axes=(), **SETUP)


def bars(svg: str) -> list[tuple[float, float, str]]:
    """(start, end, class) of the bars of a waterfall, from top to bottom."""
    found = [
        (float(r.get("x", 0)), float(r.get("width", 0)), r.get("class", "")) for r in ET.fromstring(svg).iter("rect")
    ]
    return [(x, x + width, kind) for x, width, kind in found]


@pytest.mark.parametrize("pair", [("full", "lora"), ("lora", "full"), ("full", "paca"), ("paca", "dora")])
def test_the_bars_of_the_waterfall_join_up(pair: tuple[str, str]) -> None:
    """Drawn to scale: each bar starts where the last one ended, from one step's end to the other's."""
    from perfmodel.report.charts.waterfall import waterfall

    e = explain(MODEL, *pair, axes=(), **SETUP)
    for width in (720, 360):
        first, *middle, last = bars(waterfall(e, width).svg())
        at = first[1]
        assert middle
        for start, end, kind in middle:
            assert kind in ("f-saved", "f-added")
            assert at == pytest.approx(end if kind == "f-saved" else start, abs=1.1)  # a bar is at least 1 px wide
            at = start if kind == "f-saved" else end
        assert at == pytest.approx(last[1], abs=1.1)
        assert (last[1] - last[0]) / (first[1] - first[0]) == pytest.approx(e.after.total / e.before.total, rel=0.01)


def test_what_is_summed_up_in_the_terminal_is_not_listed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that count a part twice, or leave it out, do not sum to the step; also one that changes by the limit."""
    monkeypatch.setenv("COLUMNS", "100")
    at_limit = explained.SMALL * 1024.0
    bars = [
        Bar("gemm_forward", 64.0, 0.0), Bar("attention", 0.0, at_limit), Bar("clipping", 0.0, at_limit / 2),
    ]  # fmt: skip
    before, after = (SimpleNamespace(total=total) for total in (1024.0, 960.0))
    e: Any = SimpleNamespace(waterfall=bars, before=before, after=after)
    shown = [line.split("  ")[0] for line in explained._waterfall(e).splitlines()]
    assert shown == ["from A to B", *(bar.name for bar in bars[:2]), "what hardly changes", "step"]
    *_, rest, total = explained._waterfall(e).splitlines()
    assert units.signed(at_limit / 2) in rest
    assert total.split() == ["step", "1024", "s", "960", "s", "-64.0", "s"]


def test_the_roofline_holds_all_kernels() -> None:
    """The kernels' times are the parts' times, each kernel lies where its work and its time put it."""
    e = explain(MODEL, "full", "lora:targets=all-linear", axes=(), **SETUP)
    found = longest_kernels(e.b)
    assert set(GROUPS) <= set(PARTS)
    for part, seconds in e.after.parts.items():
        if part != "waiting":
            assert sum(k.seconds for k in found if k.part == part) == pytest.approx(seconds, rel=1e-9, abs=1e-12)
    products = [k for k in found if "gemm" in k.part or k.part == "attention"]
    assert sum(k.operations for k in products) == e.b.flops["total"]
    over = roof(e.on, found)
    assert over.peaks == {"bf16": e.on.hardware.peak("bf16"), "fp32": e.on.hardware.peak("fp32")}
    assert all(k.rate <= over.peaks[k.dtype] for k in products if k.part != "attention")


@pytest.mark.parametrize(("methods", "keys"), [(["A"], []), (["A", "B"], ["A", "B"])])
def test_lines_of_one_picture_are_told_apart_by_a_legend(methods: list[str], keys: list[str]) -> None:
    """Two lines without a key are guesswork; one line has its name in the sentence below."""
    line = Crossover("batch", "", 1, [1, 2], [1.2, 1.1], ["faster"] * 2, [True] * 2, [True] * 2)
    told: Any = [SimpleNamespace(labels=("full", method), crossovers=[line]) for method in methods]
    (picture,) = exhibits.crossings(told)["crossings"]
    assert [key["name"] for key in picture["legend"]] == keys


def test_the_picture_is_a_file_of_its_own(tmp_path: Path) -> None:
    """SVG without anything from elsewhere; another ending is a mistake."""
    target = tmp_path / "why.svg"
    done = call(
        "explain", "full", "lora", "--model", "gpt2", "--device", "l40s", "--axes", "none", "--plot", str(target)
    )
    assert done.exit_code == 0, done.output
    tree = ET.parse(target).getroot()
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in target.read_text()
    assert references(target.read_text()).fetched == []
    wrong = call(
        "explain", "full", "lora", "--model", "gpt2", "--device", "l40s", "--axes", "none", "--plot", "why.png"
    )
    assert wrong.exit_code == 2
    assert "why.svg" in wrong.stderr


def call(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    """Whole or not at all, and a place that cannot be written is one line."""
    pytest.importorskip("jinja2")
    target = tmp_path / "r.html"
    options = ("--model", "gpt2", "--device", "l40s", "--methods", "full", "lora", "--axes", "none")
    done = call("report", *options, "-o", str(target))
    assert done.exit_code == 0, done.output
    parsed(target.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    lost = call("report", *options, "-o", str(tmp_path / "nowhere" / "r.html"))
    assert (lost.exit_code, lost.stderr.count("\n")) == (2, 1)
    assert call("report", *options[:-1], "depth").exit_code == 2


def test_notebooks_show_every_result() -> None:
    """Single setups and grids; nothing to fetch, nothing to run."""
    grid = {"device": "l40s", "batch": 2, "seq": np.array([64, 128, 65_536])}
    shown = [
        predict(MODEL, "lora", **SETUP),
        predict(MODEL, "lora", **grid),
        compare(MODEL, METHODS, **SETUP),
        compare(MODEL, METHODS, **grid),
        explain(MODEL, "full", "lora", axes=(), **SETUP),
        advise(MODEL, "lora", device="l40s", batch=2, seq=64),
        plan(MODEL, METHODS, device=["l40s", "t4"], batch=2, seq=64, samples=100),
        plan("llama-3.1-8b", "full", device="t4", samples=8),
    ]
    texts = [result._repr_html_() for result in shown]
    for html in texts:
        ET.fromstring(html)
        assert references(html).fetched == []
        assert len(html) < 12_000
    assert "in part of the grid" in texts[1]
    assert "one change after another" in texts[5]
    assert "left out" not in texts[6]
    assert "Nothing fits" in texts[7]
    assert "because" in texts[2]
    beside = compare(MODEL, ("full", "lora", "galore"), device="l40s", gpus=2, parallel="fsdp1")
    assert beside.unanswered
    assert all(said in " ".join(text_of(ET.fromstring(beside._repr_html_())).split()) for said in beside.unanswered)
    assert all(bar.name in texts[4] for bar in shown[4].waterfall)  # type: ignore[attr-defined]


def test_the_best_is_marked_among_those_that_fit() -> None:
    """A figure of a step that does not run is nobody's best."""
    c = compare("llama-3.1-8b", ("full", "lora", "paca"), device="l40s", batch=1, seq=512)
    assert [bool(p.fits) for p in c.predictions] == [False, True, True]
    rows = {row.name: row.cells for row in figures(c)}
    for name, cells in rows.items():
        assert sum(cell.best for cell in cells) < 2, f"{name}: a mark on all says nothing"
    for name, cells in rows.items():
        assert not cells[0].best, name
    assert sum(cell.best for cell in rows["step"]) == 1
    assert not any(cell.best for cell in rows["fits"])


def test_a_usual_setup_is_told_in_three_words() -> None:
    """What is as always would hide what is not."""
    assert setup_line(Setup(batch=4, seq=512)) == "batch 4 x 512 tokens, bf16, adamw"


@pytest.mark.parametrize(
    ("text", "set_"),
    [
        ("12.3 us", "12.3 µs"), ("-27.3 ms", "−27.3 ms"), ("2.00x slower", "2.00× slower"), ("4x512x64", "4×512×64"),
        ("batch 4 x 512", "batch 4 × 512"), ("[1.03 - 1.21]", "[1.03\u2060–\u20601.21]"), ("max-plus", "max-plus"),
        ("a100-80gb-sxm", "a100-80gb-sxm"), ("2026-11-24", "2026-11-24"), ("fp32-bf16", "fp32-bf16"),
    ],
)  # fmt: skip
def test_signs_are_typeset_and_names_are_not(text: str, set_: str) -> None:
    assert typeset(text) == set_


def test_an_assumption_reads_as_words() -> None:
    """The name of a Python field is no word, and a size without images is no assumption."""
    body = text_of(parsed(page("two verdicts")))
    assert not re.search(r"group_by_length|in_backward|image_size|of an image", body)
    assert "batches of similar length" in body


@pytest.mark.parametrize(
    ("extra", "outside"),
    [
        ({}, []),
        ({"gpus": 8, "parallel": "zero3"}, ["network"]),
        ({"gpus": 8, "parallel": "zero3", "offload": "optimizer"}, ["network", "bus"]),
    ],
)
def test_what_limits_a_phase_adds_up_to_its_time(extra: dict[str, Any], outside: list[str]) -> None:
    """What the network and the bus take had no column, and the regime was none of those that were shown."""
    e = explain("smollm2-135m", "full", "lora", device="a100-80gb-sxm", batch=1, seq=256, axes=(), **extra)
    found = [*e.before.phases.values(), *e.after.phases.values()]
    _, limits, rows = phase_table(found)
    assert limits == ["compute", "memory", *outside]
    for time, *parts in ([float(cell.replace(",", "")) for cell in row] for row in rows):
        assert sum(parts[: len(limits) + 1]) == pytest.approx(time, abs=0.002 * max(p.seconds for p in found) * 1e3)
    shown = explained._phases({"A": e.before.phases, "B": e.after.phases})
    for word in ("network", "bus"):
        assert (word in shown[0].splitlines()[0].split()) == (f"{word}: " in shown[1]) == (word in outside)
    assert max(map(len, shown[0].splitlines())) <= 80
