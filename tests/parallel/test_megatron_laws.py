"""Laws of Megatron-Core's program, which need no torch: what it computes, exchanges and keeps."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.calls import costs
from perfmodel.calls.collectives import KIND_OF, message_bytes
from perfmodel.errors import UserError
from perfmodel.methods import Method
from perfmodel.prediction.predict import Prediction, predict
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup

DIMS: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 3, "vocab_size": 1024, "tie_word_embeddings": False,
}  # fmt: skip
few = settings(max_examples=25, derandomize=True)
SIZES = st.fixed_dictionaries(
    {"num_hidden_layers": st.integers(1, 5), "intermediate_size": st.sampled_from((256, 512, 768)),
     "num_key_value_heads": st.sampled_from((4, 8)), "tie_word_embeddings": st.booleans()}
)  # fmt: skip


def of_megatron(**changes: Any) -> Config:
    """The model in Megatron-Core's program."""
    return Config({**DIMS, "model_type": "megatron_gpt", "megatron": "llama", **changes}, "megatron", "megatron")


def answered(method: str, setup: Setup, **changes: Any) -> Prediction:
    """What it costs on H100s."""
    return predict(of_megatron(**changes), method, setup, "h100-sxm")


def recorded(method: str, setup: Setup, **changes: Any) -> Step:
    """Its step."""
    architecture = from_config(of_megatron(**changes))
    bound: Method = methods.parse(method).bind(architecture)
    return build(architecture, bound, setup, "cuda", "9.0")


def exchanged(step: Step) -> dict[str, int]:
    """Bytes of a rank's messages by kind."""
    found: dict[str, int] = {}
    for _, op, count in step.ops():
        if op.attrs.ranks is not None:
            kind = KIND_OF[op.name]
            found[kind] = found.get(kind, 0) + count * int(message_bytes(op))
    return found


@few
@given(sizes=SIZES, batch=st.integers(1, 3), accum=st.integers(1, 3))
def test_it_computes_what_the_model_of_transformers_does(sizes: dict[str, Any], batch: int, accum: int) -> None:
    """One QKV, one gate and up: fewer products, the same FLOPs; and as many parameters."""
    setup = Setup(batch=batch, seq=64, grad_accum=accum)
    theirs = predict(Config({**DIMS, **sizes}, "llama", "llama"), "full", setup, "h100-sxm")
    ours = answered("full", setup, **sizes)
    assert ours.flops == theirs.flops
    assert ours.total_params == theirs.total_params == ours.trainable_params


@few
@given(tp=st.sampled_from((1, 2, 4)), tokens=st.booleans(), sizes=SIZES)
def test_ranks_that_share_layers_share_their_products(tp: int, tokens: bool, sizes: dict[str, Any]) -> None:
    """Of full fine-tuning; together they have the model's parameters."""
    alone, shared = Setup(seq=64), Setup(seq=64, gpus=tp, tp=tp, sequence_parallel=tokens and tp > 1)
    one, many = (answered("full", setup, **sizes) for setup in (alone, shared))
    assert many.flops["total"] * tp == one.flops["total"]
    assert many.total_params == one.total_params
    assert (exchanged(recorded("full", shared, **sizes)) == {}) == (tp == 1)


@pytest.mark.parametrize("method", ["full", "lora:r=4", "lora:r=8,targets=linear_qkv"])
def test_a_distributed_optimizer_scatters_and_gathers_what_others_reduce(method: str) -> None:
    """An all-reduce moves as much as both; each rank then keeps its part of masters and moments."""
    whole, parts = (Setup(seq=64, gpus=4, parallel=form, clip_grad=False) for form in ("ddp", "zero1"))
    reduced, cut = (exchanged(recorded(method, setup)) for setup in (whole, parts))
    assert cut["reduce_scatter"] == pytest.approx(reduced["all_reduce"], rel=0.01)  # padded
    assert cut["all_gather"] == cut["reduce_scatter"] // 2  # bf16
    one, many = (answered(method, setup).memory.optimizer for setup in (whole, parts))
    assert many == pytest.approx(one / 4, rel=0.01)


def test_a_trained_parameter_takes_eighteen_bytes() -> None:
    """bf16 weights, fp32 gradients, masters and two moments; a frozen one two."""
    p = answered("full", Setup(seq=64))
    kept = p.memory.weights + p.memory.gradients + p.memory.optimizer
    assert kept == pytest.approx(18 * p.total_params, rel=1e-5)
    lora = answered("lora:r=8", Setup(seq=64))
    assert lora.memory.weights == 2 * lora.total_params
    assert lora.memory.gradients == 4 * lora.trainable_params


@few
@given(r=st.sampled_from((4, 8, 16)), tp=st.sampled_from((1, 2, 4)))
def test_adapters_are_cut_with_their_layers(r: int, tp: int) -> None:
    """None is repeated: together ranks have every adapter once."""
    h, f, kv = 256, 512, 128
    pairs = (h, h + 2 * kv), (h, h), (h, 2 * f), (f, h)
    setup = Setup(seq=64, gpus=tp, tp=tp)
    assert answered(f"lora:r={r}", setup).trainable_params == 3 * r * sum(n + m for n, m in pairs)


def test_adapters_of_layers_that_are_cut_exchange_hidden_states() -> None:
    """Beside rows they gather whole hidden states forward: what full fine-tuning does not (`gather_output`)."""
    setup = Setup(seq=64, gpus=2, tp=2, clip_grad=False)
    full, lora, qkv = (exchanged(recorded(m, setup)) for m in ("full", "lora:r=4", "lora:r=4,targets=linear_qkv"))
    hidden, low = 2 * 64 * 256, 2 * 64 * 4
    assert full.get("all_gather", 0) == 0
    assert lora["all_gather"] == 3 * 2 * (hidden + low)
    assert qkv["all_gather"] == 3 * low


@pytest.mark.parametrize("method", ["full", "lora:r=4"])
@pytest.mark.parametrize("parallel", ["ddp", "zero1"])
@pytest.mark.parametrize("accum", [1, 3])
def test_overlap_moves_the_same_messages(method: str, parallel: str, accum: int, monkeypatch: Any) -> None:
    """In buckets, beside compute; no call is lost."""
    monkeypatch.setattr("perfmodel.recording.parallel.megatron.LEAST", 100_000)
    monkeypatch.setattr("perfmodel.recording.parallel.megatron.PER_RANK", 0)
    behind = Setup(seq=64, gpus=4, tp=2, parallel=parallel, grad_accum=accum)
    one, other = (recorded(method, setup) for setup in (behind, replace(behind, overlap=True)))
    assert exchanged(other) == pytest.approx(exchanged(one), rel=0.02)  # of a distributed optimizer's padding
    counted = [sum(n for _, op, n in s.ops() if costs.kind(op) == "gemm") for s in (one, other)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("parallel", ["ddp", "zero1"])
def test_overlap_hides_messages_of_a_large_model(parallel: str) -> None:
    """Small ones lose by it: the host waits for each bucket's norm."""
    setup = Setup(seq=2048, gpus=8, parallel=parallel)
    asked = (setup, replace(setup, overlap=True))
    slower, faster = (predict("megatron:llama-3.1-8b", "full", s, "h100-sxm").time for s in asked)
    assert faster.phases["total"] < slower.phases["total"]
    assert faster.communication.exposed["total"] < slower.communication.exposed["total"]


def test_stages_have_the_blocks_of_all() -> None:
    """What ranks of a pipeline compute together is what one GPU does."""
    one = answered("full", Setup(seq=64, grad_accum=4), num_hidden_layers=4)
    p = answered("full", Setup(seq=64, gpus=2, pp=2, grad_accum=4), num_hidden_layers=4)
    assert p.pipeline is not None
    assert p.total_params == one.total_params
    assert p.time.phases["total"] > one.time.phases["total"] / 2


@pytest.mark.parametrize(
    ("changes", "method", "setup", "complaint"),
    [
        ({}, "dora", {}, "method dora:r=8: in Megatron-Core's program full and lora are modelled"),
        ({}, "lora:dropout=0.1", {}, "dropout in Megatron-Core's program is not modelled"),
        ({}, "lora:r=6", {"gpus": 4, "tp": 4}, "rank 6 is no multiple of tp 4"),
        ({}, "full", {"dtype": "fp32"}, "dtype fp32: not modelled in Megatron-Core's program; use dtype bf16"),
        ({}, "full", {"gpus": 2, "parallel": "fsdp2"}, "use parallel ddp or parallel zero1"),
        ({}, "full", {"gpus": 3, "tp": 3}, "tp 3 does not divide the heads of megatron, 8"),
        ({"vocab_size": 1022}, "full", {"gpus": 4, "tp": 4}, "tp 4 does not divide the vocab of megatron, 1022"),
        ({"tie_word_embeddings": True}, "full", {"gpus": 2, "pp": 2, "grad_accum": 2}, "shares one weight"),
        ({"megatron": "gpt2"}, "full", {}, "megatron 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
    ],
)
def test_what_is_not_modelled_is_refused(changes: Any, method: str, setup: dict[str, Any], complaint: str) -> None:
    """In one line that says what is."""
    with pytest.raises(UserError, match=complaint):
        answered(method, Setup(seq=64, **setup), **changes)


def test_overlap_is_megatrons() -> None:
    """Others have their own way, and would take it in silence."""
    with pytest.raises(UserError, match="overlap is of Megatron-Core's program"):
        predict(Config(DIMS, "llama", "llama"), "full", Setup(seq=64, gpus=2, overlap=True), "h100-sxm")


@pytest.mark.parametrize("parallel", ["ddp", "zero1"])
def test_stages_exchange_gradients_beside_one_another(parallel: str) -> None:
    """No stage waits with its last gradient for what replicas of the stage above exchange."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 256}
    one, two = (
        answered("full", Setup(seq=256, grad_accum=4, gpus=gpus, pp=4, parallel=parallel), **sizes) for gpus in (4, 8)
    )
    pair = [answered("full", Setup(seq=256, grad_accum=4, gpus=gpus, parallel=parallel), **sizes) for gpus in (1, 2)]
    of_all = float(pair[1].mean_step - pair[0].mean_step)
    assert 0 < two.mean_step - one.mean_step < 0.4 * of_all  # a stage has a fourth of the gradients, or a bit more


def test_each_point_of_a_grid_has_its_own_fullest_stage() -> None:
    """At few tokens the head's parameters weigh most, at many what the first stage keeps."""
    setup = Setup(seq=256, grad_accum=4, gpus=4, pp=2, tp=2)
    lengths = [256, 1024]
    both = predict("megatron:llama-3.1-8b", "full", replace(setup, seq=lengths), "h100-sxm")
    each = [predict("megatron:llama-3.1-8b", "full", replace(setup, seq=seq), "h100-sxm") for seq in lengths]
    assert list(both.memory.peak) == [p.memory.peak for p in each]
    assert len({p.pipeline.fullest for p in each if p.pipeline}) == 2
