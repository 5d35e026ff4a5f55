"""Classifiers of sequences and of tokens (`AutoModelForSequenceClassification`, …): a label for each."""

from typing import Any

import torch

from ...setup import Setup
from .family import Family, Inputs, text


def a_label_each(model: Any, setup: Setup, device: str) -> Inputs:
    """Tokens, a mask that says which are real, and one label a sample."""
    labels = torch.zeros((int(setup.batch),), dtype=torch.long, device=device)
    return {**text(model, setup, device), "labels": labels}


SEQUENCES = Family("sequence classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", a_label_each)
TOKENS = Family("token classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", text)
