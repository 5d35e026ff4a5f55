"""How other tools pack documents, as their configs ask for it: the setup, and what is said of lengths."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.imports import read
from perfmodel.imports.packing import APART as PACKED_APART
from perfmodel.imports.packing import (
    MASK,
    NEVER_CUT,
    TAKEN_OUT,
    TO_A_MULTIPLE,
    TO_THE_END,
    TO_THE_LONGEST,
    UNKNOWN,
    shorter,
)

AXOLOTL = "base_model: tinyllama-1.1b\nsequence_len: 256\nmicro_batch_size: 2\nlora_target_linear: true\n"
FACTORY = "model_name_or_path: tinyllama-1.1b\ncutoff_len: 256\nper_device_train_batch_size: 2\n"
ONE = FACTORY.replace("size: 2", "size: 1")
TRL = "model_name_or_path: tinyllama-1.1b\nmax_length: 256\nper_device_train_batch_size: 2\nuse_peft: true\n"
OLDER = TRL.replace("max_length", "max_seq_length")
FLASH = "attn_implementation: flash_attention_2\n"
APART = {"packing": "varlen", "batch": 2, "seq": 256}
IN_A_ROW = {"packing": "dense", "batch": 1, "seq": 512}
STREAMED = AXOLOTL + "sample_packing: true\npretraining_dataset: [{path: c4}]\n"

EXPECTED: dict[str, tuple[dict[str, Any], bool]] = {  # file -> fields of the setup, whether lengths are assumed
    AXOLOTL: ({}, False),
    AXOLOTL + "sample_packing: true": ({"packing": "dense"}, False),
    AXOLOTL + "sample_packing: true\nsdp_attention: true": ({"packing": "varlen"}, False),
    AXOLOTL + "sample_packing: true\nsdp_attention: true\nmultipack_real_batches: false": (APART, False),
    AXOLOTL + "sample_packing: true\nflash_attention: true": ({"packing": "varlen", "batch": 2}, True),
    AXOLOTL + "sample_packing: true\nflash_attention: true\nmultipack_real_batches: true": (
        {"packing": "dense"}, False,
    ),
    AXOLOTL + "sample_packing: true\nattn_implementation: kernels-community/vllm-flash-attn3": (
        {"packing": "dense"}, False,
    ),
    AXOLOTL + "micro_batch_size: 1\nsample_packing: true\nattn_implementation: kernels-community/vllm-flash-attn3": (
        {"packing": "dense"}, False,
    ),
    STREAMED + "sdp_attention: true": (APART, False),
    STREAMED + "sdp_attention: true\nsdpa_varlen: false": (IN_A_ROW, False),
    STREAMED + "eager_attention: true": (IN_A_ROW, False),
    STREAMED + "eager_attention: true\nbase_model: google/gemma-4-12B-it": (APART, False),
    STREAMED + "sdp_attention: true\ndiffusion: {eps: 0.001}": (IN_A_ROW, False),
    STREAMED: (IN_A_ROW, False),
    STREAMED + "flash_attention: true": (APART, True),
    STREAMED + "flash_attention: true\npretrain_multipack_attn: false": (IN_A_ROW, False),
    AXOLOTL + "pretraining_dataset: [{path: c4}]": ({"seq": 256}, False),
    AXOLOTL + "pretraining_dataset: [{path: c4}]\npretraining_sample_concatenation: true": (
        {"packing": "dense", "batch": 2}, False,
    ),
    AXOLOTL + "sample_packing: true\nstreaming: true": (APART, False),
    AXOLOTL + "sample_packing: true\nstreaming: true\nflash_attention: true\nmultipack_real_batches: true": (
        APART, True,
    ),
    AXOLOTL + "sample_packing: true\nbase_model: google/gemma-3-4b-it": (APART, False),
    AXOLOTL + "sample_packing: true\nbase_model: google/gemma-3-1b-it": ({"packing": "dense"}, False),
    AXOLOTL + "sample_packing: true\nbase_model: google/gemma-4-12B-it\ngemma4_hybrid_attn_impl: true": (
        APART | {"attention": "flash2"}, True,
    ),
    AXOLOTL + "batch_flattening: auto\nflash_attention: true": ({"packing": "flat"}, True),
    AXOLOTL + "batch_flattening: auto": ({}, False),
    AXOLOTL + "batch_flattening: true\nflash_attention: true\nrl: dpo": ({}, False),
    AXOLOTL + "group_by_length: true": ({"group_by_length": True}, False),
    AXOLOTL + "group_by_length: true\nrl: dpo": ({}, False),
    AXOLOTL + "pad_to_sequence_len: true": ({"padded": True}, False),
    AXOLOTL + "reward_model: true": ({"padded": True}, False),
    FACTORY + "neat_packing: true": ({"packing": "varlen", "batch": 2, "seq": 264}, False),
    ONE + "neat_packing: true\nflash_attn: fa2": ({"packing": "varlen", "seq": 256}, True),
    FACTORY + "packing: true": ({"packing": "dense", "seq": 264}, False),
    FACTORY + "packing: true\nflash_attn: fa2": ({"packing": "dense", "seq": 264}, False),
    FACTORY + "stage: pt": ({"packing": "dense", "seq": 256}, False),
    ONE + "packing: true\nflash_attn: fa2": ({"packing": "dense", "seq": 264}, False),
    ONE.replace("256", "255") + "packing: true\nflash_attn: fa2": ({"packing": "varlen", "seq": 256}, True),
    ONE + "packing: true\nflash_attn: fa2\nstage: pt": ({"packing": "dense"}, False),
    FACTORY + "group_by_length: true": ({"group_by_length": True}, False),
    "model: tinyllama-1.1b\nbatching_strategy: padding_free\nflash_attn: flash_attention_2": (
        {"packing": "flat"}, True,
    ),
    "model: tinyllama-1.1b\nbatching_strategy: dynamic_padding_free\nflash_attn: flash_attention_2": (
        {"packing": "varlen"}, True,
    ),
    TRL + "packing: true": (APART, False),
    TRL + "packing: true\n" + FLASH: ({"packing": "varlen", "batch": 2}, True),
    TRL + "packing: true\npacking_strategy: wrapped\n" + FLASH: ({"packing": "dense"}, False),
    OLDER + "packing: true\n" + FLASH: ({"packing": "dense"}, False),
    TRL + "padding_free: true\n" + FLASH: ({"packing": "flat"}, True),
    TRL + "train_sampling_strategy: group_by_length": ({"group_by_length": True}, False),
}  # fmt: skip


def config(folder: Path, text: str) -> Path:
    """A file that holds it."""
    path = folder / "config.yml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", EXPECTED)
def test_what_each_tool_packs(tmp_path: Path, text: str) -> None:
    """Each packs in its own way, which decides the attention of the step."""
    fields, assumed = EXPECTED[text]
    found = read(config(tmp_path, text))
    usual = {"packing": "none", "group_by_length": False, "padded": False}
    assert {name: found.setup.get(name, usual.get(name)) for name in (*usual, *fields)} == {**usual, **fields}
    assert any(said.startswith(UNKNOWN) for said in found.differences) == assumed
    assert (MASK in found.notes) == ("neat_packing" in text and "fa2" not in text)
    assert not any(said.startswith(UNKNOWN) for said in found.with_lengths().differences)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("packing: true", True), ("packing: true\nflash_attn: fa2", True), ("stage: pt", False),
        ("neat_packing: true", False),
    ],
)  # fmt: skip
def test_rows_that_llama_factorys_collator_fills_have_a_mask(tmp_path: Path, text: str, told: bool) -> None:
    """Packed to 257 tokens and filled to 264: seven zeros in the mask cost sdpa its causal kernel in every layer."""
    for rows, filled in ((FACTORY, True), (FACTORY.replace("256", "255"), False)):
        found = read(config(tmp_path, rows + text))
        assert (f"{TO_THE_END} (packing)" in found.differences) == (told and filled)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("streaming: true\n", PACKED_APART),
        ("pretraining_dataset: [a]\npretrain_multipack_attn: false\n", ""),
        ("", ""),
    ],
)
def test_one_row_of_a_stream_is_told(tmp_path: Path, asked: str, said: str) -> None:
    """Axolotl packs a stream into one row as long as a micro-batch: attention goes further than in rows apart."""
    found = read(config(tmp_path, AXOLOTL + "sample_packing: true\nsdp_attention: true\n" + asked))
    told = [words for words in found.differences if words.startswith(PACKED_APART)]
    assert [words.partition(" (")[0] for words in told] == ([said] if said else [])
    one = config(tmp_path, AXOLOTL + "micro_batch_size: 1\nsample_packing: true\n" + asked)
    assert not any(words.startswith(PACKED_APART) for words in read(one).differences)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("", shorter("sequence_len")),
        ("pad_to_sequence_len: true\n", TAKEN_OUT),
        ("reward_model: true\n", TAKEN_OUT),
        ("reward_model: true\npad_to_sequence_len: false\n", shorter("sequence_len")),
    ],
)
def test_what_is_said_of_rows_for_flash_attention(tmp_path: Path, asked: str, said: str) -> None:
    """Axolotl pads a reward model's rows to the whole length by itself: they are no shorter then."""
    found = read(config(tmp_path, AXOLOTL + FLASH + asked))
    assert found.notes == [said]
    assert (TO_THE_LONGEST in found.with_lengths().differences) == (said == TAKEN_OUT)
    assert TO_THE_LONGEST not in found.with_lengths(padded=False).differences


@pytest.mark.parametrize(
    ("text", "multiple"),
    [
        (AXOLOTL, 64),
        (AXOLOTL + "pad_to_multiple_of: 128\n", 128),
        (AXOLOTL + "pad_to_sequence_len: false\n", 1),
        (AXOLOTL + "rl: dpo\n", 1),
        (AXOLOTL + "processor_type: AutoProcessor\n", 1),
        (FACTORY, 8),
        (FACTORY + "stage: pt\n", 1),
        (TRL, 1),
        (TRL + "pad_to_multiple_of: 8\n", 8),
    ],
)
def test_rows_that_a_tool_pads_to_a_multiple_are_told(tmp_path: Path, text: str, multiple: int) -> None:
    """So even the row of a single sample has padding, whose mask costs sdpa its flash kernel."""
    found = read(config(tmp_path, text))
    told = TO_A_MULTIPLE.format(multiple)
    assert told not in found.differences, "rows as long as they may be need none"
    assert (told in found.with_lengths().differences) == (multiple > 1)
    assert found.with_lengths(padded=False).differences == found.differences


@pytest.mark.parametrize(
    ("model", "more", "first"),
    [
        ("tinyllama-1.1b", (), UNKNOWN),
        ("tinyllama-1.1b", ("--lengths", "40:90"), "lora"),
        ("tinyllama-1.1b", ("--packing", "dense"), "lora"),
        ("gpt2", (), "attention across packed samples (packing varlen)"),
    ],
)
def test_the_first_line_says_what_is_assumed_of_lengths(
    tmp_path: Path, model: str, more: tuple[str, ...], first: str
) -> None:
    """What no config says is assumed in sight, and what is not modelled is answered as the nearest that is."""
    path = config(tmp_path, AXOLOTL + "sample_packing: true\nflash_attention: true\nadapter: lora\nbf16: true\n")
    words = ["predict", "--config", str(path), "--model", model, "--device", "a100", *more]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0
    assert first in result.stdout.splitlines()[0]


@pytest.mark.parametrize(("length", "told"), [("null", True), ("256", False)])
def test_trl_cuts_no_sample_where_the_length_is_null(tmp_path: Path, length: str, told: bool) -> None:
    """Elsewhere null is an absent key; TRL's default of 1,024 tokens goes by it (trainer/sft_config.py)."""
    path = config(tmp_path, TRL.replace("256", length))
    found = read(path)
    assert (found.setup["seq"], NEVER_CUT in found.first_line) == (1024 if told else 256, told)
    assert (shorter("max_length") in found.notes) != told
    assert NEVER_CUT not in found.with_lengths().first_line
    typed = ["predict", "--config", str(path), "--device", "a100", "--seq", "300"]
    assert NEVER_CUT not in CliRunner().invoke(main, typed).stdout.splitlines()[0]
