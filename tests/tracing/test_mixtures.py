"""FLOPs of traced mixtures of experts: those of PyTorch's counter, on bundled dims, and of the loop over experts.

And the experts that Axolotl makes linear layers.
"""

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from perfmodel import UserError
from perfmodel.architectures import Config, from_config, load
from perfmodel.calls import costs
from perfmodel.devices import profile
from perfmodel.methods import parse
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tracing import traced
from perfmodel.tracing.programs import build_model
from perfmodel.tracing.programs.experts import LinearExperts
from perfmodel.tracing.programs.stacks import stacks
from perfmodel.tracing.trace import trace_step

BLOCKS = {"qwen3-30b-a3b": 2, "gpt-oss-20b": 2, "mixtral-8x7b": 2, "deepseek-v3": 5}  # three of DeepSeek's are dense
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 40,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 128, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
LLAMA4 = {
    "hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 128,
}  # fmt: skip


def flops(config: Config, setup: Setup) -> dict[str, int]:
    """Of full fine-tuning, traced as `--traced` does it."""
    step, _ = traced.of_method(config, "full", setup)
    found = {"forward": 0, "backward": 0}
    for part, op, times in step.ops():
        if part.phase in found:
            found[part.phase] += costs.flops(op) * times
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_bundled_mixtures_have_the_flops_of_the_real_program(name: str) -> None:
    """Real widths, all kinds of blocks, a few of each: the others add the same."""
    values = {**load(name).values, "num_hidden_layers": BLOCKS[name]}
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: BLOCKS[name]]
    config, setup = Config(values, name, name), Setup(batch=1, seq=64, attention="eager")
    real = trace_step(build_model(config, setup), setup, "adamw-foreach")
    assert flops(config, setup) == {phase: real.flops[phase] for phase in ("forward", "backward")}


def test_deepseeks_experts_are_those_of_the_loop() -> None:
    """PyTorch's counter has no formula for products by expert; what ours says is the sum of the loop's products."""
    config, setup = Config(DEEPSEEK, "deepseek", "deepseek"), Setup(batch=2, seq=9, dtype="fp32", attention="eager")
    model: Any = build_model(config, setup).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor.data, -0.1, 0.1)
    model.set_experts_implementation("eager")
    ids = torch.zeros((2, 9), dtype=torch.long).random_(0, 100)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert sum(flops(config, setup).values()) == counter.get_total_flops()


def test_linear_experts_compute_what_stacked_ones_do() -> None:
    """Axolotl's layers hold the same weights, cut up; other code than its own would be another program."""
    stacked: Any = Llama4TextExperts(Llama4TextConfig(**LLAMA4))
    for weight in stacked.parameters():
        torch.nn.init.normal_(weight)
    linear = LinearExperts(stacked)
    for i in range(3):
        gate, up = stacked.gate_up_proj.data[i].t().chunk(2)
        linear.gate_projs[i].weight.data, linear.up_projs[i].weight.data = gate, up
        linear.down_projs[i].weight.data = stacked.down_proj.data[i].t()
    x = torch.randn(15, 64)
    torch.testing.assert_close(linear(x), stacked(x))


def test_linear_experts_are_packed_and_a_router_is_not() -> None:
    """transformers packs plain `nn.Linear` alone; a router in 4 bit would no longer choose."""
    values = {"model_type": "llama4_text", **LLAMA4, "linear_experts": True}
    step, program = traced.of_method(Config(values, "l", "l"), "qlora:r=4,targets=q_proj", Setup(batch=1, seq=16))
    dtypes = {p.name: p.dtype for p in program.parameters}
    assert dtypes["model.layers.1.feed_forward.router.weight"] == "bf16"
    assert dtypes["model.layers.1.feed_forward.experts.up_projs.2.weight"] == "u8"
    unpacked = [n for part, op, n in step.ops() if part.phase == "forward" and op.name.endswith("dequantize_4bit")]
    assert sum(unpacked) == 2 * (4 + 3 + 3 * 3)


def test_a_list_that_numbers_the_blocks_tells_none_from_another() -> None:
    """Llama 4's `moe_layers` are all of them: 48 kinds of blocks would be traced one by one for minutes."""
    config = Config({"model_type": "llama4_text", **LLAMA4, "num_hidden_layers": 12}, "l", "l")
    (row,) = stacks(build_model(config, Setup()))
    assert row.kinds[0] == row.kinds[1] != row.kinds[3] == row.kinds[7]  # every fourth has no rotary positions
    assert len(set(row.kinds)) == 2


def test_adapters_of_experts_are_traced() -> None:
    """Configs name weights of experts of models that only a trace knows: nearly all that trains are their adapters."""
    config, setup = Config(DEEPSEEK, "deepseek", "deepseek"), Setup(batch=1, seq=16)
    experts = "target_parameters=experts.gate_up_proj+experts.down_proj"
    alone, both = (
        traced.of_method(config, f"lora:r=4,targets=o_proj{more}", setup)[0].trainable for more in ("", f",{experts}")
    )
    assert both - alone == 2 * 8 * 4 * (64 + 2 * 40 + 40 + 64)  # blocks, experts, rank, widths of both weights
    of_experts = traced.of_method(config, f"lora:r=4,targets=/(?!)/,{experts}", setup)[0].trainable
    assert of_experts == both - alone  # as Axolotl asks where it names no layers
    shared = "+".join(f"shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    for asked in (f"o_proj,{experts}", f"o_proj+{shared}"):
        with pytest.raises(UserError, match="adapters of quantised experts are not modelled"):
            traced.of_method(config, f"qlora:r=4,experts=true,targets={asked}", setup)
    traced.of_method(config, "qlora:r=4,experts=true,targets=o_proj+gate", setup)  # a router's weight is never packed


@pytest.mark.parametrize("device", ["h100-sxm", "b200", "a100-80gb-sxm", "rtx-5090"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_traced_mixture_has_the_kernels_that_a_device_has(device: str, dtype: str) -> None:
    """Before Hopper each expert has a product of its own, which the host waits for: 279 ms read for 463 on an A100."""
    values = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 48,
        "vocab_size": 128, "num_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    config, setup, on = Config(values, "moe", "moe"), Setup(batch=2, seq=17, dtype=dtype), profile.load(device)
    built_in = from_config(config)
    method = parse("full")
    steps = (
        traced.of_method(config, "full", setup, on)[0],
        build(built_in, method.bind(built_in), setup, on.kind, on.compute_capability),
    )
    found = [
        Counter(
            (part.phase, op.attrs.layout, op.attrs.sync, costs.kernels(op), costs.flops(op))
            for part, op, times in step.ops()
            for _ in range(times)
            if op.name == "_grouped_mm"
        )
        for step in steps
    ]
    assert found[0] == found[1]
    one_kernel = device in ("h100-sxm", "b200") and dtype == "bf16"
    assert {sync for _, _, sync, _, _ in found[0]} == {not one_kernel}
