"""One parameter goes through the house: from the command line to its price it passes each room once, downwards."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from click.testing import CliRunner

import perfmodel
from perfmodel.cli import main
from perfmodel.program.dims import remembered
from perfmodel.program.op import Op
from perfmodel.recording.reuse import recalled
from perfmodel.tape.tensor import Tensor
from perfmodel.values import once

HOME = Path(perfmodel.__file__).resolve().parent
RANK = 48  # no other dim of the model is that
# What remembers answers is no station of its own
HANDS_ON = {of.__code__ for of in (remembered(len), recalled, once.__get__)}
QUESTION = ["predict", "--model", "llama-3.2-1b", "--device", "l40s", "--batch", "2", "--seq", "64"]


def room(code: CodeType) -> str:
    """The room that a function stands in; empty outside of the house and for its face."""
    if code in HANDS_ON:
        return ""
    path = Path(code.co_filename)
    parts = path.relative_to(HOME).with_suffix("").parts if path.is_relative_to(HOME) else ("__init__",)
    return "" if parts[0] == "__init__" else parts[0]


def rooms(frame: FrameType | None) -> tuple[str, ...]:
    """The rooms from the command line to a call, in which one after the other handed on to the next."""
    found: list[str] = []
    while frame:
        if (here := room(frame.f_code)) and (not found or found[-1] != here):
            found.append(here)
        frame = frame.f_back
    return tuple(reversed(found))


def carries(value: Any) -> bool:
    """Whether an argument is the rank, what the user wrote of it, the method that has it, or has it as a dim."""
    if isinstance(value, (Op, Tensor)):  # nothing yet while it is made
        specs = (*getattr(value, "inputs", ()), *getattr(value, "outputs", ())) if isinstance(value, Op) else (value,)
        return any(RANK in getattr(s, "shape", ()) for s in specs)
    return value == RANK if type(value) is int else f"r={RANK}" in value if type(value) is str else False


def arguments(frame: FrameType) -> Iterator[Any]:
    code = frame.f_code
    return (frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def test_a_rank_passes_each_room_once() -> None:
    """Whoever follows one number through the code must not come back to where he was to go on."""
    ways: set[tuple[str, ...]] = set()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and room(frame.f_code) and any(map(carries, arguments(frame))):
            ways.add(rooms(frame))

    sys.setprofile(watch)
    try:
        done = CliRunner().invoke(main, [*QUESTION, "--method", f"lora:r={RANK}"])
    finally:
        sys.setprofile(None)
    assert done.exit_code == 0, done.output
    assert {way for way in ways if len(set(way)) < len(way)} == set()
    recorded = ("cli", "commands", "prediction", "recording", "objectives", "architectures", "methods", "tape")
    assert {("cli", "commands"), recorded, ("cli", "commands", "prediction", "devices", "calls")} <= ways
