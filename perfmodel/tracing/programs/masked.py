"""Masked language models: the loss is taken over all tokens, as a dense batch has it (`AutoModelForMaskedLM`)."""

from .family import Family, text_inputs

FAMILY = Family("masked", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", text_inputs)
