"""S2FT: whole heads and channels train in place, as slices of the weights that read or write them."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UserError
from ..program.dims import contiguous_strides, product
from ..tape.packages.sliced import sliced_linear
from ..tape.tensor import Storage, Tensor
from .parts.base import Linear, method, option
from .parts.targeted import Targeted, base_bias, matches

READERS = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "output.dense")  # of heads and channels; others write


@method(
    "s2ft",
    title="S2FT",
    source="https://arxiv.org/abs/2412.06289; github.com/Infini-AI-Lab/S2FT, efficiency/s2ft.py",
    trains="slices of o and down",
    adds="nothing",
)
@dataclass(frozen=True)
class S2Ft(Targeted):
    """Structured sparse tuning: some input columns of o and down (rows of q, k, v, up, gate) train in place.

    A permutation has put the chosen ones side by side, so a layer is one GEMM, and backward multiplies only with their
    slice. The authors draw heads and channels over all layers; every layer gets the mean number here. Their own AdamW
    updates slices tensor by tensor; the optimizer here is the setup's.
    """

    heads: float = option(0.052, "share of the attention layers' width that trains (the authors' o_ratio, v_ratio)")
    channels: float = option(0.02, "share of the MLP layers' width that trains (the authors' d_ratio, u_ratio)")

    family: ClassVar[str] = "s2ft"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, share in (("heads", self.heads), ("channels", self.channels)):
            if not 0 < share <= 1:
                raise UserError(f"method s2ft: {name} must be above 0 and at most 1, got {share}")
        if self.adapter_dtype is not None:
            raise UserError("method s2ft: its slices are part of the weights and have their dtype; no adapter_dtype")

    def check(self) -> None:
        assert self.architecture is not None
        if self.architecture.traits.conv1d:
            raise UserError(
                f"method s2ft: the authors' layers replace nn.Linear, {self.architecture.name} has Conv1D; "
                "use paca or lora"
            )
        super().check()

    def dtype_beside(self, dtype: str) -> str:
        return dtype

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        setup = layer.scope.build.setup
        if setup.amp or setup.grad_accum > 1:
            wrong = "--amp: its layers do not run under autocast" if setup.amp else "--grad-accum: it adds no gradients"
            raise UserError(f"method s2ft: leave out {wrong}")
        if len(x.shape) != 3:
            raise UserError(f"method s2ft: its layers take samples of tokens, {layer.name} gets loose rows")
        share = self.heads if "attn" in layer.name or "attention" in layer.name else self.channels
        n_in, n_out = layer.n_in, layer.n_out
        if any(matches(layer.name, reader) for reader in READERS):
            w = max(1, round(share * n_in))
            frozen, chosen = (n_out, n_in - w), (n_out, w)
        else:
            w = max(1, round(share * n_out))
            frozen, chosen = (n_out - w, n_in), (w, n_in)
        layer.scope.parameter(f"{layer.name}.weight", frozen, "weight")
        trained = layer.adapter("weight.slice", chosen, dtype)
        shape = (n_out, n_in)  # both lie in one weight
        weight = Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))
        return sliced_linear(x, weight, trained, base_bias(layer))
