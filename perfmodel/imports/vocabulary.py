"""Tokens that a config adds: a tool gives the embedding and the head a row more for each that has none yet."""

import re
from typing import Any

from ..architectures import load
from ..architectures.names import bundled_for
from .axolotl_kernels import diffuses
from .keys import NOTHING, Keys

AS_IT_IS = "the vocabulary as it is, without rows for new tokens"
UNCUT = "the embedding with all of its rows, not cut to the tokens of the tokenizer"
NOT_ROUND = "the vocabulary as it is, without rows up to a multiple of 32"
LACKING = (  # special tokens, and models that have no row left for them, by their names
    (r"<\|finetune_right_pad_id\|>", r"llama-?3-"),  # Llama 3.1 has it
    (r"<\|im_(start|end)\|>", r"^(mistralai|mistral-community|meta-llama|codellama)/|^nousresearch/(meta-)?llama"),
    (r"<pad>|\[PAD\]|<\|pad\|>", r"(^|/)(open_|meta-|code|tiny)?llama-?[123]?[-_.]|mistral-7b|mixtral-8x7b"),
)
ITSELF = ((r"llama-?3", 128_000),)  # models, and tokens of the vocabulary itself: special ones are added behind them
OF_LLAMA_FACTORY = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")


def enlarged_by_axolotl(keys: Keys) -> None:
    """Say that `tokens` and `special_tokens` add rows (loaders/model.py, `_resize_token_embeddings`).

    What a special token is to a tokenizer no config tells: it is said where the model is known to lack it.
    """
    if isinstance(keys.values.get("tokens"), list) and keys.values["tokens"]:
        keys.differ(AS_IT_IS, "tokens")
    special, model = keys.values.get("special_tokens"), str(keys.values.get("base_model"))
    named = " ".join(map(str, special.values())) if isinstance(special, dict) else ""
    if any(re.search(token, named) and re.search(models, model, re.IGNORECASE) for token, models in LACKING):
        keys.differ(AS_IT_IS, "special_tokens")
    if keys.flag("shrink_embeddings"):
        keys.differ(UNCUT, "shrink_embeddings")
    if keys.flag("resize_token_embeddings_to_32x") and (_rows(model) or 0) % 32:
        keys.differ(NOT_ROUND, "resize_token_embeddings_to_32x")
    diffusion = keys.values.get("diffusion") or {}
    if diffuses(keys) and isinstance(diffusion, dict) and _adds_a_mask(diffusion, model):
        keys.differ(AS_IT_IS)


def _rows(model: str) -> int | None:
    """Tokens of a model's vocabulary, as its bundled config has them; None where there is none."""
    meant = bundled_for(model)
    size = None if meant is None else load(meant.name).values.get("vocab_size")
    return size if isinstance(size, int) else None


def _adds_a_mask(diffusion: dict[str, Any], model: str) -> bool:
    """Whether masked diffusion adds its token (integrations/diffusion/utils.py, `resolve_mask_token_id`).

    So it does where none is named, or one that the tokenizer's `vocab_size` leaves out, as it does added tokens.
    """
    token = diffusion.get("mask_token_id")
    if not isinstance(token, int):
        return not diffusion.get("mask_token_str")
    return any(token >= size and re.search(models, model, re.IGNORECASE) for models, size in ITSELF)


def enlarged_by_llama_factory(keys: Keys) -> bool:
    """Whether rows are added, which is said; beside adapters embedding and head then train, too (model/adapter.py)."""
    asked = [key for key in OF_LLAMA_FACTORY if keys.values.get(key) not in NOTHING]
    if asked:
        keys.differ(AS_IT_IS, *asked)
    return bool(asked)
