"""Encoder-decoder models (`AutoModelForSeq2SeqLM`): the decoder reads the labels, shifted by one."""

from typing import Any

from torch import nn

from .family import Family, text_inputs

FAMILY = Family(
    "seq2seq",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    text_inputs,
    note="seq is the length of the encoder's input and of the decoder's target alike",
)


def untie_head(model: Any) -> None:
    """Give the output head a weight of its own, as `tie_weights` leaves it where a checkpoint holds two unlike ones.

    T5's configs tie the head whatever they say; the checkpoints of those that say no (T5 1.1, Flan-T5, mT5) hold both.
    """
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
