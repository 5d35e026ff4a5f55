"""Where an op runs: the clocks of a step by name, and how one waits for another.

The host dispatches; the device works off several queues at once, each in its own order: CUDA's streams and its copy
engines. Each of them has a clock. A clock is only a name, so a program may bring further ones: an event is a clock that
one op sets and another waits for.
"""

from typing import NamedTuple

HOST = "host"
COMPUTE = "compute"  # the stream that everything runs on unless a program says otherwise
COMMUNICATION = "communication"
WITHIN = "communication within"  # of ranks that share layers or sequences: NCCL's streams are one for each communicator
COPY = "copy"
REDUCE = "reduce"  # FSDP's stream that gradients are reduced and cast on
GATHER_COPY = "gather copy"  # FSDP's stream of copies into what is gathered


class Run(NamedTuple):
    """An op runs on one stream, after what others were given before it.

    When the host comes to the op, the stream `on` waits for all that was queued on the streams `after` up to then
    (`torch.cuda.Stream.wait_stream`), and the op follows what is queued on its own. Where an op synchronises
    (`costs.synchronises`), the host waits until the stream `on` is done.

    >>> gather = Run(COMMUNICATION, after=(COMPUTE,))  # its inputs come from the compute stream
    >>> use = Run(after=(COMMUNICATION,))  # and a kernel of the compute stream needs what it gathers
    """

    on: str = COMPUTE
    after: tuple[str, ...] = ()


MAIN = Run()
