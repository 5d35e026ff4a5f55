"""A callback for `transformers.Trainer`: predicted against measured step, and what explains a gap.

    from perfmodel.integrations.trainer import StepPrediction

    trainer.add_callback(StepPrediction(log=trainer.log))

Before the first step it warns if the step will not fit. After the warm-up it watches some steps, prints and logs once,
and is silent from then on. Model, method and setup are read from the Trainer, the device from its name.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..devices import host as hosts
from ..devices import profile
from ..errors import UserError
from ..prediction.predict import Prediction
from .findings import Findings, as_configured, findings, too_large
from .program import TrainingRun, device_here, trainer_program
from .watch import DATA, IN_STEP, OTHER, Stopwatch, Watch


class StepPrediction:
    """Prints predicted against measured step time and peak memory.

    Any event of a `TrainerCallback` that it does not name does nothing.

    Args:
        device: what to predict for, a name or the path of a TOML; the device that the Trainer runs on if None.
        host: name or path of a TOML.
        node: what several processes run on, a name or the path of a TOML; the usual one of the device if None.
        method: as `perfmodel predict --method` takes it; read from the model if None.
        traced: whether to predict from a trace of the real program (`perfmodel.traced`): for models and tuners without
            a built-in form.
        seq: tokens of a sample that you planned with; the configuration's max_length, or the longest seen, if None.
        warm_up: steps that are not watched.
        steps: steps that are watched.
        show: prints.
        log: `trainer.log`, for figures in TensorBoard, W&B, MLflow or whatever the Trainer reports to, and in its log
            history: `Findings.metrics` says which. Printed only if None (a callback does not know its Trainer).

    Attributes:
        found: what was printed, once it was.
        own_seconds: host time that the callback took inside the watched steps.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        host: str = "default",
        node: str | None = None,
        method: str | None = None,
        traced: bool = False,
        seq: int | None = None,
        warm_up: int = 5,
        steps: int = 20,
        show: Callable[[str], None] = print,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if warm_up < 0 or steps < 1:
            raise UserError(f"warm_up must be from 0 and steps from 1, got {warm_up} and {steps}")
        self.device, self.host, self.node, self.method, self.seq = device, host, node, method, seq
        self.traced = traced
        self.warm_up, self.steps, self.show, self.log = warm_up, steps, show, log
        self.program: TrainingRun | None = None
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
        self._unhook()
        self.seen, self.watch, self.program, self.found, self.own_seconds = 0, None, None, None, 0.0
        self.model, self.arguments = model, args
        self.resident = resident_bytes()
        self.active = bool(state.is_world_process_zero)
        if self.active:
            self.hook = model.register_forward_pre_hook(self._forward, with_kwargs=True)

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
        if self.watch.steps == self.steps or state.global_step >= state.max_steps:
            self._end(control)

    def _between(self, *args: Any, **kwargs: Any) -> None:
        if self.watch:
            self.watch.mark(OTHER)

    on_log = on_evaluate = on_save = _between

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that was stopped ends the window."""
        if self.watch and self.watch.steps:
            self._end(control)
        self._unhook()

    def _begin(self) -> None:
        """Open the window: from now on time is marked and shapes are kept."""
        cuda = _cuda(self.model)
        self.watch = Watch(Stopwatch(cuda))
        if cuda:
            cuda.reset_peak_memory_stats()

    def _forward(self, module: Any, args: Any, kwargs: Any) -> None:
        """A batch is about to go through the model; the first one, before anything was computed, tells the length."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not module.training or ids is None:
            return
        if self.program is None:
            self._told(lambda: self._before(int(ids.shape[1])))
            self._between()
        if self.watch:
            start = time.perf_counter()
            self.watch.batch(ids, kwargs.get("attention_mask"))
            self.own_seconds += time.perf_counter() - start

    def _told(self, what: Callable[[], None]) -> None:
        """Do it; what cannot be predicted is one line and the end: no training must stop because of its commentary."""
        try:
            what()
        except Exception as error:  # a model may be anything
            self.watch, self.active = None, False
            self._unhook()
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.show(f"perfmodel: no prediction: {kind}{error}")

    def _before(self, seq: int) -> None:
        """Read the run, and warn if its step will not fit; a process that is taken alone of several is not judged."""
        on = self._on()
        by = hosts.host_of(self.host, on)
        read = partial(trainer_program, self.model, self.arguments, self.method, from_trace=self.traced)
        try:
            self.program, planned = self._planned(read(), seq, on, by)
            warning = too_large(planned, on)
        except UserError as error:
            if self.arguments.world_size == 1:
                raise
            self.program, _ = self._planned(read(alone=str(error)), seq, on, by)
            warning = ""
        if warning:
            self.show(f"perfmodel: {warning}")

    def _planned(
        self, program: TrainingRun, seq: int, on: profile.DeviceProfile, by: hosts.Host
    ) -> tuple[TrainingRun, Prediction]:
        """A run, and the prediction of its step as configured, or of a first batch of so many tokens a sample."""
        setup = program.setup if program.setup.gpus == 1 else replace(program.setup, node=self.node)
        known = replace(program, length=self.seq or program.length, setup=setup)
        return known, as_configured(known, seq, on, by)

    def _end(self, control: Any) -> None:
        """Close the window, print and log."""
        watch, self.watch, self.active = self.watch, None, False
        self._unhook()
        assert watch is not None
        self._told(lambda: self._find(watch))
        if self.found is None:
            return
        self.show(self.found.text())
        if self.log:
            wanted = control.should_log
            self.log(self.found.metrics())
            control.should_log = wanted  # the Trainer takes any log for its own of this step

    def _find(self, watch: Watch) -> None:
        cuda = _cuda(self.model)
        if self.program is None:
            raise UserError("no batch with input_ids was seen; models of something else are not compared")
        on = self._on()
        self.found = findings(
            self.program, watch, on, hosts.host_of(self.host, on), peak=cuda.max_memory_allocated() if cuda else None,
            grown=resident_bytes(peak=True) - self.resident, named=self._gpu(),
        )  # fmt: skip

    def _on(self) -> profile.DeviceProfile:
        return profile.load(self.device) if self.device else device_here(self._gpu())

    def _gpu(self) -> str | None:
        """The maker's name of the GPU that the model is on; None on a CPU."""
        cuda = _cuda(self.model)
        return str(cuda.get_device_name()) if cuda else None

    def _unhook(self) -> None:
        if self.hook:
            self.hook.remove()
            self.hook = None


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
