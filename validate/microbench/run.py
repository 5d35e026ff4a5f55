"""Goes through a design within a budget of seconds, the blocks in turn, and returns one record a case."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from perfmodel.tracing.programs.choose import out_of_memory

from ..measuring.environment import spoilt
from .designs import MicroCase
from .kernels import build_call, release_pools
from .stopwatch import Stopwatch

Progress = Callable[[float, str], None]  # share of the budget that is spent, what comes next
WEIGHTS = {"gemm fp32": 4.0, "gemm bf16": 2.0, "pointwise fp32": 3.0, "pointwise bf16": 1.5, "attention": 2.0}
REPEATS = 9
CASE_SECONDS = 0.2  # most that the repeats of one case take
NEEDED = 60  # cases of a block that run even if the time is over, small ones first: no fit without them


def run_blocks(
    blocks: dict[str, list[MicroCase]],
    device: str,
    watch: Stopwatch,
    seconds: float,
    progress: Progress = lambda share, label: None,
) -> list[dict[str, Any]]:
    """Measure the blocks for so many seconds, each for its share; records of kind "microbench" and "unmeasured".

    After an error that spoils the GPU (`SPOILT`), which is the last record then, nothing more is measured.
    """
    begin = time.perf_counter()
    spent = dict.fromkeys(blocks, 0.0)
    done = dict.fromkeys(blocks, 0)
    todo = {name: list(reversed(cases)) for name, cases in blocks.items()}
    records = []
    while any(todo.values()):
        elapsed = time.perf_counter() - begin
        open_blocks = [b for b in todo if todo[b] and (elapsed < seconds or done[b] < NEEDED)]
        if not open_blocks:
            break
        name = min(open_blocks, key=lambda b: spent[b] / WEIGHTS.get(b, 1.0))
        case = todo[name].pop()
        progress(min(1.0, elapsed / seconds), case_in_words(case.as_dict()))
        start = time.perf_counter()
        record = attempt(case, device, watch)
        spent[name] += time.perf_counter() - start
        done[name] += 1
        records.append(record)
        if spoilt(record):
            return records
    release_pools(device)
    return records


def case_in_words(case: Mapping[str, Any]) -> str:
    """A case, of its record, as a line tells of it."""
    return f"{case['op']} {case['dtype']} {' x '.join(str(size) for size in case['sizes'].values())}".rstrip()


def attempt(case: MicroCase, device: str, watch: Stopwatch) -> dict[str, Any]:
    """A record of kind "microbench", or "unmeasured" where memory ran out or a kernel failed."""
    try:
        call, inner = build_call(case, device)
        timing = watch(call, inner, CASE_SECONDS, REPEATS)
    except RuntimeError as error:  # of cuBLAS, cuDNN and oneDNN too, for which a card or a shape is not made
        text = " ".join(str(error).split())[:300]
        status = "oom" if out_of_memory(error) else "error"
        if status == "oom":  # the pools of larger cases would leave none to smaller ones
            release_pools(device)
        return {"kind": "unmeasured", "case": case.as_dict(), "status": status, "message": text}
    return {"kind": "microbench", "case": case.as_dict(), "clock": watch.kind, "seconds": asdict(timing)}
