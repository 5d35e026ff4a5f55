"""ResLoRA: LoRA with residual paths from the same layer of earlier blocks.

The program is the authors' (github.com/microsoft/LMOps, reslora/myloralib/layers.py); adapters have the base's dtype.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from ..architectures.masks import read_scalar
from ..errors import UserError
from ..tape.core import Tensor, emit
from ..tape.extra import add_in_place
from ..tape.inplace import add_to_output
from ..tape.linalg import matmul
from ..tape.pointwise import add, dropout, fill, mul
from ..tape.shape import transpose
from .base import Linear, method, option
from .lora import Lora

Pair = tuple[Tensor, Tensor]  # A (r, n_in) and B (n_out, r)
SHORTCUTS = ("is", "bs", "ms")
NORMS = {"is": (4,), "bs": (), "ms": (3, 4)}  # merge flags with which a training step reads a norm back, by shortcut


@method(
    "reslora",
    source="https://arxiv.org/abs/2402.18039; github.com/microsoft/LMOps, reslora",
    trains="A, B",
    adds="lora + earlier blocks",
)
@dataclass(frozen=True)
class ResLora(Lora):
    """LoRA with shortcuts: of the input (is), of the adapters (bs), or of xAᵀ (ms) of the same layer in earlier blocks.

    is: the adapter reads x plus the previous block's x. bs: the adapters of the `pre_num` blocks before run on x too.
    ms: B reads xAᵀ plus that of the `pre_num` blocks before. Merge flags choose how it is merged after training; with
    some of them every layer reads a norm back in every forward, and the host waits.
    """

    shortcut: str = option("is", "is, bs or ms (the authors' res_flag 1, 2, 3)")
    pre_num: int = option(4, "earlier blocks that bs and ms reach back to; -1: all")
    merge_flag: int = option(0, "0, 3 (merge_bi) or 4 (merge_bw)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortcut not in SHORTCUTS:
            raise UserError(f"method reslora: shortcut {self.shortcut!r} is unknown: use is, bs or ms")
        if self.pre_num < 1 and self.pre_num != -1:
            raise UserError(f"method reslora: pre_num must be from 1, or -1 for all, got {self.pre_num}")
        if self.merge_flag not in (0, 3, 4):
            raise UserError(f"method reslora: merge_flag must be 0, 3 or 4, got {self.merge_flag}")

    def sizes(self) -> tuple[str, ...]:
        return ("r", "shortcut")

    def dtype_beside(self, dtype: str) -> str:
        return self.base_dtype(dtype)

    @property
    def reach(self) -> int:
        """Blocks that a layer reaches back to, where there are so many."""
        return 1 if self.shortcut == "is" else self.layers if self.pre_num == -1 else self.pre_num

    def layer_key(self, layer: int) -> Hashable:
        """Blocks near either end have fewer blocks before or after them; those between are alike."""
        adapted = [i for i in range(self.layers) if super(ResLora, self).layer_key(i)]
        if layer not in adapted:
            return "frozen"
        place, after = adapted.index(layer), len(adapted) - 1 - adapted.index(layer)
        return layer if place <= self.reach or after < self.reach else "between"

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if layer.scope.layer is None:
            raise UserError("method reslora: the head has no earlier block; leave out lm_head")
        if layer.scope.build.setup.checkpoint != "none":
            raise UserError("method reslora: shortcuts reach out of checkpointed blocks; leave out --checkpoint")
        result, weights = layer(x), self.weights(layer, dtype)
        forward = {"is": self._input, "bs": self._block, "ms": self._middle}[self.shortcut]
        return forward(layer, result, x, weights)

    def _input(self, layer: Linear, result: Tensor, x: Tensor, weights: Pair) -> Tensor:
        self._read_norm(x)
        _keep(layer, "input", x)
        before = self._earlier(layer, "input")
        return _add(layer, result, self._up(self._down(add(x, before[0] if before else x), weights), weights))

    def _block(self, layer: Linear, result: Tensor, x: Tensor, weights: Pair) -> Tensor:
        for name, weight in zip("AB", weights, strict=True):
            _keep(layer, name, weight)
        before = zip(self._earlier(layer, "A"), self._earlier(layer, "B"), strict=True)
        for pair in (weights, *before):
            result = _add(layer, result, self._up(self._down(x, pair), pair))
        return result

    def _middle(self, layer: Linear, result: Tensor, x: Tensor, weights: Pair) -> Tensor:
        before = self._earlier(layer, "middle")
        total = fill("zeros_like", before[0].shape, before[0].dtype, like=before[0]) if before else None
        for earlier in before:
            assert total is not None
            total = add_in_place(total, earlier)
        middle = self._down(x, weights)
        _keep(layer, "middle", middle)
        result = _add(layer, result, self._up(middle if total is None else add(middle, total), weights))
        self._read_norm(middle if self.merge_flag == 4 else x)
        return result

    def _down(self, x: Tensor, weights: Pair) -> Tensor:
        return matmul(dropout(x, self.dropout), transpose(weights[0], 0, 1))

    def _up(self, middle: Tensor, weights: Pair) -> Tensor:
        return mul(matmul(middle, transpose(weights[1], 0, 1)), self.alpha)

    def _read_norm(self, x: Tensor) -> None:
        """`torch.norm(x).item()`: the host waits for the device."""
        if self.merge_flag in NORMS[self.shortcut]:
            read_scalar(emit("linalg_vector_norm", (x,), (), x.dtype))

    def _earlier(self, layer: Linear, what: str) -> list[Tensor]:
        """What the same layer kept in earlier blocks, the nearest first."""
        kept, index = layer.scope.build.kept, layer.scope.layer
        found = {k[2]: t for k, (t, _) in kept.items() if k[:2] == (layer.name, what) and k[2] < index}
        return [found[i] for i in sorted(found, reverse=True)[: self.reach]]


def _keep(layer: Linear, what: str, value: Tensor) -> None:
    layer.scope.build.keep((layer.name, what, layer.scope.layer), value)


def _add(layer: Linear, result: Tensor, delta: Tensor) -> Tensor:
    """`result += delta`; a layer with a bias returns a view of its product."""
    return add_to_output(result, delta, viewed=layer.has_bias, strided=True)
