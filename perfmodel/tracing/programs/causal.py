"""Causal language models: every token is predicted from those before it (`AutoModelForCausalLM`)."""

from .family import Family, text

FAMILY = Family("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", text)
