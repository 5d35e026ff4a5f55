"""Cut cross entropy: the tape equals its program, call by call, and no logits are left."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import setup_of, step_of

pytest.importorskip("transformers")

import reference_liger
import torch

from perfmodel import explain, methods, predict, traced
from perfmodel.architectures import Config, from_config
from perfmodel.errors import UserError
from perfmodel.recording.record import build
from perfmodel.tracing.packages import cut_loss
from perfmodel.tracing.programs import models
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import MIXTURES, SMALL, Case


def differences(name: str, spec: str, **options: Any) -> list[str]:
    """What tape and reference program disagree about, on real tensors: which rows have labels is data."""
    config = Config({**SMALL, **MIXTURES}[name], name, name)
    architecture = from_config(config)
    setup = setup_of(name, **{"kernels": "cce", **options})
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu")
    model = models.build_model(config, setup, device="cpu")
    model = reference_liger.patch(model) if setup.uses("liger") else model
    model = models.apply_method(cut_loss.with_cut_loss(model), method, architecture)
    exact = patch.object(cut_loss.LinearCrossEntropy, "rows_of_a_lock", 128)
    with exact, reference_liger.patched(name, scaled=False, on=setup.uses("liger")):
        trace = trace_step(model, setup, step.optimizer, real=True)
    return counts.judge_step(Case(config, spec, setup), step, trace, real=True).differences


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "full", {"batch": 4}),
        ("llama", "lora:r=4,targets=all-linear,dropout=0.1", {"batch": 1}),
        ("llama", "lora:r=4,modules_to_save=lm_head", {"batch": 2, "grad_accum": 2}),
        ("llama", "norm", {"batch": 2, "dtype": "fp16"}),
        ("llama", "full", {"batch": 3, "kernels": "liger+cce", "checkpoint": "block"}),
        ("mistral", "top_k:k=1", {"grad_accum": 2, "checkpoint": "block-reentrant"}),
        ("qwen2", "lora:r=4,adapter_dtype=bf16", {"attention": "eager", "amp": "bf16"}),
        ("qwen3", "lora:r=4,implementation=axolotl", {"batch": 2}),
        ("qwen3", "lora:r=4", {"kernels": "liger+cce"}),
        ("gemma", "full", {}),
        ("gemma3_text", "full", {"batch": 2}),
        ("cohere", "full", {"batch": 2}),
        ("cohere2", "lora:r=4,targets=q_proj", {}),
        ("granite", "full", {"batch": 2}),
        ("granite", "lora:r=4,targets=all-linear", {}),
        ("smollm3", "dora:r=4,targets=q_proj", {}),
        ("phi3", "lora:r=4,targets=all-linear", {}),
        ("glm4", "full", {}),
        ("olmo2", "full", {}),
        ("stablelm", "full", {}),
        ("starcoder2", "lora:r=4,targets=q_proj", {}),
        ("mixtral", "full", {}),
        ("qwen3_moe", "lora:r=4,targets=q_proj", {}),
        ("gpt_oss", "full", {"attention": "eager"}),
    ],
)
def test_the_tape_equals_the_program(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes; peak memory within 2 %."""
    assert differences(name, spec, **options) == []


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_reference_is_the_loss_of_the_logits(softcap: float) -> None:
    """Log-sum-exp, picked logit and gradients: those of transformers' loss; the last token has no next one."""
    torch.manual_seed(0)
    e, c, labels = torch.randn(2, 5, 8), torch.randn(40, 8), torch.randint(40, (2, 5))
    found, wanted = [], []
    for loss_of, kept in ((cut_loss.apply_lce, found), (plain, wanted)):
        leaves = [x.clone().requires_grad_() for x in (e, c)]
        loss = loss_of(*leaves, labels, softcap)
        kept += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def plain(e: torch.Tensor, c: torch.Tensor, labels: torch.Tensor, softcap: float) -> torch.Tensor:
    """By logits."""
    logits = (e @ c.t())[:, :-1]
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", ["qwen3", "granite", "gemma2", "gpt2"])
def test_a_trace_has_it_too(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """On any model with a head: the calls of the tape, where that has it, but for how many locks there are."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    config = Config(SMALL[name], name, name)
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 2, "seq": np.array([16, 24, 32]), "kernels": "cce"}
    asked |= {"attention": "eager"} if name == "gemma2" else {}
    found = predict(traced(config), "full", **asked)
    logits = predict(traced(config), "full", **asked | {"kernels": "torch"})
    assert np.all(found.memory.peak <= logits.memory.peak)
    if from_config(config).traits.cut_loss and name != "gemma2":
        tape = predict(config, "full", **asked)
        for figure in ("flops", "kernels", "dispatches"):
            assert np.array_equal(getattr(found, figure)["total"], getattr(tape, figure)["total"])


@pytest.mark.parametrize(
    ("device", "tokens", "vocab", "width", "measured", "within"),
    [  # seconds forward and backward: the table of apple/ml-cross-entropy's README; huggingface/trl, pull request 6858
        ("a100-80gb-sxm", 8192, 256_000, 2304, 134.8e-3, 0.06),
        ("h100-sxm", 16384, 248_320, 2048, 92.55e-3, 0.18),
        ("h100-sxm", 4096, 248_320, 2048, 23.18e-3, 0.18),
    ],
)
def test_times_are_about_those_that_were_measured(
    device: str, tokens: int, vocab: int, width: int, measured: float, within: float
) -> None:
    """One figure, how much of the gradients' products is left out, comes from the first row; no fit saw the others."""
    values = {**SMALL["llama"], "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": 1}
    config = Config({**values, "max_position_embeddings": tokens + 1}, "llama", "llama")
    asked = {"device": device, "batch": 1, "seq": tokens + 1, "kernels": "cce"}
    kernels = explain(config, "full", "full", **asked).kernels("a")
    assert sum(k.seconds for k in kernels if k.name.startswith("cce::")) == pytest.approx(measured, rel=within)


def test_no_logits_are_ever_there() -> None:
    """Memory falls by logits in fp32 and their gradient; a frozen head's gradient is not formed either."""
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 2, "seq": 2048, "checkpoint": "block"}
    plain, cut = (predict("llama-3-8b", "lora:r=8", kernels=k, **asked) for k in ("torch", "cce"))
    assert plain.memory.peak - cut.memory.peak > 2 * 2048 * 128_256 * 4
    full, frozen = (predict("llama-3-8b", m, kernels="cce", **asked) for m in ("full", "lora:r=8"))
    assert frozen.flops["backward"] < full.flops["backward"]


def test_a_grid_gives_what_its_points_give() -> None:
    """Rows that have labels are one fewer than tokens in each sample."""
    seq = np.array([64, 100, 2048])
    grid = predict("qwen2.5-0.5b", "full", device="h100-sxm", batch=3, seq=seq, kernels="cce")
    for i, s in enumerate(seq):
        point = predict("qwen2.5-0.5b", "full", device="h100-sxm", batch=3, seq=int(s), kernels="cce")
        assert grid.memory.peak[i] == point.memory.peak
        assert grid.flops["total"][i] == point.flops["total"]
        assert grid.time.phases["total"][i] == pytest.approx(point.time.phases["total"], rel=1e-12)


@pytest.mark.parametrize(
    ("model", "method", "options", "message"),
    [
        ("gpt2", "full", {}, "not modelled for gpt2"),
        ("gemma2", "full", {"attention": "eager"}, "not modelled for gemma2"),
        ("llama", "lora:r=2,targets=q_proj+lm_head", {}, "leave lm_head out"),
        ("llama", "full", {"dtype": "fp32"}, "take weights of 16 bits"),
        ("llama", "full", {"objective": "dpo"}, "objective dpo takes logits"),
        ("llama", "full", {"compile": "default"}, "not modelled with compile default"),
        ("llama", "full", {"seq": 1}, "no next one to predict"),
    ],
)
def test_what_is_not_modelled_is_refused(model: str, method: str, options: dict[str, Any], message: str) -> None:
    """One line that says why."""
    with pytest.raises(UserError, match=message):
        step_of(model, method, kernels="cce", **options)


def test_a_head_that_is_gathered_by_hand_is_refused() -> None:
    """FSDP's has come with its unit; of ZeRO-3 nothing was compared."""
    with pytest.raises(UserError, match="not modelled with parallel zero3"):
        predict("llama-3-8b", "full", device="h100-sxm", gpus=8, parallel="zero3", kernels="cce")
    predict("llama-3-8b", "full", device="h100-sxm", gpus=8, parallel="zero1", kernels="cce")


@pytest.mark.parametrize("kernels", ["cce", "liger"])
def test_a_head_in_shards_is_refused_where_its_loss_reads_it(kernels: str) -> None:
    """Under accelerate's FSDP2 around PEFT's models; TRL's head gathers it, and a tied one came with the words."""
    asked: dict[str, Any] = {"device": "h100-sxm", "gpus": 8, "parallel": "fsdp2", "kernels": kernels}
    with pytest.raises(UserError, match="which lies in shards there"):
        predict("llama-3.1-8b", "lora", **asked)
    predict("llama-3.1-8b", "lora", **asked, fsdp_units="blocks")
    assert not any("unknown calls" in note for note in predict("llama-3.2-1b", "lora", **asked).notes)
    whole, shards = (
        predict("llama-3.1-8b", "lora", **{**asked, "kernels": k}).time.communication for k in ("trl", "torch")
    )
    assert whole is not None
    assert shards is not None
    assert whole.nbytes["all_gather"] == pytest.approx(shards.nbytes["all_gather"], rel=1e-6)
