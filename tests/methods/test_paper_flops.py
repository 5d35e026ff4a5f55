"""FLOPs of the methods of the papers around LoRA, as formulas of their shapes.

T tokens, a weight of m outputs and n inputs, rank r. The references in plain torch say that the tape runs the authors'
program; these say that the program costs what the papers' arithmetic says.
"""

from typing import Any

import pytest
from closed_forms import LAYERS, R, T, adapted_flops, flops_of, products, recorded
from helpers import by_phase


def lora_forward(n: int, m: int) -> int:
    return 2 * T * R * (n + m)


def lora_backward(n: int, m: int, needed: bool) -> int:
    """dB, the gradient of xAᵀ, dA, and that of x where it is asked for."""
    return 4 * T * m * R + 2 * T * n * R + 2 * T * n * R * needed


def spec(method: str) -> str:
    return f"{method}{',' if ':' in method else ':'}r={R},targets=all-linear"


def update_flops(method: str, name: str) -> Any:
    return by_phase(recorded(name, spec(method)))["optimizer"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", ["lora", "cola", "lora_pro", "lora_rite", "reslora:shortcut=is", "reslora:shortcut=ms,pre_num=2"]
)
def test_forward_and_backward_are_those_of_lora(method: str, name: str) -> None:
    """4Tnm + 6Tr(n+m): what they change is between the steps, in the optimizer, or elementwise."""
    assert flops_of(recorded(name, spec(method))) == adapted_flops(name, lora_forward, lora_backward)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_block_shortcut_runs_the_adapters_of_earlier_blocks_again(name: str) -> None:
    """ResLoRA: 6Tr(n+m) more for each earlier block's adapters, of which the first blocks have fewer."""
    again = sum(min(layer, 2) for layer in range(LAYERS)) / LAYERS
    extra = sum(lora_forward(n, m) for n, m, _ in products(name)) * again
    forward, backward = adapted_flops(name, lora_forward, lora_backward)
    assert flops_of(recorded(name, spec("reslora:shortcut=bs,pre_num=2"))) == (forward + extra, backward + 2 * extra)


@pytest.mark.parametrize("method", ["galore", "fedgalore"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_galore_is_full_fine_tuning_with_two_projections(method: str, name: str) -> None:
    """6Tnm, and 4nmr in the update: to the moments' space and back."""
    assert flops_of(recorded(name, spec(method))) == flops_of(recorded(name, "full"))
    assert update_flops(method, name) == sum(4 * n * m * R for n, m, _ in products(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_apollo_projects_gradients_but_nothing_back(name: str) -> None:
    """2nmr in the update: the whole gradient is scaled, not rebuilt."""
    assert flops_of(recorded(name, spec("apollo"))) == flops_of(recorded(name, "full"))
    assert update_flops("apollo", name) == sum(2 * n * m * R for n, m, _ in products(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_update_of_lora_pro_grows_with_the_weight(name: str) -> None:
    """8nmr for the dense gradient and back, 8m²r for the projector on the outputs, the rest in r² and r³."""
    flops = sum(8 * m * n * R + 8 * m * m * R + 14 * R**2 * (n + m) + 6 * R**3 for n, m, _ in products(name))
    assert update_flops("lora_pro", name) == flops


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_update_of_lora_rite_does_not(name: str) -> None:
    """14r²(n+m) for rotations of gradients and moments, 12r³ between the bases; QRs, eigenvectors are no products."""
    assert update_flops("lora_rite", name) == sum(14 * R**2 * (n + m) + 12 * R**3 for n, m, _ in products(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gelora_is_lora_with_a_rank_for_every_block(name: str) -> None:
    """4Tnm + 6Tr_i(n+m): linear in the rank of each block."""
    flops = [sum(flops_of(recorded(name, f"gelora:ranks={ranks},targets=all-linear"))) for ranks in RANKS]
    assert flops[3] - flops[0] == sum(f - flops[0] for f in flops[:3])


RANKS = ("1+1+1", "3+1+1", "1+4+1", "3+4+1")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_xgblora_adapts_some_blocks_with_rank_one(name: str) -> None:
    """6T(n+m) on the chosen blocks: as many adapters of rank 1, and no block below the lowest has a backward."""
    step = recorded(name, "xgblora:targets=all-linear")
    adapted = [p for p in step.parameters if p.requires_grad]
    assert adapted
    assert all(1 in p.shape for p in adapted)
    full = flops_of(recorded(name, "lora:r=1,targets=all-linear"))
    assert all(some < every for some, every in zip(flops_of(step), full, strict=True))
