"""Samples of a micro-batch and micro-batches of a step, as DeepSpeed's config says them.

What is "auto" there, transformers' trainer fills; a number that is another than its own ends the run in an error, that
of accelerate's short form too (transformers/integrations/deepspeed.py, `trainer_config_finalize`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from .keys import Keys

KEYS = {"batch": "train_micro_batch_size_per_gpu", "grad_accum": "gradient_accumulation_steps"}
OF_ALL = "train_batch_size"  # samples of a step on all GPUs together
AS_MANY = "as many samples on each of any number of GPUs, not those of one train_batch_size"


def numbers(keys: Keys) -> dict[str, int]:
    """The fields of a setup that are plain numbers.

    Raises:
        UserError: a value that is neither a positive integer nor "auto".
    """
    return {name: keys.count(key, 1) for name, key in KEYS.items() if keys.get(key) not in (None, "auto")}


def of_all(keys: Keys) -> int | None:
    """Samples of a step on all GPUs together, where they are given."""
    return None if keys.get(OF_ALL) in (None, "auto") else keys.count(OF_ALL, 1)


def shared(setup: Mapping[str, Any], samples: int, gpus: int) -> dict[str, Any]:
    """A setup with so many samples of a step, of GPUs that each have their own (`_set_batch_related_parameters`).

    Raises:
        UserError: the GPUs cannot share them.
    """
    found = {name: setup[name] for name in KEYS if isinstance(setup.get(name), int)}
    if len(found) == len(KEYS):
        _check(found, samples, gpus)
        return dict(setup)
    each, rest = divmod(samples, gpus * next(iter(found.values()), 1))
    if rest or not each:
        of_each = f", {' and '.join(f'{KEYS[name]} {n}' for name, n in found.items())}" if found else ""
        raise UserError(f"{OF_ALL} {samples} cannot be shared by {gpus} GPUs{of_each}: give a multiple")
    return {"grad_accum": 1, **setup, "grad_accum" if "batch" in found else "batch": each}


def _check(found: Mapping[str, int], samples: int, gpus: int) -> None:
    """Raise `UserError` where all three numbers are there and differ (`_batch_assertion`)."""
    made = found["batch"] * found["grad_accum"] * gpus
    if made != samples:
        raise UserError(
            f"{OF_ALL} {samples} is not {KEYS['batch']} {found['batch']} x {KEYS['grad_accum']} {found['grad_accum']} "
            f"x {gpus} GPUs: give {made}, or leave one of them out"
        )


def on_each_gpu(
    setup: Mapping[str, Any], samples: int, gpus: Sequence[int], sharing: int
) -> tuple[dict[str, Any], list[str]]:
    """The same for one number of GPUs or each of several, of which so many share their samples; and what is said."""
    return shared(setup, samples, max(1, gpus[0] // sharing)), [AS_MANY] if len(set(gpus)) > 1 else []


def agreed(own: Mapping[str, Any], its: Mapping[str, Any], *, counted: bool = False) -> dict[str, Any]:
    """What DeepSpeed's config says beside a training config's own setup.

    Args:
        counted: whether the training config counts the samples of all GPUs, which make its micro-batches.

    Raises:
        UserError: they have different numbers of samples or micro-batches, or another 16-bit dtype of autocast.
    """
    if None not in (amp := own.get("amp"), dtype := its.get("amp")) and amp != dtype:
        raise UserError(
            f'the training config has {amp}, DeepSpeed\'s config {dtype}: make them alike, or give "auto" in the latter'
        )
    said = {name: value for name, value in its.items() if not (counted and name == "grad_accum")}
    for name, key in KEYS.items():
        if name in own and own[name] != said.get(name, own[name]):
            raise UserError(
                f"the training config has {name.replace('_', '-')} {own[name]}, DeepSpeed's config {key} {its[name]}: "
                "make them alike, or leave the latter out"
            )
    return said
