"""Fake tensors whose results are remembered by what decides them: PyTorch's own way to the same takes twice as long."""

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

VIEWS = (  # those that training makes; a meta kernel is all that is behind each
    aten.alias.default, aten.as_strided.default, aten.detach.default, aten.expand.default, aten.permute.default,
    aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.t.default, aten.transpose.int, aten.unsqueeze.default,
    aten.view.default,
)  # fmt: skip
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
BY_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}


class _Made(NamedTuple):
    """A tensor with a storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        """One without data."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _OtherError(Exception):
    """Something else than a plain fake tensor, or than numbers and words."""


class Fakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """`FakeTensorMode` that gives what it gave before where a call is the same again but for the data.

    Attributes:
        known: the results of calls by what decides them: what each makes, "changed" (its first argument), or None
            (ask again).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.known: dict[Any, tuple[_Made, ...] | Literal["changed"] | None] = {}

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of a call."""
        kind, options = _kind(func), kwargs or {}
        try:
            if kind == "view":
                self._seen(args[0])
                with in_kernel_invocation_manager(self):
                    view = func(*args, **options)
                return FakeTensor(self, view, args[0].fake_device)
            seen = self._seen((*args, *options.items())) if kind else None
        except _OtherError:
            seen = None
        key = (id(func), torch.get_default_dtype(), seen)
        known = self.known.get(key) if seen else None
        if known == "changed":
            return args[0]
        if known is None:
            out = super().dispatch(func, types, args, options)
            if seen and key not in self.known:
                changed = kind == "changed" and out is args[0] and self._seen(out) == seen[0]
                self.known[key] = "changed" if changed else _made(out, args) if kind == "new" else None
            return out
        with in_kernel_invocation_manager(self):
            empty = [of.empty() for of in known]
        made = tuple([FakeTensor(self, t, of.device) for t, of in zip(empty, known, strict=True)])
        return made if len(func._schema.returns) > 1 else made[0]

    def _seen(self, value: Any) -> Any:
        """What a call sees of an argument.

        Raises:
            _OtherError: it may see more.
        """
        if type(value) is FakeTensor:
            if value.constant is None and value.layout is torch.strided and value.fake_mode is self:
                return value.shape, value.stride(), value.dtype, value.fake_device
            raise _OtherError
        if isinstance(value, (list, tuple)):
            return tuple([self._seen(part) for part in value])
        if isinstance(value, PLAIN):
            return type(value), value
        raise _OtherError


@cache
def _kind(func: Any) -> str:
    """What a call does: "view" its first argument, make something "new", have its first argument "changed", or ""."""
    if func in VIEWS:
        return "view"
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or BY_DATA & set(func.tags):
        return ""
    taken, given = func._schema.arguments, func._schema.returns
    if not taken or str(taken[0].type) not in ("Tensor", "List[Tensor]") or not given:
        return ""
    if any(str(value.type) != "Tensor" for value in given):
        return ""
    told = [value.alias_info for value in (*taken, *given)]
    if not any(told):
        return "new"
    rest = any(told[1 : len(taken)])
    return "changed" if not rest and len(given) == 1 and told[0] and told[0].is_write and told[-1] else ""


def _made(out: Any, args: Any) -> tuple[_Made, ...] | None:
    """What a call made, None where that is more than tensors with storages of their own."""
    made = out if isinstance(out, tuple) else (out,)
    if any(type(t) is not FakeTensor or t.constant is not None or t.layout is not torch.strided for t in made):
        return None
    taken = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
    known = tuple([_Made(t.shape, t.stride(), t.dtype, t.fake_device) for t in made])
    for t, of in zip(made, known, strict=True):
        storage = t.untyped_storage()
        if storage._cdata in taken or t.storage_offset() or storage.nbytes() != of.empty().untyped_storage().nbytes():
            return None
        taken.add(storage._cdata)
    return known
