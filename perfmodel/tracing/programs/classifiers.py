"""Classifiers of text: a class a sample (`AutoModelForSequenceClassification`), or one a token."""

from typing import Any

import torch

from ...setup import Setup
from .family import Family, Inputs, text_inputs


def classes(model: Any, setup: Setup, device: str) -> Inputs:
    """Tokens, a mask that says which are real, and a class for each sample."""
    return {
        **text_inputs(model, setup, device),
        "labels": torch.zeros((int(setup.batch),), dtype=torch.long, device=device),
    }


OF_SAMPLES = Family("classifier", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", classes, only_named=True)
OF_TOKENS = Family("token classifier", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", text_inputs, only_named=True)
