"""Of several numbers of GPUs those that a job can have; a single one that it cannot is refused."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..errors import UserError

Made = TypeVar("Made")
Refused = dict[int, UserError]  # number of GPUs -> why the job cannot have it


def possible(make: Callable[[int], Made], counts: Iterable[int]) -> tuple[dict[int, Made], Refused]:
    """What is made for each number of GPUs, and why for some it is not.

    Raises:
        UserError: that of the first number, where none goes.
    """
    made: dict[int, Made] = {}
    refused: Refused = {}
    for count in counts:
        try:
            made[count] = make(count)
        except UserError as error:
            refused[count] = error
    if not made and refused:
        raise next(iter(refused.values()))
    return made, refused
