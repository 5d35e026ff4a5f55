"""Fields of several GPUs: which of them mean something beside the others, and what those offer.

A field that means nothing is not shown, and what it holds is not asked: a share of layers is no question of one GPU.
"""

from collections.abc import Mapping
from functools import cache
from itertools import chain
from typing import Any

from ..devices import profile
from ..network import files as nodes
from ..setup import DDP, OFFLOAD, ROTATE, ULYSSES

ROWS = (("nodes", "node"), ("tp", "pp", "cp"), ("pp_schedule", "cp_rotate", "ddp", "offload"))  # of the form
FIELDS = tuple(chain.from_iterable(ROWS))
DECIDING = ("device", "gpus", "parallel", "tp", "pp", "cp")  # fields on which it depends what means something
COUNTS = ("tp", "pp", "cp")
# Fields that take nothing but these; of them they offer those that mean something
CLOSED = {"node": tuple(nodes.names()), "cp_rotate": (*ROTATE, ULYSSES), "ddp": DDP, "offload": OFFLOAD}
AS_USUAL = "none"  # of a field that is None at first
STAGED = ("ddp", "fsdp2")  # forms that replicas of a pipeline have
SHARING = {"fsdp2": ROTATE, **dict.fromkeys(("zero1", "zero2", "zero3"), (ULYSSES,))}  # sequences, by form
SCHEDULES = ("1f1b", "gpipe", "interleaved:v=2", "interleaved:v=4")
OFFLOADED = {"zero1": OFFLOAD[:2], "zero2": OFFLOAD[:2], "zero3": OFFLOAD, "fsdp1": OFFLOAD[::2], "fsdp2": OFFLOAD[::2]}
MOST_SHARES = 64  # GPUs beyond which a field offers nothing; more can be typed


def offered(deciding: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What each field that means something offers, the usual value first, or what stands for it here.

    Args:
        deciding: `DECIDING` as they are typed; what is no number counts as 1.
    """
    found: dict[str, tuple[Any, ...]] = {}
    parallel, gpus = str(deciding["parallel"]), _count(deciding["gpus"])
    tp, pp, cp = (_count(deciding[name]) for name in COUNTS)
    if gpus > 1:
        shares = tuple(n for n in range(1, min(gpus, MOST_SHARES) + 1) if gpus % n == 0)
        found |= {"nodes": (AS_USUAL, *shares), "node": (AS_USUAL, *nodes_of(str(deciding["device"]))), "tp": shares}
        if parallel in STAGED:
            found["pp"] = shares
            found |= {"pp_schedule": SCHEDULES} if pp > 1 else {}
        if parallel == "ddp" and pp == 1 and gpus > tp:
            found["ddp"] = DDP
        if parallel in SHARING:
            found["cp"] = shares
            found |= {"cp_rotate": SHARING[parallel]} if cp > 1 else {}
    # beside which offloading is not modelled
    shared = tp > 1 or (parallel in SHARING and cp > 1) or (parallel == "fsdp2" and pp > 1)
    if parallel in OFFLOADED and (parallel.startswith("zero") if gpus == 1 else not shared):
        found["offload"] = OFFLOADED[parallel]
    return found


def meant(typed: Mapping[str, Any], deciding: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they are asked: without those that mean nothing, and the first offer for a value that does not.

    Such a value was chosen before another field was changed; one that nobody offers is left to be refused.
    """
    means = offered(deciding)
    found = {name: value for name, value in typed.items() if name not in FIELDS or name in means}
    closed = {name: known for name, known in CLOSED.items() if name in found}
    stale = [name for name, known in closed.items() if found[name] in known and found[name] not in means[name]]
    return found | {name: means[name][0] for name in stale}


@cache
def nodes_of(device: str) -> tuple[str, ...]:
    """The bundled nodes that have such GPUs; all where none is known to have them."""
    slug = profile.bundled(device)
    alike = tuple(name for name in nodes.names() if nodes.load(name).gpu == slug)
    return alike or tuple(nodes.names())


def _count(typed: Any) -> int:
    text = str(typed).removesuffix(".0")
    return int(text) if text.isdecimal() and len(text) < 9 else 1
