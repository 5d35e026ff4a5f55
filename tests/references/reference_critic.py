"""A policy with a value model beside it, as TRL's trainer of PPO wraps them (experimental/ppo/ppo_trainer.py, 1.10)."""

from typing import Any

import torch
from helpers import config_of
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from perfmodel.setup import Setup
from perfmodel.tracing.programs import models


class PolicyAndValue(torch.nn.Module):
    """Two models that train as one: of the second the values that it finds after every token."""

    def __init__(self, policy: Any, value_model: Any) -> None:
        super().__init__()
        self.policy, self.value_model, self.config = policy, value_model, policy.config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.policy.activation_checkpointing_enable(**options)

    def forward(self, **inputs: Any) -> tuple[Any, torch.Tensor]:
        output = getattr(self.value_model, self.value_model.base_model_prefix)(**inputs)
        values = self.value_model.score(output.hidden_states[-1])
        return self.policy(**inputs), values


def of_values(name: str, setup: Setup) -> Any:
    """A classifier of sequences with one output."""
    named = CLASSIFIERS[config_of(name).text("model_type")]
    config = config_of(name, architectures=[named], num_labels=1)
    return models.build_model(config, setup, device="cpu")
