"""What both FSDPs are: units that a rank keeps a part of, gathered as hooks ask for them, a reference model's too."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

from ...program.dims import Dim
from ...program.part import Part
from ...program.ranks import Ranks
from ...tape.autograd import differentiate
from ...tape.core import Wrapping
from ...tape.tensor import Grads, Node, Parameter, Tensor
from .form import OfBlocks


class Sharded(OfBlocks, Wrapping):
    """Hooks around units.

    Attributes:
        across: the replicas of a rank's part, over which its gradient is reduced, too (HSDP); None: there are none.
        frozen: the hooks around a reference model, if there is one.
        offloads: whether parts, their gradients and the update are the host's.
        reduce_dtype: what gradients are reduced in; None: the dtype of what is gathered.
        reduces: whether gradients are reduced behind backward; if not, they wait for the next micro-batch.
        ran: paths of units in the order of their forward passes, with their parts of the step.
        done: those whose gradients are reduced.
    """

    shares_norm = True

    def __init__(
        self, ranks: Ranks, across: Ranks | None, frozen: Self | None, *, offloads: bool, reduce_dtype: str | None
    ) -> None:
        self.ranks = ranks
        self.across = across
        self.frozen = frozen
        self.offloads = offloads
        self.reduce_dtype = reduce_dtype
        self.reduces = True
        self.ran: list[tuple[str, Part]] = []
        self.done: set[str] = set()

    @property
    def reference(self) -> Self | None:
        """A frozen model is cut as well."""
        return self.frozen

    @property
    @abstractmethod
    def kept_bytes(self) -> Dim:
        """Bytes of a frozen model that are there from step to step beside a rank's parts."""

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """What is gathered dies with its use, but for what stays of a frozen model."""
        return self.frozen.kept_bytes if self.frozen is not None else 0

    def _before_backward(self, path: str, out: Tensor) -> Tensor:
        """What a unit gives, with the hook that runs before its backward pass."""
        node = differentiate("pre_backward", (out,), self._pre_backward, (path,))
        if node is None:
            return out
        hooked = out.alias()
        node.produces(hooked)
        return hooked

    @abstractmethod
    def _pre_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        """That hook: the unit is gathered, and the one whose backward follows."""
