"""The answer in words: which method is faster, by how much, and because of what."""

from collections.abc import Iterable, Sequence

from .. import units
from ..prediction.predict import Prediction
from .anatomy import BUBBLE, PERIODIC, WAITING, Anatomy
from .speedup import SpeedUp

WORTH_SAYING = 0.2  # of the main part: a part below this against the trend is left out of the sentence
MATTERS = 0.02  # of the step: parts that change by less changed nothing
ALIKE = 0.67  # of the larger of two changes: from here on they cancel out
DOMINATES = 1 / 3  # of the step

OF = {  # part -> how it follows an amount of time
    "gemm_forward": "of forward GEMMs",
    "gemm_input_grad": "of input-gradient GEMMs",
    "gemm_weight_grad": "of weight-gradient GEMMs",
    "attention": "of attention",
    "embedding": "in the embedding and its gradient",
    "pointwise": "of norms, activations and residual adds",
    "loss": "in logits and loss",
    "recompute": "of recomputed forward",
    "dequantisation": "of dequantisation",
    "accumulation": "of gradient accumulation",
    "adapter_gemm": "of adapter GEMMs",
    "adapter_pointwise": "of adapter casts and pointwise kernels",
    "exchange": "of copies to and from what travels between GPUs",
    "communication": "of communication that nothing hides",
    "offloading": "of copies over the bus and of the host's cores that nothing hides",
    "clipping": "of gradient clipping",
    "optimizer": "in the optimizer",
    "clipped": "in the optimizer with clipping",
    PERIODIC: "on average of what comes every so many steps",
    BUBBLE: "of waiting for other stages",
    WAITING: "of waiting for the host",
}


def in_words(p: Prediction) -> str:
    """The method of a prediction in words."""
    return p.step.method.in_words() if p.step is not None else p.method


def notes_by_method(predictions: Sequence[Prediction]) -> list[str]:
    """What there is to know about several predictions; of some alone, with their names."""
    return named_notes([(in_words(p), p.notes) for p in predictions])


def named_notes(known: Sequence[tuple[str, Iterable[str]]]) -> list[str]:
    """Notes of several methods, each by its name and notes; one that not all have begins with whose it is."""
    told: dict[str, list[str]] = {}
    for name, notes in known:
        for note in dict.fromkeys(notes):
            told.setdefault(note, []).append(name)
    return [note if len(of) == len(known) else f"{', '.join(of)}: {note}" for note, of in told.items()]


def answer(a: Prediction, b: Prediction, speedup: SpeedUp, reason: str, capacity: float, room: float) -> str:
    """One sentence on `b` against `a`; `capacity` is the device's memory in bytes, `room` the highest peak that fits.

    >>> from perfmodel import compare
    >>> full, lora = "full", "lora:r=32,targets=q_proj+v_proj"
    >>> compare("llama-3.2-3b", (full, lora), device="l40s", batch=4, seq=210).speedups[0].answer.split(",")[0]
    'LoRA r=32 on q'
    """
    text = f"{capitalised(in_words(b))} {_verdict(speedup, in_words(a))}" + (f", {reason}" if reason else "")
    return f"{text}.{_room(a, b, capacity, room)}"


def _verdict(s: SpeedUp, other: str) -> str:
    if s.verdict == "slower":
        factor, low, high = 1 / s.ratio, 1 / s.high, 1 / s.low
    else:
        factor, low, high = s.ratio, s.low, s.high
    interval = f"[{low:.2f} - {high:.2f}]"
    if s.verdict == "same":
        return f"takes about as long as {other} here (speed-up {factor:.2f} {interval})"
    return f"is {factor:.2f}x {s.verdict} than {other} here {interval}"


def _room(a: Prediction, b: Prediction, capacity: float, room: float) -> str:
    """A further sentence where one of the two does not fit."""
    if a.fits and b.fits:
        return ""
    out = [p for p in (a, b) if not p.fits]
    *peaks, limit = _told_apart([float(p.memory.peak) for p in out], room)
    besides = ", and NCCL's buffers" if a.memory.buffers or b.memory.buffers else ""
    less = f" ({units.nbytes(capacity)} less CUDA's context and workspaces{besides})" if room < capacity else ""
    have = f"of {limit}{less}"
    if len(out) == 2:
        return f" Neither fits: they need {' and '.join(peaks)} {have}."
    fits = b if b.fits else a
    return f" Only {in_words(fits)} fits: {in_words(out[0])} needs {peaks[0]} {have}."


def _told_apart(peaks: Sequence[float], limit: float) -> list[str]:
    """Peaks and the limit that they pass, with as many digits as it takes to see that they do."""
    told = [units.nbytes(size) for size in (*peaks, limit)]
    return told if told[-1] not in told[:-1] else [f"{size / 1e9:,.3f} GB" for size in (*peaks, limit)]


def why(a: Anatomy, b: Anatomy, verdict: str, tokens: int) -> str:
    """The reason for a verdict: the largest part of the waterfall in its direction, and the largest against it.

    Args:
        a, b: the baseline's step and the other one's.
        verdict: faster, slower or same.
        tokens: tokens of one step.
    """
    if a.parts["clipping"] or b.parts["clipping"]:
        a, b = _with_clipping(a), _with_clipping(b)
    change = {name: b.parts[name] - a.parts[name] for name in a.parts}
    saved, added = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
    down, up = -change[saved], change[added]
    if verdict == "same":
        return _balance(saved, down, added, up, MATTERS * a.total)
    if verdict == "faster":
        if up >= down:
            return f"because all that it saves, mainly {_amount(saved, down)}, outweighs {_amount(added, up)}"
        against = f", though it adds {_amount(added, up)}" if up > WORTH_SAYING * down else ""
        return f"because {_saved(saved, a, b, tokens)}{against}"
    if down >= up:
        return f"because all that it adds, mainly {_amount(added, up)}, outweighs the saving of {_amount(saved, down)}"
    more = f", more than it saves: {_amount(saved, down)}" if down > WORTH_SAYING * up else ""
    return f"because {_added(added, a, b)}{more}"


def _with_clipping(of: Anatomy) -> Anatomy:
    """A step whose optimizer holds its clipping, as the row `optimizer` of all tables does."""
    others = {name: seconds for name, seconds in of.parts.items() if name not in ("clipping", "optimizer")}
    return Anatomy({**others, "clipped": of.parts["clipping"] + of.parts["optimizer"]}, of.phases)


def _amount(part: str, seconds: float) -> str:
    return f"{units.seconds(seconds)} {OF[part]}"


def _saved(part: str, a: Anatomy, b: Anatomy, tokens: int) -> str:
    before, after = a.parts[part], b.parts[part]
    if part == WAITING:
        return f"the device waits {units.seconds(before - after)} less for the host"
    if part in ("optimizer", "clipped") and before > DOMINATES * a.total:
        before, after = (_optimizer_step(of, part) for of in (a, b))
        shrinks = f"{units.seconds(before)} of {units.seconds(a.total)}, now {units.seconds(after)}"
        step = "optimizer step" + " with clipping" * (part == "clipped")
        return f"the {step} dominates at {tokens:,} tokens a step: {shrinks}"
    if after == 0.0:
        return f"it does without {_amount(part, before)}"
    return f"it saves {_amount(part, before - after)}"


def _optimizer_step(of: Anatomy, part: str) -> float:
    """Seconds of the phase, waits included; what runs inside backward is none of the phase."""
    phase = of.phases.get("optimizer")
    return max(of.parts[part], 0.0 if phase is None else phase.seconds)


def _added(part: str, a: Anatomy, b: Anatomy) -> str:
    more = b.parts[part] - a.parts[part]
    if part == WAITING:
        return f"the device waits {units.seconds(more)} longer for the host"
    return f"it adds {_amount(part, more)}"


def _balance(saved: str, down: float, added: str, up: float, matters: float) -> str:
    if down > matters and up > matters:
        adds, saves = f"what it adds, mainly {_amount(added, up)},", f"what it saves, mainly {_amount(saved, down)},"
        if up < ALIKE * down:
            return f"because {adds} uses up part of {saves[:-1]}"
        if down < ALIKE * up:
            return f"because {saves} makes up for part of {adds[:-1]}"
        return f"because {adds} uses up {saves[:-1]}"
    if down > matters:
        return f"because all it saves is {_amount(saved, down)}"
    if up > matters:
        return f"because all it adds is {_amount(added, up)}"
    return "because no part of the step changes much"


def capitalised(text: str) -> str:
    """A capital at the start of a sentence, but not in names such as rsLoRA."""
    first = text.split(" ", 1)[0]
    return text[0].upper() + text[1:] if first.islower() else text
