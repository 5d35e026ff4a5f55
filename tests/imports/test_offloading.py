"""What other tools' files have in the host's memory."""

from pathlib import Path
from typing import Any

import pytest
from test_launches import AXOLOTL, written

from perfmodel.imports.read import read
from perfmodel.setup import Setup

PINNED = {"device": "cpu", "pin_memory": True}
OFFLOADING: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": PINNED}}}, "optimizer", []),
    ({"deepspeed": {"zero_optimization": {"stage": 2, "cpu_offload": True}}}, "optimizer", []),
    (
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": PINNED, "offload_param": PINNED}}},
        "params", [],
    ),
    (
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}}, "optimizer",
        ["offloaded to the host's memory, not to NVMe (zero_optimization.offload_optimizer)"],
    ),
    ({"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}}, "none", []),
    ({"deepspeed": "ds_z2_offload_config.json"}, "optimizer", []),
    ({"fsdp_config": {"offload_params": True}}, "params", []),
    ({"fsdp_config": {"offload_params": False}}, "none", []),
    (
        {"fsdp_config": {"offload_params": True}, "optimizer": "adamw_bnb_8bit"}, "none", ["without offloading"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "offload", "said"), OFFLOADING)
def test_what_a_file_offloads_is_offloaded_on_several_gpus(
    tmp_path: Path, values: dict[str, Any], offload: str, said: list[str]
) -> None:
    """Files that offload do so because nothing else fits: without it both time and memory would be another step's."""
    found = read(written(tmp_path, "config.yml", {**AXOLOTL, **values}))
    several = found.on_several(found.asks())
    assert several.setup["offload"] == offload
    assert [words for words in several.differences if "offload" in words] == said
    typed = found.on_several(found.asks().as_typed("ddp"))
    assert Setup(**typed.setup, gpus=8).offload == "none"
