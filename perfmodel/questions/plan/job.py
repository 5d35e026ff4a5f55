"""A job: a data set, passes over it, and what comes beside its steps; counted before anything is priced.

Steps are those of transformers' Trainer (`Trainer.set_initial_training_values`, `_run_epoch`): every epoch ends with
what is left, fewer micro-batches and a short one, and a part of an epoch is as many of its first steps. The last step
is evaluated and saved in any case (`DefaultFlowCallback.on_step_end`, 5.24).
"""

import math
from dataclasses import fields, replace

import numpy as np

from ...errors import UserError, check_kind, check_number
from ...program.lengths import Lengths
from ...program.sizes import LARGEST, single
from ...setup import Setup
from ...values import immutable
from . import collating
from .collating import Counts

MOST = 2**31  # samples of a data set; of more the lengths would fill the memory
LAID_OUT = 1_000_000  # samples whose order is gone through one by one; a larger data set is as many times these
WHOLE_ROWS = ("dense", "varlen")  # packings that fill rows of `seq` tokens
SEED = 42  # of the order of samples, as transformers' default


@immutable
class Job:
    """What is trained on and for how long.

    Attributes:
        samples: samples (documents; pairs of an objective on pairs) of the data set; None: as many as there are lengths
            in a file, or as `tokens` make.
        tokens: tokens of the data set, padding not counted, in the place of `samples`.
        epochs: passes over it; may be a fraction.
        max_steps: optimizer steps in the place of `epochs`; without a data set's size it has as many samples as these.
        drop_last: whether a last short micro-batch is left out (`dataloader_drop_last`).
        eval_every: steps from one evaluation to the next, and one at the end; None: none.
        eval_samples: samples of an evaluation; where documents are packed, they are too.
        save_every: steps from one checkpoint to the next, or below 1 a share of all, and one at the end; None: that
            alone.
        save_only_model: whether checkpoints hold no states of the optimizer.
        disk: bytes a second to where checkpoints are written.
        startup: seconds before the first step: imports, weights, data.
    """

    samples: int | None = None
    tokens: float | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    drop_last: bool = False
    eval_every: int | None = None
    eval_samples: int = 0
    save_every: float | None = None
    save_only_model: bool = False
    disk: float = 1e9
    startup: float = 60.0

    def __post_init__(self) -> None:
        if self.samples is not None and self.tokens is not None:
            raise UserError("a data set is so many samples or so many tokens: give one of the two")
        for name in NUMBERS:
            value = getattr(self, name)
            if value is None and name in MAY_BE_NONE:
                continue
            check_number(name, value, whole=name in WHOLE)
            if name in WHOLE:  # 1e4 is one too
                object.__setattr__(self, name, int(value))
        for name in FLAGS:
            check_kind(name, getattr(self, name), (bool, np.bool_), "True or False")
        for name in ("samples", "tokens", "max_steps", "eval_every", "eval_samples"):
            least = 0 if name == "eval_samples" else 1
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST * LARGEST:
                raise UserError(f"{name} must be a number from {least} to {MOST * LARGEST:.1e}, got {value}")
        every = self.save_every
        if every is not None and not (0 < every < 1 or (1 <= every <= MOST and every % 1 == 0)):
            raise UserError(f"save_every must be a number of steps, or a share of all below 1, got {every}")
        if self.samples is not None and self.samples > MOST:
            raise UserError(f"samples must be at most {MOST:,}, got {self.samples}")
        if not 0 < self.epochs <= LARGEST:
            raise UserError(f"epochs must be more than 0 and at most {LARGEST}, got {self.epochs}")
        if not (0 < self.disk < math.inf and 0 <= self.startup < math.inf):
            raise UserError(f"disk must be positive and startup not negative, got {self.disk} and {self.startup}")
        if (self.eval_every is None) != (self.eval_samples == 0):
            raise UserError("an evaluation takes both: eval_every steps and eval_samples")


FLAGS = tuple(f.name for f in fields(Job) if f.type is bool)
NUMBERS = tuple(f.name for f in fields(Job) if f.type is not bool)
MAY_BE_NONE = tuple(f.name for f in fields(Job) if f.default is None)
WHOLE = ("samples", "max_steps", "eval_every", "eval_samples")


@immutable
class JobCounts:
    """A job in numbers, for one setup.

    Attributes:
        samples: of the data set.
        rows: that an epoch has: samples, or what packing makes of them.
        tokens: of an epoch without padding; as a collator cuts them.
        computed: of an epoch as the model gets them, padding included.
        steps: optimizer steps of the job.
        short: those of them that end an epoch with less than the others.
        last: samples of such a step over those of the others.
        epochs: passes in whole steps, a little more than asked for where a part of one is no whole number of steps.
        evaluated: evaluations.
        eval_batches: micro-batches of one.
        saved: checkpoints.
    """

    samples: int
    rows: int
    tokens: int
    computed: int
    steps: int
    short: int
    last: float
    epochs: float
    evaluated: int
    eval_batches: int
    saved: int

    @property
    def trained_tokens(self) -> float:
        """Tokens of the job without padding."""
        return self.tokens * self.epochs


def job_counts(job: Job, setup: Setup) -> JobCounts:
    """Count a job.

    Raises:
        UserError: nothing says how large the data set is, or it is smaller than a micro-batch that is to be whole.
    """
    lengths, times = _lengths(job, setup)
    batch, group = int(setup.batch), samples_of_step(setup)
    rows, tokens, computed = _collated(lengths, times, setup)
    samples = round(len(lengths) * times)
    evaluated = math.ceil(job.eval_samples * rows / samples)  # rows; packed as the data set is
    if job.drop_last:
        kept = (rows - rows % batch) / rows
        rows, tokens, computed = (round(count * kept) for count in (rows, tokens, computed))
    if not rows:
        raise UserError(f"drop_last leaves nothing: the data set has fewer rows than a micro-batch of {batch}")
    an_epoch, left = -(-rows // group), rows % group
    steps = job.max_steps or math.ceil(job.epochs * an_epoch)
    return JobCounts(
        samples=samples,
        rows=rows,
        tokens=tokens,
        computed=computed,
        steps=steps,
        short=steps // an_epoch if left else 0,
        last=left / group if left else 1.0,
        epochs=steps / an_epoch,
        evaluated=-(-steps // job.eval_every) if job.eval_every else 0,
        eval_batches=-(-evaluated // (batch * int(setup.replicas))),
        saved=_saved(job, steps),
    )


def _saved(job: Job, steps: int) -> int:
    """Checkpoints; a share of steps is rounded up (transformers/trainer_callback.py, `TrainerState.compute_steps`)."""
    if job.save_every is None:
        return 1
    return math.ceil(steps / (job.save_every if job.save_every >= 1 else math.ceil(job.save_every * steps)))


def samples_of_step(setup: Setup) -> int:
    """Samples of an optimizer step, on all GPUs that share the data."""
    return int(setup.batch) * setup.grad_accum * int(setup.replicas)


def _lengths(job: Job, setup: Setup) -> tuple[Counts, float]:
    """Tokens of samples in the order of the data set, and how many times that is the data set.

    A distribution is laid out as equally likely lengths in a random order.
    """
    found = setup.lengths
    if found is None:
        return np.full(1, int(setup.seq), np.int64), float(_samples(job, setup, int(setup.seq)))
    if found.given and job.samples is None and job.tokens is None:
        return np.array(found.given, np.int64), 1.0
    samples = _samples(job, setup, _mean(found, setup))
    laid = min(samples, LAID_OUT)
    values = np.array(found.given or found.values)
    drawn = np.rint(np.sort(values)[np.arange(laid) * len(values) // laid]).astype(np.int64)
    return np.random.default_rng(SEED).permutation(np.maximum(1, drawn)), samples / laid


def _mean(lengths: Lengths, setup: Setup) -> float:
    """Mean tokens of a sequence; documents that a row may cut anywhere stay whole."""
    return float(np.mean(lengths.values) if setup.packing == "dense" else lengths.mean(setup.seq))


def _samples(job: Job, setup: Setup, tokens: float) -> int:
    """Samples of a data set whose sequences have so many tokens."""
    if job.samples is not None:
        return job.samples
    if job.tokens is None and job.max_steps is not None:
        return job.max_steps * samples_of_step(setup)
    if job.tokens is None:
        raise UserError(
            "how large is the data set? give samples, tokens, max_steps, or lengths with a file that holds every one"
        )
    found = math.ceil(job.tokens / (tokens * setup.of_sample))
    if found > MOST:
        raise UserError(f"{job.tokens:.3g} tokens are {found:.3g} samples, more than {MOST:,}")
    return found


def _collated(lengths: Counts, times: float, setup: Setup) -> tuple[int, int, int]:
    """(rows of an epoch, its tokens, its tokens with padding), of lengths and how many times they come."""
    seq, packing = int(setup.seq), setup.packing
    cut = np.minimum(lengths, seq)
    if packing in WHOLE_ROWS:
        whole = packing == "dense"
        made = collating.wrapped_rows(lengths, seq) if whole else collating.best_fit_rows(cut, seq)
        rows = math.ceil(made * times)
        return rows, round(int((lengths if whole else cut).sum()) * times), rows * seq
    of_all = np.tile(cut, setup.of_sample)  # those of a pair are padded together with the others
    tokens = computed = int(of_all.sum())
    if packing == "none" and len(cut) > 1:
        order = np.random.default_rng(SEED).permutation(of_all)
        if setup.group_by_length:
            order = collating.length_grouped(order, int(setup.sequences) * setup.grad_accum)
        computed = collating.padded_tokens(order, int(setup.sequences))
    return round(len(cut) * times), round(tokens * times), round(computed * times)


def check_single(setup: Setup) -> None:
    """Raise `UserError` where a setup is a grid."""
    if not all(isinstance(axis, int) for axis in (setup.batch, setup.seq, setup.gpus)):
        raise UserError("plan takes one batch, one seq and one number of GPUs; for grids use sweep")


def with_global_batch(setup: Setup, samples: int | None, *, micro: bool) -> Setup:
    """A setup whose optimizer step has so many samples.

    Args:
        micro: whether its micro-batch stays, so that more of them are accumulated; else one takes all samples, or as
            many as leave each stage of a pipeline a micro-batch.

    Raises:
        UserError: they are no whole number of micro-batches, or fewer than there are stages.
    """
    if samples is None:
        return setup
    samples = single("global_batch", samples)
    replicas = int(setup.replicas)
    if not micro:
        if samples % replicas:
            raise UserError(f"global batch {samples} does not divide among {replicas} GPUs")
        each = samples // replicas
        least = setup.pp if setup.pp_schedule == "1f1b" else min(setup.pp, each)
        accum = next((n for n in range(least, each + 1) if each % n == 0), None)
        if accum is None:
            raise UserError(
                f"global batch {samples} makes {each} micro-batches at most, fewer than the stages of pp {setup.pp}; "
                f"use --global-batch {least * replicas} or more"
            )
        return replace(setup, batch=each // accum, grad_accum=accum)
    batch = int(setup.batch) * replicas
    if samples < batch or samples % batch:
        near = max(1, round(samples / batch)) * batch
        raise UserError(f"global batch {samples} is no multiple of the micro-batches of {batch}: try {near}")
    return replace(setup, grad_accum=samples // batch)
