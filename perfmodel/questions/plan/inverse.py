"""What fits: the largest micro-batch, the longest context, the smallest GPU, the biggest model.

Of a peak that grows with what is searched, the largest value that fits is found by doubling and halving.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ... import architectures
from ...architectures.base import Architecture
from ...architectures.names import name_order
from ...devices.host import GivenHost
from ...devices.profile import DeviceProfile
from ...errors import UserError
from ...methods import Method
from ...prediction.predict import Model, Prediction, architecture_of, method_of
from ...program.sizes import LARGEST
from ...recording.collector import no_collector
from ...setup import Setup
from .fitting import Fitting, Relaxation
from .job import check_single
from .planning import Devices, in_half_of_device, planned_devices

LEAST_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}  # of a weight, by the dtype of the base
FEW_BITS = 0.25  # of a weight of a base in few bits, its scales not counted: GPTQ has them in two


@dataclass(frozen=True)
class Largest:
    """The largest value of something that fits.

    Attributes:
        what: "batch", "seq", "device" or "model".
        value: None where not even the smallest fits.
        prediction: of the step with it.
        given_up: what has to go for it to fit.
        limited_by: what keeps it from being larger: memory, or what the model takes.
        gpus: of the job; the micro-batch is that of each.
    """

    what: str
    device: str
    method: str
    value: int | str | None
    prediction: Prediction | None
    given_up: tuple[str, ...] = ()
    limited_by: str = "memory"
    gpus: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        p = self.prediction
        return {
            "what": self.what, "device": self.device, "gpus": self.gpus, "method": self.method,
            "value": self.value, "given_up": list(self.given_up), "limited_by": self.limited_by,
            "peak_bytes": None if p is None else int(p.memory.peak),
            "step_s": None if p is None else float(p.time.phases["total"]),
        }  # fmt: skip


Answers = list[Largest]


def largest_batch(model: Model, method: str | Method, setup: Setup, on: DeviceProfile, host: GivenHost) -> Largest:
    """The largest micro-batch that fits, everything else as it is."""
    return _largest("batch", model, method, replace(setup, batch=1), on, host, 1)


def longest_context(model: Model, method: str | Method, setup: Setup, on: DeviceProfile, host: GivenHost) -> Largest:
    """The longest samples that fit, everything else as it is; all of that length, which ranks can share."""
    least = 2 if setup.prompt is None else setup.prompt + 1  # a token predicts the next one
    return _largest("seq", model, method, replace(setup, seq=least, lengths=None), on, host, least)


def _largest(
    what: str, model: Model, method: str | Method, setup: Setup, on: DeviceProfile, host: GivenHost, least: int
) -> Largest:
    check_single(setup)
    architecture = architecture_of(model)
    bound = method_of(method).bind(architecture)
    fitting = Fitting(architecture, host)
    refusal: list[str] = []

    step = 1 if what == "batch" else setup.seq_multiple
    smallest = -(-least // step)

    def at(size: int) -> Prediction | None:
        changes: dict[str, Any] = {what: size * step}
        try:
            p = fitting.predicted(Relaxation((), replace(setup, **changes), bound), on)
        except UserError as error:
            refusal.append(str(error))
            if size == smallest:
                raise
            return None
        return p if p.fits else None

    with no_collector():
        value, p = _search(at, smallest)
    by = refusal[-1] if refusal else "memory"
    return Largest(what, on.slug, bound.spec(), value * step or None, p, limited_by=by, gpus=int(setup.gpus))


def _search(at: Callable[[int], Prediction | None], smallest: int) -> tuple[int, Prediction | None]:
    """The largest size with a prediction, and that; 0 if the smallest has none."""
    best, low, high = at(smallest), smallest, smallest * 2
    if best is None:
        return 0, None
    while high <= LARGEST and (p := at(high)) is not None:
        best, low, high = p, high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        p = at(middle)
        if p is None:
            high = middle
        else:
            best, low = p, middle
    return low, best


def smallest_gpus(model: Model, method: str | Method, setup: Setup, device: Devices | None, host: GivenHost) -> Answers:
    """The GPUs of least memory on which the step fits: as it is, and with what may be given up; ties included."""
    check_single(setup)
    architecture = architecture_of(model)
    bound = method_of(method).bind(architecture)
    fitting = Fitting(architecture, host)
    found: list[tuple[float, Largest]] = []
    refused: list[UserError] = []
    devices = sorted(planned_devices(device), key=lambda on: on.hardware.memory_bytes)
    with no_collector():
        for on in devices:
            size = on.hardware.memory_bytes
            if any(not answer.given_up and smaller < size for smaller, answer in found):
                break
            try:
                best = fitting.best(in_half_of_device(setup, on), bound, on, lambda p: float(p.time.phases["total"]))
            except UserError as error:
                refused.append(error)
                continue
            if best is not None:
                relaxation, p = best
                given_up, gpus = relaxation.given_up, int(setup.gpus)
                found.append((size, Largest("device", on.slug, bound.spec(), on.slug, p, given_up, gpus=gpus)))
    if refused and len(refused) == len(devices):
        raise refused[0]
    return [*_least([pair for pair in found if not pair[1].given_up]),
            *(answer for answer in _least(found) if answer.given_up)]  # fmt: skip


def _least(found: list[tuple[float, Largest]]) -> Answers:
    """Those of the least memory."""
    least = min((size for size, _ in found), default=None)
    return [answer for size, answer in found if size == least]


def biggest_model(method: str | Method, setup: Setup, on: DeviceProfile, host: GivenHost) -> Largest:
    """The bundled model of most parameters whose step fits, everything else as it is."""
    check_single(setup)
    asked = method_of(method)
    best: Prediction | None = None
    with no_collector():
        for name in sorted(architectures.model_names(), key=name_order):
            p = _model_that_fits(name, asked, setup, on, host)
            if p is not None and (best is None or p.total_params > best.total_params):
                best = p
    biggest = None if best is None else best.model
    return Largest("model", on.slug, asked.spec(), biggest, best, gpus=int(setup.gpus))


def _model_that_fits(name: str, asked: Method, setup: Setup, on: DeviceProfile, host: GivenHost) -> Prediction | None:
    """The step of a bundled model; None if it does not fit, or the method or setup is none for it."""
    config = architectures.load(name)
    if config.kind not in architectures.supported():
        return None
    model = architectures.from_config(config)
    if _least_of_weights(model, asked, setup) > on.capacity:
        return None
    try:
        p = Fitting(model, host).predicted(Relaxation((), setup, asked.bind(model)), on)
    except UserError:
        return None
    return p if p.fits else None


def _least_of_weights(model: Architecture, asked: Method, setup: Setup) -> float:
    """Bytes of weights that a GPU has at least: of its MLPs, a part where several may share them; none on the host."""
    if setup.offload == "params":
        return 0.0
    each = FEW_BITS if asked.in_few_bits else LEAST_BYTES[setup.dtype]
    return float(model.layers * 2 * model.hidden * model.intermediate * each / setup.gpus)


QUESTIONS = ("largest_batch", "longest_context", "smallest_gpu", "biggest_model")


def answers(
    questions: Sequence[str], model: Model | None, methods: Sequence[str | Method], setup: Setup,
    device: Devices | None, host: GivenHost = "default",
) -> Answers:  # fmt: skip
    """Answers to some of `QUESTIONS` for every method; all but the smallest GPU on each device.

    Raises:
        UserError: no device where one is needed, and what `predict` refuses.
    """
    return [found for question in questions for method in methods
            for found in _answers(question, model, method, setup, device, host)]  # fmt: skip


def _answers(
    question: str, model: Model | None, method: str | Method, setup: Setup, device: Devices | None, host: GivenHost
) -> Iterator[Largest]:
    if question == "smallest_gpu":
        assert model is not None
        yield from smallest_gpus(model, method, setup, device, host)
        return
    if device is None:
        raise UserError(f"--{question.replace('_', '-')} asks about a device: give --device")
    for on in planned_devices(device):
        if question == "biggest_model":
            yield biggest_model(method, in_half_of_device(setup, on), on, host)
        else:
            assert model is not None
            ask = {"largest_batch": largest_batch, "longest_context": longest_context}[question]
            yield ask(model, method, in_half_of_device(setup, on), on, host)
