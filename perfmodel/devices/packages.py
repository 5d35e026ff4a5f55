"""Which price model kernels that are no ATen calls take: of bitsandbytes, flash-attn, Liger, cut cross entropy,
TRL, Axolotl, Unsloth, LoRAFusion and Inductor.

Their names carry a namespace (`liger::rms_norm`). Triton's norms and losses were measured by
Liger and have kinds of their own (`perfmodel.devices.pointwise.KINDS`); what only streams is priced as any such kernel.
"""

from typing import Any

from ..program.op import Op

ROWS = {
    "liger::rms_norm": "fused_norm",
    "te::rmsnorm_fwd": "fused_norm",
    "dropout_layer_norm::dropout_add_ln_fwd": "fused_norm",
    "liger::cross_entropy": "cross_entropy",
    "cce::indexed_dot": "embedding",
    "trl::fold_logits": "fused_norm",
    "xentropy::forward": "cross_entropy",
    "bitsandbytes::int8_vector_quant": "fused_norm",  # a row a program
    "bitsandbytes::dequantize_4bit": "dequantise",
    "bitsandbytes::cdequantize_blockwise_nf4": "dequantise",
}
GENERATED = {
    "inductor::pointwise": "pointwise", "inductor::scatter": "strided", "inductor::rows": "fused_norm",
    "inductor::columns": "column_reduction",
}  # fmt: skip
BACKWARD_NORMS = {  # how many inputs are read; None: all
    "liger::rms_norm_backward": None, "liger::rms_norm_backward_apart": 4,
    "dropout_layer_norm::dropout_add_ln_bwd": None, "te::rmsnorm_bwd": None,
}  # fmt: skip

Row = tuple[Any, ...]  # kind, kernels, bytes read, bytes written, elements, rows, elements of a row


def package_kernels(op: Op) -> Row:
    """The row of one memory-bound kernel of a package.

    An op that writes over an input reads it too; what such an op only writes (partial sums) is not read.
    """
    if op.name.startswith("inductor::"):
        return _generated(op)
    x = op.inputs[0]
    rows = x.numel // x.shape[-1] if x.shape else 1
    length = x.shape[-1] if x.shape else 1
    written = op.bytes_written
    if op.name == "cce::indexed_dot":  # a row of the words for each row of the states
        return (ROWS[op.name], 1, 2 * x.nbytes, written, x.numel, rows, length)
    if op.name == "trl::fold_logits":  # only sums are written
        return (ROWS[op.name], 1, op.bytes_read, written, x.numel, rows, length)
    if op.name in BACKWARD_NORMS:
        read = sum(s.nbytes for s in op.inputs[: BACKWARD_NORMS[op.name]])
        return ("fused_norm_backward", 1, read, x.nbytes, x.numel, rows, length)
    elements = max(op.outputs, key=lambda s: len(s.shape)).numel
    return (ROWS.get(op.name, "pointwise"), 1, op.bytes_read, written, elements, rows, length)


def _generated(op: Op) -> Row:
    """A kernel that Inductor wrote: the shape of its loops is `op.attrs.loops`."""
    assert op.attrs.loops is not None
    points, length = op.attrs.loops
    kind = "cross_entropy" if op.attrs.exponential else GENERATED[op.name]
    return (kind, 1, op.bytes_read, op.bytes_written, points * length, points, length)
