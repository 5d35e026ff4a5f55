"""What stands below the figures of several methods."""

import pytest
from click.testing import CliRunner

from perfmodel.cli import main


def below(*words: str) -> str:
    """What a command prints, in one line."""
    done = CliRunner().invoke(main, [*words, "--device", "h100-sxm", "--batch", "1", "--seq", "64"])
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "full"),
    [
        (("compare", "--methods", "full", "lora:r=4"), "full fine-tuning"),
        (("explain", "full", "lora:r=4", "--axes", "none"), "full fine-tuning"),
        (("sweep", "--methods", "full", "lora:r=4"), "full"),
    ],
)
def test_a_note_on_one_method_of_several_names_it(words: tuple[str, ...], full: str) -> None:
    """Two references without names leave open which method has which; what holds for all is said once."""
    told = below(*words, "--model", "gpt2", "--objective", "dpo")
    assert told.count("note: DPO as") == 1
    assert f"note: {full}: its reference is a second, frozen model in memory" in told
    assert "its reference is the model without its adapters" in told


def test_a_sweep_says_what_its_setup_rests_on() -> None:
    """A map of float8 steps is not more certain than one of them."""
    assert "note: float8 in eager mode" in below("sweep", "--model", "llama-3.2-1b", "--fp8", "rowwise")


def test_a_sweep_over_gpus_says_where_their_graphs_end() -> None:
    """The note is of the several GPUs that are asked about, not of the one that a setup has by itself."""
    told = below("sweep", "--model", "smollm2-135m", "--gpus", "1-2", "--parallel", "fsdp2", "--compile", "default")
    assert "each block is a graph of its own between FSDP2's hooks" in told
    assert "one graph without breaks" not in told
