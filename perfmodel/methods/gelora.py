"""GeLoRA: LoRA whose rank in a block comes from the intrinsic dimensions of the block's input and output."""

from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from ..architectures.base import Build, Scope
from ..architectures.masks import model_buffer
from ..errors import UserError
from ..tape.core import new_tensor, tape
from ..tape.tensor import Tensor
from .lora import Lora
from .parts.base import Linear, Method, Periodic, method, option
from .parts.checks import fraction, positive
from .parts.periodic import Recorded, layers_alike
from .parts.targeted import Targeted
from .two_nn import intrinsic_dimension

BATCH = 8  # samples that go through the model together in the pre-pass


@method(
    "gelora",
    title="GeLoRA",
    source="https://arxiv.org/abs/2412.09250",
    trains="A, B, a rank per block",
    adds="as lora; a pre-pass",
)
@dataclass(frozen=True)
class GeLora(Targeted):
    """LoRA with a rank per block, from a pre-pass that estimates the intrinsic dimensions of the hidden states.

    A block has to gain as many dimensions as its output has beyond its input; that bounds its rank from below. The
    pre-pass runs once, without gradients: `samples` sequences through the model, then TwoNN on one vector a sample and
    layer, from the distances of all pairs. It depends on data what ranks come out, so they are given.
    """

    ranks: tuple[Any, ...] = option((2,), "rank of each block, joined by +, or one for all")
    alpha: float = option(8.0, "scale numerator; changes no cost")
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)
    samples: int = option(1024, "samples of the pre-pass", positive)

    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "rank": "ranks", "r": "ranks"}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranks", tuple(_rank(r) for r in self.ranks))

    def sizes(self) -> tuple[str, ...]:
        return ("ranks",)

    def check(self) -> None:
        super().check()
        assert self.architecture is not None
        if len(self.ranks) not in (1, self.layers):
            raise UserError(
                f"method gelora: ranks names {len(self.ranks)} blocks, {self.architecture.name} has {self.layers}"
            )

    def rank(self, layer: int) -> int:
        """The rank in a block."""
        return int(self.ranks[layer % len(self.ranks)])

    def layer_key(self, layer: int) -> Hashable:
        return super().layer_key(layer), self.rank(layer)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if layer.scope.layer is None:
            raise UserError(f"method gelora: ranks belong to blocks, and {layer.name} is in none: name other targets")
        rank = self.rank(layer.scope.layer)
        self.check_rank(layer, rank)
        return Lora(r=rank, alpha=self.alpha, dropout=self.dropout).adapted(layer, x, dtype)

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("pre-pass for the ranks", None, self._pre_pass),)

    def _pre_pass(self, step: Recorded) -> None:
        """Forward passes of the frozen model, then the intrinsic dimension of every hidden state."""
        quiet: dict[str, Any] = {f.name: 0.0 for f in fields(step.architecture) if f.name.endswith("dropout")}
        architecture = replace(step.architecture, **quiet)
        setup = replace(step.setup, batch=BATCH, checkpoint="none", packing="none")  # its samples are rows of their own
        build = Build(architecture, Method(architecture=architecture), setup, {})
        tape().begin("inputs", "forward")
        with tape().autocasting():
            architecture.forward(Scope(build), *(model_buffer((BATCH, setup.seq)) for _ in range(3)))
        for part in tape().parts:
            part.repeat *= -(-self.samples // BATCH)
        with layers_alike("intrinsic dimension", architecture.layers + 1):
            intrinsic_dimension(new_tensor((self.samples, architecture.hidden), "fp32"))


def _rank(text: Any) -> int:
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"method gelora: ranks takes numbers joined by +, got {text!r}") from None
    return int(positive("method gelora: ranks", number))
