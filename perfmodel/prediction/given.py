"""The setup of a question: what is asked for, and in the place of what nobody says what the program or the GPU has."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ..architectures import Architecture
from ..devices.profile import DeviceProfile
from ..errors import UserError, check_kind, nearest
from ..setup import Setup

NAMES = tuple(f.name for f in fields(Setup))


def setup_given(
    setup: Setup | None,
    options: Mapping[str, Any],
    architecture: Architecture | None = None,
    devices: Sequence[DeviceProfile] = (),
) -> Setup:
    """A setup with some of its fields replaced; without one, those that no option names are the usual ones.

    Usual is what transformers falls back to where a model's program has no SDPA, and on GPUs without units for bf16,
    where PyTorch emulates it, fp16.

    Raises:
        UserError: an unknown option, or one out of range.
    """
    check_kind("setup", setup, (Setup, type(None)), "a Setup; its fields go as options, such as batch=4")
    for name in options:
        if name not in NAMES:
            raise UserError(f"unknown setup option {name!r}: {nearest(name, NAMES)}")
    if setup is not None:
        return replace(setup, **options) if options else setup
    usual = {} if "attention" in options or architecture is None else usual_attention(architecture)
    if "dtype" not in options and "amp" not in options:
        halves = {on.hardware.half for on in devices}
        usual |= {"dtype": halves.pop()} if len(halves) == 1 else {}
    return Setup(**(usual | dict(options)))


def usual_attention(architecture: Architecture) -> dict[str, str]:
    """The attention of a program that lacks SDPA's, as a field of a setup; none for the others."""
    has = architecture.traits.attention
    return {} if architecture.recorded or Setup.attention in has else {"attention": has[0]}
