"""Many threads at once are answered as one alone: whoever serves others, or asks in a notebook's background, has them.

One process has one tape (it stands for PyTorch's global state), one cycle collector, and files that load on demand.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest

import perfmodel
from perfmodel.errors import UserError
from perfmodel.prediction.predict import plain
from perfmodel.registry import Registry
from perfmodel.setup import Setup
from perfmodel.tape.core import Tape, recording, tape

THREADS = 8
SETUPS = (
    {"batch": 1, "seq": 64}, {"batch": 2, "seq": 128, "checkpoint": "block"},
    {"batch": 3, "seq": 32, "compile": "default"},
    {"batch": 1, "seq": 48, "grad_accum": 3, "gpus": 8, "parallel": "fsdp2"},
)  # fmt: skip
STEPS = [
    (model, method, setup)
    for model in ("gpt2", "llama-3.2-1b", "gemma-2-2b")
    for method in ("full", "lora:r=8", "dora:r=4", "runlora:r=4")
    for setup in SETUPS
]


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads that take turns a hundred times as often as usual: what can go wrong in hours does in seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def step(question: tuple[str, str, dict[str, Any]]) -> Any:
    """The figures of a step, or why there are none."""
    model, method, setup = question
    try:
        return perfmodel.predict(model, method, Setup(**setup), "l40s").as_dict()
    except UserError as error:
        return str(error)


def ask(question: tuple[str, int]) -> Any:
    """The answer to one of the larger questions, which records many steps."""
    what, size = question
    if what == "compare":
        return perfmodel.compare("gpt2", ["full", "lora"], Setup(batch=size, seq=64)).as_dict()
    if what == "sweep":
        return plain(perfmodel.sweep("gpt2", ["full", "lora"], batch=[1, size], seq=[32, 64]).table())
    if what == "plan":
        return perfmodel.plan("gpt2", ["full", "lora"], Setup(batch=size, seq=64), "l40s", samples=1000).as_dict()
    return perfmodel.advise("gpt2", "full", Setup(batch=size, seq=64), "l40s").as_dict()


@pytest.mark.parametrize(
    ("answer", "questions"),
    [(step, STEPS), (ask, [(what, size) for what in ("compare", "sweep", "plan", "advise") for size in (2, 3)])],
)
def test_threads_get_what_one_alone_gets(impatient: None, answer: Any, questions: list[Any]) -> None:
    """A tape that two write on gives figures of neither; and none may leave the collector off, or memory would grow."""
    with ThreadPoolExecutor(THREADS) as threads:
        at_once = list(threads.map(answer, questions))
    assert [answer(question) for question in questions] == at_once
    assert gc.isenabled()


COLD = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from test_threads import STEPS, THREADS, step
sys.setswitchinterval(5e-5)
with ThreadPoolExecutor(THREADS) as threads:
    print(json.dumps(list(threads.map(step, STEPS[::5]))))
"""


def test_the_first_questions_of_a_process_may_come_at_once() -> None:
    """What is loaded on demand is loaded once and whole, whoever demands it first."""
    path = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent), *sys.path]
    program = f"import sys; sys.path[:0] = {path!r}\n{COLD}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps([step(question) for question in STEPS[::5]]))


def test_a_thread_waits_until_another_has_recorded() -> None:
    """A thread's own recordings nest: a choice by price records its candidates while a step is recorded."""
    begun = Event()

    def other() -> Tape:
        begun.set()
        with recording(Tape()) as own:
            return own if tape() is own else Tape()

    with ThreadPoolExecutor(1) as threads:
        with recording(Tape()) as outer, recording(Tape()) as inner:
            waiting = threads.submit(other)
            assert begun.wait(10)
            assert not waiting.done()
            assert tape() is inner
        assert waiting.result(10) not in (outer, inner)


def test_a_step_is_looked_at_while_another_thread_waits_to_record_one() -> None:
    """A plan records and looks at steps in turns: a lock around the looking would stop it, and all others, for good."""
    first, second = (perfmodel.predict("gpt2", method, batch=2, seq=48) for method in ("full", "bitfit"))
    first, second = (
        perfmodel.predict("gpt2", p.method, batch=2, seq=48) for p in (first, second)
    )  # known: no step yet
    assert first.recorded is not None
    assert "step" not in vars(first.recorded)
    recording_now, looking, seen = Event(), Event(), Event()

    def look() -> None:
        recording_now.wait(10)
        looking.set()
        assert first.step is not None

    def record_and_look() -> None:
        with recording(Tape()):
            recording_now.set()
            looking.wait(10)
            time.sleep(0.05)  # the other one has gone as far as it gets
            assert second.step is not None
        seen.set()

    for run in (look, record_and_look):
        Thread(target=run, daemon=True).start()
    assert seen.wait(30)


def test_an_entry_is_there_once_its_file_is_loaded_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method is registered where its class is defined: what its file has below is not there yet."""
    folder = tmp_path / "registered_slowly"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from pathlib import Path\nfrom threading import Barrier, Event\nfrom perfmodel.registry import Registry\n"
        "met, end = Barrier(2), Event()\nentries = Registry(__name__, Path(__file__).parent)\n"
    )
    (folder / "slow.py").write_text(
        "from . import end, entries, met\ndef slow(): return below\n"
        "entries.add('slow', slow)\nmet.wait(10)\nend.wait(10)\nbelow = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import registered_slowly  # type: ignore[import-not-found]

    met: Barrier = registered_slowly.met
    entries: Registry[Any] = registered_slowly.entries
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(entries.get, "slow")
        met.wait(10)
        second = threads.submit(lambda: entries.get("slow")())
        with pytest.raises(TimeoutError):
            second.result(0.1)
        registered_slowly.end.set()
        assert (first.result(10)(), second.result(10)) == (1, 1)
