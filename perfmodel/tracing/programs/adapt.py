"""What fine-tuning makes of a real model: an adapter_config.json, or a method of the tape on any architecture."""

from typing import Any

import torch

from ...architectures.tasks import CLASSIFIERS, Classifier
from ...architectures.traits import Targets, Traits
from ...errors import UserError, nearest
from ...methods import Method
from ...methods.parts.peft_adapter import AUTOCAST, PeftAdapter
from ...methods.parts.quantised import QuantisedLora
from ...recording.program import RecordedModel, its_own_norm
from ...setup import Setup
from ..regions import bounds
from . import models
from .diffusion import TEXT, of_diffusers
from .stacks import stacks
from .without_data import apply_without_data

_STARTS = ("pissa", "olora", "orthogonal", "corda", "loftq")  # need real weights and change no op of a step


def layers_of(model: Any, name: str) -> RecordedModel:
    """What methods must know of a real model: its sizes, blocks and linear layers."""
    config = model.config if of_diffusers(model) else model.config.get_text_config()
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]

    def said(*keys: str) -> int:
        return next((n for key in keys if isinstance(n := _setting(config, key), int)), 0)

    heads = said("num_attention_heads")
    head_dim = said("head_dim", "attention_head_dim")
    hidden = said("hidden_size") or heads * head_dim
    path, blocks = _row_of_blocks(model, said("num_hidden_layers"))
    return RecordedModel(
        name=name, model_type=_model_type(model), layers=blocks,
        hidden=hidden, heads=heads, kv_heads=said("num_key_value_heads") or heads,
        head_dim=head_dim or hidden // max(1, heads),
        intermediate=said("intermediate_size", "ffn_dim", "n_inner"), vocab=said("vocab_size"), max_positions=None,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        linears=tuple(found), path=path, found=_traits(model),
        classifier=_classifier(model), limits=_limits(model),
    )  # fmt: skip


def _model_type(model: Any) -> str:
    """As peft's tables of default targets have it; of diffusers the class."""
    return str(getattr(model.config, "model_type", type(model).__name__))


def _limits(model: Any) -> tuple[int, ...]:
    """Lengths at which the program may change; a diffusion transformer has none without tokens for its image."""
    return (1, TEXT + 1) if of_diffusers(model) else bounds(model.config.to_dict())


def _setting(config: Any, key: str) -> Any:
    """A setting of a transformers config; None where it has none, or one that differs from layer to layer."""
    try:
        return getattr(config, key, None)
    except Exception:  # Gemma 4's refuses to give the sizes of heads as one, with an error of its own
        return None


def _classifier(model: Any) -> Classifier | None:
    of = next((of for end, of in CLASSIFIERS.items() if type(model).__name__.endswith(end)), None)
    padded = getattr(model.config, "pad_token_id", None) is not None
    return Classifier(of, model.config.num_labels, padded, None) if of else None


def _traits(model: Any) -> Traits:
    """The traits of a real model; default targets are peft's for its type."""
    from peft.utils import constants

    def default(table: str) -> tuple[str, ...] | None:
        names = getattr(constants, f"TRANSFORMERS_MODELS_TO_{table}_MODULES_MAPPING").get(_model_type(model))
        return tuple(names) if isinstance(names, list) else None  # not a pattern that names must match

    kinds = {name.rsplit(".", 1)[-1]: type(m).__name__ for name, m in model.named_modules()}
    return Traits(
        head="masked" if type(model).__name__.endswith("ForMaskedLM") else "causal",
        norm=its_own_norm,
        norms=tuple(sorted(name for name, kind in kinds.items() if "norm" in kind.lower())),
        targets=Targets(
            lora=default("LORA_TARGET"), vera=default("VERA_TARGET"), c3a=default("C3A_TARGET"),
            adalora=default("ADALORA_TARGET"), vblora=default("VBLORA_TARGET"), fourierft=default("FOURIERFT_TARGET"),
            beft=default("BEFT_TARGET"), ia3=default("IA3_TARGET"), feedforward=default("IA3_FEEDFORWARD"),
        ),
        conv1d="Conv1D" in kinds.values(),
    )  # fmt: skip


def _row_of_blocks(model: Any, layers: int) -> tuple[str, int]:
    """Where the longest row of blocks lies in the module tree, and how many there are; of a short one by its length.

    Of an encoder and a decoder it is the decoder's, where the output is.
    """
    rows = stacks(model)
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    row = (rows[-1] if two else max(rows, key=len)) if rows else None
    longest = row.containers[0] if row is not None else None
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            continue
        if module is longest or (longest is None and len(module) == layers):
            return name, len(module)
    return "", layers or 1


def adapted(model: Any, method: Method, architecture: RecordedModel, setup: Setup) -> tuple[Any, Method]:
    """A real model with a method on it, and the method bound to it.

    Raises:
        UserError: neither peft nor transformers has the method, or it does not fit the model.
    """
    bound = method.bind(architecture)
    try:
        if isinstance(method, PeftAdapter):
            return _of_peft(model, method.values), bound
        if isinstance(bound, QuantisedLora):
            from .low_bit import apply_low_bit  # its ops have the names of bitsandbytes', which may be loaded here

            return apply_low_bit(model, bound, architecture, setup), bound
        return models.apply_method(model, bound, architecture), bound
    except UserError:
        raise
    except Exception as error:  # each tuner checks its config in its own way
        called = method.values["peft_type"] if isinstance(method, PeftAdapter) else method.name
        raise UserError(f"peft cannot apply {called} to this model: {' '.join(str(error).split())}") from error


def _of_peft(model: Any, peft_config: dict[str, Any]) -> Any:
    """What peft makes of a model and an adapter_config.json's values.

    Raises:
        UserError: the installed peft does not know its `peft_type`.
    """
    import peft

    values = {k: v for k, v in peft_config.items() if v is not None}
    kind, autocast = str(values.pop("peft_type", "")).upper(), bool(values.pop(AUTOCAST, True))
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [str(getattr(t, "value", t)) for t in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise UserError(f"peft_type {kind!r} is unknown to the installed peft: {nearest(kind, known)}")
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
    if str(options.get("init_lora_weights")).startswith(_STARTS):
        options["init_lora_weights"] = True
    return apply_without_data(
        kind, options, lambda: peft.get_peft_model(model, cls(**options), autocast_adapter_dtype=autocast)
    )


def inputs_of(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """What a tuner wants besides the batch: which task each sample belongs to. Under the caller's fake mode."""
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(model, "peft_config", {}).values()}
    if kinds & {"POLY", "MULTITASK_PROMPT_TUNING"}:
        return {"task_ids": torch.zeros((batch,), dtype=torch.long)}
    return {}
