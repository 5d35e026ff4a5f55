"""Which price model the kernels of other packages take: those of bitsandbytes, Liger, Unsloth and LoRAFusion.

They are no ATen calls, so their names carry a namespace (`liger::rms_norm`). Triton's norms and losses were measured by
Liger and have kinds of their own (`perfmodel.devices.pointwise.KINDS`); what only streams is priced as any such kernel.
"""

from typing import Any

from ..tape.core import Op

ROWS = {"liger::rms_norm": "fused_norm", "liger::cross_entropy": "cross_entropy"}  # a row a program
BACKWARD_NORMS = ("liger::rms_norm_backward",)

Row = tuple[Any, ...]  # kind, kernels, bytes read, bytes written, elements, rows, elements of a row


def memory_bound(op: Op) -> Row:
    """The row of one memory-bound kernel of a package.

    An op that writes over an input reads it too; what such an op only writes (partial sums) is not read.
    """
    x = op.inputs[0]
    rows = x.numel // x.shape[-1] if x.shape else 1
    length = x.shape[-1] if x.shape else 1
    written = op.bytes_written
    if op.name in BACKWARD_NORMS:
        return ("fused_norm_backward", 1, op.bytes_read, x.nbytes, x.numel, rows, length)
    elements = max(op.outputs, key=lambda s: len(s.shape)).numel
    return (ROWS.get(op.name, "pointwise"), 1, op.bytes_read, written, elements, rows, length)
