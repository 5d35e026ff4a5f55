"""DDP that knows less or more of the graph: `find_unused_parameters`, `static_graph`.

Where it looks for parameters without a gradient, it walks through the graph behind each forward pass whose gradients
are exchanged, and what the model gives, logits too, is copied (`_DDPSink`), whoever needs it. A map on the host notes
each gradient, is all-reduced behind the last bucket, and is looked at before each gradient is copied back. Buckets stay
those of the first step: filled in the order in which the modules were made, the first one made goes out last.

A static graph is learned in the first step; from then on the map is only looked at. In PyTorch 2.13 it cannot be
learned from a step of several micro-batches (`no_sync`), and a search does not see through reentrant checkpoints.

No model here has a trained parameter without a gradient, for whose sake the host would wait for the map.

Source: torch 2.13, csrc/distributed/c10d/reducer.cpp (`search_unused_parameters`, `all_reduce_local_used_map`,
`finalize_bucket_dense`), nn/parallel/distributed.py (`_post_forward`, `compute_bucket_size_limits`).
"""

from collections.abc import Sequence

from ...errors import UserError
from ...optimizers.parts.update import existing
from ...program.dims import Dim, decide
from ...program.dtypes import ITEMSIZE
from ...program.op import ON_HOST, OVER_BUS, PLAIN, Op
from ...program.part import Part
from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.autograd import differentiate
from ...tape.core import emit, hooked, record, tape
from ...tape.tensor import Grads, Node, Parameter, Tensor
from ..deepspeed.stages import flat_places
from .collectives import all_reduce
from .ddp import BUCKET, FIRST_BUCKET, Bucket, Replicated
from .ddp_compiled import Place
from .messages import LayerGradient

MAP = "i32"  # dtype of the map of parameters that got a gradient


def ddp_of(setup: Setup, ranks: Ranks, late: Sequence[str], graphs: frozenset[Place] = frozenset()) -> Replicated:
    """DDP as a setup has it.

    Args:
        late: `Architecture.registers_late`, for the order in which parameters were made.
        graphs: where the graph of a compiled model is cut.

    Raises:
        UserError: PyTorch ends in an error with the rest of the setup.
    """
    if setup.ddp == "find-unused" and setup.checkpoint == "block-reentrant":
        raise UserError("ddp find-unused: DDP cannot look through reentrant checkpoints; use --checkpoint block")
    if setup.ddp == "static-graph" and setup.grad_accum > 1:
        raise UserError("ddp static-graph: DDP cannot learn it from several micro-batches a step; use --ddp plain")
    if setup.ddp == "find-unused":
        return FindUnusedDdp(ranks, late, graphs)
    return StaticGraphDdp(ranks, graphs) if setup.ddp == "static-graph" else Replicated(ranks, graphs)


class StaticGraphDdp(Replicated):
    """The hooks of DDP with a static graph."""

    def _copy_back(self, p: Parameter) -> None:
        """It looks whether the parameter was used."""
        record("_local_scalar_dense", (_flag(),), (), ON_HOST)
        super()._copy_back(p)


class FindUnusedDdp(StaticGraphDdp):
    """The hooks of DDP that finds unused parameters.

    Args:
        late: as of `ddp_of`.
    """

    def __init__(self, ranks: Ranks, late: Sequence[str], graphs: frozenset[Place]) -> None:
        super().__init__(ranks, graphs)
        self.late = late
        self.trained: Dim = 0

    def begin(self) -> None:
        """Gradients are noted even if they are not exchanged."""
        super().begin()
        tape().after_gradient = self._divide if self.reduces else hooked(_note)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the model gives is copied, and the graph is searched."""
        outputs = super().end(outputs)
        if self.reduces and tape().grad_enabled:
            hooked(self._search)(outputs)
        node = differentiate("_DDPSinkBackward", outputs, _pass_on)
        copies = [emit("clone", (x,), x.shape, x.dtype, strides=x.strides) for x in outputs]
        if node is not None:
            node.produces(*copies)
        return copies

    def _search(self, outputs: Sequence[Tensor]) -> None:
        current = tape()
        current.part.host.searched += nodes_behind(outputs, leaves_alone=current.flow is not None)

    def end_of_backward(self) -> None:
        """As without a search; then the map is emptied."""
        super().end_of_backward()
        if self.reduces:
            tape().begin("exchange", "backward")
            hooked(self._empty)()

    def _empty(self) -> None:
        emptied = existing((self.trained,), MAP)
        record("fill_.Scalar", (emptied,), (emptied,), ON_HOST)

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """The buckets, and the map on the device."""
        return super().held_bytes(parameters) + existing((self.trained,), MAP).nbytes

    def _into_bucket(self, p: Parameter) -> None:
        _note(p)
        super()._into_bucket(p)

    def _sent(self, order: Sequence[LayerGradient]) -> dict[int, list[Bucket]]:
        self.trained = len(order)
        arrival = {gradient: i for i, gradient in enumerate(order)}
        places, _ = flat_places([r.parameter for r in reversed(self.ready)], self.late)
        sent: dict[int, list[Bucket]] = {}
        latest = 0
        for bucket in reversed(first_buckets(list(places))):
            latest = max(latest, *(arrival[gradient] for gradient in bucket))
            dtype = bucket[0].parameter.dtype
            sent.setdefault(latest, []).append((dtype, sum(gradient.parameter.nbytes for gradient in bucket)))
        sent[latest].append((MAP, self.trained * ITEMSIZE[MAP]))
        return sent

    def _ops_of(self, bucket: Bucket) -> list[Op]:
        """The message of a bucket, or of the map, which is copied to the device before."""
        if bucket[0] != MAP:
            return super()._ops_of(bucket)
        current = tape()
        part, current.part = current.part, Part("map", "backward")
        of_all, on_device = existing((self.trained,), MAP), existing((self.trained,), MAP)
        over = OVER_BUS if current.device == "cuda" else PLAIN
        if current.device == "cuda":
            pinned = existing((self.trained,), MAP)
            record("empty_like", (of_all,), (pinned,), ON_HOST)
            record("copy_", (pinned, of_all), (pinned,), ON_HOST)
            of_all = pinned
        record("copy_", (on_device, of_all), (on_device,), over)
        current.part, part = part, current.part
        return [*part.ops, all_reduce(self.trained, MAP, self.ranks)]


def first_buckets(made: Sequence[LayerGradient]) -> list[list[LayerGradient]]:
    """Buckets as they are before any gradient has come, by the parameter in each that was made first."""
    found: list[list[LayerGradient]] = []
    filling: dict[str, tuple[list[LayerGradient], Dim]] = {}  # by dtype: what is in it, and its bytes
    full: set[str] = set()  # dtypes of which there was one
    for gradient in made:
        dtype = gradient.parameter.dtype
        held, nbytes = filling.setdefault(dtype, ([], 0))
        if not held:
            found.append(held)
        held.append(gradient)
        nbytes = nbytes + gradient.parameter.nbytes
        filling[dtype] = held, nbytes
        if decide(nbytes >= (BUCKET if dtype in full else FIRST_BUCKET)):
            full.add(dtype)
            del filling[dtype]
    return found


def nodes_behind(outputs: Sequence[Tensor], *, leaves_alone: bool = False) -> int:
    """Nodes of the graph that a search sees, those of all identical layers.

    Args:
        leaves_alone: of a compiled model, which is a node or a few.
    """
    waiting = [t.node for t in outputs if t.node is not None]
    seen = {id(node): node for node in waiting}
    while waiting:
        for edge in waiting.pop().edges:
            if edge is not None and id(edge[0]) not in seen:
                seen[id(edge[0])] = edge[0]
                waiting.append(edge[0])
    return sum(node.part.repeat for node in seen.values() if not leaves_alone or node.name == "AccumulateGrad")


def _flag() -> Tensor:
    """One parameter's place in the map."""
    return existing((), MAP)


def _note(p: Parameter) -> None:
    """`local_used_map_[index] = 1`."""
    flag = _flag()
    record("select.int", (flag,), (flag,), ON_HOST, view=True)
    record("fill_.Scalar", (flag,), (flag,), ON_HOST)


def _pass_on(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    return tuple(grads)
