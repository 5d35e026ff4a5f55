"""What has to be given up so that a step fits into a device's memory, and the fastest way that is left.

First comes the setup as it was asked for. Where that does not fit, activation checkpointing, smaller micro-batches with
more accumulation and, of FSDP, gradients that are reduced in each: every combination of them. Where none of these fits
and the method is LoRA, QLoRA with the same options. Of the first of these stages that holds anything that fits, the
fastest is taken. The samples of an optimizer step stay the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ... import methods
from ...architectures import Architecture
from ...devices import host as hosts
from ...devices.host import GivenHost
from ...devices.profile import DeviceProfile
from ...errors import UserError
from ...methods import Method
from ...prediction import memory
from ...prediction.over_lengths import longest_drawn
from ...prediction.predict import Prediction, predict
from ...prediction.remembered import Steps
from ...program.dims import Dim
from ...recording.reuse import step_key
from ...setup import Setup
from .. import knobs
from ..splits import Split

Duration = Callable[[Prediction], float]


@dataclass(frozen=True)
class Relaxation:
    """A setup and method, and what of those asked for is given up in them."""

    given_up: tuple[str, ...]
    setup: Setup
    method: Method


def relaxations(setup: Setup, method: Method) -> Iterator[list[Relaxation]]:
    """What to try, one stage after another; in a stage smaller micro-batches first, each without checkpoints first."""
    yield [Relaxation((), setup, method)]
    assert method.architecture is not None
    smaller = _smaller(method.architecture, setup)
    yield [Relaxation(label, other, method) for label, other in smaller]
    few_bits = _in_few_bits(method)
    if few_bits is not None:
        yield [Relaxation(("QLoRA", *label), other, few_bits) for label, other in [*smaller, ((), setup)]]


def tried(method: Method) -> str:
    """What `relaxations` give up, in words."""
    also = ", checkpointing and QLoRA" if _in_few_bits(method) else " and checkpointing"
    return f"smaller micro-batches{also} alone"


def _smaller(architecture: Architecture, setup: Setup) -> list[tuple[tuple[str, ...], Setup]]:
    """The same samples a step in less memory."""
    found = []
    for position in knobs.memory_knob(architecture, setup)[1:]:
        try:
            changed = replace(setup, **position.setup)
        except UserError:  # what is updated inside backward takes one micro-batch
            continue
        if (
            changed.batch <= setup.batch
            and Split.of(changed) == Split.of(setup)
            and changed.checkpoint in (setup.checkpoint, "block")
        ):
            found.append(((position.label,), changed))
    return sorted(found, key=lambda pair: pair[1].batch)


def _in_few_bits(method: Method) -> Method | None:
    """QLoRA with the options of a LoRA; None for another method."""
    name, _, options = method.spec().partition(":")
    if name != "lora" or method.architecture is None:
        return None
    try:
        return methods.parse(f"qlora:{options}" if options else "qlora").bind(method.architecture)
    except UserError:  # an option that it does not have
        return None


@dataclass
class Fitting:
    """Searches devices for what fits; a step is recorded once for all that run the same calls.

    Attributes:
        peaks: bytes of steps whose peak is known, and of NCCL's buffers beside it.
    """

    architecture: Architecture
    host: GivenHost
    steps: Steps = field(default_factory=lambda: Steps(whole=True))
    peaks: dict[Any, tuple[int, int]] = field(default_factory=dict)

    def best(
        self, setup: Setup, method: Method, on: DeviceProfile, duration: Duration
    ) -> tuple[Relaxation, Prediction] | None:
        """The fastest of the first stage in which anything fits; None if nothing does.

        Raises:
            UserError: the setup as asked for is refused on this device.
        """
        for stage in relaxations(setup, method):
            found = [(relaxation, p) for relaxation, p in self._fitting(stage, on)]
            if found:
                return min(found, key=lambda pair: duration(pair[1]))
        return None

    def _fitting(self, stage: list[Relaxation], on: DeviceProfile) -> Iterator[tuple[Relaxation, Prediction]]:
        # Method, checkpointing and whether it accumulates, of which a smaller micro-batch did not fit. Between
        # micro-batches whole gradients may be kept that are sharded after a single one (FSDP's `no_sync`)
        full: set[tuple[Any, ...]] = set()
        fitting: set[tuple[str, Dim]] = set()  # method and micro-batch: what is recomputed would only add to its time
        for relaxation in stage:
            spec, setup = relaxation.method.spec(), relaxation.setup
            kind = spec, setup.checkpoint, setup.grad_accum > 1, setup.sync_each_batch
            if kind in full or (spec, setup.batch) in fitting:
                continue
            try:
                p = self._if_it_fits(relaxation, on)
            except UserError:
                if not relaxation.given_up:
                    raise
                continue
            if p is None:
                full.add(kind)
            else:
                fitting |= {(spec, setup.batch)} if setup.checkpoint == "none" else set()
                yield relaxation, p

    def _if_it_fits(self, asked: Relaxation, on: DeviceProfile) -> Prediction | None:
        """The prediction of a step that fits; what is known not to is not priced."""
        key, longest = self._key(asked, on), longest_drawn(asked.setup)
        if key not in self.peaks and longest != asked.setup:  # cheaper than the mean over all
            self._note(key, self.predicted(replace(asked, setup=longest), on))
        if key in self.peaks and not memory.fits(self.peaks[key][0], on.capacity, on.kind):
            return None
        p = self.predicted(asked, on)
        self._note(key, p)
        return p if p.fits else None

    def _note(self, key: Any, p: Prediction) -> None:
        self.peaks[key] = int(p.memory.peak), int(p.memory.buffers)

    def _key(self, asked: Relaxation, on: DeviceProfile) -> Any:
        """Steps with one key have one peak; a method that goes by the prices of a device has one of its own there."""
        its_own = on.slug if type(asked.method).priced is not Method.priced else ""
        return its_own, step_key(asked.method, asked.setup, on.kind, on.compute_capability or "8.0")

    def predicted(self, asked: Relaxation, on: DeviceProfile) -> Prediction:
        """The step of a setup and method on a device."""
        by = hosts.host_of(self.host, on)
        bare = replace(asked.method, architecture=None)
        return predict(self.architecture, bare, asked.setup, on, host=by, steps=self.steps)

    def least(self, setup: Setup, method: Method, on: DeviceProfile) -> int:
        """The lowest peak of any stage with NCCL's buffers, B, of those that the device does not refuse."""
        asked = (self._key(relaxation, on) for stage in relaxations(setup, method) for relaxation in stage)
        return min(sum(self.peaks[key]) for key in asked if key in self.peaks)
