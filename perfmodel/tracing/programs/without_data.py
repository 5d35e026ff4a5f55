"""Tuners of peft that read weights when they start, started without data: what a step runs does not hang on it.

AdaMSS clusters the rows of a weight (with scikit-learn), FRoD decomposes all weights of a kind together, SHiRA draws
places. Here AdaMSS's clusters are equally large (their sizes add up to the rows in any case), and the others get
tensors of the right shapes; MiCA, whose B is frozen, gets any B. FRoD's bases and the places of AdaMSS, FourierFT and
WaveFT stay on the host, and each forward pass copies them; but FRoD's are buffers, which follow where a model is moved
with its adapters, as programs of diffusers do.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from ...errors import UserError
from .diffusion import of_diffusers

# Where tuners keep places as plain tensors, neither parameters nor buffers: a dict by the name of the adapter
_PLACES = {"ADAMSS": "scatter_index", "FOURIERFT": "indices", "WAVEFT": "waveft_indices"}


class OnHost:
    """A tensor on the host: to trace the copy to the model's device, it stands on the meta device."""

    def __init__(self, like: torch.Tensor) -> None:
        self.tensor = torch.empty(like.shape, dtype=like.dtype, device="meta")

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Its copy on a device, under the caller's fake mode."""
        return self.tensor.to(device=device, dtype=dtype)


class _Numbers:
    """The numbers of a small tensor on the host, which the program reads there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.numbers: list[int] = tensor.tolist()

    def tolist(self) -> list[int]:
        """As a tensor gives them."""
        return self.numbers


def apply_without_data(kind: str, options: dict[str, Any], apply: Callable[[], Any]) -> Any:
    """What a tuner of peft makes of a model on the meta device.

    Args:
        kind: its `peft_type`.
        options: of its config.

    Raises:
        UserError: an option whose step hangs on data.
    """
    with ExitStack() as patches:
        if kind == "SHIRA":
            patches.enter_context(_drawn_places(options))
        elif kind == "ADAMSS":
            _adamss_without_data(options, patches)
        elif kind == "FROD":
            _frod_without_data(patches)
        elif kind == "LORA":
            patches.enter_context(patch("peft.tuners.lora.layer.LoraLayer.mica_init"))
        model = apply()
    moved = of_diffusers(model)
    for module in model.modules():
        if (name := _PLACES.get(kind, "")) and hasattr(module, name):
            setattr(module, name, {adapter: OnHost(places) for adapter, places in getattr(module, name).items()})
        elif kind == "FROD" and hasattr(module, "frod_V"):
            _read_sizes(module) if moved else _keep_on_host(module)
    return model


@contextmanager
def _drawn_places(options: dict[str, Any]) -> Iterator[None]:
    """SHiRA trains r·(m + n) places of a weight (m, n), which it draws; without data it could not find them again."""
    where = torch.where

    def drawn(condition: torch.Tensor, *values: Any) -> Any:
        if values or not condition.is_meta:
            return where(condition, *values)
        count = options.get("r", 32) * sum(condition.shape)
        return tuple(torch.empty(count, dtype=torch.long, device="meta") for _ in condition.shape)

    with patch.object(torch, "where", drawn):
        yield


def _adamss_without_data(options: dict[str, Any], patches: ExitStack) -> None:
    from peft.tuners.adamss import layer

    for option in ("use_asa", "use_dynamic_rank"):
        if options.get(option):
            raise UserError(f"ADAMSS: {option}: what trains then hangs on weights, and a trace has none; leave it off")
    patches.enter_context(patch.dict(sys.modules, {"sklearn": ModuleType("sklearn")}))  # its config looks for it
    patches.enter_context(patch.object(layer, "slice_pca", _singular_vectors))
    patches.enter_context(patch.object(layer, "clustering_Z", _equal_clusters))


def _singular_vectors(tensor: torch.Tensor, r: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a weight (1, 1, m, n): the right ones (1, 1, r, n) and the left ones (1, 1, m, r)."""
    rows, columns = tensor.shape[-2:]
    kept = min(r, rows, columns)
    return tensor.new_empty((1, 1, kept, columns)), tensor.new_empty((1, 1, rows, kept))


def _equal_clusters(vectors: torch.Tensor, count: int, *_: Any) -> tuple[torch.Tensor, int]:
    """The cluster of each row, and how many there are."""
    rows = vectors.shape[0]
    count = min(count, rows)
    return torch.arange(rows) * count // rows, count


def _frod_without_data(patches: ExitStack) -> None:
    from peft.tuners.frod.layer import FrodLayer
    from peft.tuners.frod.model import FrodModel

    patches.enter_context(patch.object(FrodModel, "_init_frod_projections", _shared_bases))
    patches.enter_context(patch.object(FrodLayer, "_calculate_frod_u_and_lambda", _own_basis))


def _shared_bases(tuner: Any, config: Any, adapter: str) -> None:
    """The basis (n, n) and the places of the sparse matrix that all layers (m, n) of a kind share."""
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.frod.model import Conv1D, _category_from_key

    tuner.frod_V, tuner.frod_s_indices, tuner.frod_s_size = (torch.nn.ModuleDict() for _ in range(3))
    for path, module in tuner.model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        n = module.in_features if isinstance(module, torch.nn.Linear) else module.weight.shape[0]
        values = min(max(int(n * n * config.sparse_rate), int(config.sparse_rate > 0)), n * (n - 1))
        kind = _category_from_key(path)
        tuner.frod_V[kind] = BufferDict({adapter: torch.empty((n, n), dtype=module.weight.dtype)})
        tuner.frod_s_indices[kind] = BufferDict({adapter: torch.empty((2, values), dtype=torch.long)})
        tuner.frod_s_size[kind] = BufferDict({adapter: torch.tensor([n, n])})


def _own_basis(layer: Any, shared: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The basis (m, n) of a layer, on the host, and the n factors that it trains."""
    return torch.empty(weight.shape, dtype=shared.dtype), weight.new_empty(weight.shape[1])


def _read_sizes(module: Any) -> None:
    """Let a layer whose bases are on the device know the numbers that it reads there in each forward pass."""
    if not isinstance(module.frod_V, torch.nn.ModuleDict):  # not the tuner, which holds those of all layers
        object.__setattr__(module, "frod_s_size", {key: _Numbers(t) for key, t in module.frod_s_size.items()})


def _keep_on_host(module: Any) -> None:
    """Let a layer copy its bases from the host; the tuner, which has those of all layers, holds none on the device."""
    shared = ("frod_V", "frod_s_indices", "frod_s_size")
    for name in shared if isinstance(module.frod_V, torch.nn.ModuleDict) else (*shared, "frod_U"):
        held = getattr(module, name)
        if name in module._modules:
            delattr(module, name)
        made = _Numbers if name == "frod_s_size" else OnHost
        kept = {} if isinstance(held, torch.nn.ModuleDict) else {key: made(t) for key, t in held.items()}
        object.__setattr__(module, name, kept)
