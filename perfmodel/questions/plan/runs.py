"""One way to run a job: a step as `predict` answers it, times the counts of the job, in seconds, dollars and joules."""

from math import log
from typing import Any

from ...devices.profile import DeviceProfile
from ...prediction import intervals
from ...prediction.energy import SIGMA, BoardPower, board_power
from ...prediction.predict import Prediction
from ...values import immutable
from .job import Job, JobCounts
from .prices import Price

HOUR = 3600.0
AT_STEPS_POWER = ("training", "evaluation", "periodic work")  # the rest of a job is waiting


def gpus_in_words(device: str, gpus: int) -> str:
    """GPUs in words."""
    return device if gpus == 1 else f"{gpus} x {device}"


@immutable
class PlannedRun:
    """A job on one GPU, or on as many as its setup has.

    Attributes:
        device: slug.
        asked: spec of the method that was asked for; QLoRA may run in the place of LoRA.
        prediction: of its step.
        given_up: what of the setup that was asked for had to go, for the step to fit.
        work: the job in numbers.
        parts: seconds by what takes them: training, evaluation, periodic work, checkpoints, start-up.
        price: None if none is known.
        power: None if the board's limit is not known.
    """

    device: str
    asked: str
    prediction: Prediction
    given_up: tuple[str, ...]
    work: JobCounts
    parts: dict[str, float]
    price: Price | None
    power: BoardPower | None

    @property
    def method(self) -> str:
        """Spec of the method that runs."""
        return self.prediction.method

    @property
    def where(self) -> str:
        """The GPUs that it runs on, in words."""
        return gpus_in_words(self.device, self.gpus)

    @property
    def seconds(self) -> float:
        """Of the whole job."""
        return sum(self.parts.values())

    @property
    def interval(self) -> tuple[float, float]:
        """The 90 % interval of the seconds: that of a step, which is the same error in all of them."""
        time = self.prediction.time
        low, high = (float(bound / time.phases["total"]) for bound in (time.low, time.high))
        scaled = sum(seconds for part, seconds in self.parts.items() if part in AT_STEPS_POWER)
        return self.seconds + scaled * (low - 1), self.seconds + scaled * (high - 1)

    @property
    def hourly(self) -> float | None:
        """Dollars an hour of what is rented: all GPUs of the job."""
        return None if self.price is None else self.price.usd * self.gpus

    @property
    def gpus(self) -> int:
        """How many GPUs it runs on."""
        return int(self.prediction.setup.gpus)

    @property
    def dollars(self) -> float | None:
        """Of the whole job; None if no price is known."""
        return None if self.hourly is None else self.seconds / HOUR * self.hourly

    @property
    def joules(self) -> dict[str, float] | None:
        """Of all boards and of their share of the nodes; None if the board's limit is not known."""
        if self.power is None:
            return None
        working = sum(seconds for part, seconds in self.parts.items() if part in AT_STEPS_POWER)
        board = working * self.power.step + (self.seconds - working) * self.power.idle
        return {"gpu": board * self.gpus, "node": self.seconds * self.power.node * self.gpus}

    @property
    def joules_interval(self) -> tuple[float, float] | None:
        """The 90 % interval of both together: of power and of time, taken as independent."""
        if self.joules is None:
            return None
        low, high = self.interval
        spread = log(high / low) / (2 * intervals.Z90)
        return intervals.interval_bounds(sum(self.joules.values()), (spread**2 + SIGMA**2) ** 0.5)

    def as_dict(self, today: Any, grid_co2: float | None) -> dict[str, Any]:
        """Plain values (SI)."""
        low, high = self.interval
        p, hourly = self.prediction, self.hourly
        return {
            "device": self.device, "method": self.method, "given_up": list(self.given_up),
            "setup": p.setup.as_dict(), "step_s": float(p.time.phases["total"]),
            "steps": self.work.steps, "seconds": {"total": self.seconds, "low": low, "high": high, **self.parts},
            "dollars": None if hourly is None else {
                "total": self.dollars, "low": low / HOUR * hourly, "high": high / HOUR * hourly,
            },
            "price": None if self.price is None else self.price.as_dict(today),
            "energy_j": self.energy, "co2_kg": self.co2(grid_co2),
            "peak_bytes": int(p.memory.peak), "trainable_params": int(p.trainable_params),
        }  # fmt: skip

    def co2(self, grid: float | None) -> float | None:
        """kg of CO2 from a grid of so many g/kWh."""
        return None if grid is None or self.joules is None else sum(self.joules.values()) / 3.6e6 * grid / 1e3

    @property
    def energy(self) -> dict[str, float] | None:
        """J of board, node and both, with their interval; of a step, and of the job for each token of it."""
        joules, bounds = self.joules, self.joules_interval
        if joules is None or bounds is None or self.power is None:
            return None
        step = float(self.prediction.time.phases["total"]) * (self.power.step + self.power.node) * self.gpus
        total = sum(joules.values())
        return {
            **joules, "total": total, "low": bounds[0], "high": bounds[1], "step": step,
            "token": total / self.work.trained_tokens,
        }  # fmt: skip


def planned_run(
    p: Prediction, on: DeviceProfile, job: Job, work: JobCounts, *, asked: str, given_up: tuple[str, ...],
    price: Price | None, node: float | None,
) -> PlannedRun:  # fmt: skip
    """A job with steps as predicted."""
    power = board_power(p, on.hardware, node)
    return PlannedRun(on.slug, asked, p, given_up, work, seconds_of_job(job, work, p), price, power)


def seconds_of_job(job: Job, work: JobCounts, p: Prediction) -> dict[str, float]:
    """Seconds by what takes them.

    Of a short step forward and backward take their share, the optimizer its whole time. An evaluation runs forward
    passes of as many samples as those of a training micro-batch, at their time.
    """
    phases = p.time.phases
    total, forward = float(phases["total"]), float(phases["forward"])
    short = float(phases["optimizer"]) + work.last * (forward + float(phases["backward"]))
    beside = (float(c.seconds) * (1 if c.every is None else work.steps // c.every) for c in p.periodic)
    return {
        "training": (work.steps - work.short) * total + work.short * short,
        "evaluation": work.evaluated * work.eval_batches * forward / p.setup.grad_accum,
        "periodic work": sum(beside),
        "checkpoints": work.saved * checkpoint_bytes(p, states=not job.save_only_model) / job.disk,
        "start-up": job.startup,
    }


def checkpoint_bytes(p: Prediction, *, states: bool = True) -> int:
    """Bytes of a checkpoint: adapters and what else trains where there are adapters, else all weights; and the
    optimizer's states, unless they are left out (`Trainer._save_checkpoint`, peft's `save_pretrained`)."""
    assert p.step is not None
    trained = [q for q in p.step.parameters if q.requires_grad]
    saved = trained if any(q.kind == "adapter" for q in trained) else p.step.parameters
    return int(sum(q.nbytes * q.count for q in saved) + states * p.memory.optimizer)
