"""Grids over batch, sequence, rank, number of trained blocks, GPUs and device, as blocks of columns.

The first method is the baseline: every row says how much faster it is than the baseline in the same setup. Blocks keep
the memory of a large sweep bounded; within a block everything is one vectorised prediction.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from os import PathLike
from typing import Any

import numpy as np

from ..architectures import Architecture
from ..devices import host as hosts
from ..devices.device import Device, GivenDevice, profile_of
from ..devices.host import GivenHost
from ..devices.profile import DeviceProfile
from ..errors import UserError, one_or_several
from ..methods import Method
from ..prediction import intervals
from ..prediction.given import setup_given
from ..prediction.intervals import Devices
from ..prediction.predict import Model, Prediction, architecture_of, method_of, predict_on_each
from ..program.sizes import positive
from ..setup import Setup
from ..shown import Shown, frame
from ..values import immutable
from .counts import Refused, possible
from .speedup import verdict

Columns = dict[str, np.ndarray]
Entry = tuple[Method, np.ndarray]  # a method, and ranks that it is swept over; none where it keeps its own
BLOCK = 16_384  # rows that are predicted together
TOGETHER = 16  # entries of a part, which predicts the baseline beside them


@dataclass(frozen=True)
class Sweep(Shown):
    """A planned sweep; nothing is predicted before its blocks are asked for.

    Attributes:
        batch, seq, rank: values of the axes; rank is empty where the methods keep theirs.
        gpus: values of the axis of GPUs, of which each is predicted apart.
        refused: numbers of GPUs that were asked for and are left out.
        methods: bound methods, the baseline first; `k` values are methods of their own.
    """

    model: str
    methods: tuple[Method, ...]
    devices: tuple[DeviceProfile, ...]
    setup: Setup
    host: GivenHost
    batch: np.ndarray
    seq: np.ndarray
    rank: np.ndarray
    gpus: np.ndarray
    refused: Refused

    def __len__(self) -> int:
        """Rows of the whole sweep."""
        return len(self.devices) * len(self.gpus) * sum(self._rows(m) for m in self.methods)

    def blocks(self) -> Iterator[Columns]:
        """The rows of the sweep in blocks: column → values, one a row.

        Raises:
            UserError: a setup that a model or method refuses.
        """
        for devices, gpus in self._together():
            made = self._blocks(devices, gpus)  # of several devices all fit into one
            yield from chain.from_iterable(zip(*made, strict=True) if len(devices) > 1 else made)

    def parts(self) -> Iterator[Callable[[], list[Columns]]]:
        """The sweep in parts, functions that make some blocks each, in any process; `order` says which comes when."""
        groups = self._groups()
        for device, gpus in self._places():
            for group in groups:
                for start in self._starts():
                    yield partial(self._points((device,), gpus, start).blocks, groups[0][0], group)

    def order(self) -> Iterator[tuple[int, int]]:
        """(number of a part, number of a block in it) of each block, in the order of `blocks`."""
        starts, part = len(self._starts()), 0
        for _ in self._places():
            for group in self._groups():
                yield from ((part + i, block) for block in range(len(group)) for i in range(starts))
                part += starts

    def question(self) -> dict[str, Any]:
        """What is asked, in plain values: sweeps of one question have the same rows."""
        from .asked import plain_question

        axes = {name: getattr(self, name).tolist() for name in ("batch", "seq", "gpus", "rank")}
        cut = {"rows of a block": BLOCK, "blocks of a partition": TOGETHER}
        return plain_question(
            "sweep", self.architecture, self.methods, self.setup, self.host, self._places(), **axes, **cut
        )

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
        return len(self.batch) * len(self.seq) * max(1, len(self._ranks(method)))

    def _ranks(self, method: Method) -> np.ndarray:
        """The ranks that a method is swept over; none if it has none or keeps its own."""
        return self.rank if has_rank(method) else self.rank[:0]

    def _places(self) -> list[tuple[DeviceProfile, int]]:
        return [(device, gpus) for device in self.devices for gpus in self.gpus.tolist()]

    def _together(self) -> Iterator[tuple[Devices, int]]:
        """The same, as many devices at once as have their rows in one block."""
        some = max(1, BLOCK // sum(map(self._rows, self.methods))) if len(self.gpus) == 1 else 1
        for i in range(0, len(self.devices), some):
            for gpus in self.gpus.tolist():
                yield self.devices[i : i + some], gpus

    def _blocks(self, devices: Devices, gpus: int) -> Iterator[list[Columns]]:
        """The blocks of some devices, one a device."""
        bases: dict[int, Prediction] = {}
        for entry in self._entries():
            for start in self._starts():
                base = None if entry[0] is self.methods[0] else bases[start]
                columns, predicted = self._points(devices, gpus, start).block(entry, base)
                bases.setdefault(start, predicted)
                yield columns

    def _starts(self) -> range:
        """The first of the points of the plane of batch and sequence that are predicted together."""
        return range(0, len(self.batch) * len(self.seq), BLOCK)

    def _entries(self) -> list[Entry]:
        """Methods, each with as many ranks as go into a block."""
        together = max(1, BLOCK // (len(self.batch) * len(self.seq)))
        found = []
        for m in self.methods:
            ranks = self._ranks(m)
            found += [(m, ranks[i : i + together]) for i in range(0, max(1, len(ranks)), together)]
        return found

    def _groups(self) -> list[list[Entry]]:
        """The entries of parts."""
        entries = self._entries()
        return [entries[i : i + TOGETHER] for i in range(0, len(entries), TOGETHER)]

    def _points(self, devices: Devices, gpus: int, start: int) -> "SweptPoints":
        points = np.arange(start, min(start + BLOCK, len(self.batch) * len(self.seq)))
        batch, seq = self.batch[points // len(self.seq)], self.seq[points % len(self.seq)]
        return SweptPoints(self.model, self.architecture, devices, self.setup, self.host, batch, seq, gpus)

    @property
    def architecture(self) -> Any:
        """The architecture that all methods are bound to."""
        return self.methods[0].architecture


@immutable
class SweptPoints:
    """Points of the plane of batch and sequence on some devices: what is predicted together.

    Attributes:
        batch, seq: of each point.
    """

    model: str
    architecture: Architecture
    devices: Devices
    setup: Setup
    host: GivenHost
    batch: np.ndarray
    seq: np.ndarray
    gpus: int

    def blocks(self, baseline: Entry, entries: Sequence[Entry]) -> list[Columns]:
        """The rows of some entries, against a baseline that may be the first of them."""
        columns, base = self.block(baseline, None)
        found = [columns] if entries[0] is baseline else []
        found += [self.block(e, None if e[0] is baseline[0] else base)[0] for e in entries[len(found) :]]
        return list(chain.from_iterable(found))

    def block(self, entry: Entry, base: Prediction | None) -> tuple[list[Columns], Prediction]:
        """The rows of an entry, one block a device, and what they are of, its times of shape (devices, rows).

        Args:
            base: of the baseline, at its first rank; None for the baseline itself.
        """
        method, ranks = entry
        here = np.tile(np.arange(len(self.batch)), max(1, len(ranks)))
        batch, seq, r, rows = self.batch[here], self.seq[here], np.repeat(ranks, len(self.batch)), len(here)
        swept = with_rank(method, r) if len(ranks) else method
        setup = replace(self.setup, batch=batch, seq=seq, gpus=self.gpus)
        p = predict_on_each(self.architecture, swept, setup, self.devices, self.host)
        alike: Columns = {
            "gpus": np.full(rows, self.gpus),
            "batch": batch,
            "seq": seq,
            "rank": r if len(ranks) else np.full(rows, getattr(method, "r", 0) or 0),
        }
        words = np.full(rows, self.model), _labels(method, r) if len(ranks) else np.full(rows, method.spec())
        ratio, low, high = _speed_up(base, here, p, self.devices)
        compared = {"speedup": ratio, "speedup_low": low, "speedup_high": high, "verdict": verdict(ratio)}
        figures = {name: np.broadcast_to(x, ratio.shape) for name, x in {**_figures(p), **compared}.items()}
        columns: list[Columns] = [
            {"model": words[0], "device": np.full(rows, on.slug), "method": words[1], **alike}
            | {name: x[i] for name, x in figures.items()}
            for i, on in enumerate(self.devices)
        ]
        return columns, p


def sweep(
    model: Model,
    methods: str | Method | Sequence[str | Method] = ("full", "lora"),
    setup: Setup | None = None,
    device: GivenDevice | Sequence[GivenDevice] = "l40s",
    *,
    batch: Any = None,
    seq: Any = None,
    rank: Any = (),
    k: Any = (),
    gpus: Any = None,
    host: GivenHost = "default",
    **options: Any,
) -> Sweep:
    """Plan a sweep; `perfmodel.sweep` says what it takes and raises."""
    architecture = architecture_of(model)
    methods = one_or_several("methods", methods, (str, Method))
    names = one_or_several("device", device, (str, PathLike, DeviceProfile, Device))
    if not methods or not names:
        raise UserError("a sweep needs at least one method and one device")
    ks, ranks = _axis("k", k), _axis("rank", rank)
    bound = tuple({m.spec(): m.bind(architecture) for text in methods for m in _variants(text, ks)}.values())
    if len(ranks) and not any(map(has_rank, bound)):
        raise UserError("a sweep over rank needs a method with a rank, e.g. lora")
    if len(ks) and not any(map(_has_k, bound)):
        raise UserError("a sweep over k needs a method that trains the last K blocks: top_k")
    for m in bound:
        if len(ranks) and has_rank(m):
            with_rank(m, ranks).bind(architecture)
    devices = _distinct([profile_of(d) for d in names])
    if gpus is None:
        gpus = setup_given(setup, {}).gpus
    given = partial(_with_gpus, setup, options, architecture, devices)
    setups, refused = possible(given, _axis("gpus", gpus).tolist())
    base = next(iter(setups.values()))
    return Sweep(
        model=architecture.name,
        methods=bound,
        devices=devices,
        setup=base,
        host=host if isinstance(host, str) and host == "default" else hosts.host_of(host, devices[0]),
        batch=_axis("batch", base.batch if batch is None else batch),
        seq=_axis("seq", base.seq if seq is None else seq),
        rank=ranks,
        gpus=_axis("gpus", setups),
        refused=refused,
    )


def _with_gpus(
    setup: Setup | None, options: dict[str, Any], architecture: Architecture, devices: Devices, gpus: int
) -> Setup:
    """The setup of so many GPUs, which the nodes of each device hold."""
    found = setup_given(setup, {**options, "gpus": gpus}, architecture, devices)
    if gpus > 1:
        from ..prediction.placed import placed  # few ask for several

        for on in devices:
            placed(found, on)
    return found


def has_rank(method: Method) -> bool:
    """Whether a method's size is a rank that a sweep can vary."""
    return any(f.name == "r" for f in fields(method)) and getattr(method, "inner", "lora") == "lora"


def _has_k(method: Method) -> bool:
    return any(f.name == "k" for f in fields(method))


def with_rank(method: Method, r: Any) -> Method:
    """The method with another rank, or an array of ranks."""
    changed: dict[str, Any] = {"r": r}
    return replace(method, **changed)


def _variants(text: str | Method, ks: np.ndarray) -> list[Method]:
    method = method_of(text)
    if not len(ks) or not _has_k(method):
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
    """An axis as a flat array of positive integers, each once; of ranks and of K there may be none."""
    flat = np.asarray(list(values) if isinstance(values, Iterable) else [values]).reshape(-1)
    if not flat.size and name in ("rank", "k"):
        return np.zeros(0, np.int64)
    return np.unique(np.asarray(positive(name, flat)))


def _labels(method: Method, ranks: np.ndarray) -> np.ndarray:
    """What to give `predict` for each row."""
    values, index = np.unique(ranks, return_inverse=True)
    return np.array([with_rank(method, int(v)).spec() for v in values])[index]


def _figures(p: Prediction) -> Columns:
    """The figures of a prediction, for the columns that hold them."""
    t, m = p.time, p.memory
    figures = {
        "step_s": t.phases["total"], "step_low_s": t.low, "step_high_s": t.high, "forward_s": t.phases["forward"],
        "backward_s": t.phases["backward"], "optimizer_s": t.phases["optimizer"],
        "launch_bound_share": t.launch_bound_share, "tokens_per_s": p.tokens_per_second,
        "exposed_s": t.communication.exposed["total"],
        "flops": p.flops["total"], "bytes": p.bytes["total"], "kernels": p.kernels["total"], "peak_bytes": m.peak,
        "fits": p.fits, "trainable_params": p.trainable_params,
    }  # fmt: skip
    return {**figures, "padding_share": p.padding} if p.setup.lengths else figures


def _speed_up(base: Prediction | None, here: np.ndarray, p: Prediction, on: Devices) -> tuple[Any, Any, Any]:
    """Baseline time over this one, with its interval, each (devices, rows); 1 for the baseline itself."""
    if base is None:
        return (np.ones(p.time.phases["total"].shape),) * 3
    total = base.mean_step[:, here]
    components = {name: seconds[:, here] for name, seconds in base.mean_components.items()}
    ratio = total / p.mean_step
    spread = intervals.ratio_sigma(components, total, p.mean_components, p.mean_step, on)
    return ratio, *intervals.interval_bounds(ratio, spread)
