"""A trace on several GPUs does what the tape does, and what the real programs of models without a built-in form do."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

import torch.distributed as dist

from perfmodel import compare, methods, predict
from perfmodel.architectures import Config, from_config
from perfmodel.errors import UserError
from perfmodel.prediction.memory import peak_bytes
from perfmodel.program.marks import BLOCKS, IN, OUT, marking, with_live
from perfmodel.program.op import Op
from perfmodel.program.part import Part
from perfmodel.recording import files, pieces
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing.recorded import Store, keep, traced
from validate.oracle import traced_ranks
from validate.oracle.cases import SMALL, Case
from validate.oracle.parallel import in_order

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

SETUP = Setup(batch=2, seq=33, gpus=4)
FORMS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "full", {"parallel": "ddp", "ddp": "find-unused"}),
    ("llama", "full", {"parallel": "zero2", "offload": "optimizer", "grad_accum": 2}),
    ("llama", "full", {"parallel": "zero3", "checkpoint": "block-reentrant"}),
    ("llama", "full", {"parallel": "fsdp2", "fsdp_units": "blocks", "grad_accum": 3}),
    ("llama", "lora:r=4", {"parallel": "ddp", "grad_accum": 3, "checkpoint": "block"}),
    ("llama", "lora:r=4", {"parallel": "zero1", "dtype": "fp32", "amp": "bf16"}),
    ("llama", "lora:r=4,targets=all-linear", {"parallel": "zero3", "checkpoint": "block"}),
    ("llama", "lora:r=4", {"parallel": "zero3", "offload": "params", "grad_accum": 2}),
    ("llama", "lora:r=4,targets=all-linear", {"parallel": "fsdp2", "shard_group": 2, "checkpoint": "block"}),
    ("llama", "qlora:r=4", {"parallel": "fsdp2", "offload": "params"}),
    ("llama", "qlora:r=4", {"parallel": "zero2"}),
    ("llama", "dora:r=4", {"parallel": "ddp", "ddp": "static-graph"}),
    ("llama", "top_k:k=2", {"parallel": "fsdp2", "checkpoint": "block"}),
    ("llama", "top_k:k=2", {"parallel": "ddp"}),
    ("qwen3", "full", {"parallel": "fsdp2", "reduce_dtype": "fp32"}),
    ("gemma3_text", "lora:r=4", {"parallel": "ddp"}),
    ("gemma3_text", "full", {"parallel": "fsdp2", "sync_each_batch": True, "grad_accum": 2}),
)


def built(name: str, method: str, setup: Setup) -> tuple[Step, Step]:
    """The step of a small model as the tape has it, and as it follows from a trace."""
    values = {**SMALL[name], "num_hidden_layers": 7, "layer_types": None}
    config = Config({k: v for k, v in values.items() if v is not None}, name, name)
    models = from_config(config), traced_ranks.at_one_size(config, setup)
    on_tape, of_trace = (build(m, methods.parse(method).bind(m), setup, "cuda", "9.0") for m in models)
    return on_tape, of_trace


def calls(step: Step) -> list[Any]:
    """Calls in their order, with the streams that they run on; lists of parameters in any order."""

    def call(phase: str, op: Op) -> Any:
        lists = op.name.startswith(("fsdp", "_foreach", "_fused", "stack"))
        specs = Counter[Any]()
        for spec in op.inputs:
            specs[spec.dtype, tuple(map(int, spec.shape))] += int(spec.copies)
        inputs = frozenset(specs.items()) if lists else tuple((s.dtype, tuple(map(int, s.shape))) for s in op.inputs)
        return phase, op.name, op.runs, inputs, op.recompute, op.attrs.ranks

    return [call(phase, op) for phase, op in in_order(step) if not op.view or op.name.startswith("cuda::")]


@pytest.mark.parametrize(("name", "method", "several"), CASES, ids=lambda value: str(value).replace("'", ""))
def test_a_trace_on_several_gpus_is_the_tape_there(name: str, method: str, several: dict[str, Any]) -> None:
    """Hooks around blocks, at gradients and behind the model stand where they stand around a model on the tape."""
    on_tape, of_trace = built(name, method, replace(SETUP, **several))
    ours, theirs = calls(on_tape), calls(of_trace)
    assert [c[:3] for c in theirs] == [c[:3] for c in ours]
    assert Counter(theirs) == Counter(ours)
    assert (of_trace.trainable, of_trace.total) == (on_tape.trainable, on_tape.total)
    assert peak_bytes(of_trace) == pytest.approx(peak_bytes(on_tape), rel=0.03)
    for what in ("gradients", "units", "weights", "returns"):
        mine, other = (sum(getattr(p.host, what) * n for p, n in step.parts()) for step in (of_trace, on_tape))
        counted = what in ("gradients", "units")  # weights go by what a module asks for: DoRA's twice, tied ones once
        assert mine == (other if counted else pytest.approx(other, rel=0.15)), what


GRID = list(traced_ranks.traced_grid("quick"))


@pytest.mark.parametrize("case", GRID[::2], ids=lambda case: f"{case.config.name} {case.method}")
def test_models_without_a_built_in_form_do_what_their_real_program_does(case: Case) -> None:
    """Calls, bytes, collectives in their order, and memory, under PyTorch's DDP and FSDP2."""
    result = traced_ranks.compare_traced(case)
    assert result.differences == []
    assert result.collectives > 0


def test_blocks_that_are_given_several_tensors_are_gathered_and_reduced_as_really() -> None:
    """Gemma 3n's blocks take a slice of the words' vectors, too: their gradient is complete with all that they took.

    Not compared are gradients of slices that are changed in place: fake tensors replay views, real ones do not.
    """
    values = {
        **traced_ranks.LLAMA_LIKE, "model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"],
        "num_hidden_layers": 5, "head_dim": 16, "layer_types": [*["sliding_attention"] * 4, "full_attention"],
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16,
        "laurel_rank": 8, "sliding_window": 16, "activation_sparsity_pattern": [0.0] * 5, "pad_token_id": 0,
    }  # fmt: skip
    case = Case(Config(values, "gemma3n", "gemma3n"), "full", replace(SETUP, parallel="fsdp2"))
    result = traced_ranks.compare_traced(case)
    in_place = ("slice_backward", "copy_", "new_zeros", "bytes: ")
    assert [each for each in result.differences if not any(name in each for name in in_place)] == []
    assert result.collectives > 0
    assert result.peak_ratio == pytest.approx(1, abs=0.03)


def test_a_recorded_program_is_the_same_from_its_file(tmp_path: Path) -> None:
    """The second question needs no torch, on several GPUs neither: marks lie in the file."""
    config = Config(traced_ranks.MODELS[0], "lfm2", "lfm2")
    asked = {"method": "full", "device": "h100-sxm", "batch": 2, "seq": 40, "gpus": 4, "parallel": "fsdp2"}
    first, second = (predict(traced(config, tmp_path), **asked) for _ in range(2))
    assert first.time.phases == second.time.phases
    assert first.memory == second.memory
    (path, *_) = [p for p in tmp_path.iterdir() if "first" in files.read_object(p)]
    kept = files.read_program(path)
    assert any(op.name.startswith("mark::") for part in kept.first for op in part.ops)


@pytest.mark.parametrize("parallel", FORMS)
def test_on_one_gpu_nothing_is_exchanged(parallel: str, tmp_path: Path) -> None:
    """One GPU's answer is what it was, whatever form is named."""
    model = traced(Config(traced_ranks.MODELS[0], "lfm2", "lfm2"), tmp_path)
    asked = {"device": "h100-sxm", "batch": 2, "seq": 40}
    alone = predict(model, "lora:r=4,targets=q_proj", **asked)
    named = predict(model, "lora:r=4,targets=q_proj", **asked, gpus=1, parallel=parallel)
    assert named.time.phases == alone.time.phases
    assert named.memory == alone.memory


def test_what_lora_saves_on_gradients_shows(tmp_path: Path) -> None:
    """Under DDP it sends a share of the bytes, under FSDP2 it gathers what full fine-tuning gathers."""
    model = traced(Config(traced_ranks.MODELS[0], "lfm2", "lfm2"), tmp_path)
    asked = {"device": "h100-sxm", "batch": 2, "seq": 40, "gpus": 4}
    kinds = {"ddp": "all_reduce", "fsdp2": "all_gather"}
    for parallel, kind in kinds.items():
        found = compare(model, ["full", "lora:r=4,targets=q_proj"], **asked, parallel=parallel).predictions
        full, lora = (p.time.communication.nbytes[kind] for p in found)
        assert 0 < lora < full / 10 if parallel == "ddp" else full / 2 < lora


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tp", 2, "tp: 2 on several GPUs is not modelled by a trace; use --tp 1"),
        ("objective", "dpo", "objective: dpo on several GPUs is not modelled by a trace; use --objective sft"),
        ("fsdp_units", "adapters", "fsdp_units: adapters on several GPUs is not modelled by a trace"),
    ],
)
def test_what_no_trace_follows_there_is_refused_in_one_line(field: str, value: Any, said: str, tmp_path: Path) -> None:
    """A mesh cuts layers, an objective calls the model several times, halves of adapters are modules of their own."""
    model = traced(Config(traced_ranks.MODELS[0], "lfm2", "lfm2"), tmp_path)
    setup = replace(SETUP, parallel="fsdp2", **{field: value})
    with pytest.raises(UserError, match=said):
        build(model, methods.parse("full").bind(model), setup)


def test_blocks_that_do_not_come_one_after_another_are_refused() -> None:
    """A block that runs twice has no place of its own among the hooks."""
    numbers = marking(BLOCKS, "model.layers.* 0")
    runs = [with_live(marking(what, "model.layers.*."), 0, 0) for what in (IN, OUT)]
    part = Part("traced", "forward", ops=[numbers, *runs, *runs])
    with pytest.raises(UserError, match="its program is no row of blocks"):
        pieces.series_of([part], "albert")


def test_a_block_that_a_pass_leaves_out_has_no_calls() -> None:
    """Without images Llama 3.2 Vision skips its cross-attention: those behind it had its number, and a traceback."""
    ops = [marking(BLOCKS, "model.layers.* 0,1,2")]
    for number in (0, 2):
        ops.append(with_live(marking(IN, "model.layers.*."), 0, 0, number))
        ops.append(with_live(marking(OUT, "model.layers.*."), 0, 0))
    (series,), _ = pieces.series_of([Part("traced", "forward", ops=ops)], "mllama")
    assert series.numbers == {("model.layers.*",): [0, 2]}
    assert [piece.name for piece in series.pieces if piece.block] == ["model.layers.0.", "model.layers.2."]


def test_what_is_kept_for_several_gpus_is_what_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 has another linear layer: the program of one GPU was kept, and the question asked PyTorch again."""
    config = Config(traced_ranks.MODELS[0], "lfm2", "lfm2")
    setup = Setup(batch=2, seq=40, gpus=4, parallel="zero3")
    (kept,) = keep(config, ["full"], setup, "h100-sxm", tmp_path)
    assert kept.file.exists()
    monkeypatch.setattr(Store, "_record", None)
    model = traced(config, tmp_path)
    assert predict(model, "full", device="h100-sxm", batch=2, seq=40, gpus=4, parallel="zero3").time.phases["total"] > 0
    with pytest.raises(TypeError):
        predict(model, "full", device="h100-sxm", batch=2, seq=40)
