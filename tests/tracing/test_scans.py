"""Programs that go over a sample token by token: what short samples say of longer ones against a whole trace."""

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("peft")

from perfmodel import UserError
from perfmodel.architectures import Config
from perfmodel.devices import price, profile
from perfmodel.program.polynomials import NoPolynomial
from perfmodel.recording.program import Program
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing import scans, traced
from perfmodel.tracing.sizes import LIVE

MAMBA = {
    "model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 7, "state_size": 8, "time_step_rank": 6,
    "conv_kernel": 4, "vocab_size": 128,
}  # fmt: skip
JAMBA = {
    "model_type": "jamba", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "attn_layer_offset": 2,
    "attn_layer_period": 8, "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8, "mamba_dt_rank": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128,
}  # fmt: skip
AMP = {"dtype": "fp32", "amp": "bf16"}


def calls(step: Step) -> Counter[Any]:
    """Every call with its tensors, those of a list counted, and its bytes.

    Of others the operands count one by one: prices take queries, keys and values by their places.
    """
    found: Counter[Any] = Counter()
    for part, op, times in step.ops():
        inputs: Any = op.inputs
        if op.name in scans.LISTS:
            counted: Counter[Any] = Counter()
            for spec in op.inputs:
                counted[spec.dtype, spec.shape] += spec.copies
            inputs = frozenset(counted.items())
        key = (inputs, op.outputs, op.bytes_read, op.bytes_written, op.attrs, op.owner, op.recompute)
        found[part.phase, op.name, *key] += times
    return found


def seconds(step: Step) -> float:
    """What all calls take: a price finds queries, keys and values by their places."""
    h100 = profile.load("h100-sxm")
    return sum(float(price.durations([op], h100)[0]) * times for _, op, times in step.ops())


def host(program: Program) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for part in (*program.first, *program.later):
        for name in part.host.__slots__:
            found[part.phase, name] += getattr(part.host, name) * part.repeat
    return found


@pytest.mark.parametrize(
    ("config", "method", "setup"),
    [
        (MAMBA, "full", {}),
        # the first block is of a kind of its own: none of seven is saved, so three say the same
        (
            {**MAMBA, "num_hidden_layers": 3},
            "lora:r=4,targets=in_proj+x_proj,dropout=0.1",
            {"checkpoint": "block", **AMP},
        ),
        (JAMBA, "qlora:r=4,targets=in_proj+up_proj+q_proj", {"checkpoint": "block-reentrant", "grad_accum": 2}),
    ],
)
def test_short_samples_say_what_longer_ones_do(
    config: dict[str, Any], method: str, setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call by call, host work and live bytes: nobody traces the millions of calls of a sample of 4,096 tokens."""
    values, asked = Config(config, "scanning", "scanning"), Setup(batch=2, seq=scans.LONGEST + 1, **setup)
    solved, program = traced.of_method(values, method, asked)
    assert any(part.repeat > scans.LONGEST - 3 for part in program.first)
    monkeypatch.setattr(traced, "LONGEST", asked.seq)
    step, whole = traced.of_method(values, method, asked)
    assert calls(solved) == calls(step)
    assert seconds(solved) == pytest.approx(seconds(step))
    assert host(program) == host(whole)
    assert program.live.at(2, asked.seq) == pytest.approx(whole.live.at(2, asked.seq), rel=LIVE)


def test_a_loop_that_is_not_found_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a long sample must not get a traceback."""
    monkeypatch.setattr(scans, "LONGEST_TURN", 2)
    with pytest.raises(UserError, match="cannot be traced at 64 tokens"):
        traced.of_method(Config({**MAMBA, "num_hidden_layers": 2}, "m", "m"), "full", Setup(batch=1, seq=64))


def test_stretches_that_do_not_fold_alike_are_refused() -> None:
    """What the turns of short samples do not tell must not be made up."""
    turning, other = (list(scans.stretches_of(keys)) for keys in (["a", *"xyxyxyxy", "b"], ["a", *"xyxzxyxz", "b"]))
    assert [stretch.times for stretch in turning] == [1, 4, 1]
    with pytest.raises(NoPolynomial):
        scans._alike([turning, other])
