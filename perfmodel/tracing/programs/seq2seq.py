"""Encoder-decoder models (`AutoModelForSeq2SeqLM`): the decoder reads the labels, shifted by one."""

from .family import Family, text_inputs

FAMILY = Family(
    "seq2seq",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    text_inputs,
    note="seq is the length of the encoder's input and of the decoder's target alike",
)
