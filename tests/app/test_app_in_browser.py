"""The page in a real browser: choose, drag, share, drop a file, on a phone, in the dark, with the keyboard."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if BROWSER is None:
    pytest.skip("no Chromium here: the page was not looked at", allow_module_level=True)
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

ANSWERED, PAINTED = 0.5, 3.0  # seconds
CONFIG = """base_model: meta-llama/Llama-3.2-1B
adapter: qlora
load_in_4bit: true
lora_r: 8
lora_target_linear: true
sequence_len: 1024
"""
DRAG = """async () => {
  const told = document.querySelector("#told"), range = document.querySelector("#batch input[type=range]");
  const times = [];
  for (let i = 0; i < 50; i++) {
    const start = performance.now();
    const done = new Promise((answered) => {
      const watch = new MutationObserver(() => {
        if (!told.textContent.includes(`batch ${5 + i} ×`)) return;
        watch.disconnect();
        answered(performance.now() - start);
      });
      watch.observe(told, {childList: true, subtree: true, characterData: true});
    });
    range.value = String(5 + i);
    range.dispatchEvent(new Event("input", {bubbles: true}));
    times.push(await done);
  }
  return times;
}"""
DROP = """([name, text]) => {
  const given = new DataTransfer();
  given.items.add(new File([text], name));
  const area = document.querySelector("#drop .area");
  area.dispatchEvent(new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: given}));
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as people start it, whose temporary folder has to stay empty."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "perfmodel", "app", "--port", str(port)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/", server)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
    assert not [path for path in folder.rglob("*") if path.is_file()], "an upload was written to disk"


def _wait_for(url: str, server: Any) -> None:
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError("the server did not answer within a minute")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which nothing may be complained of, and which may ask nobody but its own server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, faults = context.new_page(), []
    opened.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("dialog", lambda dialog: faults.append(f"a script ran: {dialog.message}"))
    opened.on("request", lambda asked: faults.append(asked.url) if asked.url.startswith("http") and
              "//127.0.0.1:" not in asked.url else None)  # fmt: skip
    yield opened
    context.close()
    assert faults == []


def visit(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#map svg", state="attached")


def told(page: Any) -> str:
    return str(page.inner_text("#told .pm"))


def test_it_paints_and_answers_at_once(page: Any, address: str) -> None:
    """A page that hesitates is closed."""
    visit(page, address)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint / 1000 <= PAINTED
    times = page.evaluate(DRAG)
    assert median(times) / 1000 <= ANSWERED, sorted(times)
    assert "batch 54 × 512 tokens" in told(page)


def test_choices_are_in_the_address_and_come_back(page: Any, address: str) -> None:
    """Who is sent a link sees the same answer, and the same fields."""
    visit(page, address)
    page.get_by_label("GPU", exact=True).fill("H100 SXM")
    page.get_by_label("GPU", exact=True).press("Enter")
    page.get_by_label("Checkpointing").click()
    page.get_by_role("option", name="block", exact=True).click()
    page.wait_for_function("location.search.includes('h100-sxm') && location.search.includes('checkpoint=block')")
    before, link = told(page), page.input_value("#link textarea")
    assert link == page.url
    other = page.context.new_page()
    visit(other, link)
    assert told(other) == before
    assert other.get_by_label("Checkpointing").input_value() == "block"
    assert "--checkpoint block" in other.input_value("#command textarea")
    assert "gradient_checkpointing: true" in other.input_value("#config textarea")


def choose(page: Any, label: str, option: str, said: str) -> None:
    """Choose in a list, until the address says it."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    page.wait_for_function(f"location.search.includes('{said}')", timeout=10_000)


def test_several_gpus_unfold(page: Any, address: str) -> None:
    """One GPU has no such part; of several it shows what means something, and comes back open by a link."""
    visit(page, f"{address}?model=tinyllama-1.1b&device=h100-sxm&batch=1&seq=256")
    assert not page.is_visible("#several")
    choose(page, "GPUs", "4", "gpus=4")
    page.click("#several button")
    choose(page, "Pipeline", "2", "pp=2")  # of one micro-batch, which is refused in a line
    assert "--grad-accum 2 or more" in told(page)
    choose(page, "Parallel form", "fsdp2", "parallel=fsdp2")
    assert "pp=" not in page.url
    choose(page, "Context parallel", "2", "cp=2")
    choose(page, "Keys, values by", "alltoall", "cp_rotate=alltoall")
    assert "context parallel 2, alltoall" in told(page)
    other = page.context.new_page()
    visit(other, page.url)
    assert other.get_by_label("Keys, values by").input_value() == "alltoall"
    assert not other.is_visible("#pp")
    assert not other.is_visible("#offload")
    assert "--parallel fsdp2 --cp 2 --cp-rotate alltoall" in other.input_value("#command textarea")
    choose(page, "GPUs", "1", "seq=256&parallel")
    page.wait_for_function("!document.querySelector('#several')")


def test_a_file_is_dropped(page: Any, address: str) -> None:
    visit(page, address)
    page.evaluate(DROP, ["mine.yaml", CONFIG])
    page.wait_for_function("location.search.includes('qlora')", timeout=10_000)
    assert "mine.yaml (Axolotl)" in page.inner_text("#said")
    assert page.get_by_label("Model").input_value() == "llama-3.2-1b"
    page.set_input_files("#drop input", {"name": "big.yaml", "mimeType": "text/plain", "buffer": b"#" * (2**20 + 1)})
    page.wait_for_function("document.querySelector('#said').innerText.includes('larger than 1 MiB')")


ATTACK = "<img src=x onerror=alert(1)>${alert(2)}{{constructor}}"


def test_names_of_strangers_are_text(page: Any, address: str) -> None:
    """What comes from a link or a file is shown as it is written, and nothing of it runs."""
    from urllib.parse import quote

    page.goto(f"{address}?method=full&method={quote(ATTACK)}")
    page.wait_for_function("document.querySelector('#told')?.innerText.includes('onerror=alert(1)>${alert(2)}{{const')")
    page.evaluate(DROP, [f"{ATTACK}.yaml", "a: 1"])
    page.wait_for_function("document.querySelector('#said').innerText.includes('onerror=alert(1)')")
    page.evaluate(DROP, ["a.yaml", CONFIG.replace("meta-llama/Llama-3.2-1B", f'"{ATTACK}"')])
    page.wait_for_function("document.querySelector('#said').innerText.includes('unknown model')")
    assert page.query_selector(":is(#told, #map, #said) img") is None


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("query", ["", "?gpus=8&parallel=fsdp2&cp=2"])
def test_everybody_can_read_it(browser: Any, address: str, width: int, scheme: str, query: str) -> None:
    """On a phone nothing scrolls sideways, and axe-core finds no serious fault, by day or by night."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    visit(page, address + query)
    assert page.is_visible("#several") == bool(query)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (f["id"], [n["html"][:200] for n in f["nodes"]]) for f in found if f["impact"] in ("serious", "critical")
    ]
    context.close()
    assert serious == []


def test_the_keyboard_is_enough(page: Any, address: str) -> None:
    """From the first field to the copy of the command by Tab; a slider by its arrows."""
    visit(page, address)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
    for part in ("drop", "every"):
        assert page.evaluate(f"document.querySelector('#{part} :is(input, button), button#{part}')?.tabIndex") == 0
    assert any("batch" in name or "range" in name for name in reached), reached
    page.focus("#batch input[type=range]")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("location.search.includes('batch=5')")
    assert "batch 5 × 512 tokens" in told(page)


def test_every_gpu(page: Any, address: str) -> None:
    visit(page, address)
    page.click("#every")
    page.wait_for_function("document.querySelector('#everywhere').innerText.includes('Cheapest')")


def test_a_port_that_is_taken_is_one_line(address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "perfmodel", "app", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"perfmodel: 127.0.0.1:{port} cannot be listened on; give another --port or --host\n"


def test_it_does_not_listen_to_others(address: str) -> None:
    """Loopback alone, unless it is told otherwise; and no way to leave a file."""
    port = int(address.rstrip("/").rpartition(":")[2])
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with socket.socket() as other:
            other.settimeout(2)
            assert other.connect_ex((own, port)) != 0
    done = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-F", f"files=@{Path(__file__)}",
         f"{address}gradio_api/upload"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "403"
