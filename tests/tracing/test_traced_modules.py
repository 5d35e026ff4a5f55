"""Modules as people have them: with loops that count, layers that are dropped, or after a first call."""

from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from torch.utils.flop_counter import FlopCounterMode

from perfmodel import UserError, predict_module


class Counting(torch.nn.Module):
    """Blocks of one kind in a loop that does something at some of them."""

    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(blocks)])
        self.neck = torch.nn.Linear(16, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = x.new_zeros(())
        for i, block in enumerate(self.blocks):
            x = torch.relu(block(x))
            if i % 5 == 4:
                taken = taken + self.neck(x).pow(2).sum()
        return taken + x.pow(2).sum()


def test_a_loop_that_counts_its_blocks_is_traced_whole() -> None:
    """What it does at the tenth block was left out, with a note that all was checked."""
    x = torch.ones(4, 16)
    with FlopCounterMode(display=False) as counter:
        Counting()(x)
    found = predict_module(Counting(), x, device="l40s")
    assert found.flops["forward"] == counter.get_total_flops()
    assert "traced whole" in " ".join(found.notes)


@pytest.mark.parametrize("drop", [0.1, 0.9])
def test_layerdrop_leaves_what_is_likelier(drop: float) -> None:
    """Each layer was dropped, of whatever probability: m2m_100's own is 0.05."""
    transformers = pytest.importorskip("transformers")
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    counts = dict.fromkeys(
        ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2
    )
    ids = torch.full((2, 8), 5)

    def flops(p: float) -> Any:
        dropped = {"encoder_layerdrop": p, "decoder_layerdrop": p}
        config = transformers.M2M100Config(vocab_size=64, max_position_embeddings=32, **sizes, **counts, **dropped)
        model = transformers.M2M100ForConditionalGeneration(config)
        return predict_module(model, {"input_ids": ids, "labels": ids}, device="l40s").flops["forward"]

    assert (flops(drop) == flops(0.0)) == (drop < 0.5)


def test_a_model_that_has_run_is_traced_as_before() -> None:
    """transformers hooks what a model captures at its first call; a second set of hooks took outputs twice."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(hidden_sizes=[8, 16, 32, 64], depths=[1] * 4, decoder_hidden_size=16)
    model = transformers.SegformerForSemanticSegmentation(config).train()
    inputs = {"pixel_values": torch.ones(1, 3, 64, 64), "labels": torch.zeros(1, 64, 64, dtype=torch.long)}
    fresh = predict_module(model, inputs, device="l40s")
    model(**inputs)
    assert predict_module(model, inputs, device="l40s").flops == fresh.flops


def test_a_loss_of_nothing_that_trains_is_called_so() -> None:
    with pytest.raises(UserError, match="the loss depends on nothing that trains"):
        predict_module(torch.nn.Linear(4, 4), torch.ones(2, 4), loss=lambda y: y.detach().sum())
