"""Draws the picture of docs/from-a-shape-to-seconds.md: the seven calls of one adapted linear layer, to scale."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from perfmodel import Device, predict
from perfmodel.report.theme import PALETTE

BASE, ADAPTER = PALETTE["saved"][0], PALETTE["added"][0]
NAMES = ("frozen product", "to fp32", "· Aᵀ", "· Bᵀ", "scale", "add", "to bf16")


def main() -> None:
    """Write one-linear-layer.svg beside this file."""
    lora = predict("llama-3.2-3b", "lora:r=32,targets=q_proj+v_proj", device="l40s", batch=4, seq=210)
    device = Device.load("l40s")
    block = next(part for part, _ in lora.step.parts() if part.name == "blocks" and part.repeat == 27)
    first = next(i for i, op in enumerate(block.ops) if op.name == "mm")
    layer = [op for op in block.ops[first : first + 14] if not op.view]
    plt.rcParams |= {"svg.hashsalt": "perfmodel", "font.size": 10}
    figure, axes = plt.subplots(figsize=(8, 1.7))
    start = 0.0
    for i, (name, op) in enumerate(zip(NAMES, layer, strict=True)):
        wide = device.op(op) * 1e6
        axes.barh(0, wide, left=start, color=BASE if op.owner == "base" else ADAPTER, edgecolor="white", height=0.6)
        axes.text(start + wide / 2, 0.42 if i % 2 else -0.42, f"{name}\n{wide:.0f}", ha="center",
                  va="bottom" if i % 2 else "top", fontsize=9)  # fmt: skip
        start += wide
    axes.set(
        xlim=(0, start), ylim=(-1.1, 1.1), yticks=[], xlabel="microseconds on an L40S, 840 tokens, 3072 x 3072, r = 32"
    )
    axes.spines[["left", "right", "top"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("one-linear-layer.svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
