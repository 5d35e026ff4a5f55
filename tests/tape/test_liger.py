"""Liger's kernels: the tape equals Liger's program, call by call, and its figures agree with Liger's measurements."""

from typing import Any

import numpy as np
import pytest
from helpers import architecture_of, config_of, setup_of, step_of

pytest.importorskip("transformers")

import reference_liger as reference
import torch

from perfmodel import explain, methods, predict
from perfmodel.architectures import from_config, load
from perfmodel.errors import UserError
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tape.packages import liger
from perfmodel.tracing.programs import models
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import Case

WIDE = architecture_of("llama", vocab_size=2048)


def differences(name: str, spec: str, **options: Any) -> list[str]:
    """What tape and reference program disagree about."""
    config, architecture = config_of(name), architecture_of(name)
    setup = setup_of(name, kernels="liger", **options)
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = models.apply_method(reference.patch(models.build_model(config, setup)), method, architecture)
    with reference.patched(name, scaled=setup.grad_accum > 1, release=setup.stack.liger):
        trace = trace_step(model, setup, step.optimizer)
    return counts.judge_step(Case(config, spec, setup), step, trace).differences


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "full", {"batch": 4}),
        ("llama", "lora:r=4,targets=all-linear,dropout=0.1", {"batch": 1}),
        ("llama", "lora:r=4", {"checkpoint": "block", "batch": 4}),
        ("mistral", "full", {"grad_accum": 2, "checkpoint": "block-reentrant"}),
        ("qwen2", "full", {"dtype": "fp32", "batch": 3}),
        ("qwen2", "lora:r=4,adapter_dtype=bf16", {"attention": "eager"}),
        ("llama", "lora:r=4", {"dtype": "fp32", "amp": "bf16"}),
        ("qwen3", "full", {"batch": 3, "checkpoint": "block"}),
        ("qwen3", "lora:r=4,targets=all-linear", {"dtype": "fp32", "amp": "bf16"}),
        ("smollm3", "full", {"batch": 2, "grad_accum": 2}),
        ("smollm3", "lora:r=4,targets=q_proj+v_proj", {}),
        ("gemma2", "lora:r=4", {"attention": "eager", "checkpoint": "block-reentrant"}),
        ("gemma3_text", "full", {"batch": 2}),
        ("gemma3_text", "lora:r=4", {"dtype": "fp32", "amp": "bf16", "checkpoint": "block"}),
        ("llama", "full", {"dtype": "fp32", "amp": "bf16", "batch": 3}),
        ("llama", "full", {"stack": "liger=0.6.1", "batch": 3}),
        ("llama", "full", {"stack": "liger=0.7", "batch": 3}),
        ("llama", "full", {"stack": "liger=0.8.2", "batch": 3}),
        ("llama", "full", {"stack": "liger=0.8.3", "batch": 3}),
        ("qwen2", "full", {"stack": "liger=0.7", "dtype": "fp32", "amp": "bf16", "batch": 3}),
        ("qwen2", "full", {"stack": "liger=0.8.2", "dtype": "fp32", "amp": "bf16", "batch": 3}),
        ("qwen3", "lora:r=4", {"stack": "liger=0.8.4"}),
    ],
)
def test_the_tape_equals_ligers_program(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes; peak memory within 2 %."""
    assert differences(name, spec, **options) == []


# the reference computes what the plain modules compute


def gradients(function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and input gradients for a fixed gradient of the outputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    kept = [y.detach().clone() for y in outputs]
    return [*kept, *torch.autograd.grad(loss, leaves)]


def test_the_reference_norm_and_swiglu_are_their_plain_forms() -> None:
    """Hand-written backward passes have to give the gradients that autograd gives."""
    x, w, a, b = (torch.randn(s) for s in ((2, 3, 8), (8,), (2, 3, 8), (2, 3, 8)))
    eager = lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))  # noqa: E731
    for fused, plain, inputs in (
        (reference.RMSNorm.apply, eager, (x, w)),
        (lambda x, w: reference.RMSNorm.apply(x, w, 1.0), lambda x, w: eager(x, 1 + w), (x, w)),
        (lambda a, b: reference.GELUMul.apply(a * 1.0, b * 1.0), lambda a, b: reference.gelu(a) * b, (a, b)),
        (lambda a, b: reference.SiLUMul.apply(a * 1.0, b * 1.0), lambda a, b: torch.nn.functional.silu(a) * b, (a, b)),
    ):
        for one, other in zip(gradients(fused, *inputs), gradients(plain, *inputs), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_the_reference_rotation_is_transformers_rotation() -> None:
    """In place and by halves, it is `apply_rotary_pos_emb`."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, angle = torch.randn(2, 5, 4 * 8), torch.randn(2, 5, 2 * 8), torch.randn(1, 5, 4)
    cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))

    def with_rotation(rotation: Any) -> Any:
        def run(q: torch.Tensor, k: torch.Tensor) -> Any:
            return rotation(*(2 * x.view(2, 5, -1, 8).transpose(1, 2) for x in (q, k)), cos, sin)

        return run

    both = (gradients(with_rotation(f), q, k) for f in (reference.Rope.apply, apply_rotary_pos_emb))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*both, strict=True))


def test_the_reference_loss_is_the_loss_of_the_logits() -> None:
    """Chunks and gradients in forward change nothing: 20 tokens, chunks of 4 by 40/8 = 5."""
    x, w, target = torch.randn(20, 8), torch.randn(40, 8), torch.randint(40, (20,))
    fused = gradients(lambda x, w: reference.FusedLinearCrossEntropy.apply(x, w, target), x, w)
    plain = gradients(lambda x, w: torch.nn.functional.cross_entropy(x @ w.t(), target), x, w)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(fused, plain, strict=True))


# what Liger promises


def test_no_logits_are_ever_stored() -> None:
    """The point of the fused loss: nothing of tokens × vocabulary, in 16 or 32 bit."""

    def largest(kernels: str) -> Any:
        step = step_of(WIDE, "lora:r=4", batch=4, seq=64, kernels=kernels)
        made = [s.numel for part, op, _ in step.ops() if part.name == "head" for s in op.outputs if not op.view]
        return max(made)

    assert largest("torch") == 256 * WIDE.vocab
    assert largest("liger") < 256 * WIDE.vocab / 8


def test_chunks_are_about_as_large_as_the_hidden_states() -> None:
    """ceil(V/H) parts of the tokens, rounded up to a power of two; they cover all tokens."""
    assert liger.chunks(16384, 128256, 4096) == [512] * 32
    assert liger.chunks(4096 * 4, 32000, 4096) == [2048] * 8
    assert liger.chunks(1000, 128256, 4096) == [32] * 31 + [8]
    assert liger.chunks(3, 40, 8) == [1, 1, 1]
    for tokens in range(1, 300, 7):
        assert sum(liger.chunks(tokens, 1000, 64)) == tokens


def test_memory_and_time_fall() -> None:
    """Fewer passes and no logits: less memory, less traffic and less time than eager kernels, the same FLOPs."""
    plain, fused = (
        predict("llama-3-8b", "lora:r=8", device="h100-sxm", batch=4, seq=1024, kernels=k) for k in ("torch", "liger")
    )
    assert fused.memory.peak < 0.8 * plain.memory.peak
    assert fused.bytes["total"] < 0.8 * plain.bytes["total"]
    assert fused.time.phases["total"] < 0.9 * plain.time.phases["total"]
    assert fused.flops["total"] == plain.flops["total"]


@pytest.mark.parametrize("release", ["0.8.2", "0.8.5"])
def test_compiled_every_chunk_is_multiplied(release: str) -> None:
    """Each writes into a part of one gradient: compiled, only the last was taken for needed."""
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 4, "seq": 512, "kernels": "liger"}
    asked["stack"] = f"liger={release}"
    eager, compiled = (predict("tinyllama-1.1b", "lora:r=8", compile=c, **asked) for c in ("none", "default"))
    assert compiled.flops["forward"] == eager.flops["forward"]


def test_saved_activations_are_those_that_lorafusion_measured() -> None:
    """Llama-3.1-8B, LoRA r=16 with dropout on all linears, Liger's norm, rotation and SwiGLU, flash attention.

    106,676.5 elements of 16 bits a token and layer: CentML/lorafusion, simulator/configs/llama-3.1-8b-instruct.yaml.
    """
    method = "lora:r=16,dropout=0.1,targets=all-linear,adapter_dtype=bf16"
    bound = methods.parse(method).bind(from_config(load("llama-3.1-8b")))
    setup = Setup(batch=1, seq=512, attention="flash2", kernels="liger")
    step = build(bound.architecture, bound, setup, "cuda", "9.0")
    (layer,) = [p for p in step.groups[0].parts if p.name == "blocks" and p.phase == "forward" and p.repeat > 1]
    assert layer.delta / 512 / 2 == pytest.approx(106_676.5, rel=0.02)


def test_a_grid_gives_what_its_points_give() -> None:
    """Points that need different numbers of chunks are split, and come back in their place."""
    seq = np.array([64, 100, 512, 700])
    grid = predict("qwen2.5-0.5b", "full", device="h100-sxm", batch=2, seq=seq, kernels="liger")
    for i, s in enumerate(seq):
        point = predict("qwen2.5-0.5b", "full", device="h100-sxm", batch=2, seq=int(s), kernels="liger")
        assert grid.memory.peak[i] == point.memory.peak
        assert grid.kernels["total"][i] == point.kernels["total"]
        assert grid.time.phases["total"][i] == pytest.approx(point.time.phases["total"], rel=1e-12)


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("gpt2", "full", "kernels liger: Liger has none for gpt2; use kernels torch"),
        ("llama", "lora:r=2,targets=q_proj+lm_head", "leave lm_head out of targets"),
    ],
)
def test_what_liger_cannot_do_is_refused(model: str, method: str, message: str) -> None:
    """One line that says why."""
    with pytest.raises(UserError, match=message):
        step_of(model, method, kernels="liger")


@pytest.mark.parametrize(
    ("kernels", "tokens", "vocab", "width", "measured"),
    [  # ms of head and loss, forward and backward, trained, on an H100: huggingface/trl, pull request 6858, issue 7244
        ("torch", 16384, 248_320, 2048, 137.0),
        ("torch", 8192, 151_936, 4096, 59.0),
        ("liger", 16384, 248_320, 2048, 321.2),
        ("liger", 8192, 151_936, 4096, 192.0),
    ],
)
def test_the_loss_takes_about_as_long_as_was_measured(
    kernels: str, tokens: int, vocab: int, width: int, measured: float
) -> None:
    """No fit saw them. Copies in fp32 of the weight's gradient, once a chunk, made releases like 0.8.0 slow."""
    shape = {"vocab_size": vocab, "hidden_size": width, "num_attention_heads": 16, "num_hidden_layers": 1}
    config = config_of("llama", **shape, max_position_embeddings=tokens)
    asked: dict[str, Any] = {"device": "h100-sxm", "batch": 1, "seq": tokens, "kernels": kernels}
    step = explain(config, "full", "full", stack="liger=0.8.0", **asked)
    of_the_head = (k for k in step.kernels("a") if str(vocab) in k.shapes and k.part != "optimizer")
    assert sum(k.seconds for k in of_the_head) == pytest.approx(measured / 1e3, rel=0.12)
    now = explain(config, "full", "full", **asked)
    saved = step.a.time.phases["total"] - now.a.time.phases["total"]
    assert saved > 0.4 * measured / 1e3 if kernels == "liger" else saved == 0
