"""What the `torch.compile` pass promises: fewer kernels and bytes, the same mathematics, and Inductor's own counts."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grids import check_every_point
from helpers import NAMES, architecture_of, free_host, period_of, setup_of, step_of
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from perfmodel import advise, explain, methods, predict
from perfmodel.calls import costs
from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.passes import compile as compiling
from perfmodel.passes import partition
from perfmodel.passes.fusion import fused_kernels
from perfmodel.passes.graph import Graph, Prim, Value
from perfmodel.passes.mincut import Network
from perfmodel.passes.partition import Halves
from perfmodel.prediction import memory
from perfmodel.setup import Setup
from validate.oracle.cases import with_targets

few = settings(
    max_examples=4, derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32000,
}  # fmt: skip


WIDE = {"llama": {"hidden_size": 512, "intermediate_size": 1024}}


@pytest.mark.parametrize("method", tuple(methods.registered()))
def test_a_compiled_step_does_the_same_with_less(method: str) -> None:
    """FLOPs stay, kernels and bytes never grow, and on a host that takes no time no step gets slower.

    C3A's own backward forms the gradient of the first layer's input, which nobody wants: a compiler leaves it out.
    """
    for name in ("llama", "gpt2"):
        model = architecture_of(name, layers=5, **WIDE.get(name, {}))
        try:
            eager, compiled = (
                predict(model, method, device="h100", batch=2, seq=64, host=free_host(), padded=True, compile=mode)
                for mode in ("none", "default")
            )
        except UserError:
            continue
        assert compiled.flops == eager.flops or (method == "c3a" and compiled.flops["total"] < eager.flops["total"])
        for phase in ("forward", "backward"):
            assert compiled.kernels[phase] <= eager.kernels[phase]
        assert compiled.kernels["optimizer"] == eager.kernels["optimizer"]
        assert compiled.bytes["total"] <= eager.bytes["total"]
        assert compiled.time.phases["total"] <= eager.time.phases["total"]
        assert compiled.memory.gradients == eager.memory.gradients
        return
    pytest.fail(f"{method} was tried on no model")


@pytest.mark.parametrize("kernels", ["torch", "liger"])
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_there_whatever_trains(name: str, kernels: str) -> None:
    """Gradients of frozen layers lead to those of what trains before them: none of their products is dead code.

    Liger's norms write them over what came in, an encoder's output has one of every layer of the decoder.
    """
    model = architecture_of(name, layers=6 * period_of(name))
    tried = 0
    for method in ("full", "norm", "bitfit", "lora:r=4", "prompt_tuning"):
        try:
            eager, compiled = (
                predict(
                    model, with_targets(method, model), setup_of(name, seq=64, kernels=kernels, compile=mode), "h100"
                )
                for mode in ("none", "default")
            )
        except UserError:
            continue
        assert compiled.flops["total"] == eager.flops["total"], method
        tried += 1
    if not tried:
        pytest.skip(f"nothing of {name} is compiled with {kernels} kernels")


@pytest.mark.parametrize("checkpoint", ["block", "block-reentrant"])
def test_checkpoints_stay(checkpoint: str) -> None:
    """What a checkpoint drops is not saved by the compiler either, and what it runs again still runs."""
    plain = step_of("llama", layers=6, seq=512, compile="default")
    dropped = step_of("llama", layers=6, seq=512, compile="default", checkpoint=checkpoint)
    assert memory.step_segment(dropped).peak < memory.step_segment(plain).peak
    recomputed = [op for _, op, _ in dropped.ops() if op.recompute]
    assert any(costs.kind(op) == "attention" for op in recomputed)
    assert any(costs.kind(op) == "gemm" for op in recomputed)


@few
@given(name=st.sampled_from(NAMES), method=st.sampled_from(("full", "lora:r=4", "dora:r=4")), more=st.integers(1, 4))
def test_each_further_layer_adds_the_same(name: str, method: str, more: int) -> None:
    """Three copies stand for a run of layers: kernels, bytes and memory must grow by the same with each layer."""

    def figures(layers: int) -> np.ndarray:
        model = architecture_of(name, layers=layers)
        p = predict(model, with_targets(method, model), setup_of(name, seq=64, compile="default"), "h100")
        return np.array([p.kernels["total"] - p.kernels["optimizer"], p.bytes["forward"], p.bytes["backward"]])

    steps = [figures((7 + i * more) * period_of(name)) for i in range(3)]
    assert (steps[2] - steps[1] == steps[1] - steps[0]).all()


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("name", ["llama", "opt", "phi"])  # two biases of Phi's have one gradient
@pytest.mark.parametrize("method", ["full", "lora:r=4", "loha:r=4", "top_k:k=1", "c3a:block_size=16"])
def test_what_is_allocated_is_freed(name: str, method: str, accum: int) -> None:
    """Over a step live bytes come back to where they were: no value is forgotten, none is freed twice."""
    step = step_of(name, method, layers=6, compile="default", grad_accum=accum)
    assert memory.step_segment(step).delta == 0


@settings(few, max_examples=12)
@given(
    name=st.sampled_from(("llama", "qwen2", "phi", "gemma")),
    method=st.sampled_from(("full", "lora:r=4", "loha:r=4", "randlora:r=4", "ia3", "dora:r=4", "top_k:k=1")),
    batches=st.lists(st.integers(1, 32), min_size=1, max_size=2),
    seqs=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    precision=st.sampled_from(({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp32", "amp": "bf16"})),
    attention=st.sampled_from(("sdpa", "eager")), checkpoint=st.sampled_from(("none", "block")),
    accum=st.integers(1, 2), padded=st.booleans(),
)  # fmt: skip
@example(
    name="llama", method="full", batches=[1, 3, 32], seqs=[1, 16, 300], precision={"dtype": "bf16"}, attention="sdpa",
    checkpoint="none", accum=1, padded=False,
)  # fmt: skip
def test_a_grid_equals_its_points(
    name: str, method: str, batches: list[int], seqs: list[int], precision: dict[str, Any], attention: str,
    checkpoint: str, accum: int, *, padded: bool,
) -> None:  # fmt: skip
    """What is fused and saved may differ between the points of a grid: then the grid is split."""
    model = architecture_of(name)
    method = with_targets(method, model)
    fixed = {**precision, "attention": attention, "checkpoint": checkpoint, "grad_accum": accum, "padded": padded}

    def setup(batch: Any, seq: Any) -> Setup:
        return setup_of(name, batch=batch, seq=seq, compile="default", **fixed)

    whole = predict(model, method, setup(np.array(batches)[:, None], np.array(seqs)), "l40s")
    check_every_point(
        model, (len(batches), len(seqs)), whole, lambda at: (setup(batches[at[0]], seqs[at[1]]), methods.parse(method))
    )


@pytest.mark.parametrize(
    ("name", "method", "batches", "seqs", "fixed"),
    [
        (  # another cut at 22 tokens than at 8 and at 2,024
            "llama-3.2-3b", "full", [7], [8, 22, 2024],
            {"dtype": "fp32", "amp": "bf16", "checkpoint": "block", "attention": "eager", "padded": True},
        ),
        (  # other pairs fuse first
            "t5-small", "vblora", [2, 16], [18, 22, 1232], {"dtype": "fp32", "attention": "eager", "padded": True},
        ),
        ("opt-1.3b", "top_k:k=2", [1, 16], [28, 45, 405], {"grad_accum": 2, "optimizer": "adamw-fused"}),  # a slice
    ],
)  # fmt: skip
def test_points_inside_a_grid_of_a_real_model_are_looked_at(
    name: str, method: str, batches: list[int], seqs: list[int], fixed: dict[str, Any]
) -> None:
    """Its smallest and its largest point may compile alike and one between them in another way."""
    setups = [Setup(batch=b, seq=s, compile="default", **fixed) for b in batches for s in seqs]
    grid = Setup(batch=np.array(batches)[:, None], seq=np.array(seqs), compile="default", **fixed)
    check_every_point(
        name, (len(batches), len(seqs)), predict(name, method, grid, "l40s"),
        lambda at: (setups[at[0] * len(seqs) + at[1]], methods.parse(method)),
    )  # fmt: skip


@pytest.mark.parametrize("layers", [2, 3, 7])
@pytest.mark.parametrize("method", ["full", "lora:r=4,targets=all-linear"])
def test_every_gradient_is_added_once_a_further_micro_batch(method: str, layers: int) -> None:
    """Outside the compiled code, by autograd's own nodes: the first micro-batch has nothing to add to."""
    step = step_of("llama", method, layers=layers, compile="default", grad_accum=3)
    added = [
        sum(p.repeat * len(p.ops) for p in group.parts if p.name == "accumulation") for group in step.groups[:2]
    ]  # fmt: skip
    assert added == [0, sum(p.count for p in step.parameters if p.requires_grad)]
    assert all(p.host.nodes == len(p.ops) for p in step.groups[1].parts if p.name == "accumulation")


def test_cuda_graphs_leave_one_launch_per_graph() -> None:
    """A launch-bound step becomes device-bound, but guards are asked all the same."""
    times = [
        predict("smollm2-135m", "lora", device="h100", batch=1, seq=64, compile=mode).time.phases["forward"]
        for mode in ("none", "default", "reduce-overhead")
    ]
    assert times[0] > times[1] > times[2]


def test_an_odd_vocabulary_costs_a_compiled_step_little() -> None:
    """Eager GPT-2 pays for its 50,257 columns with older kernels; Inductor pads them."""
    kwargs: dict[str, Any] = {"device": "a100", "batch": 8, "seq": 512, "host": free_host()}
    eager, compiled = (predict("gpt2", "full", compile=mode, **kwargs) for mode in ("none", "default"))
    assert float(compiled.time.phases["total"]) < 0.8 * float(eager.time.phases["total"])


def test_the_waterfall_still_adds_up() -> None:
    """Every fused kernel belongs to one part."""
    e = explain("smollm2-135m", "full", "lora", device="l40s", batch=2, seq=256, axes=(), compile="default")
    difference = e.b.time.phases["total"] - e.a.time.phases["total"]
    assert sum(bar.difference for bar in e.waterfall) == pytest.approx(difference, rel=1e-12)


def test_advise_says_what_compiling_buys() -> None:
    """The knob is searched, and its gain alone is among the changes."""
    found = advise("smollm2-135m", "lora", device="l40s", batch=1, seq=512)
    alone = {change.label: change for change in found.alone}
    assert alone["torch.compile"].seconds < 0
    assert found.best is not None
    assert "torch.compile" in found.best.changes


@pytest.mark.parametrize(
    ("asked", "compile_"),
    [
        ({"torch_compile": True}, "default"), ({"torch_compile": False}, "none"), ({}, "none"),
        ({"torch_compile_backend": "inductor"}, "default"),
        ({"torch_compile_mode": "reduce-overhead"}, "reduce-overhead"),
    ],
)  # fmt: skip
def test_training_arguments_ask_for_it(asked: dict[str, Any], compile_: str, tmp_path: Path) -> None:
    """A backend or a mode switches compiling on, as in transformers."""
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"per_device_train_batch_size": 4, "bf16": True, **asked}))
    assert read(file).setup["compile"] == compile_


def test_the_cut_is_minimal() -> None:
    """The network of a textbook: of two cuts the cheaper one."""
    network = Network()
    source, a, b, sink = (network.node() for _ in range(4))
    for edge in ((source, a, 3), (source, b, 2), (a, b, 5), (a, sink, 2), (b, sink, 3)):
        network.edge(*edge)
    assert network.source_side(source, sink) in ({source}, {source, a, b})


def prim(kind: str, reads: tuple[Value, ...], outs: tuple[Value, ...], length: int = 1) -> Prim:
    return Prim(kind, kind, [(v, v.nbytes) for v in reads], outs[0].points, 0, False, "base", length, [*outs])


def test_a_second_round_fuses_what_the_first_made_alike() -> None:
    """Inductor goes over the pairs until nothing fuses any more (`Scheduler.fuse_nodes`).

    64 points and 8 that read the same memory have no loop in common; 64 points summed to 8 rows and the 8 have.
    """
    x, wide, total, few = (Value("fp32", n) for n in (512, 64, 8, 8))
    prims = [prim("pointwise", (x,), (wide,)), prim("rows", (wide,), (total,), 8), prim("pointwise", (x,), (few,))]
    assert len(fused_kernels(prims[::2], {wide, few})) == 2
    assert len(fused_kernels(prims, {wide, total, few})) == 1


def test_what_only_its_own_kernel_reads_stays_on_the_chip() -> None:
    """A row's sum that the same kernel divides by is never written; a library's kernel writes all that it makes."""
    x, total, share, product, statistics = (Value("fp32", n) for n in (64, 8, 64, 64, 8))
    prims = [
        prim("rows", (x,), (total,), 8), prim("pointwise", (x, total), (share,)),
        prim("extern", (share,), (product, statistics)),
    ]  # fmt: skip
    own, library = fused_kernels(prims, {product})
    assert (own.writes, list(own.reads)) == ([share], [x])
    assert library.writes == [product, statistics]


def test_a_sum_down_columns_takes_along_what_reads_its_result() -> None:
    """IA3's gradients are sums over all tokens, cast to fp32: Inductor writes 47 kernels in the backward pass of four
    Llama blocks at 8 x 512 tokens, four of them the copies of `ORACLE`; each cast by itself would make it 55."""
    model = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    step = step_of(architecture_of("llama", **model), "ia3", batch=8, seq=512, compile="default")
    backward = [(op, n) for part, op, n in step.ops() if part.phase == "backward" and op.name.startswith("inductor::")]
    assert sum(n for _, n in backward) == 47 - 4


LAYERS = LLAMA["num_hidden_layers"]
# Triton kernels of Inductor's backward beyond those of the pass: the rotary gradient of q is written once more in the
# layout that the next product reads, a copy that the pass fuses.
ORACLE = {"full": LAYERS, "lora": LAYERS}


@pytest.mark.parametrize("method", ORACLE)
def test_kernels_are_those_of_inductor(method: str, ready: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own scheduler, run for a GPU on the real model, makes as many kernels as the pass, of both kinds; and
    AOTAutograd saves as many bytes for backward."""
    pytest.importorskip("torch")
    program = "import sys; from validate.oracle.inductor import main; main(sys.argv[1:])"
    command = [*ready, "-c", program, "llama", json.dumps(LLAMA), method, "batch=2", "seq=512"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    real = json.loads(run.stdout.splitlines()[-1])
    model = {key: value for key, value in LLAMA.items() if key != "model_type"}
    saved: list[int] = []

    def partitioned(graph: Graph) -> Halves:
        halves = partition.partitioned(graph)
        read = {value for prim in halves.backward for value, _ in prim.reads}
        saved.append(sum(value.nbytes for value in halves.saved & read))
        return halves

    monkeypatch.setattr(compiling, "partitioned", partitioned)
    step = step_of(architecture_of("llama", **model), method, device="cpu", batch=2, seq=512, compile="default")
    made: Counter[tuple[str, str]] = Counter()
    for part, op, count in step.ops():
        made["generated" if op.name.startswith("inductor::") else "extern", part.phase] += count
    assert made["generated", "forward"] == real["generated"]["forward"]
    assert made["generated", "backward"] == real["generated"]["backward"] - ORACLE[method]
    assert made["extern", "forward"] == real["extern"]["forward"]
    assert made["extern", "backward"] == real["extern"]["backward"] + 1  # the loss's own gradient, made outside
    assert saved == [real["saved"]]


@pytest.mark.parametrize(("attention", "told"), [("sdpa", True), ("flash2", False), ("eager", False)])
def test_a_mask_is_told_where_it_costs_a_kernel(attention: str, told: bool) -> None:
    """flash-attn takes no mask and eager attention has one in any case: the note would cast doubt for nothing."""
    notes = predict("qwen3-0.6b", "full", device="l40s", seq=64, compile="default", attention=attention).notes
    assert any("explicit mask" in said for said in notes) == told
    assert any("one graph" in said for said in notes)


@pytest.mark.parametrize(
    ("handed_in", "cache", "block", "masked"),
    [
        (True, True, False, True), (True, False, False, True), (False, False, False, True), (False, True, False, False),
        (True, False, True, False),
    ],
)  # fmt: skip
def test_transformers_masks_compiled_attention_as_the_model_says(
    handed_in: bool, cache: bool, block: bool, masked: bool
) -> None:
    """An explicit mask costs the flash kernel and doubles the work: which compiled programs get one, by dynamo.

    The model's program gets an attention mask, as from every collator; a block that is compiled alone gets what was
    made outside.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given_masks: list[tuple[bool, bool]] = []

    def look(graph: Any, inputs: Any) -> Any:
        calls = [n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
        given_masks.extend((n.kwargs["attn_mask"] is not None, n.kwargs["is_causal"]) for n in calls)
        return graph.forward

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=64, attn_implementation="sdpa",
        )
    )  # fmt: skip
    ids = torch.zeros(2, 8, dtype=torch.long)
    torch._dynamo.reset()
    if block:
        model.model.layers[0].compile(backend=look)
    compiled = model if block else torch.compile(model, backend=look)
    mask = {"attention_mask": torch.ones_like(ids)} if handed_in else {}
    compiled(input_ids=ids, labels=ids, use_cache=cache, **mask)
    assert given_masks == [(masked, not masked)]
    if handed_in and not block:
        assert Setup(compile="default").explicit_mask


def test_few_long_rows_are_summed_by_many_programs() -> None:
    """One program for the sum of a whole layer's branch made AdaLoRA's compiled backward five times the eager one."""
    setup: dict[str, Any] = {"device": "h100-sxm", "batch": 4, "seq": 1024}
    method = "adalora:init_r=12,targets=all-linear"
    eager, compiled = (predict("llama-3.2-1b", method, compile=mode, **setup) for mode in ("none", "default"))
    assert compiled.time.phases["backward"] < eager.time.phases["backward"]


@pytest.mark.parametrize(("method", "broken"), [("lora", False), ("dora", True), ("loha", True), ("vblora", True)])
def test_methods_that_dynamo_leaves_say_so(method: str, broken: bool) -> None:
    notes = predict("llama-3.2-1b", method, device="h100-sxm", compile="default").notes
    assert any("Dynamo breaks the graph" in note for note in notes) == broken
