"""Strategies for the fuzz tests: mutated files, and command lines made from the real option table.

Set FUZZ_TRIES to run as many tries of every test, with a new random seed each time.
"""

import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from typing import Any

import click
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from perfmodel import methods
from perfmodel.cli import COMMANDS, main
from perfmodel.commands.advise import Quantity
from perfmodel.commands.options import GridAxis

TRIES = int(os.environ.get("FUZZ_TRIES", "0"))
SECONDS = 10.0  # of the processor's time that any question may take
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking an example that takes seconds takes minutes
MEMORY = 900 * 2**20  # B beside the 100 MiB that the program has before it is asked


def tries(usual: int) -> settings:
    """Settings of a fuzz test: a fixed small sample by default, FUZZ_TRIES random ones on demand."""
    return settings(
        max_examples=TRIES or usual,
        derandomize=not TRIES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking a slow try takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


@contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Around a try: more than so many seconds of the processor, or bytes of memory, fail it."""

    def late(*_: Any) -> None:
        raise AssertionError(f"more than {seconds} s of the processor's time")

    usual, limits = signal.signal(signal.SIGPROF, late), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, usual)


NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 10**30, 10**400, 0.0, 0.5, -0.5, 1e-300, 1e300, 1.5, nan, inf, -inf]
)
# what a shell can pass: no NUL, but bytes that are not UTF-8 (surrogate escapes)
WORDS = st.one_of(
    st.sampled_from(["", " ", "none", "null", "true", "NaN", "all-linear", "auto", "../..", "-1", "1e9", "٣", "²"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["\udcff\udcfe", "a" * 300, "a/" * 600, "[red]", "{x}", "%s", "\n", "\x1b[31m", "~"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.just("\0"))
DEEP = [[[[[[[[[[[[]]]]]]]]]]]]
ODD = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(WORDS, SCALARS, max_size=2), st.sampled_from([DEEP, {}, []])
)


@st.composite
def mutated(draw: DrawFn, value: Any, changes: int = 3) -> Any:
    """A nested value with some entries dropped, replaced, renamed or wrapped."""
    for _ in range(draw(st.integers(0, changes))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: DrawFn, value: Any) -> Any:
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = list(range(len(value)))
    if not keys or draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    key = draw(st.sampled_from(keys))
    changed = dict(value) if isinstance(value, dict) else list(value)
    kind = draw(st.sampled_from(["drop", "replace", "replace", "rename", "wrap", "deeper", "deeper"]))
    if kind == "drop":
        del changed[key]
    elif kind == "replace":
        changed[key] = draw(ODD)
    elif kind == "rename" and isinstance(changed, dict):
        changed[draw(WORDS)] = changed.pop(key)
    elif kind == "wrap":
        changed[key] = [changed[key]]
    else:
        changed[key] = _mutate(draw, changed[key])
    return changed


LITERALS = st.sampled_from([
    "", "nan", "inf", "-1", "0", "1e-300", "1e300", "1e400", "9" * 400, "9" * 5000, "true", '""', '"x"', "'", "[]",
    "{}", "[[1, 2], [3]]", "{a = 1}", "1979-05-27", '"\\u0000"', '"\\ud800"', "- x", "&a [*a]", "*a", "1,2", "\ufeff",
])  # fmt: skip
BYTES = st.sampled_from([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"[" * 2000, b"{" * 2000, b"\r", b"\n\n", b"\t"])

VALUE = re.compile(r"(?<=[=:,] ).*|(?<==).*|(?<=,)[^,]*")  # of a line of TOML, YAML, JSON or CSV


@st.composite
def mangled(draw: DrawFn, text: str) -> bytes:
    """The bytes of a text file with lines dropped, doubled or given other values, cut off, or with garbage in it."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(0, 3))):
        i = draw(st.integers(0, max(0, len(lines) - 1)))
        kind = draw(st.sampled_from(["drop", "double", "value", "value", "value", "key"]))
        here = lines[i : i + 1]
        if kind == "drop":
            here = []
        elif kind == "double":
            here *= 2
        elif kind == "value":
            literal = draw(LITERALS)
            here = [re.sub(VALUE, lambda _, x=literal: x, line, count=1) for line in here]
        else:
            here = [draw(WORDS).replace("\n", "") + line for line in here]
        lines[i : i + 1] = here
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["whole", "whole", "whole", "whole", "cut", "garbage", "bom", "empty", "binary"]))
    at = draw(st.integers(0, len(raw)))
    return {
        "whole": raw, "cut": raw[:at], "garbage": raw[:at] + draw(BYTES) + raw[at:], "bom": b"\xef\xbb\xbf" + raw,
        "empty": b"", "binary": draw(st.binary(max_size=40)),
    }[kind]  # fmt: skip


@st.composite
def json_file(draw: DrawFn, value: Any) -> bytes:
    """The bytes of a JSON file that was right once."""
    text = json.dumps(draw(mutated(value)), indent=1)
    return draw(mangled(text)) if draw(st.booleans()) else text.encode()


METHOD_VALUES = st.one_of(
    st.sampled_from(
        ["1", "2", "4", "0", "-1", "1.5", "true", "false", "q_proj+v_proj", "all-linear", "c_attn", "fp32"]
    ),
    st.sampled_from(["bf16", "0-1", "0+2", "2-0", "nan", "inf", "1e30", "+", "lora", "full", "unsloth", "99999999999"]),
    WORDS,
)


@st.composite
def method(draw: DrawFn, wild: bool = True) -> str:
    """A method's name with options of its own; with sizes of one's small models unless it is `wild`."""
    registered = methods.registered()
    name = draw(st.sampled_from([*registered, "full", "lora"]))
    known = list(methods.options(registered[name]))
    if not wild:
        size = next((f":{key}={draw(st.integers(1, 2))}" for key in ("r", "k") if key in known), "")
        return name + draw(st.sampled_from(["", size]))
    options = draw(st.dictionaries(st.sampled_from(known) if known else WORDS, METHOD_VALUES, max_size=3))
    text = name + ":" * bool(options) + ",".join(f"{k}={v}" for k, v in options.items())
    return draw(st.one_of(st.just(text), st.just(text), st.just(text), WORDS, st.just(text + draw(WORDS))))


# option or argument -> values that are right, values that are not
NAMES: dict[str, tuple[list[str], list[str]]] = {
    "model": (["tiny/config.json", "tiny-gpt2/config.json", "tiny", "tiny-gpt2", "tiny-bert", "tiny-qwen", "[", "gpt2"],
              ["broken.json", "nowhere/config.json", "mine.toml", "no/model"]),
    "device": (["l40s", "h100-sxm", "A100", "t4", "cpu-epyc-genoa-2c", "mine.toml"], ["broken.toml", "broken.json"]),
    "host": (["default"], ["mine.toml", "broken.toml", "nowhere.toml"]),
    "axes": (["none", "batch", "batch+seq+size", "size", "targets"], ["batch+", "rank", "+"]),
    "name": (["lora", "full", "gelora"], ["laro"]),
    "config": (["lora.yml", "sft.json", "adapter_config.json"], ["broken.json", "tiny/config.json", "tiny"]),
    "output": (["out.csv", "out.json", "out.parquet", "out.html"], ["out.txt", "tiny", "nowhere/out.csv"]),
    "plot": (["plot.svg"], ["plot.txt", "nowhere/plot.svg"]),
    "html": (["page.html"], ["nowhere/page.html", "tiny"]),
    "paths": (["records.jsonl"], ["broken.json", "trace.json.gz", "nowhere.jsonl", "/dev/zero"]),
    "path": (["trace.json.gz"], ["broken.json", "records.jsonl", "tiny", "/dev/zero"]),
    "phases": (["forward", "ProfilerStep#1"], ["nowhere"]),
}  # fmt: skip
TYPES: dict[type, tuple[list[str], list[str]]] = {
    GridAxis: (["1", "2", "1+2+4", "1-4", "16-64:16", "1-64*2"],
           ["0", "-", "4-1", "1-2:0", "1*2", "+", "1--2", "1-99999999999999", "1-4:", "1-4*"]),
    Quantity: (["24G", "900M", "20M", "24 G", "100k"], ["0", "-1GB", "1e9", "GB", "9" * 400, "1TB", "24GB", "2B", "1"]),
}  # fmt: skip
WHOLE = (["1", "2", "4", "8"], ["0", "-1", "1000000", "10" * 20, "1.5"])
METHODS = ("method", "methods", "a", "b")
SLOW = ("traced", "peft_config")  # they start torch


def _value(param: click.Parameter, wild: bool) -> SearchStrategy[str]:
    """Values of an option; when `wild`, half are not such as its help asks for."""
    kind = param.type
    if param.name in METHODS:
        return method(wild)
    if type(kind) in TYPES:
        right, wrong = TYPES[type(kind)]
    elif isinstance(kind, click.Choice):
        right, wrong = [str(c) for c in kind.choices], ["bf17"]
    else:
        right, wrong = NAMES.get(param.name or "", WHOLE)
    usual = st.sampled_from(right)
    return st.one_of(usual, usual, usual, st.sampled_from(wrong), WORDS) if wild else usual


@st.composite
def command_line(draw: DrawFn, command: str) -> list[str]:
    """Arguments of a command: what it requires (mostly), some of the rest, in any order."""
    found = main.get_command(click.Context(main), command)
    if isinstance(found, click.Group):
        name = draw(st.sampled_from([*found.commands]))
        return [name, *draw(arguments(found.commands[name]))]
    return draw(arguments(found))


@st.composite
def arguments(draw: DrawFn, command: click.Command) -> list[str]:
    """What follows a command's name."""
    pieces: list[list[str]] = []
    wild = draw(st.booleans())
    for param in command.params:
        if param.name in SLOW:
            continue
        wanted = (not wild or draw(st.integers(0, 9)) > 0) if param.required else draw(st.integers(0, 5)) == 0
        if not wanted:
            continue
        if isinstance(param, click.Argument):
            pieces.append([draw(_value(param, wild))])
        elif isinstance(param, click.Option) and param.is_flag:
            pieces.append([draw(st.sampled_from([*param.opts, *param.secondary_opts]))])
        else:
            count = draw(st.integers(1, 3)) if param.multiple else 1
            pieces.append([draw(st.sampled_from(param.opts)), *(draw(_value(param, wild)) for _ in range(count))])
    ordered = [word for piece in draw(st.permutations(pieces)) for word in piece]
    if wild and draw(st.integers(0, 9)) == 0:
        ordered.insert(draw(st.integers(0, len(ordered))), draw(st.one_of(WORDS, st.just("--"), st.just("--help"))))
    return ordered


MEASURING = ("validate", "calibrate")  # they run for minutes
SERVING = ("app",)  # it runs until it is ended
QUICK = [name for name in COMMANDS if name not in (*MEASURING, *SERVING)]


def write_folder(folder: Path, small: dict[str, dict[str, Any]], configs: Path, device: str) -> None:
    """The files that command lines name: small models, a device, training configs, and broken ones."""
    for name, kind in (
        ("tiny", "llama"),
        ("tiny-gpt2", "gpt2"),
        ("tiny-bert", "bert"),
        ("tiny-qwen", "qwen"),
        ("[", "llama"),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(small[kind]))
    (folder / "mine.toml").write_text(device)
    (folder / "broken.toml").write_text("name = [")
    (folder / "broken.json").write_text('{"model_type": "llama",')
    for name, source in {
        "lora.yml": "axolotl/lora-1b.yml", "sft.json": "trl/sft-lora.json", "adapter_config.json": "peft/lora.json"
    }.items():  # fmt: skip
        (folder / name).write_bytes((configs / source).read_bytes())
