"""`perfmodel validate coverage`: which model types of transformers and which tuners of peft can be traced, and why not.

Every model type is built from transformers' own default config, at full size: a trace needs no memory for weights.
"""

import csv
import ctypes
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from perfmodel.architectures import Config
from perfmodel.errors import UserError
from perfmodel.partitions import Workers, answered
from perfmodel.resources import DATA, read_rows
from perfmodel.setup import Setup
from perfmodel.tracing import programs, traced
from perfmodel.tracing.programs.tuners_of_peft import EXAMPLES

SETUP = Setup(batch=1, seq=64)
TABLE = DATA / "coverage" / "transformers-5.24.csv"  # of a whole run: every type with the reason why not
PATIENCE = 600  # seconds of this process for one type or tuner
LEAST_TYPES = 25  # model types of transformers
LEAST_TUNERS = 0.9  # of the tuners of peft
LLAMA = Config(
    {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    },
    "llama", "llama",
)  # fmt: skip  # peft's tuners are tried on it: some of them compute on every block of a weight when they start

# Keys without which a default config describes no model, from the config.json of the checkpoint that is named.
NEEDED: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 33, "pad_token_id": 1},  # facebook/esm2_t33_650M_UR50D
    "ministral": {"head_dim": 128},  # mistralai/Ministral-8B-Instruct-2410
    "hunyuan_v1_dense": {"head_dim": 128},  # tencent/Hunyuan-7B-Instruct
    "hunyuan_v1_moe": {"head_dim": 128},  # tencent/Hunyuan-A13B-Instruct
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},  # deepseek-ai/DeepSeek-V2-Lite
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},  # rednote-hilab/dots.llm1.base
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5}},  # databricks/dbrx-base
    "nemotron": {"num_key_value_heads": 8},  # nvidia/Minitron-8B-Base
    "reformer": {"axial_pos_shape": [8, 8]},  # their product must be the sequence length
    "xmod": {"default_language": "en_XX"},  # what `set_default_language` sets, as its documentation has it
    "encoder-decoder": {  # two BERTs, as transformers' documentation of the class has it
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        "pad_token_id": 0,
    },
}
QUICK = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "gptj", "bloom",
    "falcon", "opt", "mamba", "mixtral", "bert", "roberta", "distilbert", "deberta-v2", "albert", "electra",
    "modernbert", "t5", "bart", "mbart", "pegasus", "marian", "vit", "deit", "swin", "convnext", "resnet", "beit",
    "dinov2",
)  # fmt: skip


@dataclass(frozen=True)
class CoverageRow:
    """One model type or tuner.

    Attributes:
        kind: the family of models, or "tuner".
        reason: why it cannot be traced; empty if it can.
        traced, blocks: of how many of its repeated blocks the largest trace was made.
        calls: ATen calls of forward and backward.
    """

    kind: str
    name: str
    seconds: float
    reason: str = ""
    traced: int = 0
    blocks: int = 0
    calls: int = 0

    @property
    def ok(self) -> bool:
        """Whether it can be traced."""
        return not self.reason


def model_types(*, quick: bool) -> list[tuple[str, str]]:
    """(family, model type) of all that some family knows, or of a fixed part of them."""
    known = programs.types()
    names = [name for name in QUICK if name in known] if quick else list(known)
    return [(known[name].name, name) for name in names]


def cover_model(family: str, name: str) -> CoverageRow:
    """Trace full fine-tuning of one model type: with bf16 weights, or fp32 ones where its program cannot have them."""
    config = Config({"model_type": name, **NEEDED.get(name, {})}, name, name)
    setup = replace(SETUP, batch=2) if family == "vision" else SETUP  # LeViT normalises over the batch
    rows = (_of_dtype(family, config, replace(setup, dtype=dtype)) for dtype in ("bf16", "fp32"))
    first = next(rows)
    return first if first.ok else next((row for row in rows if row.ok), first)


def _of_dtype(family: str, config: Config, setup: Setup) -> CoverageRow:
    return _row(family, config.name, lambda: traced.of_method(config, "full", setup))


def tuners() -> list[str]:
    """Every tuner of the installed peft."""
    import peft

    return sorted(str(getattr(kind, "value", kind)) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING)


def cover_tuner(name: str) -> CoverageRow:
    """Trace one tuner on a Llama."""
    values = {"peft_type": name, "task_type": "CAUSAL_LM", **EXAMPLES.get(name, {})}
    with TemporaryDirectory() as folder:
        if name == "XLORA":
            values["adapters"] = dict.fromkeys(("0", "1"), _saved_lora(folder))
        return _row("tuner", name, lambda: traced.of_peft(LLAMA, values, SETUP))


def _saved_lora(folder: str) -> str:
    """A LoRA on disk, as X-LoRA mixes them."""
    import peft

    model = programs.build_model(LLAMA, SETUP, device="cpu")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def _row(kind: str, name: str, trace: Callable[[], Any]) -> CoverageRow:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), patience(PATIENCE):
            warnings.simplefilter("ignore")
            step, made = trace()
    except UserError as error:
        return CoverageRow(kind, name, time.perf_counter() - start, reason=_without(str(error), name))
    except TimeoutError as error:
        return CoverageRow(kind, name, time.perf_counter() - start, reason=str(error))
    calls = sum(count * (not op.view) for part, op, count in step.ops() if part.phase != "optimizer")
    return CoverageRow(kind, name, time.perf_counter() - start, "", made.traced, made.blocks, int(calls))


def patience(seconds: int) -> AbstractContextManager[None]:
    """Raise `TimeoutError` in what takes more of this process's time, or of this thread's where it is not the main one
    (a worker's); nothing where the system has no such clock."""
    alone = threading.current_thread() is threading.main_thread()
    return _patience_of_process(seconds) if alone else _patience_of_thread(seconds)


@contextmanager
def _patience_of_process(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"not traced within {seconds} s")

    if not hasattr(signal, "ITIMER_PROF"):
        yield
        return
    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _patience_of_thread(seconds: int) -> Iterator[None]:
    if not hasattr(time, "pthread_getcpuclockid"):
        yield
        return
    thread, over = threading.get_ident(), threading.Event()
    clock = time.pthread_getcpuclockid(thread)
    end = time.clock_gettime(clock) + seconds

    def watch() -> None:
        while not over.wait(min(1, seconds / 10)):
            if time.clock_gettime(clock) > end:
                # Only a class can be raised in another thread: its text comes below.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"not traced within {seconds} s") from None
    finally:
        over.set()
        watching.join()


def read_coverage(path: Path = TABLE) -> list[CoverageRow]:
    """The rows of a run that `append_row` wrote."""
    return read_rows(path, lambda r: CoverageRow(**{f.name: f.type(r[f.name]) for f in fields(CoverageRow)}))  # type: ignore[operator]


def append_row(path: Path, row: CoverageRow) -> None:
    """Add a row to a table, which is made if it is not there."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(CoverageRow)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({**asdict(row), "seconds": round(row.seconds, 1)})


def enough(rows: Sequence[CoverageRow]) -> bool:
    """Whether at least `LEAST_TYPES` model types and `LEAST_TUNERS` of the tuners can be traced."""
    by_tuner = [row.ok for row in rows if row.kind == "tuner"]
    by_type = [row.ok for row in rows if row.kind != "tuner"]
    return sum(by_type) >= LEAST_TYPES and sum(by_tuner) >= LEAST_TUNERS * len(by_tuner)


def _without(reason: str, name: str) -> str:
    """A reason beside the name that it is about."""
    for start in (f"{name}: ", f"{name} cannot be traced: "):
        reason = reason.removeprefix(start)
    return reason


def cover(
    models: Sequence[tuple[str, str]], names: Sequence[str], progress: Callable[[str], None], workers: Workers
) -> Iterator[CoverageRow]:
    """A row for each model type and each tuner, as they come."""

    def tasks() -> Iterator[Callable[[], CoverageRow]]:
        for family, name in models:
            progress(name)
            yield partial(cover_model, family, name)
        for name in names:
            progress(name)
            yield partial(cover_tuner, name)

    return (row for _, row in answered(enumerate(tasks()), workers))
