"""What a calibration says of what it was made from, and of steps that it has not seen: the judgement before it is kept.

Predicted are the timed programs of the host, in the fit and left out of it, and, on a calibrated CPU, a few real steps,
measured as `validate measure` does and predicted as anybody would. Files whose predictions are further off than half of
what was measured are not written: such an error is none of the machine, but of the fit.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from perfmodel.architectures import Config
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.prediction.predict import predict
from perfmodel.prediction.times import step_time
from perfmodel.program.part import PHASES
from perfmodel.setup import Setup

from ..accuracy import Errors
from ..fitting.judging import Fit
from ..measuring.cells import Cell
from ..measuring.environment import native_bf16
from ..measuring.visit import visit
from .hosts import HostFit, Timed, dispatched

WORST = 0.5  # mean |relative error| beyond which nothing is written
FITTED, LEFT_OUT, STEPS = "fitted", "left_out", "steps"
TITLES = {FITTED: "programs in the host's fit", LEFT_OUT: "programs left out of it", STEPS: "real steps, not fitted"}
WARM_UP, TIMED = 2, 5
MODELS = {
    "llama": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4000, "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 384, "n_layer": 3, "n_head": 6, "n_positions": 128, "vocab_size": 6000,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    },
}  # fmt: skip


def of_programs(found: HostFit, on: DeviceProfile | None = None) -> dict[str, Errors]:
    """Errors of predicting the timed programs, those in the fit and those left out of it."""
    groups = {FITTED: found.fitted, LEFT_OUT: found.left_out}
    return {key: Errors.of(_error(t, found.host, on) for t in timed) for key, timed in groups.items() if timed}


def _error(timed: Timed, by: Host, on: DeviceProfile | None) -> float:
    if on is not None:
        predicted = float(step_time(timed.step, on, by).phases["total"])
    else:
        predicted = sum(dispatched(timed.step, by).values())
    return predicted / sum(timed.seconds[phase] for phase in PHASES) - 1.0


def cells(dtypes: Sequence[str]) -> Iterator[Cell]:
    """Small real steps: two architectures, full fine-tuning and LoRA, every dtype."""
    for name, values in MODELS.items():
        for method in ("full", "lora:r=8,targets=all-linear"):
            for dtype in dtypes:
                yield Cell(Config(values, name, name), method, Setup(batch=2, seq=96, dtype=dtype))


def of_steps(on: DeviceProfile, by: Host, threads: int) -> Errors:
    """Errors of predicting real steps on a calibrated CPU that no fit has seen."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    errors = []
    try:
        for cell in cells(("fp32", "bf16") if native_bf16() else ("fp32",)):
            measured = visit(cell, "cpu", threads=threads, warm_up=WARM_UP, steps=TIMED, whole=False)["median_s"][
                "step"
            ]
            predicted = predict(cell.config, cell.method, cell.setup, on, host=by).time.phases["total"]
            errors.append(float(predicted) / measured - 1.0)
    finally:
        torch.set_num_threads(before)
    return Errors.of(errors)


def poor(fits: Mapping[str, Fit], kind: str) -> dict[str, str]:
    """Blocks of a GPU's kernels that are too far off on rows that no fit saw -> what becomes of them.

    The file goes without them, so its class's figures are taken. A CPU's take part in the programs and steps that are
    judged.
    """
    blocks = fits.items() if kind == "cuda" else ()
    off = {block: fit.errors.mean for block, fit in blocks if not fit.errors.mean <= WORST}
    told = "kernels of {}: off by {:,.0f} % on rows left out of the fit: the figures of its class are taken"
    return {block: told.format(block, 100 * mean) for block, mean in off.items()}


def refusal(checks: Mapping[str, Errors]) -> str:
    """Why a fit is not to be kept, in one line; empty if it may be."""
    for what, mean in ((TITLES[key], errors.mean) for key, errors in checks.items()):
        if not mean <= WORST:
            limit = f"more than {100 * WORST:.0f} %: nothing was written"
            return f"predictions of {what} are off by {100 * mean:,.0f} % in the mean, {limit}"
    return ""
