"""The keys and values that a config file holds, YAML or JSON; files that describe no training, or another tool's."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..resources import LARGEST, json_object, mapping, parsed, read_text
from .ddp import FACTORY
from .keys import NO_TRAINING

LARGEST_YAML = 2**20  # bytes
MOST_VALUES = 100_000  # those behind an alias count wherever it stands
# Keys that only such a file has (several at once where a space is between them), and what it is
BESIDE = (
    (("distributed_type", "compute_environment"), "accelerate's own config; give it as --accelerate"),
    (("zero_optimization", "train_micro_batch_size_per_gpu"), "DeepSpeed's own config; give it as --accelerate"),
    (("export_dir",), "an export"),
    (("infer_backend",), "a config of inference"),
    (("provider", "dockerfile_commands", "gpu_count"), "a cloud job"),
)
OF_OTHERS = ((("train_type model", "tuner_type model"), "ms-swift"),)
COMPONENT = "_component_"  # of torchtune's sections
UNREAD = "a config of {}, which is not read: say its step with options, such as --model, --method, --batch and --seq"

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
OF_WORDS = re.compile("^(wandb|hub|report)_|strategy$")  # keys that hold such words, as save_strategy: "no"


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    return _parsed(path, read_text(path, LARGEST if path.suffix == ".json" else LARGEST_YAML))


def values_alone(name: str, text: str) -> tuple[Path, dict[str, Any]]:
    """A file's name without its folders, and the keys and values of its text.

    Raises:
        UserError: a text that is too large, or holds something else.
    """
    path = Path(Path(name).name)
    if len(text.encode(errors="replace")) > LARGEST_YAML:
        raise UserError(f"{path}: larger than {LARGEST_YAML // 2**20} MiB, so not what is read here")
    return path, _parsed(path, text)


def _parsed(path: Path, text: str) -> dict[str, Any]:
    if path.suffix == ".json":
        return json_object(text, str(path))
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of C is ten times as fast
    values = mapping(parsed(text, partial(yaml.load, Loader=loader), "YAML", str(path), yaml.YAMLError), str(path))
    _check_size(values, path)
    return {str(key): value for key, value in values.items()}


def _check_size(values: Any, path: Path) -> None:
    """Raise `UserError` where few aliases stand for a great many values, which nothing may walk through or print."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if isinstance(value, (dict, list, tuple, set)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
            if seen + len(waiting) > MOST_VALUES:
                raise UserError(f"{path}: more than {MOST_VALUES:,} values, so not a training config")


def refuse_others(path: Path, values: dict[str, Any]) -> None:
    """Say what a file is that describes no training, or that of a tool that is not read.

    Raises:
        UserError: it is such a file.
    """
    for marks, what in BESIDE:
        if _has(values, marks) and not values.get("do_train"):
            raise UserError(f"{path}: {NO_TRAINING}: {what}")
    if values and all(re.fullmatch("<.+>", key) for key in values):
        raise UserError(f"{path}: {NO_TRAINING}: new tokens and what they mean")  # LLaMA-Factory's
    if any(isinstance(section, dict) and COMPONENT in section for section in values.values()):
        raise UserError(f"{path}: {UNREAD.format('torchtune')}")
    for marks, tool in OF_OTHERS:
        if _has(values, marks):
            raise UserError(f"{path}: {UNREAD.format(tool)}")


def unquoted(tool: str, path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Words in quotes as a tool takes them; one for false is true to LLaMA-Factory, and to some checks of Axolotl.

    Raises:
        UserError: a word for false in a file of these.
    """
    words = {key: value.lower() for key, value in values.items() if isinstance(value, str) and not OF_WORDS.search(key)}
    for key, word in words.items():
        if tool in (FACTORY, "Axolotl") and WORDS.get(word) is False:
            raise UserError(f"{path}: {key} {values[key]!r} in quotes is a word, which {tool} may take for true")
    return {**values, **{k: WORDS[w] for k, w in words.items() if w in WORDS}} if tool == "Axolotl" else values


def _has(values: dict[str, Any], marks: tuple[str, ...]) -> bool:
    return any(all(values.get(key) not in (None, "") for key in mark.split()) for mark in marks)
