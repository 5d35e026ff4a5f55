"""TRL's fused head: the tape equals its program, call by call, and no logits are left."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import setup_of

pytest.importorskip("transformers")

import reference_liger
import torch

from perfmodel import methods, predict, traced
from perfmodel.architectures import Config, from_config
from perfmodel.recording.record import build
from perfmodel.tape.packages import fused_head as of_tape
from perfmodel.tracing.packages import fused_head
from perfmodel.tracing.programs import models
from perfmodel.tracing.trace import CallRecorder, trace_step
from validate.oracle import counts
from validate.oracle.cases import MIXTURES, SMALL, Case


def differences(name: str, spec: str, **options: Any) -> list[str]:
    """What tape and program disagree about, on real tensors, where a tile is of 32 tokens and 64 words."""
    config = Config({**SMALL, **MIXTURES}[name], name, name)
    architecture = from_config(config)
    setup = setup_of(name, **{"kernels": "trl", **options})
    method = methods.parse(spec).bind(architecture)
    tiles = [patch.multiple(module, TOKENS=32, WORDS=64) for module in (of_tape, fused_head)]
    with tiles[0], tiles[1]:
        step = build(architecture, method, setup, "cpu")
        model = models.build_model(config, setup, device="cpu")
        model = reference_liger.patch(model) if setup.uses("liger") else model
        model = models.apply_method(fused_head.with_fused_head(model), method, architecture)
        with reference_liger.patched(name, scaled=False, on=setup.uses("liger")):
            trace = trace_step(model, setup, step.optimizer, real=True)
    return counts.judge_step(Case(config, spec, setup), step, trace, real=True).differences


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "full", {"batch": 4}),
        ("llama", "lora:r=4,targets=all-linear,dropout=0.1", {"batch": 1}),
        ("llama", "full", {"batch": 3, "dtype": "fp32"}),
        ("llama", "full", {"batch": 3, "dtype": "fp32", "amp": "bf16"}),
        ("llama", "full", {"batch": 2, "kernels": "liger+trl", "checkpoint": "block"}),
        ("llama", "lora:r=4,modules_to_save=lm_head", {"batch": 2, "grad_accum": 2}),
        ("mistral", "top_k:k=1", {"checkpoint": "block-reentrant"}),
        ("qwen2", "full", {"batch": 2}),
        ("qwen2", "lora:r=4", {"attention": "eager", "amp": "bf16"}),
        ("gemma2", "lora:r=4", {"attention": "eager"}),
        ("gemma3_text", "full", {}),
        ("cohere", "full", {"batch": 2}),
        ("granite", "lora:r=4,targets=q_proj", {}),
        ("qwen3_moe", "lora:r=4,targets=q_proj", {}),
    ],
)
def test_the_tape_equals_the_program(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes; peak memory within 2 %."""
    assert differences(name, spec, **options) == []


def test_the_program_is_the_loss_of_the_logits() -> None:
    """In tiles of 4 tokens by 16 words; beside it come entropies, and whether each label is the likeliest."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(2, 6, 8), torch.randn(40, 8), torch.randint(40, (2, 6))
    rows, targets = hidden[:, :-1].reshape(-1, 8), labels[:, 1:].reshape(-1)
    with patch.multiple(fused_head, TOKENS=4, WORDS=16):
        found = [x.clone().requires_grad_() for x in (rows, weight)]
        log_probs, entropy, first = fused_head.ChunkedLogProb.apply(*found, targets)
        made = [-log_probs.mean(), *torch.autograd.grad(-log_probs.mean(), found)]
    plain = [x.clone().requires_grad_() for x in (rows, weight)]
    logits = plain[0] @ plain[1].t()
    loss = torch.nn.functional.cross_entropy(logits, targets)
    wanted = [loss, *torch.autograd.grad(loss, plain)]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(made, wanted, strict=True))
    p = logits.log_softmax(-1)
    assert torch.allclose(entropy, -(p.exp() * p).sum(-1), atol=1e-5)
    assert torch.equal(first, logits.argmax(-1) == targets)


def test_trls_own_function_makes_the_same_calls() -> None:
    """Where TRL is installed: its kernels stand in, all else is its own."""
    own = pytest.importorskip("trl.kernels.chunked_logprob")
    launched = {"_forward_kernel": fused_head.fold_logits, "_backward_kernel": fused_head.grad_logits}
    rows, weight, targets = torch.randn(10, 8), torch.randn(40, 8), torch.randint(40, (10,))

    def grid(kernel: Any) -> Any:
        def run(tile: Any, stride: int, *rest: Any, **flags: Any) -> None:
            kernel(tile, *(rest[:-1] if kernel is fused_head.fold_logits else rest[:4] + rest[5:6]))

        return {(n,): run for n in range(20)} | {(n, m): run for n in range(20) for m in range(9)}

    def calls(function: Any, *more: Any) -> list[str]:
        leaves = [x.clone().requires_grad_() for x in (rows, weight)]
        recorder = CallRecorder()
        recorder.recording = True
        with recorder.observe("forward"):
            found = function.apply(*leaves, *more)
            found[0].sum().backward()
        return sorted(map(str, recorder.trace.calls["forward"].items()))

    kernels = {name: grid(kernel) for name, kernel in launched.items()}
    utils = SimpleNamespace(maybe_gather_lm_head_ctx=lambda *head: nullcontext())  # the real ones import much more
    with (
        patch.multiple(fused_head, TOKENS=4, WORDS=16),
        patch.multiple(own, TOKEN_CHUNK_SIZE=4, _use_triton=lambda device: True, **kernels),
        patch.object(own, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), create=True),
        patch.dict(sys.modules, {"trl.trainer.utils": utils}),
    ):
        ours = calls(fused_head.ChunkedLogProb, targets)
        theirs = calls(own.ChunkedLogProbFunction, None, targets, 1.0, 16, None, 1.0, ("entropy", "is_top1"))
    assert ours == theirs


def test_no_logits_are_ever_there() -> None:
    """A tile of them is; a trained head's gradient is in fp32 until it is through."""
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 2, "seq": 4096, "checkpoint": "block"}
    plain, fused = (predict("llama-3-8b", "lora:r=8", kernels=k, **asked) for k in ("torch", "trl"))
    assert plain.memory.peak - fused.memory.peak > 2 * 4096 * 128_256 * 4
    assert fused.flops["total"] == pytest.approx(plain.flops["total"] + 2 * (2 * 4095) * 128_256 * 4096, rel=1e-3)


def test_a_grid_gives_what_its_points_give() -> None:
    """Of batches that need different numbers of tiles, too."""
    seq = np.array([64, 3000, 5000])
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 2, "kernels": "trl"}
    grid = predict("qwen2.5-0.5b", "full", seq=seq, **asked)
    for i, s in enumerate(seq):
        point = predict("qwen2.5-0.5b", "full", seq=int(s), **asked)
        assert grid.memory.peak[i] == point.memory.peak
        assert grid.kernels["total"][i] == point.kernels["total"]
        assert grid.time.phases["total"][i] == pytest.approx(point.time.phases["total"], rel=1e-12)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_a_trace_has_it_too(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """On any model with a head."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    config = Config(SMALL[name], name, name)
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 2, "seq": np.array([16, 24, 32]), "kernels": "trl"}
    asked |= {"attention": "eager"} if name == "gemma2" else {}
    found = predict(traced(config), "full", **asked)
    plain = predict(traced(config), "full", **{**asked, "kernels": "torch"})
    assert (found.flops["total"] > plain.flops["total"]).all()  # backward has the logits a second time
    if from_config(config).traits.cut_loss:
        tape = predict(config, "full", **asked)
        for figure in ("flops", "kernels", "dispatches", "bytes"):
            assert np.array_equal(getattr(found, figure)["total"], getattr(tape, figure)["total"])
