"""Devices without measurements of their own for a block: whose ratios they take."""

from perfmodel.devices.profile import CUDNN_ATTENTION, EARLY, GROUPED

A100, H100 = "a100-80gb-sxm", "h100-sxm"
HOPPER = ("h200", "h100-pcie", "h100-nvl", "gh200")

SIBLINGS: dict[str, dict[str, str]] = {
    "gemm.bf16": {
        "a100-40gb-sxm": A100,
        "a100-40gb-pcie": "a100-80gb-pcie",
        "a30": A100,  # the same silicon, with its L2 in halves
        **dict.fromkeys(HOPPER, H100),
    },
    "gemm.fp32": {
        A100: "a100-80gb-pcie",
        "a100-40gb-sxm": "a100-40gb-pcie",
        "v100": "v100-32gb-pcie",
        "v100-32gb-sxm": "v100-32gb-pcie",
        **dict.fromkeys(HOPPER, H100),
        **dict.fromkeys(("quadro-rtx-8000", "rtx-2080-ti", "titan-rtx"), "t4"),
    },
    "attention": {
        "a100-40gb-sxm": A100,
        "a100-40gb-pcie": A100,
        "a100-80gb-pcie": A100,
        **dict.fromkeys(HOPPER, H100),
        "b300": "b200",
        "gb200": "b200",
        "gb300": "b200",
        "a40": "rtx-a5000",
    },
    CUDNN_ATTENTION: {"h200": H100, "h100-pcie": H100, "b300": "b200", "gb200": "b200", "gb300": "b200"},
    "pointwise": {
        "a100-40gb-sxm": A100,
        **dict.fromkeys(HOPPER, H100),
        "v100": "v100-32gb-pcie",
        "v100-32gb-sxm": "v100-32gb-pcie",
    },
    GROUPED: {**dict.fromkeys(HOPPER, H100), "gb300": "b300"},
    EARLY: dict.fromkeys(HOPPER, H100),
}
