"""Tokens that a config adds: a tool gives the embedding and the head a row more for each that has none yet."""

import re

from .keys import Keys

AS_IT_IS = "the vocabulary as it is, without rows for new tokens"
LACKING = (  # special tokens, and models that have no row left for them, by their names
    (r"<\|finetune_right_pad_id\|>", r"llama-?3-"),  # Llama 3.1 has it
    (r"<\|im_(start|end)\|>", r"^(mistralai|mistral-community|meta-llama)/"),
)


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
