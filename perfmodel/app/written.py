"""The choices as something to take away: a command line, and a training config."""

import shlex
from dataclasses import replace
from typing import Any

import yaml

from ..errors import UserError
from ..imports import read_alone
from ..methods import parse
from ..methods.lora import Lora
from ..methods.parts.quantised import QuantisedLora
from ..methods.parts.targeted import ALL_LINEAR
from ..setup import Setup
from .choices import Choices, chosen_fields, setup_fields

NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
OPTIMIZERS = {"adamw": "adamw_torch", "adamw-fused": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit",
              "sgd": "sgd", "adafactor": "adafactor", "lion": "lion_32bit", "rmsprop": "rmsprop"}  # fmt: skip


OF_SEVERAL = ("parallel", "node", "reshard", "fsdp_units")  # refused where they are typed for one GPU


def as_command(c: Choices) -> str:
    """Two commands, a line each, that give the same answers."""
    shared = ["--model", c.model, "--device", c.device, "--methods", *c.methods]
    alone = c.setup.gpus == 1 and c.setup.offload == "none"
    for name, value in chosen_fields(c.setup).items():
        if alone and name in OF_SEVERAL:
            continue
        option = f"--{name.replace('_', '-')}"
        shared += [option, value] if value not in ("true", "false") else [option if value == "true" else _off(option)]
    job = ["--samples", str(c.samples), "--epochs", f"{c.epochs:g}"]
    job += ["--price", f"{c.price:g}"] if c.price is not None else []
    return "\n".join(shlex.join(["perfmodel", *words]) for words in (["compare", *shared], ["plan", *shared, *job]))


def _off(option: str) -> str:
    return option.replace("--", "--no-", 1)


def as_config(c: Choices) -> str:
    """A file of TRL for the second method, which `--config` reads; comments say what it cannot say.

    What is in it is read back: a line is only left out of the comments where the reading gives what was chosen.
    """
    text = yaml.safe_dump(_of_trl(c), sort_keys=False)
    return "".join(f"# {line}\n" for line in _unsaid(c, text)) + text


def _of_trl(c: Choices) -> dict[str, Any]:
    s = c.setup
    method = parse(c.methods[1])
    found: dict[str, Any] = {
        "model_name_or_path": c.model,
        "dtype": NAMES[s.dtype],
        "bf16": s.amp == "bf16",
        "fp16": s.amp == "fp16",
        "per_device_train_batch_size": s.batch,
        "gradient_accumulation_steps": s.grad_accum,
        "max_length": s.seq,
        "num_train_epochs": c.epochs,
        "gradient_checkpointing": s.checkpoint != "none",
        "gradient_checkpointing_kwargs": {"use_reentrant": s.checkpoint == "block-reentrant"},
        "attn_implementation": {"flash2": "flash_attention_2"}.get(s.attention, s.attention),
        "use_liger_kernel": s.uses("liger"),
        "torch_compile": s.compile != "none",
        "max_grad_norm": 1.0 if s.clip_grad else 0.0,
    }
    found |= {"optim": OPTIMIZERS[s.optimizer]} if s.optimizer in OPTIMIZERS else {}
    if isinstance(method, (Lora, QuantisedLora)):
        found |= {"use_peft": True, "lora_r": method.r, "lora_dropout": method.dropout}
        found |= {"lora_target_modules": _listed(method.targets)} if method.targets else {}
        found |= {"load_in_4bit": True} if method.name == "qlora" else {}
        found |= {"load_in_8bit": True} if method.name == "lora_8bit" else {}
    return found


def _listed(targets: tuple[str, ...]) -> list[str]:
    """Targets as a list that TRL leaves one: what stands alone it takes out (trl/trainer/model_config.py), and PEFT for
    `all-linear` or for a regex of whole paths. So a name that is alone stands twice."""
    alone = len(targets) == 1 and targets != (ALL_LINEAR,)
    return list(targets * 2 if alone else targets)


def _unsaid(c: Choices, text: str) -> list[str]:
    """What of the choices a reading of the file does not give back."""
    try:
        found = read_alone("config.yaml", text)
    except UserError as error:
        return [str(error)]
    read = replace(Setup(), **{name: value for name, value in found.setup.items() if value is not None})
    ours, theirs = chosen_fields(c.setup), chosen_fields(read)
    usual = {name: str(value).lower() for name, value in setup_fields().items()}
    other = [f"{n}={ours.get(n, usual[n])}" for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
    method = c.methods[1]
    lines = [] if parse(found.method or "full") == parse(method) else [f"read as {found.method}, not as {method}"]
    return [*lines, *([f"not said here: {' '.join(other)}"] if other else [])]
