"""The reader on profiles of real GPUs that others published (tests/fixtures/traces/README.md says whose).

What the reader finds is held against plain counts of the file's events, made here in another way, and against what the
model says of the same calls. The whole files are read too where a folder has them:
`PERFMODEL_TRACES=FOLDER pytest tests/measuring/test_real_traces.py`.
"""

import csv
import gzip
import json
import os
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel.calls.table import ROWS

pytest.importorskip("torch")

import torch
from helpers import calls_by_name, step_of

from perfmodel.architectures import from_config
from perfmodel.architectures.config import load
from perfmodel.calls import costs
from perfmodel.calls.launches import launch_for
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.program.op import Op, Spec
from perfmodel.program.software import SoftwareStack
from validate.measuring import kineto, show_profile, traces
from validate.measuring.names import generated, is_operator, short
from validate.measuring.profile import composite, plain_profile

Trace = dict[str, Any]
CUTS = Path(__file__).parents[1] / "fixtures" / "traces"
WHOLE = Path(os.environ.get("PERFMODEL_TRACES", "/nowhere"))
STEPS, SGD = ("## forward ##", "## backward ##", "## optimizer ##"), "Optimizer.{0}#SGD.{0}"
PHASES = {  # file -> the annotations that mark its phases
    "h100_qwen_two_layers": (),
    "h100_bert_forward": ("ProfilerStep#6",),
    "a100_resnet_ddp_step": STEPS,
    "rtx2080ti_mlp_two_steps": (SGD.format("zero_grad"), SGD.format("step")),
    "h100_qwen1.5-0.5b_forward_16x559": ("ProfilerStep#6",),
    "h100_bert-small_forward_1x141": ("ProfilerStep#6",),
    "a100_resnet_ddp_train_sgd": STEPS,
    "rtx2080ti_mlp_train_sgd": (SGD.format("zero_grad"), SGD.format("step")),
}
WHOLE_COUNTS = {  # kernels, copies, fills; of them without a launch, as the files' own readers count
    "h100_qwen1.5-0.5b_forward_16x559": (1465, 1, 241, 509), "h100_bert-small_forward_1x141": (60, 1, 0, 0),
    "a100_resnet_ddp_train_sgd": (2700, 960, 114, 0), "rtx2080ti_mlp_train_sgd": (8716, 0, 1640, 0),
}  # fmt: skip
EXECUTION, TABLE = "gpt2-large_train_1x512_execution_trace", "rtx4060ti_smollm2-135m_train_amp_sdpa"
WORK = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
LAUNCHING = (
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync"
)  # fmt: skip


def whole(name: str, ending: str = ".json.gz") -> Path:
    """One of the whole files."""
    path = WHOLE / f"{name}{ending}"
    if not path.is_file():
        pytest.skip(f"PERFMODEL_TRACES names no folder with {path.name}")
    return path


@cache
def trace_of(name: str) -> Trace:
    path = CUTS / f"{name}.json.gz"
    found: Trace = json.loads(gzip.decompress((path if path.exists() else whole(name)).read_bytes()))
    return found


@cache
def profile_of(name: str) -> kineto.Profile:
    return kineto.parse_trace(trace_of(name), PHASES[name], transparent=composite)


def of(trace: Trace, *categories: str) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e.get("cat") in categories]


def launched(trace: Trace) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(work, its launch) by correlation."""
    calls = {
        e["args"]["correlation"]: e for e in of(trace, "cuda_runtime", "cuda_driver") if "correlation" in e["args"]
    }
    return [(e, calls[e["args"]["correlation"]]) for e in of(trace, *WORK) if e["args"]["correlation"] in calls]


def busy(events: list[dict[str, Any]]) -> float:
    """Seconds in which something runs: how many do, counted up and down in nanoseconds."""
    edges: Counter[int] = Counter()
    for e in events:
        edges[round(e["ts"] * 1000)] += 1
        edges[round((e["ts"] + e["dur"]) * 1000)] -= 1
    total = running = last = 0
    for at, change in sorted(edges.items()):
        total += (at - last) * (running > 0)
        running, last = running + change, at
    return total * 1e-9


@pytest.mark.parametrize("name", PHASES)
def test_counts_phases_launches_and_busy_time_are_those_of_the_file(name: str) -> None:
    """Every figure of a measurement on a GPU starts here; the file's own events, counted plainly, are the truth."""
    trace, found = trace_of(name), profile_of(name)
    pairs = launched(trace)
    assert Counter(w.kind for w in found.work) == Counter(WORK[e["cat"]] for e, _ in pairs)
    assert found.unlaunched == len(of(trace, *WORK)) - len(pairs)
    assert sum(w.nbytes for w in found.work) == sum(e["args"].get("bytes", 0) for e, _ in pairs)
    assert found.busy == pytest.approx(busy([e for e, _ in pairs]), rel=1e-4)
    runtime = Counter(e["name"] for e in of(trace, "cuda_runtime", "cuda_driver"))
    assert {n: k for n, (k, _) in found.launches.items()} == {n: runtime[n] for n in LAUNCHING if runtime[n]}
    marks = [e for e in of(trace, "user_annotation") if e["name"] in PHASES[name]]
    assert sum(found.phases.values()) == pytest.approx(sum(e["dur"] for e in marks) * 1e-6)
    expected = Counter(
        next((m["name"] for m in marks if m["ts"] <= call["ts"] <= m["ts"] + m["dur"]), "outside") for _, call in pairs
    )
    assert Counter(w.phase for w in found.work) == expected


@pytest.mark.parametrize("name", WHOLE_COUNTS)
def test_the_whole_files_hold_what_their_readme_says(name: str) -> None:
    """Kernels, copies and fills, those without a launch too."""
    found, every = profile_of(name), Counter(WORK[e["cat"]] for e in of(trace_of(name), *WORK))
    assert (every["kernel"], every["memcpy"], every["memset"], found.unlaunched) == WHOLE_COUNTS[name]
    assert len(found.work) + found.unlaunched == sum(every.values())


@pytest.mark.parametrize("name", PHASES)
def test_all_work_belongs_to_an_operator(name: str) -> None:
    """Autograd's nodes and annotations own no kernel: the comparison by call would fail in every cell."""
    by_call = plain_profile(profile_of(name), "cuda", 1.0)["by_call"]
    owners = {call for table in by_call.values() for call in table}
    assert owners
    assert all(is_operator(call) for call in owners), owners
    assert not any(composite(call) for call in owners), owners


@pytest.mark.parametrize("name", ["h100_qwen_two_layers", "h100_bert_forward", "a100_resnet_ddp_step"])
def test_the_owner_is_around_the_call_that_the_external_id_names(name: str) -> None:
    """Newer traces link a kernel to the call that launched it a second way, which the reader does not use."""
    trace = trace_of(name)
    calls = {e["args"]["External id"]: e for e in of(trace, "cpu_op")}
    compared = 0
    for work, (event, _) in zip(profile_of(name).work, launched(trace), strict=True):
        inner = calls.get(event["args"].get("External id"))
        if inner is None:
            continue
        around = {
            e["name"] for e in calls.values()
            if e["tid"] == inner["tid"] and e["ts"] <= inner["ts"] < e["ts"] + e["dur"]
        }  # fmt: skip
        assert work.call in around
        compared += 1
    assert compared > 50


def calls_of(trace: Trace) -> Counter[str]:
    """Operators that no operator with kernels of its own is around."""
    found: Counter[str] = Counter()
    threads = defaultdict(list)
    for e in of(trace, "cpu_op"):
        if is_operator(e["name"]) and not composite(e["name"]):
            threads[e["tid"]].append((e["ts"], -e["dur"], e["name"]))
    for rows in threads.values():
        until = 0.0
        for ts, minus, name in sorted(rows):
            if ts >= until:
                found[name], until = found[name] + 1, ts - minus
    return found


@pytest.mark.parametrize("name", PHASES)
def test_calls_launch_as_many_kernels_as_the_model_says(name: str) -> None:
    """The table of kernels per call, on real GPUs: a helper counted, or a kernel forgotten, shows in the next call."""
    per_call = {short(call): known.launches for call, known in ROWS.items()}
    calls, kernels = calls_of(trace_of(name)), Counter(w.call for w in profile_of(name).work if w.is_kernel)
    unknown = ("c10d", "aten::_foreach", "aten::conv", "aten::max_pool")  # collectives, lists, pictures
    modelled = [c for c in kernels if not c.startswith(unknown)]
    assert len(modelled) > 8
    assert {c: kernels[c] for c in modelled} == {c: calls[c] * per_call.get(short(c), 1) for c in modelled}


def test_a_product_is_one_kernel_whatever_its_library_launches_for_it() -> None:
    """By hand: in two layers cuBLAS clears a counter for each of 12 products, and on the A100 it adds up parts of k."""
    found = profile_of("h100_qwen_two_layers")
    helpers = [w for w in found.work if w.helps]
    assert Counter((w.kind, w.call, w.nbytes) for w in helpers) == {
        ("memset", "aten::mm", 4): 6, ("memset", "aten::addmm", 4): 6
    }  # fmt: skip
    told = plain_profile(found, "cuda", 1.0)
    products = [w for w in found.work if w.call == "aten::mm"]
    assert told["by_call"]["outside"]["aten::mm"] == (6, pytest.approx(sum(w.seconds for w in products)))
    assert told["helpers"] == {"number": 12, "seconds": pytest.approx(sum(w.seconds for w in helpers))}
    assert told["kernels"]["outside"] == sum(n for n, _ in told["by_call"]["outside"].values()) == 93
    parts = [w for w in profile_of("a100_resnet_ddp_step").work if w.helps and w.kind == "kernel"]
    assert Counter(w.call for w in parts) == {"aten::addmm": 1, "aten::mm": 1}


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of its parameters, in order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    wide = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            sizes = [(width, wide, 1), (width, width, 3), (4 * width, width, 1)]
            sizes += [(4 * width, wide, 1)] if block == 0 else []
            for out, into, side in sizes:
                shapes += [(out, into, side, side), (out,), (out,)]
            wide = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def test_lists_are_packed_into_launches_as_on_a_gpu() -> None:
    """`multi_tensor_apply` on ResNet-50's 161 parameters (SGD on an A100): three launches of one list, three of two."""
    found = profile_of("a100_resnet_ddp_step")
    tensors = tuple(Spec("fp32", shape) for shape in resnet50())
    for name, call, calls in (
        ("_foreach_mul_.Scalar", "aten::_foreach_mul_", 1),
        ("_foreach_add_.List", "aten::_foreach_add_", 2),
    ):
        op = Op(name, tensors, tensors, 0, 0)
        launch_for(op, SoftwareStack.of("torch=2.4").list_room("8.0"))  # before launches had 32 KiB of arguments
        launches = costs.kernels(op)
        assert sum(w.call == call for w in found.work) == calls * launches


@pytest.mark.parametrize("name", PHASES)
def test_memory_peak_is_that_of_the_gpus_allocator(name: str) -> None:
    """The allocator tells its own total with every event: its highest, less what lived when the trace began."""
    events = sorted((e for e in trace_of(name)["traceEvents"] if e["name"] == "[memory]"), key=lambda e: e["ts"])
    own = [e["args"] for e in events if e["args"]["Device Type"] == 1]
    before = own[0]["Total Allocated"] - own[0]["Bytes"] if own else 0
    assert profile_of(name).memory_peak == max((a["Total Allocated"] - before for a in own), default=0)


def test_no_name_raises_and_composites_are_known() -> None:
    """`overloads()` lists what only TorchScript knows; a third of the common names raised."""
    schemas = {s.name for s in torch._C._jit_get_all_schemas()} | {f"aten::{name}" for name in dir(torch.ops.aten)}
    assert len(schemas) > 2000
    found = {name for name in schemas if composite(name)}
    assert {"aten::linear", "aten::matmul", "aten::reshape", "aten::to", "aten::layer_norm", "aten::softmax"} <= found
    assert not found & {"aten::mm", "aten::add", "aten::zeros", "aten::where", "aten::linalg_pinv", "aten::_to_copy"}
    strange = ("detach", "AddmmBackward0", "Optimizer.step#AdamW.step", "nobody::knows", "aten::", "::", "")
    assert not any(map(composite, strange))


def test_only_operators_are_taken_for_operators() -> None:
    """Names as profilers write them; what Inductor generates stands for the tape's own calls."""
    yes = ("aten::mm", "bitsandbytes::dequantize_4bit", "flash_attn::_flash_attn_forward", "aten::_foreach_add_")
    no = (
        "autograd::engine::evaluate_function: AddmmBackward0", "torch::autograd::AccumulateGrad", "AddmmBackward0",
        "CompiledFunction", "Optimizer.step#AdamW.step", "Torch-Compiled Region: 0/0", "record_param_comms",
        "torch.distributed.ddp.reducer::copy_bucket_to_grad", "torch::distributed::reducer::mul_out", "detach",
    )  # fmt: skip
    assert all(map(is_operator, yes))
    assert not any(map(is_operator, no))
    assert generated("triton_poi_fused_add_mul_3") == "inductor::pointwise"
    assert generated("triton_per_fused_mean_0") == generated("triton_red_fused_sum_1") == "inductor::reduction"
    assert generated("volta_sgemm_128x64_nn") == ""
    assert short("inductor::reduction") == short("inductor::rows")


# GPT-2 under transformers of 2024 and torch 2.1 against the tape's, which mirrors today's: in every layer the mask was
# applied by `where` on scores divided by the root of the head size, both values made by `full`; today one mask is
# made ahead and added to scaled scores. Labels were shifted by slicing. The first step makes Adam's states, and AdamW
# decays weights by a call more.
GPT2 = {
    ("forward", "div"): (36, 0), ("forward", "full"): (72, 0), ("forward", "where"): (36, 1),
    ("forward", "mul"): (144, 180), ("forward", "add"): (145, 184), ("backward", "div"): (36, 0),
    ("backward", "where"): (36, 0), ("backward", "mul"): (252, 288), ("backward", "slice_backward"): (2, 0),
    ("forward", "ones_like"): (1, 0), ("backward", "ones_like"): (0, 1), ("optimizer", "zeros_like"): (872, 0),
    ("optimizer", "_foreach_mul"): (1, 2), ("forward", "arange"): (1, 5), ("forward", "bitwise_and"): (0, 2),
    ("forward", "constant_pad_nd"): (0, 1), ("forward", "index"): (0, 1), ("forward", "le"): (0, 1),
    ("forward", "new_ones"): (0, 1), ("forward", "scalar_tensor"): (0, 1), ("forward", "zeros"): (0, 1),
    ("forward", "_to_copy"): (0, 1),
}  # fmt: skip
VIEWS = {
    "_reshape_alias", "_unsafe_view", "as_strided", "detach", "empty", "expand", "lift_fresh", "permute", "slice",
    "split", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2_large_nodes", EXECUTION])
def test_a_recorded_step_of_gpt2_large_makes_the_calls_of_the_tape(name: str) -> None:
    """A training step as somebody ran it on a GPU years ago: what differs from the tape is what has changed since."""
    found = traces.calls(trace_of(name), composite)
    step = step_of(
        from_config(load("gpt2-large")), batch=1, seq=512, dtype="fp32", attention="eager", optimizer="adamw-foreach",
        clip_grad=0.0,
    )  # fmt: skip
    differing = {}
    for phase in found:
        there, here = Counter[str](), Counter[str]()
        for call, n in found[phase].items():
            there[short(call)] += n
        for call, n in calls_by_name(step, phase).items():
            here[short(call)] += n
        differing |= {(phase, k): (there[k], here[k]) for k in (there | here).keys() - VIEWS if there[k] != here[k]}
    assert differing == GPT2


def test_a_table_of_averages_is_read_and_its_products_are_those_of_the_tape() -> None:
    """SmolLM2 written anew by somebody else: 20 forwards and backwards make the products that the tape records."""
    path = whole(TABLE, ".csv")
    found = {a.name: a for a in traces.averages(path)}
    plain = [r for r in csv.DictReader(path.read_text().splitlines()) if r["calls"]]
    assert sum(a.calls for a in traces.averages(path)) == sum(int(r["calls"]) for r in plain)
    assert sum(a.device_self for a in traces.averages(path)) == pytest.approx(
        sum(float(r["self_cuda_us"]) for r in plain) * 1e-6
    )
    step = step_of(from_config(load("smollm2-135m")), batch=1, seq=256, dtype="fp32", amp="bf16")
    products = sum(calls_by_name(step, phase)["mm"] for phase in ("forward", "backward"))
    assert found["aten::mm"].calls == 20 * products


def test_files_that_are_no_traces_are_refused_in_one_line(tmp_path: Path) -> None:
    """A download cut short, or another file, is an everyday thing."""
    whole_file = (CUTS / "h100_bert_forward.json.gz").read_bytes()
    for number, content in enumerate((whole_file[:4000], b"\x1f\x8b nothing", b"[1]", b"nonsense", b"\xff\xfe\x00")):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{number}.json"):
            traces.read_trace(path)


def told(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["validate", "profile", *map(str, arguments)])


def test_the_command_tells_what_a_trace_holds(tmp_path: Path) -> None:
    """`perfmodel validate profile` on each kind of file, in words and as JSON."""
    done = told(CUTS / "a100_resnet_ddp_step.json.gz", "--top", "3")
    assert done.exit_code == 0, done.output
    assert all(text in done.output for text in (*STEPS, "c10d::allreduce_", "cudaMemsetAsync", "0 copies over the bus"))
    assert re.findall(r"(?m)^(kernel|call) +(\w+) +time", done.output) == [("call", "kernels"), ("kernel", "number")]
    found = json.loads(told(CUTS / "rtx2080ti_mlp_two_steps.json.gz", "--phase", SGD.format("step"), "--json").output)
    assert found["by_call"][SGD.format("step")]["aten::_foreach_add_"][0] == found["kernels"][SGD.format("step")] == 4
    assert json.loads(told(CUTS / "gpt2_large_nodes.json.gz", "--json").output)["backward"]["aten::mm"] == 290
    table = tmp_path / "averages.csv"
    table.write_text(
        "name,calls,self_cpu_us,cpu_total_us,self_cuda_us,cuda_total_us\naten::mm,3,5,7.5,90,90\nall,,9,,,\n"
    )
    assert json.loads(told(table, "--json").output)[0]["device_self"] == pytest.approx(90e-6)
    assert "aten::mm" in told(table).output


def test_a_name_that_stands_in_two_phases_is_one_row() -> None:
    """Numbers and times of both are added; the longest comes first."""
    found = {"forward": {"aten::mm": (3, 2e-6), "aten::add": (1, 5e-6)}, "backward": {"aten::mm": (3, 6e-6)}}
    assert show_profile._rows(found, 5) == [
        ["aten::mm", "6", "8.00 us", "61.5 %"], ["aten::add", "1", "5.00 us", "38.5 %"]
    ]  # fmt: skip


def test_the_command_reads_a_trace_of_this_machine(tmp_path: Path) -> None:
    """A CPU's profile has calls and no device; without annotations all of it is outside."""
    with torch.profiler.profile() as profiler:
        torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.export_chrome_trace(str(tmp_path / "cpu.json"))
    done = told(tmp_path / "cpu.json")
    assert done.exit_code == 0, done.output
    assert "aten::mm" in done.output
    assert "device busy" not in done.output
    assert re.findall(r"(?m)^(kernel|call) +(\w+) +time", done.output) == [("call", "number")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "neither a Chrome trace"), ('{"traceEvents": [{"ph": "X", "cat": "kernel"}]}', "KeyError"),
        ('{"traceEvents": 3}', "TypeError"), ('{"nodes": [{"id": 1}]}', "KeyError"),
        ('{"nodes": [{"id": 1, "name": "a", "ctrl_deps": 2}, {"id": 2, "name": "b", "ctrl_deps": 1}]}', "Recursion"),
    ],
)  # fmt: skip
def test_broken_traces_end_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    """Never a traceback for a file from elsewhere."""
    (tmp_path / "x.json").write_text(content)
    done = told(tmp_path / "x.json")
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output
