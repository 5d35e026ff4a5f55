"""Marks among the calls of a recorded program: where what several GPUs do hooks in. They are no calls and cost nothing.

A mark says what comes there and of which module or parameter. Blocks of a row are alike, so in its names a star stands
for a block's number; which blocks some calls are of, `BLOCKS` says before them. What it "reads" are the bytes that are
live there besides weights and complete gradients, what it "writes" the most since the mark before.
"""

from typing import Any, NamedTuple

from .op import Op, Spec

PREFIX = "mark::"
BLOCKS = "blocks"  # whose calls follow: "model.layers.* 0,1"
IN, OUT = "in", "out"  # a module's forward pass begins, and has ended
BEFORE, BEHIND = "before", "behind"  # the gradient of its output is complete, and that of its input
GRADIENT = "gradient"  # that of a parameter is
USED = "used"  # a module of a block runs, whose parameter this is
END = "end"  # a pass has ended
OUTPUTS = "outputs"  # what a call of the whole model gives


class Mark(NamedTuple):
    """What a mark says, and of what; of a block in a row that stands for itself its number, too."""

    what: str
    of: str
    number: int | None = None


def marking(what: str, of: str = "", specs: tuple[Spec, ...] = ()) -> Op:
    """A mark as it stands among ops."""
    return Op(f"{PREFIX}{what} {of}", specs, (), 0, 0, view=True)


def with_live(op: Op, live: Any, most: Any, number: int | None = None) -> Op:
    """A mark with live bytes, and with the number of the block that it is of, if that is known."""
    return Op(op.name if number is None else f"{op.name} {number}", op.inputs, (), live, most, view=True)


def read_mark(op: Op) -> Mark | None:
    """What an op marks; None where it is a call.

    >>> read_mark(marking(IN, "model.layers.*."))
    Mark(what='in', of='model.layers.*.', number=None)
    """
    if not is_mark(op.name):
        return None
    what, _, of = op.name.removeprefix(PREFIX).partition(" ")
    path, _, number = of.partition(" ")
    return Mark(what, path, int(number)) if what == IN and number else Mark(what, of)


def is_mark(name: str, *what: str) -> bool:
    """Whether a call of that name is a mark, one of `what` if that is given.

    >>> is_mark("mark::in model.norm.", IN, BEFORE), is_mark("mm")
    (True, False)
    """
    return name.startswith(PREFIX) and (not what or name.removeprefix(PREFIX).partition(" ")[0] in what)
