"""An experiment of PEFT's method comparison: an adapter's config, and parameters of its training over default ones.

`experiments/KIND/NAME/{adapter_config,training_params}.json` below `default_training_params.json`
(method_comparison/MetaMathQA/run.py and image-gen/run.py of peft at 5d602fd, each with its utils.py).
"""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..resources import read_json
from .adapter import NOT_FACTORED
from .fields import ATTENTION, DTYPES, UNSCALED, attention
from .keys import Keys
from .packing import shorter

GENERATION = "default_benchmark_params.json"  # of method_comparison/text_generation_benchmark/run.py
DEFAULTS, OWN, ADAPTER = "default_training_params.json", "training_params.json", "adapter_config.json"
METHODS = {
    "lora-fa": ("lora", "lora_fa"),
    "lora+": ("lora", "loraplus"),
    "riemannian": ("lora", "riemannian_lora"),
}  # by optimizer: from, to
LENGTHS = shorter("max_seq_length")
ONLY_GENERATES = f"a training step: the benchmark that the adapter belongs to only generates ({GENERATION})"
# `get_dino_encoder` and `precompute_prompt_caches` of image-gen: 346 MB in fp32, and 157 MB of 20 prompts
ALONE = "the step's memory alone, without DINOv2 and the prompts' embeddings, which lie on the GPU too"
# Of the loop of MetaMathQA/run.py: ACCELERATOR_EMPTY_CACHE_SCHEDULE, and `use_cache` of the model's own config, which
# transformers' Trainer switches off, and checkpointing does
NEVER_EMPTIED = "the allocator's cache is never emptied; the benchmark does it after every tenth step"
NOT_CACHED = "keys and values are not copied into a cache, which the benchmark leaves on"
OWN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # tuners whose keys and values stand in such a cache
# `boft_P`, a buffer that PEFT makes on the host, where it stays as nothing moves the model after that
ON_GPU = "BOFT's permutations on the GPU, not copied from the host in every forward pass"
ONE_SHAPE = "torch.compile for batches of one shape, not of any (dynamic)"  # `get_model` of utils.py
# Of `optimizer_kwargs`, which go to PyTorch's AdamW: forms of its update other than that by default
FORMS_OF_ADAMW = {"fused": True, "foreach": False, "amsgrad": True, "capturable": True, "differentiable": True}
BY_DEFAULT = "AdamW in the form that PyTorch has by default"
PIXELS, TEXT = 16, 512  # a token of an image stands for 16 x 16 pixels; what `tracing.programs.diffusion` takes as text


def experiment_parameters(path: Path) -> Keys | None:
    """The parameters of the training that a file of an experiment belongs to; None if it belongs to none."""
    parents = path.resolve().parents
    if path.name not in (OWN, ADAPTER) or len(parents) < 4 or not (parents[3] / DEFAULTS).is_file():
        return None
    own = path.with_name(OWN)
    return Keys({**read_json(parents[3] / DEFAULTS), **(read_json(own) if own.is_file() else {})}, path.name)


def generation_of(path: Path) -> tuple[str | None, dict[str, Any]] | None:
    """Model and setup of the benchmark of generation that an adapter's config belongs to; None if it belongs to none.

    Raises:
        UserError: a value of the wrong type.
    """
    parents = path.resolve().parents
    if len(parents) < 4 or not (parents[3] / GENERATION).is_file():
        return None
    keys = Keys(read_json(parents[3] / GENERATION), GENERATION)
    return keys.text("model_id"), {"dtype": DTYPES.get(keys.text("dtype") or "")}


def setup_of(keys: Keys) -> dict[str, Any]:
    """The setup of an experiment.

    Raises:
        UserError: a value of the wrong type, or what is not modelled.
    """
    dtype = keys.text("dtype", "bfloat16")
    if dtype not in DTYPES:
        raise UserError(f"{keys.origin}: dtype {dtype!r}: quantised base weights are not modelled; use bfloat16")
    kind = keys.text("optimizer_type", "AdamW")
    if kind not in ("AdamW", *METHODS):
        raise UserError(f"{keys.origin}: optimizer_type {kind!r} is not modelled; use AdamW")
    options = keys.get("optimizer_kwargs")
    if isinstance(options, dict) and any(options.get(name) is asked for name, asked in FORMS_OF_ADAMW.items()):
        keys.differ(BY_DEFAULT, "optimizer_kwargs")
    if "dino_model_id" in keys:
        keys.differ(ALONE, "dino_model_id")
    if compiles := keys.flag("compile"):
        keys.differ(ONE_SHAPE, "compile")
    return {
        "batch": keys.count("batch_size", 4),
        "seq": _image_and_text(keys) if of_images(keys) else keys.count("max_seq_length", 768),
        "dtype": DTYPES[dtype],
        "amp": _autocast(keys, DTYPES[dtype]) if keys.flag("use_amp") else None,
        "optimizer": "adamw",
        "checkpoint": "block" if keys.flag("use_gc") else "none",
        "attention": attention(keys, "attn_implementation", ATTENTION),
        "compile": "default" if compiles else "none",
        "clip_grad": keys.number("grad_norm_clip", 1.0) > 0,
        "group_by_length": not of_images(keys),  # `BucketIterator` of MetaMathQA/utils.py
    }


def _autocast(keys: Keys, dtype: str) -> str:
    """The dtype of autocast, which the loop names none: fp16 on a GPU, with a scaler of losses beside any weights."""
    keys.differ(UNSCALED)
    if dtype == "bf16":
        keys.differ("products in bf16, not in fp16 under autocast", "use_amp")
    return "bf16" if dtype == "bf16" else "fp16"


def of_images(keys: Keys) -> bool:
    """Whether it trains an image model: only a trace of its program can answer."""
    return keys.get("resolution") is not None


def notes_of_batches(keys: Keys) -> list[str]:
    """What a reader should know about the batches."""
    return [] if of_images(keys) else [LENGTHS]


def differ_in_its_loop(keys: Keys, tuner: str) -> None:
    """Say what its own loop does that no key asks for.

    Args:
        tuner: PEFT's name of it, empty for full fine-tuning.
    """
    if of_images(keys):
        if tuner == "FROD":  # its bases are buffers, as large as the weights, and go to the GPU with the model
            keys.differ(NOT_FACTORED)
        return
    keys.differ(NEVER_EMPTIED)
    if not keys.flag("use_gc") and tuner not in OWN_CACHE:
        keys.differ(NOT_CACHED)


def _image_and_text(keys: Keys) -> int:
    """Tokens of a sample: those of its text, and one for every 16 x 16 pixels (8 of the image encoder, 2 of a patch).

    Raises:
        UserError: a value of the wrong type.
    """
    text = keys.count("max_sequence_length", TEXT)
    if text != TEXT:
        keys.differ(f"{TEXT} tokens of text, the others of the image", "max_sequence_length")
    return (keys.count("resolution", 512) // PIXELS) ** 2 + text


def differ_in_a_trace(keys: Keys) -> None:
    """Say what of the training a trace of the adapter does not follow."""
    if not keys.flag("autocast_adapter_dtype", True):
        keys.differ("adapters in fp32", "autocast_adapter_dtype")
    if keys.text("optimizer_type", "AdamW") in METHODS:
        keys.differ("AdamW", "optimizer_type")


def experiment_method(keys: Keys, method: str) -> str | None:
    """The method with what its training makes of it; None if no built-in form has that."""
    name, _, options = method.partition(":")
    needed, made = METHODS.get(keys.text("optimizer_type", "AdamW") or "", (name, name))
    if name != needed:
        return None
    if name == "boft":
        keys.differ(ON_GPU)
    if not keys.flag("autocast_adapter_dtype", True) and method != "full":
        options = ",".join(filter(None, (options, f"adapter_dtype={DTYPES[keys.text('dtype') or 'bfloat16']}")))
    return made + (f":{options}" if options else "")
