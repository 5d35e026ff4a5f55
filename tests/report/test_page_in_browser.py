"""The page in a real browser: nothing sticks out at the width of a phone or a desktop, and it prints."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="the report extra is not installed")

from perfmodel.report.page import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
FRAME = """<!doctype html><iframe id="f" style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe><script>
f.onload = () => {{
  const page = f.contentDocument.documentElement, box = e => e.getBoundingClientRect();
  const seen = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg svg"));
  const out = seen.filter(e => box(e).right > {width} + 1);
  const small = [...page.querySelectorAll("svg text")].filter(e => box(e).height && box(e).height < 10);
  let struck = 0, shared = 0;
  for (const chart of [...page.querySelectorAll("svg.chart")].filter(e => box(e).height)) {{
    const texts = [...chart.querySelectorAll("text")].map(box);
    const within = p => t => p.x > t.left && p.x < t.right && p.y > t.top + 2 && p.y < t.bottom - 2;
    for (const line of chart.querySelectorAll(".line")) {{
      const steps = Math.ceil(line.getTotalLength()), at = line.getScreenCTM();
      const points = [...Array(steps + 1).keys()].map(i => line.getPointAtLength(i).matrixTransform(at));
      struck += points.filter(p => texts.some(within(p))).length;
    }}
    const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2;
    shared += texts.filter((a, i) => texts.some((b, j) => j > i && meet(a, b))).length;
  }}
  document.title = [page.scrollWidth, out.length, small.length, struck, shared].join(" ");
}}
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page's layout was not looked at")


@pytest.fixture(scope="module")
def page() -> str:
    methods = ("full", "lora:r=32,targets=all-linear", "top_k:k=4")
    return report("llama-3.2-1b", methods, device="l40s", batch=4, seq=210, command="perfmodel")


def browse(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *words],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_and_labels_are_readable(tmp_path: Path, page: str, width: int) -> None:
    """A page that scrolls sideways on a phone is not read, nor a label on a line or on another label.

    Tables may scroll in their own boxes.
    """
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.format(width=width, page=html.escape(page, quote=True)))
    dom = browse(tmp_path, "--virtual-time-budget=5000", "--dump-dom", framed.as_uri())
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\d+) (\d+)</title>", dom)
    assert title, dom[:300]
    scroll, *faults = map(int, title.groups())
    assert scroll <= width
    assert faults == [0, 0, 0, 0], "outside, tiny, on a line, on another label"


def test_it_prints(tmp_path: Path, page: str) -> None:
    """The page ends up in a paper file or on a wall: on few sheets, tables of kernels left out."""
    source, paper = tmp_path / "page.html", tmp_path / "page.pdf"
    source.write_text(page)
    browse(tmp_path, f"--print-to-pdf={paper}", source.as_uri())
    assert paper.read_bytes().startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) <= 6
