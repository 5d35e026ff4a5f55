"""DeepSpeed's trace of modules: what ZeRO-3 knows of a pass through a model before it comes.

The modules of a pass are noted from one call of the whole model to the next, the backward pass among them. If the next
pass calls the same ones, DeepSpeed knows what follows: it gathers ahead, small weights stay, and so do those that come
again soon. At the first module that differs it forgets all, and notes anew from the next call of the model. Where a
model is called more than once before its backward pass (by KTO, or without adapters as its own reference), it never
has the whole of a micro-batch: weights are gathered where a module runs and freed behind it, the small ones too.

Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (`trace_prologue`, `reset_step`,
`release_sub_module`), parameter_offload.py (`_start_of_forward_hook`).
"""

from collections.abc import Sequence
from typing import NamedTuple

ROUNDS = 4  # micro-batches, behind which the trace is the same in each
Modules = Sequence[str]  # paths and names of what runs in a pass, in its order


class TraceCoverage(NamedTuple):
    """What of a pass the trace has.

    Attributes:
        backward: whether of the backward pass that follows, too.
        off: names of what other passes of the micro-batch run and this one does not: adapters that are switched off.
    """

    forward: bool
    backward: bool
    off: frozenset[str] = frozenset()


def trace_coverage(passes: Sequence[Modules], *, trained: bool = True) -> list[TraceCoverage]:
    """What the trace has of each pass of a micro-batch; backward follows the last one, if the model is `trained`."""
    every = set().union(*passes)
    segments = [(modules, trained and i == len(passes) - 1) for i, modules in enumerate(passes)]
    trace: tuple[Modules, bool] | None = None
    noted: tuple[Modules, bool] | None = None
    found: list[TraceCoverage] = []
    for segment in segments * ROUNDS:
        if trace is None and noted is None:
            noted = segment
        else:
            trace, noted = trace or noted, None
        forward = trace is not None and trace[0] == segment[0]
        backward = trace == segment and segment[1]
        found.append(TraceCoverage(forward, backward, frozenset(every.difference(segment[0]))))
        if trace != segment:
            trace = None
    return found[-len(passes) :]
