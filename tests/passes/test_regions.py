"""Compiled steps of several GPUs: regions between FSDP2's hooks, graphs that DDP cuts, and what is exchanged beside."""

from typing import Any

import numpy as np
import pytest
from grids import check_every_point
from helpers import architecture_of, step_of, total
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import methods, predict
from perfmodel.calls import costs
from perfmodel.errors import UserError
from perfmodel.prediction import memory
from perfmodel.program.part import Part
from perfmodel.recording.parallel.ddp_compiled import ParameterUse, Uses, cuts_of, heaped
from perfmodel.recording.parallel.messages import LayerGradient
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tape.tensor import Parameter

WAYS: list[dict[str, Any]] = [
    {"parallel": "fsdp2"},
    {"parallel": "fsdp2", "checkpoint": "block", "grad_accum": 3},
    {"parallel": "fsdp2", "reshard": False, "shard_group": 2, "amp": "bf16", "dtype": "fp32"},
    {"parallel": "ddp", "checkpoint": "block", "grad_accum": 3},
    {"parallel": "ddp", "ddp": "find-unused"},
    {"parallel": "ddp", "ddp": "static-graph", "amp": "bf16", "dtype": "fp32"},
]


def messages(step: Step) -> list[tuple[str, str, Any]]:
    """The collectives of a step in their order."""
    return [
        (part.phase, op.name, op.inputs[0].shape)
        for group in step.groups for part in group.parts * group.repeat
        for op in part.ops * part.repeat if op.attrs.ranks is not None
    ]  # fmt: skip


def graphs(step: Step) -> dict[str, int]:
    """How many graphs are entered in a micro-batch."""
    found = {"forward": 0, "backward": 0}
    for part in step.groups[-2].parts:
        found[part.phase] += part.host.graphs * part.repeat
    return found


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
@pytest.mark.parametrize("method", ["full", "lora:r=4,targets=all-linear", "top_k:k=2"])
def test_a_compiled_rank_does_and_sends_the_same_with_fewer_kernels(method: str, way: dict[str, Any]) -> None:
    """A compiler fuses, no more: FLOPs and messages stay, and every byte that is allocated is freed."""
    eager, compiled = (step_of("llama", method, layers=6, gpus=4, compile=c, **way) for c in ("none", "default"))
    assert messages(compiled) == messages(eager)
    if way.get("checkpoint"):  # a product that only ran before a checkpoint's last saved tensor is left out
        assert 0.9 * total(eager) < total(compiled) <= total(eager)
    else:
        assert total(compiled) == total(eager)
    assert total(compiled, costs.kernels) < 0.7 * total(eager, costs.kernels)
    assert total(compiled, lambda op: op.bytes_read + op.bytes_written) < total(
        eager, lambda op: op.bytes_read + op.bytes_written
    )
    assert memory.step_segment(compiled).delta == 0


@pytest.mark.parametrize("layers", [1, 4, 9])
def test_each_block_is_a_graph_between_hooks(layers: int) -> None:
    """Beside the blocks the mask, the rotary tables, the last norm and the loss are graphs; two have no backward."""
    step = step_of("llama", layers=layers, gpus=2, parallel="fsdp2", compile="default")
    assert graphs(step) == {"forward": layers + 4, "backward": layers + 2}


def test_what_trains_less_than_a_bucket_is_one_graph() -> None:
    """Then nothing is left to hide its all-reduce beside: the graph's gradients come behind all of its backward."""
    step = step_of("llama", "lora:r=4", layers=6, gpus=2, compile="default")
    assert graphs(step) == {"forward": 1, "backward": 1}
    parts = [part for part in step.groups[-2].parts if part.phase == "backward"]
    sent = [i for i, part in enumerate(parts) if any(op.name == "c10d::allreduce_" for op in part.ops)]
    products = [i for i, part in enumerate(parts) if any(op.name.startswith("mm") for op in part.ops)]
    assert min(sent) > max(products)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(sizes=SIZES, first=st.integers(1, 30), others=st.integers(30, 90))
def test_every_graph_but_the_first_fills_a_bucket(sizes: list[int], first: int, others: int) -> None:
    """And no more than one use of a parameter beyond it; the first one has what is left, which is something."""
    uses, part = Uses(), Part("blocks", "forward")
    for i, n in enumerate(sizes):
        parameter = Parameter(f"{i}.weight", (n,), "u8", kind="weight", trainable=True)
        uses.found.append(ParameterUse(0, part, (i, 0), parameter))
    cuts = sorted(layer for layer, _ in cuts_of(uses, first, others) if layer is not None)
    filled = [sum(sizes[a:b]) for a, b in zip(cuts, [*cuts[1:], len(sizes)][: len(cuts)], strict=True)]
    for i, (cut, nbytes) in enumerate(zip(cuts, filled, strict=True)):
        least = first if i == len(cuts) - 1 else others
        assert least <= nbytes < least + sizes[cut]
    assert 0 not in cuts
    assert sum(sizes[1 : cuts[0] if cuts else len(sizes)]) < (others if cuts else first)


@given(st.integers(0, 40), st.data())
def test_a_heap_of_equals_gives_each_once_and_the_least_last(n: int, data: st.DataObject) -> None:
    """Whatever order libstdc++ makes of equals, no gradient is lost, and the next graph comes behind all."""
    p = Parameter("p", (1,), "fp32", kind="weight", trainable=True)
    pushed: list[LayerGradient | None] = [LayerGradient(p, i) for i in range(n)]
    assert sorted(c.layer for c in heaped(pushed) if c is not None) == list(range(n))
    pushed.insert(data.draw(st.integers(0, n)), None)
    taken = heaped(pushed)
    assert taken[-1] is None
    assert sorted(c.layer for c in taken if c is not None) == list(range(n))


def test_equals_leave_a_heap_as_libstdc_has_them() -> None:
    """What `std::priority_queue` of GCC 12 gave of seven equals, alone and with one that is less pushed fourth."""
    p = Parameter("p", (1,), "fp32", kind="weight", trainable=True)
    pushed: list[LayerGradient | None] = [LayerGradient(p, i) for i in range(7)]
    assert [c.layer for c in heaped(pushed) if c is not None] == [0, 2, 5, 6, 4, 1, 3]
    pushed.insert(3, None)
    assert [c.layer for c in heaped(pushed) if c is not None] == [0, 2, 5, 4, 1, 6, 3]


@pytest.mark.parametrize("way", [{"parallel": "fsdp2", "checkpoint": "block"}, {"parallel": "ddp"}])
def test_a_grid_of_compiled_ranks_equals_its_points(way: dict[str, Any]) -> None:
    """A sweep over sizes and GPUs is one recording."""
    model = architecture_of("llama", layers=5)

    def setup(batch: Any, gpus: Any) -> Setup:
        return Setup(batch=batch, seq=64, gpus=gpus, compile="default", **way)

    batches, gpus = [1, 4], [2, 8]
    whole = predict(model, "lora:r=4", setup(np.array(batches)[:, None], np.array(gpus)), "h100")
    check_every_point(
        model, (2, 2), whole, lambda at: (setup(batches[at[0]], gpus[at[1]]), methods.parse("lora:r=4"))
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("method", ["full", "lora:r=8,targets=all-linear"])
def test_compiled_layers_that_gpus_share_wait_as_eager_ones(method: str, tokens: bool) -> None:
    """Inductor moves no collective: what is exchanged stays as exposed as it was, beside fewer kernels."""
    usual = Setup(batch=8, seq=2048, gpus=2, tp=2, sequence_parallel=tokens)
    eager = predict("llama-3.1-8b", method, usual, "h100-sxm")
    compiled = predict("llama-3.1-8b", method, usual, "h100-sxm", compile="default")
    before, after = (p.time.communication for p in (eager, compiled))
    assert after.nbytes == before.nbytes
    assert after.exposed["total"] == pytest.approx(before.exposed["total"], rel=0.02)
    assert compiled.kernels["total"] < eager.kernels["total"]
    assert compiled.flops == eager.flops


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama", "dora:r=4", {}, "what Dynamo makes of dora"),
    ("llama", "full", {"parallel": "fsdp1"}, "graphs break at its hooks; use --parallel ddp or fsdp2"),
    ("llama", "full", {"parallel": "zero2"}, "DeepSpeed compiles by itself"),
    ("llama", "lora:implementation=unsloth", {}, "what Dynamo makes of unsloth's lora on several GPUs"),
    ("llama", "full", {"compile": "reduce-overhead"}, "CUDA graphs of several GPUs are not modelled"),
    ("llama", "full", {"parallel": "fsdp2", "offload": "params"}, "offload: not modelled with compile"),
    ("llama", "full", {"tp": 2, "checkpoint": "block"}, "cannot compile checkpointed layers that GPUs share"),
    ("llama", "full", {"tp": 2, "gpus": 4}, "ddp takes no layers that GPUs share; use --parallel fsdp2"),
    ("llama", "full", {"tp": 2, "gpus": 4, "sequence_parallel": True, "parallel": "fsdp2"}, "cut words .* --gpus 2"),
    ("bert", "full", {}, "language models are"),
]


@pytest.mark.parametrize(("name", "method", "options", "why"), REFUSED)
def test_what_was_not_compared_is_refused_in_a_line(name: str, method: str, options: dict[str, Any], why: str) -> None:
    """Programs that break otherwise would be answered with figures of another one."""
    with pytest.raises(UserError, match=why) as fault:
        step_of(name, method, **{"gpus": 2, "compile": "default", **options})
    assert "\n" not in str(fault.value)
