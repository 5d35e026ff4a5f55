"""What training a model takes on one device: full fine-tuning, LoRA and QLoRA, by precision of the weights."""

from dataclasses import replace
from typing import Any

from .. import units
from ..architectures import Architecture
from ..devices import host as hosts
from ..devices.device import profile_of
from ..errors import UserError
from ..methods import Method, parse
from ..methods.parts.targeted import ALL_LINEAR, Targeted
from ..prediction.predict import Model, Prediction, architecture_of, predict
from ..setup import Setup
from ..values import immutable
from .sentences import in_words, named_notes

QUERIES_AND_VALUES = ("q_proj", "v_proj")
Precisions = dict[str, tuple[dict[str, Any], tuple[str, ...]]]  # setup and methods of each


def precisions(half: str) -> Precisions:
    """What to answer for a device whose 16-bit dtype is `half`."""
    fp32, whole = {"dtype": "fp32", "amp": None}, {"dtype": half, "amp": None}
    return {
        "fp32": (fp32, ("full", "lora")),
        f"{half} autocast": ({**fp32, "amp": half}, ("full", "lora")),
        half: (whole, ("full", "lora")),
        f"8-bit base, {half}": (whole, ("lora_8bit",)),
        f"4-bit base, {half}": (whole, ("qlora",)),
    }


@immutable
class Estimated:
    """One method in one precision."""

    precision: str
    prediction: Prediction


@immutable
class Estimate:
    """What training takes in each precision.

    Attributes:
        capacity: memory of the device, B.
        left_out: what is not answered, and why.
    """

    capacity: float
    rows: list[Estimated]
    left_out: list[str]

    @property
    def notes(self) -> list[str]:
        """What is not answered, and what there is to know about methods, in whatever precision."""
        known: dict[str, list[str]] = {}
        for row in self.rows:
            known.setdefault(row.prediction.method, []).extend(row.prediction.notes)
        return [*self.left_out, *named_notes(list(known.items()))]

    @property
    def answer(self) -> str:
        """The fastest that fits, or what takes least memory if nothing does, in a sentence."""
        device = f"{self.rows[0].prediction.device} ({units.nbytes(self.capacity)})"
        fit = [row for row in self.rows if row.prediction.fits]
        if not fit:
            least = min(self.rows, key=lambda row: row.prediction.memory.peak)
            return f"None of these fits on {device}: {_told(least)} takes least, {_peak(least)}."
        best = min(fit, key=lambda row: row.prediction.time.phases["total"])
        step = units.seconds(best.prediction.time.phases["total"])
        return f"Fastest of what fits on {device}: {_told(best)}, {step} a step, {_peak(best)}."

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `estimate`: each prediction as `predict` has it, with its precision."""
        rows = [{"precision": row.precision, **row.prediction.as_dict()} for row in self.rows]
        return {"answer": self.answer, "memory_bytes": self.capacity, "rows": rows, "left_out": self.left_out}


def _told(row: Estimated) -> str:
    return f"{in_words(row.prediction)} ({row.precision})"


def _peak(row: Estimated) -> str:
    return units.nbytes(row.prediction.memory.peak)


def estimated(model: Model, setup: Setup, device: str, *, host: str = "default") -> Estimate:
    """Predict a step of every method in every precision (`precisions`); dtype and autocast of the setup do not count.

    Adapters of a model that PEFT has no default targets for are on queries and values, as of most that it knows.

    Raises:
        UserError: what `predict` refuses in all of them.
    """
    architecture, on = architecture_of(model), profile_of(device)
    by = hosts.host_of(host, on)
    rows, left_out = [], []
    for precision, (fields, methods) in precisions(on.hardware.half).items():
        for name in methods:
            try:
                p = predict(
                    architecture, _with_targets(parse(name), architecture), replace(setup, **fields), on, host=by
                )
            except UserError as error:
                refused = error
                left_out.append(f"{name} in {precision} is left out: {error}")
            else:
                rows.append(Estimated(precision, p))
    if not rows:
        raise refused
    return Estimate(on.capacity, rows, left_out)


def _with_targets(method: Method, architecture: Architecture) -> Method:
    if not isinstance(method, Targeted) or architecture.traits.targets.of(method.family) is not None:
        return method
    known = {name.rsplit(".", 1)[-1] for name in architecture.linear_names()}
    return replace(method, targets=QUERIES_AND_VALUES if known.issuperset(QUERIES_AND_VALUES) else (ALL_LINEAR,))
