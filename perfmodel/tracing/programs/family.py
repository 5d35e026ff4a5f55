"""A family of models: those that one of transformers' auto classes builds and that train on the same kind of batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...setup import Setup
from ...values import once

Inputs = dict[str, torch.Tensor]


def of_labels(model: Any, inputs: Inputs) -> torch.Tensor:
    """The loss that a model makes of the labels among its inputs."""
    loss: torch.Tensor = model(**inputs).loss
    return loss


@dataclass(frozen=True)
class Family:
    """Models that train on the same kind of batch.

    Attributes:
        name: as the coverage lists it.
        mapping: transformers' table of model type → class name(s), in `models.auto.modeling_auto`.
        inputs: the keyword arguments of a dense batch, labels included, for (model, setup, device); the tensors are
            made under the caller's fake mode.
        only_named: whether a config stands for it only where its `architectures` says so.
        takes_images: whether there may be images in the text.
        reads_length: whether a sample is as long as the setup says.
        loss: runs the forward pass on these inputs.
        note: what a reader of a prediction must know about the batch.
    """

    name: str
    mapping: str
    inputs: Callable[[Any, Setup, str], Inputs]
    loss: Callable[[Any, Inputs], torch.Tensor] = of_labels
    note: str = ""
    only_named: bool = False
    reads_length: bool = True
    takes_images: bool = False

    @once
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Class names by model type."""
        from transformers.models.auto import modeling_auto

        table = getattr(modeling_auto, self.mapping)
        return {kind: (names,) if isinstance(names, str) else tuple(names) for kind, names in table.items()}


def tokens(shape: Sequence[Any], device: str) -> torch.Tensor:
    """Token ids of a batch: (batch, seq) int64."""
    return torch.zeros(tuple(map(int, shape)), dtype=torch.long, device=device)


def text_inputs(model: Any, setup: Setup, device: str) -> Inputs:
    """Tokens, a mask that says which are real, and a label for each."""
    return _texts((setup.batch, setup.seq), device)


def packed_inputs(model: Any, setup: Setup, device: str) -> Inputs:
    """The same as packing lays it out; within documents positions and no mask (all 0: documents of one token)."""
    inputs = _texts(setup.shape, device)
    named = getattr(model.config, "architectures", None) or [""]
    if str(named[0]).endswith("ForSequenceClassification"):
        inputs["labels"] = tokens(setup.shape[:1], device)
    if setup.within_documents:
        inputs["position_ids"] = torch.zeros_like(inputs.pop("attention_mask"))
    return inputs


def _texts(shape: Sequence[Any], device: str) -> Inputs:
    ids, labels = tokens(shape, device), tokens(shape, device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
