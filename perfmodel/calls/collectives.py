"""Collectives by their names in PyTorch."""

from typing import Any

from ..program.dims import Dim, larger
from ..program.op import Op

KIND_OF = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allgather_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "_c10d_functional::all_to_all_single": "send_recv",  # of context parallelism alone: all goes to the next rank
    "c10d::send": "send_recv",
    "c10d::recv_": "send_recv",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
}  # fmt: skip


def message_bytes(op: Op) -> Dim:
    """The whole buffer of a collective, as nccl-tests counts it: what is gathered, or what is to be scattered."""
    given, into = (sum(s.nbytes for s in specs) for specs in (op.inputs, op.outputs))
    return larger(given, into)


def collective_row(op: Op) -> tuple[tuple[str, str], tuple[Any, ...]]:
    """What its price goes by: (kind, dtype), and (bytes of its message, how many ranks, how far apart)."""
    assert op.attrs.ranks is not None
    return (KIND_OF[op.name], op.inputs[0].dtype), (message_bytes(op), *op.attrs.ranks)


def exchanges(op: Op) -> bool:
    """Whether an op exchanges data with other GPUs."""
    return op.attrs.ranks is not None
