"""A job in numbers: what the real collators make of a data set, and the steps of the real Trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import UserError
from perfmodel.questions.plan import collating
from perfmodel.questions.plan.job import SEED, Job, job_counts, with_global_batch
from perfmodel.setup import Setup

SEQ, BATCH = 96, 4


def documents(n: int, seed: int = 0) -> list[int]:
    """Lengths of documents, some longer than a row, some alike."""
    return [int(x) for x in np.clip(np.random.default_rng(seed).lognormal(3.4, 0.9, n), 1, 3 * SEQ)]


def of(lengths: list[int], packing: str, **options: Any) -> Setup:
    return Setup(batch=BATCH, seq=SEQ, lengths=lengths, packing=packing, **options)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=60), seq=st.integers(1, 20))
def test_best_fit_rows_are_those_of_the_plain_algorithm(lengths: list[int], seq: int) -> None:
    """Rows alike in the room left are counted together, which must change nothing."""
    rows: list[int] = []
    for length in sorted((min(x, seq) for x in lengths), reverse=True):
        fitting = [i for i, room in enumerate(rows) if room >= length]
        if fitting:
            rows[min(fitting, key=rows.__getitem__)] -= length
        else:
            rows.append(seq - length)
    assert collating.best_fit_rows(np.array(lengths), seq) == len(rows)


@pytest.mark.parametrize(("packing", "strategy"), [("dense", "wrapped"), ("varlen", "bfd")])
@pytest.mark.parametrize("n", [1, 999, 2500])
def test_packed_rows_and_tokens_are_those_of_trl(packing: str, strategy: str, n: int) -> None:
    """A count of rows decides the steps: TRL packs thousand by thousand, which leaves a short row in each."""
    trl_data, datasets = pytest.importorskip("trl.data_utils"), pytest.importorskip("datasets")
    lengths = documents(n)
    data = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    packed = trl_data.pack_dataset(data, SEQ, strategy)
    work = job_counts(Job(), of(lengths, packing))
    assert work.rows == len(packed)
    assert work.tokens == sum(len(row["input_ids"]) for row in packed)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("n", [3, 801])
def test_padded_tokens_are_those_of_transformers_collator(monkeypatch: Any, grouped: bool, n: int) -> None:
    """Padding can be half of what is computed: it is that of the sampler and collator of the real Trainer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = documents(n, seed=1)
    cut = [min(x, SEQ) for x in lengths]
    order = np.random.default_rng(SEED).permutation(n)
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: torch.tensor(order))
    indices = get_length_grouped_indices(cut, BATCH) if grouped else order.tolist()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    collate = transformers.DataCollatorWithPadding(tokenizer)
    batches = [indices[i : i + BATCH] for i in range(0, n, BATCH)]
    got = [collate([{"input_ids": [0] * cut[i]} for i in batch])["input_ids"] for batch in batches]
    work = job_counts(Job(), of(lengths, "none", group_by_length=grouped))
    assert work.computed == sum(ids.numel() for ids in got)
    assert work.tokens == sum(int((ids == 0).sum()) for ids in got)


def test_flat_tokens_are_those_of_the_flattening_collator() -> None:
    """A micro-batch of it is one row of as many tokens as its samples have."""
    transformers = pytest.importorskip("transformers")
    lengths = documents(10)
    flat = transformers.DataCollatorWithFlattening()([{"input_ids": [0] * min(x, SEQ)} for x in lengths])
    work = job_counts(Job(), of(lengths, "flat"))
    assert (work.rows, work.tokens, work.computed) == (10, *(flat["input_ids"].numel(),) * 2)


@pytest.mark.parametrize("samples", [1, 7, 32, 61])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_are_those_of_the_real_trainer(tmp_path: Path, samples: int, epochs: float, drop_last: bool) -> None:
    """Accumulation, a last short batch and a part of an epoch: the Trainer's own count."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    job, setup = Job(samples=samples, epochs=epochs, drop_last=drop_last), Setup(batch=4, grad_accum=3, seq=8)
    if drop_last and samples < 4:
        with pytest.raises(UserError, match="drop_last leaves nothing"):
            job_counts(job, setup)
        return
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=3, num_train_epochs=epochs,
        dataloader_drop_last=drop_last, report_to=[], use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(torch.nn.Linear(2, 2), arguments, train_dataset=[{"x": 0}] * samples)
    steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert job_counts(job, setup).steps == steps


def test_a_last_short_step_is_counted_once_an_epoch() -> None:
    """50 samples in steps of 12 are four whole ones and a sixth of one, in each of three epochs."""
    work = job_counts(
        Job(samples=50, epochs=3, eval_every=4, eval_samples=9, save_every=6), Setup(batch=4, grad_accum=3)
    )
    assert (work.steps, work.short, work.last) == (15, 3, pytest.approx(2 / 12))
    assert (work.evaluated, work.eval_batches, work.saved) == (4, 3, 3)  # the last step, too
    assert (work.tokens, work.trained_tokens) == (50 * 512, 3 * 50 * 512)


def test_a_distribution_is_laid_out_as_lengths_of_its_mean() -> None:
    """MEAN:P95 says nothing of how many documents there are: samples or tokens do."""
    setup = of([1], "none", group_by_length=False)
    drawn = Setup(batch=BATCH, seq=4096, lengths="400:1200")  # type: ignore[arg-type]
    work = job_counts(Job(samples=5000), drawn)
    assert work.tokens / work.samples == pytest.approx(400, rel=0.01)
    assert work.tokens < work.computed
    assert job_counts(Job(tokens=2e6), drawn).samples == pytest.approx(5000, rel=0.01)
    assert job_counts(Job(samples=10**9), drawn).tokens / 1e9 == pytest.approx(400, rel=0.01)
    assert job_counts(Job(), setup).samples == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: job_counts(Job(), Setup()), "how large is the data set"),
        (lambda: Job(samples=1, tokens=1), "give one of the two"),
        (lambda: Job(samples=0), "samples must be a number from 1"),
        (lambda: Job(epochs=0), "epochs must be more than 0"),
        (lambda: Job(eval_every=10), "takes both"),
        (lambda: Job(disk=0), "disk must be positive"),
        (lambda: job_counts(Job(tokens=1e14), Setup()), "more than 2,147,483,648"),
        (lambda: with_global_batch(Setup(batch=4), 10, micro=True), "no multiple of the micro-batches of 4: try 8"),
        (
            lambda: with_global_batch(Setup(gpus=8, pp=4), 6, micro=False),
            "3 micro-batches at most, fewer than the stages of pp 4; use --global-batch 8 or more",
        ),
    ],
)
def test_what_makes_no_job_is_refused_in_a_line(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("samples", "setup", "expected"),
    [
        (16, Setup(gpus=4), (4, 1)),
        (16, Setup(gpus=4, pp=4), (4, 4)),
        (14, Setup(gpus=4, pp=4), (2, 7)),
        (2, Setup(gpus=4, pp=4, pp_schedule="gpipe"), (1, 2)),
    ],
)
def test_each_stage_of_a_pipeline_gets_a_micro_batch(samples: int, setup: Setup, expected: tuple[int, int]) -> None:
    """One micro-batch of all samples, from which a plan without --batch starts, is refused by 1F1B."""
    found = with_global_batch(setup, samples, micro=False)
    assert (found.batch, found.grad_accum) == expected


def test_steps_that_were_asked_for_replace_epochs() -> None:
    """`max_steps` of the Trainer: half a pass or many, and data enough for them where nobody says how much there is."""
    setup = Setup(batch=4, grad_accum=2)
    work = job_counts(Job(samples=100, epochs=3, max_steps=26), setup)
    assert (work.steps, work.short, work.epochs) == (26, 2, 2.0)
    assert job_counts(Job(max_steps=26), setup).samples == 26 * 8


@pytest.mark.parametrize("objective", ["dpo", "orpo", "reward", "kto", "sft"])
def test_tokens_of_a_data_set_count_both_of_a_pair(objective: str) -> None:
    """20 M tokens were 40 M of pairs, at twice the dollars."""
    for lengths in (None, "300:900"):
        work = job_counts(Job(tokens=20e6), Setup(batch=4, seq=1024, objective=objective, lengths=lengths))
        assert work.tokens == pytest.approx(20e6, rel=0.01)


def test_pairs_are_padded_to_the_longest_of_all_their_sequences() -> None:
    """TRL pads chosen and rejected answers to one length: four pairs are padded as eight samples are."""
    pairs, alone = (
        job_counts(Job(samples=n), Setup(batch=b, seq=1024, objective=o, lengths="300:900"))
        for n, b, o in ((20_000, 4, "dpo"), (40_000, 8, "sft"))
    )
    assert pairs.computed == pytest.approx(alone.computed, rel=0.01)
    assert pairs.tokens == pytest.approx(alone.tokens, rel=0.01)
