"""What DeepSpeed has in its flat buffers: all that trains, whether a gradient of it arrives or not.

Masters and states are of a rank's whole partition, in which missing gradients are zeros, and so is the step. Messages
are of the gradients that arrive.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (`bit16_groups`, `get_flat_partition`), stage3.py
(`_setup_for_real_optimizer`: `grad_partitions_flat_buffer`).
"""

from collections.abc import Sequence

from ...optimizers import Update
from ...program.dims import Dim
from ...tape.core import tape
from ...tape.tensor import Parameter


def flattened(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Those that it flattens."""
    return [p for p in parameters if p.requires_grad]


def elements_of(parameters: Sequence[Parameter]) -> Dim:
    """How many elements those have together."""
    return sum(p.numel * p.count for p in flattened(parameters))


def bytes_of(parameters: Sequence[Parameter]) -> Dim:
    """How many bytes their gradients have."""
    return sum(p.nbytes * p.count for p in flattened(parameters))


def update_of_all(parameters: Sequence[Parameter], optimizer: str) -> Update:
    """The optimizer step in the making, on all of them."""
    update = Update(tape(), optimizer, parameters)
    update.parameters = flattened(parameters)
    return update
