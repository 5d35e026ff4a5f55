"""Causal language models: every token is predicted from those before it (`AutoModelForCausalLM`)."""

from .family import Family, text_inputs

FAMILY = Family("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", text_inputs)
