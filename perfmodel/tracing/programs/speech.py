"""Speech to text (`AutoModelForSpeechSeq2Seq`): the sound of a sample, and the tokens of its transcript."""

from typing import Any

import torch

from ...errors import UserError
from ...setup import Setup
from .family import Family, Inputs, tokens


def transcripts(model: Any, setup: Setup, device: str) -> Inputs:
    """Mel spectra (batch, mel bins, frames) as long as the encoder's positions, and the tokens of the transcript.

    Raises:
        UserError: the config does not say what a sample's sound is.
    """
    config = model.config
    bins, positions = (getattr(config, key, None) for key in ("num_mel_bins", "max_source_positions"))
    if model.main_input_name != "input_features" or not bins or not positions:
        raise UserError(f"model_type {config.model_type!r}: its config does not tell the size of a sample's sound")
    weights = next(p.dtype for p in model.parameters() if p.is_floating_point())
    frames = 2 * positions  # Whisper's second convolution has a stride of 2
    sound = torch.zeros((int(setup.batch), bins, frames), dtype=torch.float32 if setup.amp else weights, device=device)
    return {"input_features": sound, "labels": tokens((setup.batch, setup.seq), device)}


FAMILY = Family(
    "speech",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    transcripts,
    note="seq is the length of the transcript; the sound is as long as the encoder takes (Whisper: 30 s)",
)
