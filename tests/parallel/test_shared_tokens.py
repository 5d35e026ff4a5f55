"""Laws of ranks that share tokens between the layers that they share (`Setup.sequence_parallel`), which need no torch.

What is exchanged when is compared with the real program: tests/oracle/test_parallel.py.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws_of_ranks import LLAMA

from perfmodel import predict
from perfmodel.errors import UserError
from perfmodel.prediction.predict import Prediction
from perfmodel.report.figures import setup_line
from perfmodel.setup import Setup

ON = "h100-sxm"
METHODS = ("full", "lora:r=8,targets=all-linear", "lora:r=16")


def shared(method: str, **options: Any) -> Prediction:
    return predict(LLAMA, method, device=ON, **{"gpus": 4, "tp": 4, "seq": 256, "sequence_parallel": True, **options})


@settings(max_examples=8)
@given(
    method=st.sampled_from(METHODS), ranks=st.sampled_from((2, 4, 8)), batch=st.sampled_from((1, 3, 8)),
    checkpoint=st.sampled_from(("none", "block")), grad_accum=st.sampled_from((1, 2)),
)  # fmt: skip
def test_shared_tokens_are_all_tokens(method: str, ranks: int, batch: int, checkpoint: str, grad_accum: int) -> None:
    """The same parameters train on as much work as of ranks that have all tokens each, in less room."""
    how = {"gpus": ranks, "tp": ranks, "batch": batch, "checkpoint": checkpoint, "grad_accum": grad_accum}
    of_all, of_some = (shared(method, **how, sequence_parallel=on) for on in (False, True))
    assert (of_some.total_params, of_some.trainable_params) == (of_all.total_params, of_all.trainable_params)
    assert of_some.memory.peak <= of_all.memory.peak, "equal where the optimizer needs most"
    assert of_some.memory.peak < of_all.memory.peak or batch < 8
    if method == "full":
        assert of_some.flops == of_all.flops
    assert of_some.tokens_per_second * of_some.time.phases["total"] == pytest.approx(batch * 256 * grad_accum)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layer_gathers_what_columns_read_and_scatters_what_rows_make(ranks: int) -> None:
    """By hand, in full fine-tuning: two of each a block and pass, the embedding and the head."""
    p = shared("full", gpus=ranks, tp=ranks, batch=2, clip_grad=False, optimizer="adamw-fused")
    blocks, hidden, logits = LLAMA.values["num_hidden_layers"], 2 * 256 * 512 * 2, 2 * 256 * 2048 * 2
    sent = p.time.communication
    assert sent.calls["all_gather"] == 2 * (2 * blocks + 1) + 1
    assert sent.calls["reduce_scatter"] == 2 * (2 * blocks + 1)
    assert sent.calls["all_reduce"] == 2 * blocks + 1, "gradients of norms, which are of a rank's own tokens"
    assert sent.nbytes["all_gather"] == 2 * (2 * blocks + 1) * hidden + logits
    assert sent.nbytes["reduce_scatter"] == 2 * (2 * blocks + 1) * hidden
    assert sent.nbytes["all_reduce"] == (2 * blocks + 1) * 512 * 2


def test_what_adapters_send_grows_with_their_rank_alone() -> None:
    """Columns gather the small product forward; of what rows make it is scattered, and its gradient gathered twice."""
    base, small, large = (
        shared(f"lora:r={r},targets={targets}", clip_grad=False)
        for r, targets in ((4, "v_proj"), (8, "v_proj+o_proj"), (16, "v_proj+o_proj"))
    )
    more = {
        kind: large.time.communication.nbytes[kind] - small.time.communication.nbytes[kind]
        for kind in ("all_gather", "reduce_scatter")
    }
    blocks, of_rank = LLAMA.values["num_hidden_layers"], 8 * 256 * 2  # B of 8 more ranks
    of_b = 8 * 512 * 2  # of B's gradient, once a use of three
    assert more["all_gather"] == blocks * of_rank * 3
    assert more["reduce_scatter"] == blocks * (of_rank * 2 + 3 * of_b)
    assert base.time.communication.nbytes["all_reduce"] == 0


def test_the_setup_is_told() -> None:
    """Beside tensor parallel, which it goes with."""
    assert "tensor parallel 2, sequence parallel" in setup_line(Setup(gpus=2, tp=2, sequence_parallel=True))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("full", {"tp": 1}, "give tp, too"),
        ("full", {"seq": 255}, "tp 4 cuts the tokens of a sequence; use a multiple of it for --seq"),
        ("full", {"gpus": 8}, "ddp takes no cut layers; use --parallel fsdp2 for replicas"),
        ("full", {"parallel": "zero3"}, "zero3 takes no cut layers; use --parallel fsdp2 for replicas"),
        ("full", {"lengths": "100:200"}, "tp 4 with sequence_parallel shares samples of one length"),
        ("full", {"optimizer": "sgd"}, "not modelled with optimizer sgd; use --optimizer adamw"),
        ("full", {"kernels": "liger"}, "not modelled with kernels liger; use --kernels torch"),
        ("full", {"dtype": "fp32", "amp": "bf16"}, "not modelled with amp bf16; use no --amp"),
        ("lora:r=6", {}, "rank 6 is no multiple of tp 4, which cuts it"),
        ("lora:dropout=0.1", {}, "not modelled with dropout of method lora; leave it out"),
        ("lora:adapter_dtype=fp32", {}, "adapter_dtype must be the base's, bf16"),
        ("lora:modules_to_save=lm_head", {}, "copies of modules that are cut are not modelled"),
        ("dora", {}, "dora on layers that are cut is not modelled"),
    ],
)
def test_what_does_not_go_with_it_is_said_in_a_line(method: str, options: dict[str, Any], said: str) -> None:
    """With what to do instead."""
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        shared(method, **options)


def test_a_model_that_does_not_go_with_it_is_named_before_its_replicas() -> None:
    """What those need would be of no use to it."""
    with pytest.raises(UserError, match="not modelled of qwen3-8b; leave it out"):
        predict("qwen3-8b", "lora", device=ON, gpus=8, tp=2, sequence_parallel=True)
