"""A campaign that takes seconds, and its command."""

from pathlib import Path
from typing import Any

from click.testing import CliRunner
from records_by_hand import DEVICE

from perfmodel.cli import main
from perfmodel.devices import profile

CPU = profile.load(DEVICE["cpu"])
TINY = """
warm_up = 1
steps = 2
[models.tiny]
model_type = "llama"
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 128
pad_token_id = 0
"""  # a model, and how it is measured: the head of a plan or a grid
PLAN = (
    TINY
    + """[[stages]]
name = "floors"
blocks = ["host", "pointwise fp32"]
most = 34
[[stages]]
name = "kernels"
blocks = ["gemm fp32", "gemm bf16", "pointwise fp32", "attention"]
most = 48
[[stages]]
name = "host costs"
programs = 10
[[stages]]
name = "steps"
cells = [{ models = ["tiny"], methods = ["full", "lora:r=4"], setups = [{ batch = 2, seq = 16, dtype = "fp32" }] }]
[[stages]]
name = "QLoRA"
needs = ["no_such_package"]
cells = [{ models = ["tiny"], methods = ["ia3"], setups = [{ batch = 2, seq = 16, dtype = "fp32" }] }]
"""
)


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(main, ["validate", "campaign", "--device", "cpu", *map(str, words)])
