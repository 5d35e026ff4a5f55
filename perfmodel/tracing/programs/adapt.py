"""What fine-tuning makes of a real model: an adapter_config.json, or a method of the tape on any architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ... import architectures, methods
from ...architectures import Architecture, Config
from ...architectures.traits import Targets, Traits
from ...errors import UserError, nearest
from ...methods import Method
from ...resources import read_json
from ...setup import Setup
from ...tape.tensor import Tensor
from . import models
from .stacks import stacks

Adapt = Callable[[Any], Any]  # the model to train from the bare one
_STARTS = ("pissa", "olora", "orthogonal", "corda", "loftq", "mica")  # need real weights and change no op of a step


@dataclass(frozen=True)
class TracedArchitecture(Architecture):
    """What methods must know of a model that the tape does not know, read off the real one."""

    linears: tuple[str, ...] = ()
    path: str = ""
    found: Traits | None = None

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        """What it is like, as its modules and peft's tables say."""
        assert self.found is not None
        return self.found

    @property
    def layer_path(self) -> str:  # type: ignore[override]
        """Where its longest row of blocks lies in the module tree."""
        return self.path

    def linear_names(self) -> list[str]:
        """Its linear layers, by their whole paths."""
        return list(self.linears)


def layers_of(model: Any, name: str) -> TracedArchitecture:
    """The blocks and linear layers of a real model."""
    config = model.config
    tied = bool(getattr(config, "tie_word_embeddings", False))
    longest = max(stacks(model), key=len, default=None)
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    return TracedArchitecture(
        name=name, model_type=config.model_type, layers=len(longest) if longest else 1, hidden=0, heads=0, kv_heads=0,
        head_dim=0, intermediate=0, vocab=0, max_positions=None, tied=tied,
        linears=tuple(found), path=_container(model, longest), found=_traits(model),
    )  # fmt: skip


def _traits(model: Any) -> Traits:
    """The traits of a real model; default targets are peft's for its type."""
    from peft.utils import constants

    def default(table: str) -> tuple[str, ...] | None:
        names = getattr(constants, f"TRANSFORMERS_MODELS_TO_{table}_MODULES_MAPPING").get(model.config.model_type)
        return tuple(names) if isinstance(names, list) else None  # not a pattern that names must match

    kinds = {name.rsplit(".", 1)[-1]: type(m).__name__ for name, m in model.named_modules()}
    return Traits(
        head="masked" if type(model).__name__.endswith("ForMaskedLM") else "causal",
        norm=_its_own_norm,
        norms=tuple(sorted(name for name, kind in kinds.items() if "norm" in kind.lower())),
        targets=Targets(
            lora=default("LORA_TARGET"), adalora=default("ADALORA_TARGET"), fourierft=default("FOURIERFT_TARGET"),
            beft=default("BEFT_TARGET"), ia3=default("IA3_TARGET"), feedforward=default("IA3_FEEDFORWARD"),
        ),
        conv1d="Conv1D" in kinds.values(),
    )  # fmt: skip


def _its_own_norm(parameter: Any, x: Tensor, setup: Setup) -> Tensor:
    raise TypeError("a traced model runs its own norms")


def _container(model: Any, stack: Any) -> str:
    if stack is None:
        return ""
    return next((name for name, module in model.named_modules() if module is stack.containers[0]), "")


def adapter_of_method(config: Config, method: str | Method) -> tuple[Method, Adapt]:
    """A method of the tape, and what applies it to the real model; bound where the tape knows the architecture.

    Raises:
        UserError: an unknown method, or options that do not fit the model.
    """
    parsed = methods.parse(method) if isinstance(method, str) else method
    architecture = _known(config)
    if architecture:
        bound = parsed.bind(architecture)
        return bound, partial(models.apply_method, method=bound, architecture=architecture)

    def adapt(model: Any) -> Any:
        architecture = layers_of(model, config.name)
        bound = parsed.bind(architecture)
        try:
            return models.apply_method(model, bound, architecture)
        except UserError:
            raise
        except Exception as error:  # each tuner checks its config in its own way
            raise UserError(f"peft cannot apply {parsed.name} to this model: {' '.join(str(error).split())}") from error

    return parsed, adapt


def _known(config: Config) -> Architecture | None:
    """The architecture that the tape makes of a config, if it does."""
    try:
        return architectures.from_config(config)
    except UserError:
        return None


def adapter_of_peft(peft_config: dict[str, Any]) -> Adapt:
    """What peft makes of an adapter_config.json's values.

    Raises:
        UserError: the installed peft does not know its `peft_type`.
    """
    import peft

    values = {k: v for k, v in peft_config.items() if v is not None}
    kind = str(values.pop("peft_type", "")).upper()
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [str(getattr(t, "value", t)) for t in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise UserError(f"peft_type {kind!r} is unknown to the installed peft: {nearest(kind, known)}")
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
    if str(options.get("init_lora_weights")).startswith(_STARTS):
        options["init_lora_weights"] = True

    def adapt(model: Any) -> Any:
        try:
            with _drawn_places(options):
                return peft.get_peft_model(model, cls(**options))
        except Exception as error:  # each tuner checks its config in its own way
            raise UserError(f"peft cannot apply {kind} to this model: {' '.join(str(error).split())}") from error

    return adapt


@contextmanager
def _drawn_places(options: dict[str, Any]) -> Iterator[None]:
    """SHiRA trains r·(m + n) places of a weight (m, n), which it draws; without data it could not find them again."""
    where = torch.where

    def drawn(condition: torch.Tensor, *values: Any) -> Any:
        if values or not condition.is_meta:
            return where(condition, *values)
        count = options.get("r", 32) * sum(condition.shape)
        return tuple(torch.empty(count, dtype=torch.long, device="meta") for _ in condition.shape)

    with patch.object(torch, "where", drawn):
        yield


def inputs_of(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """What a tuner wants besides the batch: which task each sample belongs to. Under the caller's fake mode."""
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(model, "peft_config", {}).values()}
    if kinds & {"POLY", "MULTITASK_PROMPT_TUNING"}:
        return {"task_ids": torch.zeros((batch,), dtype=torch.long)}
    return {}


def read_peft_config(path: Path) -> dict[str, Any]:
    """A PEFT adapter_config.json.

    Raises:
        UserError: it cannot be read or holds no `peft_type`.
    """
    values = read_json(path)
    if not isinstance(values.get("peft_type"), str):
        raise UserError(f"{path}: an adapter_config.json holds an object with a peft_type")
    return values
