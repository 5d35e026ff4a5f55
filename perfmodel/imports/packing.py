"""How each tool packs documents into rows, as the setup's `packing`; what is assumed where lengths have a say.

transformers finds the documents of a row where there are position ids and no mask; flash-attn in a micro-batch of one
row only (modeling_flash_attention_utils.py, `_is_packed_sequence`). No config says how long the documents are: where
attention within them depends on it, the first line says what is assumed.
"""

import re
from typing import Any

from ..errors import UserError
from .axolotl_kernels import diffuses
from .ddp import FACTORY, TRL
from .fields import ACROSS_SAMPLES
from .keys import Keys

UNKNOWN = "documents as long as a row (--lengths says how long they are)"
APART = "packed rows apart, each under its mask, not all in one row"
TO_THE_END = "packed rows full to their end, so without the mask that padding there makes"
JOINED = "rows full to their end, without the padding after each document and at the end, nor its mask"
BY_A_MASK = "documents apart by a mask, not by torch's varlen_attn, which Axolotl takes where no window slides"
TAKEN_OUT = "all rows are padded to sequence_len, and flash-attn takes padding out: samples are taken to be as long"
TO_THE_LONGEST = "micro-batches padded to their longest sample, not to sequence_len"
TO_A_MULTIPLE = "micro-batches padded to their longest sample, without the rest to a multiple of {} tokens and its mask"
FLATTENING = "auto"  # Axolotl's `batch_flattening` where it can
KNOWING = frozenset((  # attention that knows documents, by Axolotl (utils/schemas/enums.py)
    "flash_attention_2", "flash_attention_3", "flex_attention", "xformers", "sage", "kernels-community/flash-attn2",
    "kernels-community/flash-attn3", "kernels-community/sage-attention",
))  # fmt: skip
WITHOUT_MASK = ("sdpa", "eager")  # attention that gets packed rows without one (`attn_decontaminates_packing`)
# Models whose packed rows lose it whatever attention is named (`compute_loss` of core/trainers/base.py), by their names
UNMASKED = re.compile(r"gemma-?(4|3-(4|12|27)b)", re.IGNORECASE)
EIGHT = 8  # tokens to a multiple of which LLaMA-Factory's collators fill up rows
MASK = "the mask of packed documents is made on the device; LLaMA-Factory's collator makes it on the host"
NEVER_CUT = "rows of 1,024 tokens, where the file cuts none (--seq says how long they are)"
TELL_LENGTHS = "give --lengths (or --seq the mean length)"


def shorter(key: str) -> str:
    """What is to be said where samples are padded to the longest of a micro-batch only."""
    return f"without packing most batches are shorter than {key}: {TELL_LENGTHS}"


def multiple_of_axolotl(keys: Keys) -> int:
    """Tokens to a multiple of which rows without packing are padded (core/builders/{causal,rl}.py), 1 if they are not.

    The collator of images has no such thing, those of preferences have none by themselves.
    """
    if keys.values.get("processor_type") or keys.values.get("pad_to_sequence_len") is not None:
        return 1
    return keys.count("pad_to_multiple_of", 1 if keys.values.get("rl") else 64)


def multiple_of_llama_factory(keys: Keys) -> int:
    """As `multiple_of_axolotl` (`pad_to_multiple_of` of train/{sft,dpo,kto,rm}/workflow.py)."""
    return 1 if keys.text("stage") == "pt" else EIGHT


def multiple_of_trl(keys: Keys) -> int:
    """As `multiple_of_axolotl`: where the file says so alone."""
    if keys.values.get("pad_to_multiple_of") == "auto":  # on NVIDIA's GPUs nothing (sft_config.py)
        return 1
    return keys.count("pad_to_multiple_of", 1)


def packed_by_axolotl(keys: Keys, setup: dict[str, Any], asked_attention: str | None) -> None:
    """`sample_packing` and `batch_flattening` (core/trainers/base.py, core/builders/causal.py, utils/schemas).

    Attention that knows documents gets all rows of a micro-batch as one, unless real batches are asked for; SDPA and
    eager attention, where they are named, get rows without a mask; where none is named, or another, the mask stays, and
    documents see each other. Rows are padded to `sequence_len` unless the file says no (`hint_sample_packing_padding`).
    Streamed data come as one row of all tokens of a micro-batch (utils/data/streaming.py).
    """
    streams = bool(keys.get("pretraining_dataset") or keys.get("streaming"))
    one_row = not keys.flag("multipack_real_batches", asked_attention not in KNOWING) or streams
    if keys.get("sample_packing") not in (None, False):
        if not _apart_in_axolotl(keys, asked_attention, setup["attention"]):
            setup["packing"] = "dense"
            if keys.values.get("pretraining_dataset"):
                setup |= {"batch": 1, "seq": setup["batch"] * setup["seq"]}
            elif setup["batch"] > 1 or keys.flag("pad_to_sequence_len", True):
                keys.differ(TO_THE_END, "sample_packing")
        elif setup["attention"] == "flash2":
            _within(keys, setup, "varlen" if one_row or setup["batch"] == 1 else "dense", "sample_packing")
        else:
            _within(keys, setup, "varlen", "sample_packing", one_row=one_row)
            if _takes_varlen(keys, asked_attention):
                keys.differ(BY_A_MASK, "sample_packing")
    elif keys.get("pretraining_dataset") and keys.flag("pretraining_sample_concatenation"):
        setup["packing"] = "dense"  # documents see each other (utils/data/streaming.py, `encode_streaming`)
        keys.differ(JOINED, "pretraining_sample_concatenation")
    elif flattens(keys, asked_attention):
        packed_flat(keys, setup, "batch_flattening")


def flattens(keys: Keys, asked_attention: str | None) -> bool:
    """Whether Axolotl's `batch_flattening` is on, as far as attention allows for it (`check_batch_flattening_fa`)."""
    asked = keys.get("batch_flattening")
    on = asked not in (None, False) and asked_attention in KNOWING
    return on and (asked != FLATTENING or keys.count("micro_batch_size", 1) > 1)


def _takes_varlen(keys: Keys, asked_attention: str | None) -> bool:
    """Whether sdpa is torch's varlen_attn, which takes no mask as diffusion's trainer hands it in.

    Source: `_apply_sdpa_varlen_patch` of loaders/patch_manager.py.
    """
    return asked_attention == "sdpa" and keys.flag("sdpa_varlen", True) and not diffuses(keys)


def _apart_in_axolotl(keys: Keys, asked_attention: str | None, attention: str) -> bool:
    """Whether the documents of a packed row do not see each other.

    Pretraining's collator, transformers' own, gives rows a mask of ones, beside which varlen kernels alone know them,
    and models that lose it.
    """
    knows = asked_attention in KNOWING or UNMASKED.search(str(keys.values.get("base_model"))) is not None
    if keys.values.get("pretraining_dataset"):
        varlen = attention == "flash2" or _takes_varlen(keys, asked_attention)
        return keys.flag("pretrain_multipack_attn", True) and (knows or varlen)
    return knows or asked_attention in WITHOUT_MASK or bool(keys.values.get("streaming"))


def packed_by_llama_factory(keys: Keys, setup: dict[str, Any], *, pretraining: bool) -> list[str]:
    """`packing` and `neat_packing` (data/collator.py, data/processor/): rows with position ids, neat ones within them.

    Rows of `cutoff_len` and a token of padding are filled up to a multiple of eight tokens. What fills them is masked,
    so that transformers looks for no documents in the position ids; where it is nothing, flash-attn with one row finds
    them. Neat rows have masks, or lose their padding to flash-attn. Pretraining's are cut from one text.
    """
    neat, packs = keys.flag("neat_packing"), keys.flag("packing", pretraining)
    if neat and setup["attention"] == "flash2" and setup["batch"] > 1:
        raise UserError(f"{keys.origin}: neat_packing with flash_attn: fa2 takes per_device_train_batch_size: 1")
    if pretraining or not (neat or packs):
        setup |= {"packing": "dense"} if packs else {}
        return []
    flash, longer = setup["attention"] == "flash2", setup["seq"] + 1
    filled = longer % EIGHT != 0
    if not (neat and flash):
        setup["seq"] = -(-longer // EIGHT) * EIGHT
    if neat or (flash and setup["batch"] == 1 and not filled):
        _within(keys, setup, "varlen", "neat_packing" if neat else "packing")
        return [] if flash else [MASK]
    setup["packing"] = "dense"
    if filled:
        keys.differ(TO_THE_END, "packing")
    return []


def packed_by_trl(keys: Keys, setup: dict[str, Any]) -> None:
    """`packing`, `packing_strategy` and `padding_free` (trainer/sft_trainer.py): all rows of a micro-batch as one.

    `wrapped` rows are plain ones; so were all packed rows when the length was still called `max_seq_length`.
    """
    strategy = keys.text("packing_strategy", "wrapped" if "max_seq_length" in keys.values else "bfd")
    free = keys.flag("padding_free")
    if not keys.flag("packing"):
        if free:
            packed_flat(keys, setup, "padding_free")
    elif strategy == "wrapped" and not free:
        setup["packing"] = "dense"
    else:
        _within(keys, setup, "varlen", "packing", one_row=True)


def packed_flat(keys: Keys, setup: dict[str, Any], key: str) -> None:
    """The samples of a micro-batch behind one another in one row."""
    _within(keys, setup, "flat", key)


def packed_full(keys: Keys, setup: dict[str, Any], key: str) -> None:
    """As many samples behind one another in one row as fit into the tokens of a micro-batch."""
    _within(keys, setup, "varlen", key, one_row=True)


def _within(keys: Keys, setup: dict[str, Any], packing: str, key: str, *, one_row: bool = False) -> None:
    """Set the packing, if it can be, and say what is assumed of the documents' lengths.

    Args:
        one_row: whether the tool makes all rows of a micro-batch one, which here flash-attn alone gets.
    """
    if one_row and setup["attention"] != "flash2" and setup["batch"] > 1:
        keys.differ(APART, key)
    if setup.get("compile", "none") != "none" and packing != "dense":
        packing = "dense"
        keys.differ(ACROSS_SAMPLES, key)
    elif packing == "flat" or (packing == "varlen" and setup["attention"] == "flash2"):
        keys.differ(UNKNOWN, key)
    setup["packing"] = packing


MULTIPLES = {"Axolotl": multiple_of_axolotl, FACTORY: multiple_of_llama_factory, TRL: multiple_of_trl}  # by tool
