"""LoRA as PEFT runs it in eager mode, and in the fused implementations of Axolotl, Unsloth and LoRAFusion."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from ..architectures.rewrites import Pair
from ..errors import UserError, nearest
from ..program.dims import decide
from ..tape.core import tape
from ..tape.linalg import linear
from ..tape.packages.converted import float8_or_plain
from ..tape.packages.sequence import SequenceCut, gathered_along, high_of_rows, low_of_rows
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.tensor import Parameter, Tensor
from ..tape.transfers import Cut
from ..values import once
from .parts.base import Linear, Scope, method, option
from .parts.checks import fraction, positive
from .parts.stacked import folded
from .parts.targeted import Targeted, base_bias, base_weight, becomes, matches, matches_path, named

if TYPE_CHECKING:
    from ..tape.packages import axolotl
    from ..tape.packages.lora_kernels import Adapted
    from ..tape.packages.quantized import Packed

L = TypeVar("L", bound="Lora")
ON_PARAMETERS = ("lora", "rslora", "loraplus", "qlora")  # those of PEFT's `ParamWrapper`
HELP = "peft, axolotl (fused where q, k, v or the MLP are all targets, or o), unsloth (without dropout) or lorafusion"
FUSED_BY = {"axolotl": "Axolotl", "unsloth": "Unsloth", "lorafusion": "LoRAFusion"}
TOGETHER = {  # layers that one Function of Axolotl's or Unsloth's fuses, by the field that tells of their biases
    "qkv_bias": ("q_proj", "k_proj", "v_proj"), "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
    "output_bias": ("o_proj",),
}  # fmt: skip


@method(
    "lora",
    title="LoRA",
    source="https://arxiv.org/abs/2106.09685; peft/tuners/lora/layer.py",
    trains="A, B",
    adds="2 thin GEMMs, casts, add",
)
@dataclass(frozen=True, eq=False, repr=False)  # `Compared` has both; most cold starts make this one
class Lora(Targeted):
    """Low-rank adapters beside frozen linear layers: y = xWᵀ + (α/r)·(xAᵀ)Bᵀ."""

    r: Any = option(8, "rank", positive)
    alpha: float = option(
        8.0, "scale numerator; changes no cost but of target_parameters, which no scale of 1 multiplies"
    )
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)
    implementation: str = option("peft", HELP, among="implementations")
    target_parameters: tuple[str, ...] = option((), "weights of experts joined by +: gate_up_proj+down_proj")

    implementations: ClassVar[tuple[str, ...]] = ("peft", "axolotl", "unsloth", "lorafusion")
    told_by_where: ClassVar[tuple[str, ...]] = (*Targeted.told_by_where, "implementation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.implementation not in self.implementations:
            hint = nearest(self.implementation, self.implementations)
            raise UserError(f"method {self.name}: implementation {self.implementation!r} is unknown: {hint}")

    def check(self) -> None:
        super().check()
        assert self.architecture is not None
        if self.implementation not in ("peft", *self.architecture.traits.fused):
            raise UserError(
                f"method {self.name}: {self.implementation} is not written for {self.architecture.name}; "
                "use implementation=peft"
            )
        known = self.architecture.stacked_names()
        by_peft = self.architecture.recorded and not known  # a traced model, whose weights peft looks through
        for target in () if by_peft else self.target_parameters:
            if not any(matches(name, target) for name in known):
                hint = nearest(target, known) if known else f"{self.architecture.name} has no experts"
                raise UserError(
                    f"method {self.name}: target_parameters {target!r} matches no weight of experts: {hint}"
                )

    def where(self) -> str:
        return super().where() + ("" if self.implementation == "peft" else f" by {FUSED_BY[self.implementation]}")

    def plain(self: L, dtype: str) -> L:
        method = super().plain(dtype)
        return replace(method, implementation="peft") if self.why_unfused else method

    @property
    def why_unfused(self) -> str:
        """Why the implementation takes the place of no layers, so that PEFT's own forward runs; empty if it does."""
        if self.implementation == "unsloth" and self.dropout > 0:
            return "Unsloth's kernels take no dropout"
        if self.implementation not in ("axolotl", "unsloth") or self.fused_names:
            return ""
        if any(map(self.targets_all, TOGETHER.values())):
            return "Unsloth's kernels take no layers with biases"
        return "q, k and v, or gate, up and down, or o would have to be targets"

    @property
    def fused_names(self) -> tuple[str, ...]:
        """Names of the layers whose place a Function takes, of whatever block; for Unsloth's without biases."""
        biased = [getattr(self.architecture, bias, False) and self.implementation == "unsloth" for bias in TOGETHER]
        found = zip(biased, TOGETHER.values(), strict=True)
        return tuple(name for bias, names in found if not bias and self.targets_all(names) for name in names)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The targets; without a default of PEFT's no layers, where weights of experts are named.

        It has none where it turns names of transformers 4 into weights of experts: no names become an empty list.
        """
        assert self.architecture is not None
        has_default = self.architecture.traits.targets.of(self.family) is not None and not self._stacked_of_traits
        return () if self.target_parameters and not self.targets and not has_default else super().target_names

    def targets_all(self, leaves: tuple[str, ...]) -> bool:
        """Whether some block has layers with all of these names and every one of them is a target."""
        assert self.architecture is not None
        names = [name for name in self.architecture.linear_names() if name.rsplit(".", 1)[-1] in leaves]
        if {name.rsplit(".", 1)[-1] for name in names} != set(leaves):
            return False
        return any(all(self.targets_layer(name, layer) for name in names) for layer in range(self.layers))

    def targets_layer(self, name: str, layer: int | None) -> bool:
        if any(matches(name, old) for old, _ in self._stacked_of_traits):
            return False
        if self._stacked_of_traits and self.pattern is not None:
            return named(name, self._converted)
        return super().targets_layer(name, layer)

    @property
    def _stacked_of_traits(self) -> tuple[tuple[str, str], ...]:
        assert self.architecture is not None
        return self.architecture.traits.stacked

    @once
    def _converted(self) -> tuple[str, ...]:
        """The targets as PEFT has them where layers became weights of experts: names, of any block.

        Of a regex the last parts of the paths that it matches, also of those that experts had in transformers 4
        (peft/utils/transformers_weight_conversion.py, `_resolve_string_target_modules`).
        """
        if self.pattern is None:
            return self.target_names
        made = self.architecture
        assert made is not None
        old = [
            f"{name.removesuffix(new)}{old}"
            for old, new in self._stacked_of_traits
            for name in made.stacked_names()
            if matches(name, new)
        ]
        paths = [(name, layer) for name in (*made.linear_names(), *old) for layer in range(self.layers)]
        found = (name for name, layer in (*paths, ("lm_head", None)) if matches_path(self.pattern, made, name, layer))
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in found))

    def finds_nothing(self) -> bool:
        assert self.architecture is not None
        if self.architecture.recorded and self.target_parameters:
            return False  # peft finds out
        of_experts = any(np.any(self.rank_of_parameter(name)) for name in self.architecture.stacked_names())
        return super().finds_nothing() and not of_experts

    def rank_of_parameter(self, name: str) -> Any:
        """The rank of the adapter on a weight that is no linear layer's, 0 if it has none; of all blocks alike.

        A parameter that layers of transformers 4 were fused into has the ranks of all; so it has where a target names
        the like beside it, such as shared_expert.up_proj (peft's `_convert_peft_config_moe`).
        """
        fused = [old for old, new in self._stacked_of_traits if matches(name, new)]
        present = [old for old in fused if any(becomes(old, target) for target in self._converted)] if fused else []
        if present and len(present) < len(fused):
            raise UserError(
                f"method {self.name}: {' and '.join(fused)} are one weight now, so PEFT adapts both or none; "
                f"target both"
            )
        explicit = any(matches(name, target) for target in self.target_parameters)
        return self.r * len(present) if present else self.r if explicit else 0

    def stacked(self, layer: Scope, name: str, weight: Tensor, *, flipped: bool) -> Tensor:
        r = self.rank_of_parameter(name)
        if not np.any(r):
            return weight
        if self.dropout or self.name not in ON_PARAMETERS:
            raise UserError(
                f"method {self.name}: PEFT's adapters of {name}, a weight that is no linear layer's, are those of "
                f"{' or '.join(ON_PARAMETERS)} without dropout; leave it out of the targets"
            )
        tape().part.host.adapters += 1
        dtype = self.dtype_beside(layer.dtype)
        return folded(layer, name, weight, dtype, r, scaled=self.scales(), flipped=flipped)

    def scales(self) -> bool:
        """Whether α/r is another number than 1, which C++ leaves out."""
        return decide(self.r != self.alpha)

    def dtype_beside(self, dtype: str) -> str:
        return self.dtype_of_base(dtype) if self.implementation == "lorafusion" else super().dtype_beside(dtype)

    def check_pairs(self, parameters: Sequence[Parameter]) -> None:
        """Raise `UserError` where the optimizer is one of pairs of A and B, and something else trains, too: a head."""
        other = next((p.name for p in parameters if ".lora_" not in p.name), None)
        if other:
            raise UserError(
                f"method {self.name}: {self.own_optimizer} takes pairs of A and B alone; {other} trains, too"
            )

    def weights(self, layer: Linear, dtype: str) -> tuple[Parameter, Parameter]:
        """A (r, n_in) and B (n_out, r)."""
        self.check_rank(layer, self.r)
        a = layer.adapter("lora_A.weight", (self.r, layer.n_in), dtype)
        return a, layer.adapter("lora_B.weight", (layer.n_out, self.r), dtype)

    def pair(self, layer: Linear) -> Pair | None:
        if not self.targets_layer(layer.name, layer.scope.layer):
            return None
        tape().part.host.adapters += 1
        cut, r, dtype = layer.cut, self.r, self.dtype_of_base(layer.scope.dtype)
        ranks, rows = cut.ranks.size, cut.by == "rows"
        self._check_cut(cut)
        self.check_rank(layer, r)
        shapes = {
            "linear_in": (r if rows else r // ranks, layer.n_in),
            "linear_out": (layer.n_out // ranks if rows else layer.n_out, r),
        }
        a, b = (
            layer.scope.parameter(f"{layer.name}.adapter.{n}.weight", s, "adapter", dtype=dtype, trainable=True)
            for n, s in shapes.items()
        )
        return cut.counted(a), cut.counted(b)

    def _check_cut(self, cut: Cut) -> None:
        """Raise `UserError` where ranks that share a layer do not divide the adapter's rank."""
        if np.any(np.asarray(self.r) % cut.ranks.size):
            raise UserError(
                f"method {self.name}: rank {np.max(self.r)} is no multiple of tp {cut.ranks.size}, which cuts it"
            )

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if self.implementation == "lorafusion":
            self._check_autocast(layer)
            a, b = self.weights(layer, dtype)
            from ..tape.packages.lora_kernels import lorafusion_linear  # loaded where it is used

            return lorafusion_linear(x, base_weight(layer), a, b, base_bias(layer), self.dropout)
        if layer.name.endswith(".o_proj") and self._fuses((layer,)):
            return self._fused_output(layer, x)
        if isinstance(layer.cut, SequenceCut):
            return self._beside_tokens(layer, x)
        result = layer(x)
        a, b = self.weights(layer, dtype)
        result_dtype = result.dtype
        x = cast(x, dtype)
        recipe = layer.scope.build.setup.fp8  # A and B are `nn.Linear` too
        low = layer.cut.between(_half(a, dropout(x, self.dropout), recipe))
        result = add(result, mul(_half(b, low, recipe), self.alpha))
        return cast(result, result_dtype)

    def _beside_tokens(self, layer: Linear, x: Tensor) -> Tensor:
        """Of ranks that share tokens between layers, as NeMo Automodel runs it: in the base's dtype, α/r before B."""
        cut, r, dtype = layer.cut, self.r, self.dtype_of_base(layer.scope.dtype)
        self._check_cut(cut)
        self.check_rank(layer, r)
        own, rows = r // cut.ranks.size, cut.by == "rows"
        a = cut.counted(layer.adapter("lora_A.weight", (r if rows else own, layer.n_in), dtype))
        b = cut.counted(layer.adapter("lora_B.weight", (layer.n_out, own if rows else r), dtype))
        result = layer.product(x, cut)
        if rows:
            low = mul(low_of_rows(x, a, cut.ranks), self.alpha)
            return cut.made(add(result, high_of_rows(low, b, cut.ranks)))
        low = gathered_along(linear(x, a), cut.ranks, 2)
        return add(result, linear(mul(low, self.alpha), b))

    def qkv(self, layers: tuple[Linear, ...], x: Tensor) -> list[Tensor] | None:
        if not self._fuses(layers):
            return None
        if self.implementation == "axolotl":
            from ..tape.packages import axolotl

            return axolotl.qkv(x, self._for_axolotl(*layers), self.dropout)
        from ..tape.packages.lora_kernels import unsloth_qkv

        return unsloth_qkv(x, self._adapted(*layers))

    def mlp(self, layers: tuple[Linear, ...], x: Tensor, gate: str) -> Tensor | None:
        if not self._fuses(layers):
            return None
        if self.implementation == "axolotl":
            from ..tape.packages import axolotl

            return axolotl.mlp(x, self._for_axolotl(*layers), self.dropout, gate)
        from ..tape.packages.lora_kernels import unsloth_mlp

        return unsloth_mlp(x, *self._adapted(*layers))

    def _fused_output(self, layer: Linear, x: Tensor) -> Tensor:
        if self.implementation == "axolotl":
            from ..tape.packages import axolotl

            return axolotl.output(x, self._for_axolotl(layer)[0], self.dropout)
        from ..tape.packages.lora_kernels import unsloth_linear

        return unsloth_linear(x, *self._adapted(layer))

    def _fuses(self, layers: tuple[Linear, ...]) -> bool:
        """Whether a Function takes these layers' place: where all have adapters, and for Unsloth's (`patch_peft_model`)
        no bias and no dropout."""
        if self.implementation not in ("axolotl", "unsloth"):
            return False
        if self.implementation == "unsloth" and (self.dropout or any(layer.has_bias for layer in layers)):
            return False
        return all(self.targets_layer(layer.name, layer.scope.layer) for layer in layers)

    def frozen(self, layer: Linear) -> "tuple[Parameter | Packed, Parameter | None]":
        """A base layer's weight, as it is kept, and its bias."""
        return base_weight(layer), base_bias(layer)

    def _for_axolotl(self, *layers: Linear) -> "list[axolotl.Projection]":
        """Each layer's weights as Axolotl's Functions take them."""
        from ..tape.packages import axolotl

        for layer in layers:
            self._check_autocast(layer)
        beside = [self.dtype_beside(layer.scope.dtype) for layer in layers]
        return [
            axolotl.Projection(*self.frozen(layer), *self.weights(layer, dtype))
            for layer, dtype in zip(layers, beside, strict=True)
        ]

    def _adapted(self, *layers: Linear) -> "list[Adapted]":
        """Each layer's weights as Unsloth's Functions take them."""
        from ..tape.packages.lora_kernels import Adapted

        for layer in layers:
            self._check_autocast(layer)
        return [
            Adapted(self.frozen(layer)[0], *self.weights(layer, self.dtype_beside(layer.scope.dtype)))
            for layer in layers
        ]

    def _check_autocast(self, layer: Linear) -> None:
        setup = layer.scope.build.setup
        if setup.amp and setup.dtype == "fp32":
            raise UserError(
                f"method {self.name}: {self.implementation} needs 16-bit weights under autocast; use --dtype"
            )


def _half(weight: Parameter, x: Tensor, recipe: Any) -> Tensor:
    """A or B, an `nn.Linear` between the hooks of a program to which it is a unit."""
    wrapping = tape().wrapping

    def run(x: Tensor) -> Tensor:
        return float8_or_plain(x, weight, None, recipe)

    return run(x) if wrapping is None else wrapping.module(weight.name.removesuffix("weight"), run, x)
