"""Grids over batch, sequence, rank, number of trained blocks, GPUs and device, as blocks of columns.

The first method is the baseline: every row says how much faster it is than the baseline in the same setup. Blocks keep
the memory of a large sweep bounded; within a block everything is one vectorised prediction.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..devices import host as hosts
from ..devices.device import Device, profile_of
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods import Method
from ..prediction import intervals
from ..prediction.predict import Model, Prediction, architecture_of, method_of, predict, with_options
from ..prediction.times import Time
from ..setup import Setup, positive
from ..shown import Shown, frame
from .speedup import verdict

Columns = dict[str, np.ndarray]
BLOCK = 16_384  # rows that are predicted together


@dataclass(frozen=True)
class Sweep(Shown):
    """A planned sweep; nothing is predicted before its blocks are asked for.

    Attributes:
        batch, seq, rank: values of the axes; rank is empty where the methods keep theirs.
        gpus: values of the axis of GPUs, of which each is predicted apart.
        methods: bound methods, the baseline first; `k` values are methods of their own.
    """

    model: str
    methods: tuple[Method, ...]
    devices: tuple[DeviceProfile, ...]
    setup: Setup
    host: str | Host
    batch: np.ndarray
    seq: np.ndarray
    rank: np.ndarray
    gpus: np.ndarray

    def __len__(self) -> int:
        """Rows of the whole sweep."""
        return len(self.devices) * len(self.gpus) * sum(self._rows(m) for m in self.methods)

    def blocks(self) -> Iterator[Columns]:
        """The rows of the sweep in blocks: column → values, one a row.

        Raises:
            UserError: a setup that a model or method refuses.
        """
        for device in self.devices:
            for gpus in self.gpus.tolist():
                yield from self._of_gpus(device, gpus)

    def _of_gpus(self, device: DeviceProfile, gpus: int) -> Iterator[Columns]:
        base: Time | None = None
        for method in self.methods:
            times = []
            for start in range(0, self._rows(method), BLOCK):
                points = np.arange(start, min(start + BLOCK, self._rows(method)))
                columns, time = self._block(device, gpus, method, points, base)
                times.append(time)
                yield columns
            base = base or _joined(times)

    def table(self) -> Columns:
        """All rows at once."""
        blocks = list(self.blocks())
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}

    def to_frame(self) -> Any:
        """All rows as a `pandas.DataFrame`.

        Raises:
            UserError: pandas is not installed.
        """
        return frame(self.table())

    def _rows(self, method: Method) -> int:
        return len(self.batch) * len(self.seq) * len(self._ranks(method))

    def _ranks(self, method: Method) -> np.ndarray:
        """The ranks that a method is swept over; a single placeholder if it has none or keeps its own."""
        return self.rank if len(self.rank) and has_rank(method) else np.zeros(1, np.int64)

    def _block(
        self, device: DeviceProfile, gpus: int, method: Method, points: np.ndarray, base: Time | None
    ) -> tuple[Columns, Time]:
        plane = len(self.batch) * len(self.seq)
        ranks = self._ranks(method)
        r, here = ranks[points // plane], points % plane
        batch, seq = self.batch[here // len(self.seq)], self.seq[here % len(self.seq)]
        swept = with_rank(method, r) if ranks[0] else method
        setup = replace(self.setup, batch=batch, seq=seq, gpus=gpus)
        p = predict(self.architecture, swept, setup, device, host=self.host)
        rows = len(points)
        columns: Columns = {
            "model": np.full(rows, self.model),
            "device": np.full(rows, device.slug),
            "method": _labels(method, r) if ranks[0] else np.full(rows, method.spec()),
            "gpus": np.full(rows, gpus),
            "batch": batch,
            "seq": seq,
            "rank": r if ranks[0] else np.full(rows, getattr(method, "r", 0) or 0),
            **_figures(p, rows),
        }
        ratio, low, high = _speed_up(base, here, p.time, device, rows)
        compared = {"speedup": ratio, "speedup_low": low, "speedup_high": high, "verdict": verdict(ratio)}
        return {**columns, **compared}, p.time

    @property
    def architecture(self) -> Any:
        """The architecture that all methods are bound to."""
        return self.methods[0].architecture


def sweep(
    model: Model,
    methods: Sequence[str | Method] = ("full", "lora"),
    setup: Setup | None = None,
    device: str | DeviceProfile | Device | Sequence[str | DeviceProfile | Device] = "l40s",
    *,
    batch: Any = None,
    seq: Any = None,
    rank: Any = (),
    k: Any = (),
    gpus: Any = None,
    host: str | Host = "default",
    **options: Any,
) -> Sweep:
    """Plan a sweep; `perfmodel.sweep` says what it takes and raises."""
    architecture = architecture_of(model)
    names = [device] if isinstance(device, (str, DeviceProfile, Device)) else list(device)
    if not methods or not names:
        raise UserError("a sweep needs at least one method and one device")
    ks, ranks = _axis("k", k), _axis("rank", rank)
    bound = tuple({m.spec(): m.bind(architecture) for text in methods for m in _variants(text, ks)}.values())
    if len(ranks) and not any(map(has_rank, bound)):
        raise UserError("a sweep over rank needs a method with a rank, e.g. lora")
    for m in bound:
        if len(ranks) and has_rank(m):
            with_rank(m, ranks).bind(architecture)
    base = with_options(setup, options)
    return Sweep(
        model=architecture.name,
        methods=bound,
        devices=_distinct([profile_of(d) for d in names]),
        setup=base,
        host=hosts.load(host) if isinstance(host, str) and host != "default" else host,  # a device may have its own
        batch=_axis("batch", base.batch if batch is None else batch),
        seq=_axis("seq", base.seq if seq is None else seq),
        rank=ranks,
        gpus=_axis("gpus", base.gpus if gpus is None else gpus),
    )


def has_rank(method: Method) -> bool:
    """Whether a method's size is a rank that a sweep can vary."""
    return any(f.name == "r" for f in fields(method)) and getattr(method, "inner", "lora") == "lora"


def with_rank(method: Method, r: Any) -> Method:
    """The method with another rank, or an array of ranks."""
    changed: dict[str, Any] = {"r": r}
    return replace(method, **changed)


def _variants(text: str | Method, ks: np.ndarray) -> list[Method]:
    method = method_of(text)
    if not len(ks) or not any(f.name == "k" for f in fields(method)):
        return [method]
    changes: list[dict[str, Any]] = [{"k": int(k)} for k in ks]
    return [replace(method, **change) for change in changes]


def _distinct(devices: list[DeviceProfile]) -> tuple[DeviceProfile, ...]:
    """Each device once; rows tell devices apart by their slugs."""
    by_slug: dict[str, DeviceProfile] = {}
    for d in devices:
        if by_slug.setdefault(d.slug, d).hardware != d.hardware:
            raise UserError(f"two devices are called {d.slug!r}: rename the file of one")
    return tuple(by_slug.values())


def _axis(name: str, values: Any) -> np.ndarray:
    """An axis as a flat array of positive integers, each once."""
    flat = np.asarray(list(values) if isinstance(values, Iterable) else [values]).reshape(-1)
    if not flat.size:
        return np.zeros(0, np.int64)
    return np.unique(np.asarray(positive(name, flat)))


def _labels(method: Method, ranks: np.ndarray) -> np.ndarray:
    """What to give `predict` for each row."""
    values, index = np.unique(ranks, return_inverse=True)
    return np.array([with_rank(method, int(v)).spec() for v in values])[index]


def _figures(p: Prediction, rows: int) -> Columns:
    """The figures of a prediction, one a row."""
    t, m = p.time, p.memory
    figures = {
        "step_s": t.phases["total"], "step_low_s": t.low, "step_high_s": t.high, "forward_s": t.phases["forward"],
        "backward_s": t.phases["backward"], "optimizer_s": t.phases["optimizer"],
        "launch_bound_share": t.launch_bound_share, "tokens_per_s": p.tokens_per_second,
        "exposed_s": t.communication.exposed["total"],
        "flops": p.flops["total"], "bytes": p.bytes["total"], "kernels": p.kernels["total"], "peak_bytes": m.peak,
        "fits": p.fits, "trainable_params": p.trainable_params,
    }  # fmt: skip
    figures |= {"padding_share": p.padding} if p.setup.lengths else {}
    return {name: np.broadcast_to(np.asarray(value), (rows,)) for name, value in figures.items()}


def _speed_up(base: Time | None, here: np.ndarray, time: Time, on: DeviceProfile, rows: int) -> tuple[Any, Any, Any]:
    """Baseline time over this one, with its interval; 1 for the baseline itself."""
    if base is None:
        return (np.ones(rows),) * 3
    total = base.phases["total"][here]
    components = {name: seconds[here] for name, seconds in base.components.items()}
    ratio = total / time.phases["total"]
    spread = intervals.ratio_sigma(components, total, time.components, time.phases["total"], on)
    return ratio, *intervals.interval_bounds(ratio, spread)


def _joined(times: list[Time]) -> Time:
    """The baseline's blocks as one, for lookups by point."""
    components = {
        name: np.concatenate([np.broadcast_to(t.components.get(name, 0.0), t.phases["total"].shape) for t in times])
        for name in {name for t in times for name in t.components}
    }
    total = np.concatenate([t.phases["total"] for t in times])
    return Time({"total": total}, None, None, None, None, components)
