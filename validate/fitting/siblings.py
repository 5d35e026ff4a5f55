"""Devices without measurements of their own for a block: whose ratios they take."""

from perfmodel.devices.profile import CUDNN_ATTENTION, GROUPED

A100 = "a100-80gb-sxm"

SIBLINGS: dict[str, dict[str, str]] = {
    "gemm.bf16": {
        "a100-40gb-sxm": A100,
        "a100-40gb-pcie": "a100-80gb-pcie",
        "a30": A100,  # the same silicon, with its L2 in halves
        "h200": "h100-sxm",
        "h100-pcie": "h100-sxm",
        "h100-nvl": "h100-sxm",
        "gh200": "h100-sxm",
    },
    "gemm.fp32": {
        A100: "a100-80gb-pcie",
        "a100-40gb-sxm": "a100-40gb-pcie",
        "v100": "v100-32gb-pcie",
        "v100-32gb-sxm": "v100-32gb-pcie",
        "h200": "h100-sxm",
        "h100-pcie": "h100-sxm",
        "h100-nvl": "h100-sxm",
        "gh200": "h100-sxm",
        "quadro-rtx-8000": "t4",
    },
    "attention": {
        "a100-40gb-sxm": A100,
        "a100-40gb-pcie": A100,
        "a100-80gb-pcie": A100,
        "h200": "h100-sxm",
        "h100-pcie": "h100-sxm",
        "h100-nvl": "h100-sxm",
        "gh200": "h100-sxm",
        "b300": "b200",
        "gb200": "b200",
        "gb300": "b200",
        "a40": "rtx-a5000",
    },
    CUDNN_ATTENTION: {"h200": "h100-sxm", "h100-pcie": "h100-sxm", "b300": "b200", "gb200": "b200", "gb300": "b200"},
    "pointwise": {
        "a100-40gb-sxm": A100,
        "h200": "h100-sxm",
        "h100-pcie": "h100-sxm",
        "h100-nvl": "h100-sxm",
        "gh200": "h100-sxm",
        "v100": "v100-32gb-pcie",
        "v100-32gb-sxm": "v100-32gb-pcie",
    },
    GROUPED: {**dict.fromkeys(("h200", "h100-pcie", "h100-nvl", "gh200"), "h100-sxm"), "gb300": "b300"},
}
