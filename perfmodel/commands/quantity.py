"""Options that take a number with a unit."""

import re
from typing import Any

import click

PREFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "KI": 2.0**10, "MI": 2.0**20, "GI": 2.0**30}
BYTES = {"B": 1.0, **PREFIXES, **{f"{prefix}B": factor for prefix, factor in PREFIXES.items()}}
NUMBER = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """A positive number with a unit: `24GB`, `20M`, `80GiB`.

    Args:
        units: what each unit stands for, by its name in capitals.
        example: for those who write none of them.
    """

    name = "quantity"

    def __init__(self, units: dict[str, float], example: str) -> None:
        self.units = units
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(value))
        if not match or match[2].upper() not in self.units or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a positive number with a unit such as {self.example}", param, ctx)
        return float(match[1]) * self.units[match[2].upper()]
