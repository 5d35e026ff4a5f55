"""What the optimizer and clipping launch: kernels of list ops, bytes, state, groups by dtype.

For small models the optimizer is a good part of the step, and its launches are all of its time.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from helpers import calls_by_name, step_of, total
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perfmodel import optimizers, predict
from perfmodel.calls import costs
from perfmodel.calls.launches import launch_for
from perfmodel.program.op import Op, Spec
from perfmodel.program.part import Part
from perfmodel.report.figures import setup_line
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.tensor import Parameter

# ATen/native/cuda/MultiTensorApply.cuh in builds for CUDA 12; for CUDA 13, since PyTorch 2.12, seven times as much.
CHUNK = 65_536
BLOCKS = 320
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
TENSORS_WITH_SCALARS = {1: 96, 2: 64, 3: 48, 4: 36, 5: 30}
many = settings(max_examples=100, derandomize=True)


def launches(sizes: Iterable[int], limit: int, most: int = BLOCKS) -> int:
    """`multi_tensor_apply`, loop by loop."""
    count = blocks = tensors = 0
    for numel in sizes:
        tensors += 1
        chunks = -(-numel // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == limit and last) or blocks == most:
                count += 1
                blocks = 0
                tensors = 0 if last else 1
    return count + (blocks > 0)


# Tensor lists by op: in place, so the results are no list of their own. Source: ATen/native/cuda/Foreach*.cu.
LISTS = {
    "_foreach_mul_.Scalar": ("adamw-foreach", TENSORS[1]),
    "_foreach_lerp_.Scalar": ("adamw-foreach", TENSORS[2]),
    "_foreach_addcmul_.Scalar": ("adamw-foreach", TENSORS[3]),
    "_foreach_sqrt": ("adamw-foreach", TENSORS[2]),
    "_foreach_div_.ScalarList": ("adamw-foreach", TENSORS_WITH_SCALARS[1]),
    "_foreach_add_.Scalar": ("adamw-foreach", TENSORS[1]),
    "_foreach_addcdiv_.ScalarList": ("adamw-foreach", TENSORS_WITH_SCALARS[3]),
    "_foreach_addcdiv_.Scalar": ("rmsprop", TENSORS[3]),
    "_foreach_mul_.Tensor": ("adamw-foreach", TENSORS[1]),  # clipping
    "_fused_adamw_": ("adamw-fused", TENSORS[4]),
    "_foreach_add_.List": ("sgd-momentum", TENSORS[2]),
}

numels = st.one_of(
    st.integers(1, 70_000), st.integers(1, 400).map(lambda chunks: chunks * CHUNK), st.integers(CHUNK, 700 * CHUNK)
)
tensor_lists = st.lists(st.tuples(numels, st.integers(1, 130)), min_size=1, max_size=6)


def specs(tensors: Sequence[tuple[int, int]], dtype: str = "bf16") -> list[Spec]:
    return [Spec(dtype, (numel,), copies) for numel, copies in tensors]


def parameters(group: list[Spec]) -> list[Parameter]:
    """Trainable parameters with a gradient, as many copies of each as the specs say."""
    made = []
    for i, spec in enumerate(group):
        p = Parameter(f"p{i}", spec.shape, spec.dtype, kind="weight", trainable=True)
        p.count, p.used = spec.copies, True
        made.append(p)
    return made


def updated(group: list[Spec], optimizer: str) -> Iterator[tuple[Op, int]]:
    """Ops of one optimizer step, each with how often it runs."""
    tape = Tape()
    with recording(tape), tape.no_grad():
        update = optimizers.Update(tape, optimizer, parameters(group))
        update.group(update.parameters)
    return ((op, part.repeat) for part in tape.parts for op in part.ops)


def recorded(group: list[Spec], optimizer: str) -> list[Op]:
    clipping = Part("clip", "optimizer")
    optimizers.clip_grad_norm(clipping, group)
    return [op for op, times in updated(group, optimizer) for _ in range(times)] + clipping.ops


@pytest.mark.parametrize("name", LISTS)
@many
@given(tensors=tensor_lists)
@example(tensors=[(1, 110)])
@example(tensors=[(1, 97)])
@example(tensors=[(1, 64)])
@example(tensors=[(1, 48)])
@example(tensors=[(1, 36)])
@example(tensors=[(BLOCKS * CHUNK, 1), (1, 110)])
@example(tensors=[(BLOCKS * CHUNK + 1, 1), (1, 109)])
@example(tensors=[(7 * BLOCKS * CHUNK, 2), (1, 770)])
def test_launches_of_list_ops_equal_a_simulation_of_multi_tensor_apply(
    name: str, tensors: list[tuple[int, int]]
) -> None:
    """A launch is full at so many tensors or so many chunks, and the closed form must cut where the loop cuts."""
    optimizer, limit = LISTS[name]
    found = [op for op in recorded(specs(tensors), optimizer) if op.name == name]
    assert found
    for op in found:
        assert costs.kernels(op) == launches(sizes_of(tensors), 7 * limit, 7 * BLOCKS)
        launch_for(op, 1)
        assert costs.kernels(op) == launches(sizes_of(tensors), limit)


@settings(many, max_examples=30)
@given(tensors=tensor_lists)
def test_the_norms_of_a_list_are_cleaned_up_by_a_kernel_for_every_400_tensors(tensors: list[tuple[int, int]]) -> None:
    """ForeachReduceOp.cu: partial norms of chunks, then `lpnorm_cleanup` on MAX_TENSORS_PER_KERNEL tensors each."""
    (op,) = (op for op in recorded(specs(tensors), "adamw-foreach") if op.name == "_foreach_norm.Scalar")
    sizes = sizes_of(tensors)
    assert costs.kernels(op) == launches(sizes, 7 * TENSORS[1], 7 * BLOCKS) + -(-len(sizes) // 400)


def sizes_of(tensors: Sequence[tuple[int, int]]) -> list[int]:
    """As a model lists them: those of the layers of a run, which are as many of each, layer by layer."""
    return [numel for copies, layer in groupby(tensors, itemgetter(1)) for numel, _ in list(layer) * copies]


@many
@given(numel=numels, copies=st.integers(1, 130), more=st.lists(numels, min_size=1, max_size=4))
def test_launches_over_a_grid_equal_those_of_its_points(numel: int, copies: int, more: list[int]) -> None:
    """A sweep over the rank changes the sizes of adapters, and with them where launches are cut."""
    grid = np.array([numel, *more])
    ops = recorded([Spec("fp32", (grid,), copies), Spec("fp32", (7,), 3)], "adamw-foreach")
    for i, size in enumerate(grid.tolist()):
        alone = recorded([Spec("fp32", (size,), copies), Spec("fp32", (7,), 3)], "adamw-foreach")
        assert [np.broadcast_to(costs.kernels(op), grid.shape)[i] for op in ops] == [costs.kernels(op) for op in alone]


@many
@given(tensors=tensor_lists)
def test_copies_stand_for_so_many_tensors(tensors: list[tuple[int, int]]) -> None:
    """Identical layers share one spec: bytes and launches must not see the difference (in the same order)."""
    apart = [Spec("bf16", (numel,)) for numel, copies in tensors for _ in range(copies)]
    for folded, plain in zip(recorded_lists(specs(tensors)), recorded_lists(apart), strict=True):
        assert (folded.name, costs.kernels(folded)) == (plain.name, costs.kernels(plain))
        assert (folded.bytes_read, folded.bytes_written) == (plain.bytes_read, plain.bytes_written)


def recorded_lists(group: list[Spec]) -> list[Op]:
    return [op for op in recorded(group, "adamw-foreach") if op.name.startswith("_foreach")]


@pytest.mark.parametrize(
    ("optimizer", "reads", "writes"),
    [
        # parameter-sized: mul p; lerp m,g -> m; mul v; addcmul v,g -> v; sqrt v -> d; div d; add d; addcdiv p,m,d -> p
        ("adamw-foreach", 1 + 2 + 1 + 2 + 1 + 1 + 1 + 3, 8),
        ("adamw-loop", 1 + 2 + 1 + 2 + 1 + 1 + 1 + 3, 8),
        ("adamw-fused", 4, 4),  # p, g, m, v; the gradients are declared as written
        ("sgd", 2, 1),
        ("sgd-momentum", 1 + 2 + 2, 3),
        # mul v; addcmul v,g; div v -> d; sqrt d; add d; div g,d; add g,y; lerp y,z; add y,g; sub z,g
        ("schedule-free-adamw", 1 + 2 + 1 + 1 + 1 + 2 + 2 + 2 + 2 + 2, 10),
    ],
)
def test_traffic_of_an_update_is_so_many_passes_over_the_parameters(optimizer: str, reads: int, writes: int) -> None:
    """The sum by hand of the design page: foreach AdamW moves about 20 times the parameters."""
    group = specs([(1000, 3), (77, 1)], "fp32")
    size = sum(s.nbytes for s in group)
    device = [(op, times) for op, times in updated(group, optimizer) if not op.attrs.host]
    counters = 4 * 4 if optimizer == "adamw-fused" else 0  # fp32 step counters, read twice, written once
    assert sum(times * op.bytes_read for op, times in device) == reads * size + 2 * counters
    assert sum(times * op.bytes_written for op, times in device) == writes * size + counters


@pytest.mark.parametrize(
    ("optimizer", "tensors", "counters"),
    [
        ("adamw", 2, 4), ("adamw-foreach", 2, 4), ("adamw-loop", 2, 4), ("adamw-fused", 2, 4), ("sgd", 0, 0),
        ("sgd-momentum", 1, 0), ("schedule-free-adamw", 2, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp32", 4)])
def test_state_is_kept_in_the_parameters_dtype(
    optimizer: str, tensors: int, counters: int, dtype: str, itemsize: int
) -> None:
    """AdamW holds two moments, each as large as its parameter, and a step counter: most of a full step's memory."""
    group = specs([(1000, 3), (77, 1)], dtype)
    assert optimizers.state_bytes(parameters(group), optimizer) == tensors * 3077 * itemsize + counters * 4


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "sgd", "sgd-momentum"])
def test_only_what_trains_has_state_and_is_updated(optimizer: str) -> None:
    """This is where LoRA saves most: its optimizer sees adapters only."""
    step = step_of("llama", "lora:r=4", optimizer=optimizer)
    adapters = [p for p in step.parameters if p.kind == "adapter"]
    assert step.state_bytes == optimizers.state_bytes(adapters, optimizer)
    lists = [op for part, op, _ in step.ops() if part.name == "optimizer" and not op.attrs.host]
    shapes = {s.shape for s in adapters} | {()}
    assert all(s.shape in shapes for op in lists for s in (*op.inputs, *op.outputs))


def test_lists_are_grouped_by_dtype_in_order_of_appearance() -> None:
    """A mixed list would not be one launch, and PyTorch makes one call per dtype."""
    mixed = [Spec("fp32", (4,)), Spec("bf16", (5,)), Spec("fp32", (6,), 2)]
    assert optimizers.by_dtype(mixed) == [[mixed[0], mixed[2]], [mixed[1]]]
    fused = [op for op, _ in updated(mixed, "adamw-fused") if op.name == "_fused_adamw_"]
    assert [{s.dtype for s in op.outputs} for op in fused] == [{"fp32"}, {"bf16"}]
    assert [sum(s.copies for s in op.outputs) for op in fused] == [3 * 4, 4]


@pytest.mark.parametrize(
    ("optimizer", "device", "form"),
    [
        ("adamw", "cuda", "adamw-foreach"), ("adamw", "cpu", "adamw-loop"), ("adamw-fused", "cpu", "adamw-fused"),
        ("adamw-loop", "cuda", "adamw-loop"), ("sgd", "cpu", "sgd"),
    ],
)  # fmt: skip
def test_the_default_form_is_the_one_pytorch_picks_on_the_device(optimizer: str, device: str, form: str) -> None:
    """`torch.optim.AdamW` is not the same program on both: foreach on CUDA, a loop on the CPU."""
    assert optimizers.picked_form(optimizer, device) == form


def test_a_build_for_cuda_13_launches_less() -> None:
    """A seventh of the launches of an 8B model's fused update; the answer says which build it is for."""
    builds = ("cuda=12.6", "cuda=13.0", "torch=2.11,cuda=13.0")
    older, newer, before = (predict("llama-3-8b", "full", optimizer="adamw-fused", stack=build) for build in builds)
    assert newer.kernels["optimizer"] < older.kernels["optimizer"] / 5
    assert before.kernels == older.kernels
    assert "CUDA 12.6" in setup_line(older.setup)
    assert "CUDA" not in setup_line(newer.setup)
    old_card = predict("gpt2", "full", device="v100", dtype="fp16")  # has no build for CUDA 13
    assert old_card.kernels == predict("gpt2", "full", device="v100", dtype="fp16", stack="cuda=12.6").kernels


def test_the_loop_launches_for_every_tensor_and_the_lists_do_not() -> None:
    """The reason why foreach exists; a regression would show as an optimizer without overhead."""
    loop, foreach = (step_of("llama", optimizer=o, clip_grad=False) for o in ("adamw-loop", "adamw-foreach"))
    tensors = sum(p.count for p in loop.parameters)
    assert calls_by_name(loop, "optimizer")["addcdiv_"] == tensors
    assert calls_by_name(foreach, "optimizer")["_foreach_addcdiv_.ScalarList"] == 1


def test_clipping_adds_three_passes_over_the_gradients() -> None:
    """One read for the norm, one read and one write for the scaling."""

    def gradient_bytes(op: Op) -> Any:
        return sum(s.nbytes for s in (*op.inputs, *op.outputs) if s.shape)

    with_clip, without = (step_of("gpt2", clip_grad=clip) for clip in (True, False))
    passes = total(with_clip, gradient_bytes) - total(without, gradient_bytes)
    stacked = 2 * 2 * sum(p.count for p in with_clip.parameters)  # the norms, written and read as one bf16 tensor
    assert passes == 3 * with_clip.weight_bytes + stacked


@pytest.mark.parametrize(
    ("name", "states", "bits", "paged"),
    [
        ("adamw-8bit", 2, 8, False), ("paged-adamw-8bit", 2, 8, True), ("paged-adamw", 2, 32, True),
        ("lion", 1, 32, False), ("lion-8bit", 1, 8, False),
    ],
)  # fmt: skip
def test_bitsandbytes_states_byte_by_byte(name: str, states: int, bits: int, paged: bool) -> None:
    """Two moments of AdamW, one of Lion; a byte an element, a scale for 256; what is small or embeds in fp32."""
    shapes = {"weight": (300, 400), "adapter": (16, 400), "norm": (400,), "embedding": (900, 400)}
    parameters = [Parameter(kind, shape, "bf16", kind=kind, trainable=True) for kind, shape in shapes.items()]
    for p in parameters:
        p.used = True
    known = optimizers.recorded(parameters, name)
    kept = {"on the device": 0, "paged": 0}
    for kind, shape in shapes.items():
        n = int(np.prod(shape))
        quantised = bits == 8 and kind != "embedding" and n >= 4096
        kept["paged" if paged and n >= 100_000 else "on the device"] += states * n * (1 if quantised else 4)
        kept["on the device"] += states * 4 * -(-n // 256) * quantised
    kept["on the device"] += states * 256 * 4 * (bits == 8)  # the maps of codes
    assert known.state_bytes == kept["on the device"]
    assert known.paged_bytes == kept["paged"]


def test_a_copy_of_the_embedding_has_the_states_of_one() -> None:
    """The Trainer looks for `nn.Embedding`, and what PEFT trains in its place is one; a copy of the head is none."""
    states = {
        copies: predict("llama-3.2-1b", f"lora:modules_to_save={copies}", optimizer="adamw-8bit").memory.optimizer
        for copies in ("embed_tokens", "lm_head")
    }
    assert states["embed_tokens"] - states["lm_head"] == pytest.approx(2 * (4 - 1 - 4 / 256) * 128_256 * 2048)
    virtual = predict("smollm2-135m", "prompt_tuning:tokens=20", optimizer="adamw-8bit").memory.optimizer
    assert virtual == 2 * 4 * (20 * 576 + 256)  # and so are virtual tokens


@pytest.mark.parametrize(
    ("form", "name"), [("ao-adamw-8bit", "AdamW8bit"), ("ao-adamw-4bit", "AdamW4bit"), ("ao-adamw-fp8", "AdamWFp8")]
)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((256, 512), "bf16"), ((64, 96), "fp32"), ((48,), "bf16"), ((2048, 2048), "bf16")]
)
def test_torchaos_updates_are_what_inductor_schedules(form: str, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Its kernels move three times the bytes of bitsandbytes' one, and nobody would guess which they are."""
    pytest.importorskip("torchao")
    full = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    command = [sys.executable, "-m", "validate.oracle.inductor", name, "x".join(map(str, shape)), full]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    parameter = Parameter("w", shape, dtype, kind="weight", trainable=True)
    parameter.used = True
    kernels = [
        [op.name.removeprefix("inductor::"), op.bytes_read, op.bytes_written]
        for part in optimizers.recorded([parameter], form).tape.parts
        for op in part.ops
        if op.launched
    ]
    assert sorted(kernels) == sorted(json.loads(done.stdout.splitlines()[-1]))
