"""What is typed and means nothing beside the rest is refused: passed over, it would seem to be in the answer."""

import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.commands.given_launch import BESIDE

WHERE = ("--model", "gpt2", "--device", "h100-sxm", "--seq", "64")


def stderr(*words: str) -> str:
    """What `predict` complains of; empty if it answers."""
    result = CliRunner().invoke(main, ["predict", *WHERE, *words])
    assert result.exit_code in (0, 2), result.output
    return result.stderr if result.exit_code else ""


@pytest.mark.parametrize(
    ("typed", "beside"),
    [
        ("--ddp find-unused", "--gpus 2"),
        ("--parallel fsdp2", "--gpus 2"),
        ("--parallel zero3", "--offload params"),
        ("--parallel zero1", "--gpus 2"),
        ("--node dgx-a100", "--gpus 2"),
        ("--fsdp-units blocks", "--gpus 2 --parallel fsdp2"),
        ("--no-reshard", "--gpus 2 --parallel fsdp1"),
        ("--reduce-dtype fp32", "--gpus 2 --parallel fsdp2"),
        ("--shard-group 2", "--gpus 4 --parallel fsdp2"),
        ("--sync-each-batch", "--gpus 2"),
        ("--pp-schedule gpipe", "--gpus 2 --pp 2 --grad-accum 2 --model llama-3.1-8b"),
        ("--cp-rotate alltoall", "--gpus 2 --cp 2 --parallel fsdp2 --model llama-3.2-1b"),
        ("--group-by-length", "--lengths 30:60"),
        ("--overlap", "--gpus 2 --model megatron:llama-3.2-1b"),
    ],
)
def test_what_means_nothing_is_refused(typed: str, beside: str) -> None:
    """And taken where it means something."""
    option = typed.split()[0]
    needed = BESIDE[option[2:].removeprefix("no-").replace("-", "_")][0]
    assert f"{option} means nothing without {needed}; leave it out" in stderr(*typed.split())
    assert stderr(*typed.split(), *beside.split()) == ""


def test_ddp_means_nothing_beside_another_form_and_an_image_has_no_size_alone() -> None:
    """The header said "zero2, DDP find-unused", of a step that has no DDP."""
    assert "--ddp means nothing" in stderr("--gpus", "2", "--parallel", "zero2", "--ddp", "find-unused")
    assert "--image-size means nothing without --images" in stderr("--image-size", "10x10")
    assert stderr("--ddp", "plain", "--pp-schedule", "1f1b") == ""  # what is so anyway


def test_a_form_that_no_one_gpu_has_is_refused_in_words_that_help() -> None:
    """DeepSpeed's ZeRO-3 runs on one GPU, as an engine; a grid that begins with one and other questions take a form."""
    assert "--engine deepspeed-zero3" in stderr("--parallel", "zero3")
    grid = ["sweep", *WHERE, "--gpus", "1-4*2", "--parallel", "fsdp2", "--no-reshard", "--node", "dgx-h100"]
    assert CliRunner().invoke(main, grid).exit_code == 0
