"""A callback for `transformers.Trainer`: predicted against measured step, and what explains a gap.

    from perfmodel.integrations.trainer import StepPrediction

    trainer.add_callback(StepPrediction())

After the warm-up it watches some steps, prints once, and is silent from then on. Model, method and setup are read from
the Trainer, the device from its name.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..devices import host as hosts
from ..devices import profile
from ..errors import UserError
from .findings import Findings, findings
from .program import TrainingRun, device_here, trainer_program
from .watch import DATA, IN_STEP, OTHER, Stopwatch, Watch


class StepPrediction:
    """Prints predicted against measured step time and peak memory.

    Any event of a `TrainerCallback` that it does not name does nothing.

    Args:
        device: what to predict for, a name or the path of a TOML; the device that the Trainer runs on if None.
        host: name or path of a TOML.
        method: as `perfmodel predict --method` takes it; read from the model if None.
        traced: whether to predict from a trace of the real program (`perfmodel.traced`): for models and tuners without
            a built-in form.
        seq: tokens of a sample that you planned with; the configuration's max_length, or the longest seen, if None.
        warm_up: steps that are not watched.
        steps: steps that are watched.
        show: prints.

    Attributes:
        found: what was printed, once it was.
        own_seconds: host time that the callback took inside the watched steps.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        host: str = "default",
        method: str | None = None,
        traced: bool = False,
        seq: int | None = None,
        warm_up: int = 5,
        steps: int = 20,
        show: Callable[[str], None] = print,
    ) -> None:
        if warm_up < 0 or steps < 1:
            raise UserError(f"warm_up must be from 0 and steps from 1, got {warm_up} and {steps}")
        self.device, self.host, self.method, self.seq = device, host, method, seq
        self.traced = traced
        self.warm_up, self.steps, self.show = warm_up, steps, show
        self.found: Findings | None = None
        self.own_seconds = 0.0
        self.seen = 0
        self.watch: Watch | None = None
        self.hook: Any = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start over; only the first process watches."""
        self.seen, self.watch, self.found, self.own_seconds = 0, None, None, 0.0
        self.model, self.arguments = model, args
        self.resident = resident_bytes()
        self.active = bool(state.is_world_process_zero)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The data of a step is there."""
        start = time.perf_counter()
        if self.active and self.seen == self.warm_up and self.watch is None:
            self._begin()
        if self.watch:
            self.watch.mark(DATA)
        self.own_seconds += time.perf_counter() - start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over."""
        self.seen += 1
        if not self.watch:
            return
        start = time.perf_counter()
        self.watch.mark(IN_STEP)
        self.watch.steps += 1
        self.own_seconds += time.perf_counter() - start
        if self.watch.steps == self.steps:
            self._end()

    def _between(self, *args: Any, **kwargs: Any) -> None:
        if self.watch:
            self.watch.mark(OTHER)

    on_log = on_evaluate = on_save = _between

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was shorter than the window ends it."""
        if self.watch and self.watch.steps:
            self._end()

    def _begin(self) -> None:
        """Open the window: from now on shapes are seen and time is marked."""
        cuda = _cuda(self.model)
        self.watch = Watch(Stopwatch(cuda))
        if cuda:
            cuda.reset_peak_memory_stats()
        self.hook = self.model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, module: Any, args: Any, kwargs: Any) -> None:
        start = time.perf_counter()
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.watch and module.training and ids is not None:
            self.watch.batch(ids, kwargs.get("attention_mask"))
        self.own_seconds += time.perf_counter() - start

    def _end(self) -> None:
        """Close the window and print. A training run must not end because of its commentary."""
        watch, self.watch, self.active = self.watch, None, False
        self.hook.remove()
        assert watch is not None
        cuda = _cuda(self.model)
        try:
            program = trainer_program(self.model, self.arguments, self.method, from_trace=self.traced)
            name = cuda.get_device_name() if cuda else None
            self.found = findings(
                self._as_planned(program), watch, self._on(name), hosts.load(self.host),
                peak=cuda.max_memory_allocated() if cuda else None, grown=resident_bytes(peak=True) - self.resident,
                named=name,
            )  # fmt: skip
        except UserError as error:
            self.show(f"perfmodel: no prediction: {error}")
            return
        self.show(self.found.text())

    def _on(self, name: str | None) -> profile.DeviceProfile:
        return profile.load(self.device) if self.device else device_here(name)

    def _as_planned(self, program: TrainingRun) -> TrainingRun:
        if self.seq is None:
            return program
        return TrainingRun(program.architecture, program.method, program.setup, self.seq)


def _cuda(model: Any) -> Any:
    """torch.cuda if the model is on a GPU, else None."""
    if next(model.parameters()).device.type != "cuda":
        return None
    import torch

    return torch.cuda


def resident_bytes(*, peak: bool = False) -> int:
    """Memory of this process that is in RAM, or the most that ever was, B; 0 where the system does not tell."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)
