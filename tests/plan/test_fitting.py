"""What a plan gives up so that a step fits, of jobs on several GPUs."""

import numpy as np

from perfmodel import advise, plan, predict
from perfmodel.questions.plan import words


def test_checkpointing_alone_is_tried_where_accumulation_takes_more_memory() -> None:
    """FSDP2 keeps whole gradients between micro-batches: one sample at a time takes more than eight at once."""
    asked = {"device": "h100-sxm", "gpus": 32, "parallel": "fsdp2", "seq": 1024}
    model, method = "llama-3.1-70b", "full"
    split = predict(model, method, batch=1, grad_accum=8, checkpoint="block", **asked)
    whole = predict(model, method, batch=8, checkpoint="block", **asked)
    assert not split.fits
    assert whole.fits
    (run,) = plan(model, method, batch=8, samples=64, **asked).runs
    assert run.given_up == ("activation checkpointing",)
    assert run.prediction.memory.peak == whole.memory.peak


def test_a_method_that_fits_nowhere_is_named_once() -> None:
    found = plan("llama-3.1-8b", ["full", "lora:r=4", "lora:r=8"], device="l40s", samples=64, batch=1, seq=512)
    assert words.plan_answer(found).count("full fits nowhere here.") == 1


def test_a_plan_of_several_numbers_of_gpus_gives_up_what_each_alone_does() -> None:
    asked = {"device": "h100-sxm", "parallel": "fsdp2", "seq": 1024, "batch": 8, "samples": 64}
    both = plan("llama-3.1-70b", "full", gpus=np.array([16, 32]), **asked).runs
    alone = [run for n in (16, 32) for run in plan("llama-3.1-70b", "full", gpus=n, **asked).runs]
    assert sorted(r.given_up for r in both) == sorted(r.given_up for r in alone)


def test_gradients_are_reduced_each_time_where_whole_ones_do_not_fit() -> None:
    """One sample at a time is all that is asked for, so no larger micro-batch can do without accumulation."""
    asked = {"device": "h100-sxm", "gpus": 16, "parallel": "fsdp2", "seq": 1024, "batch": 1, "grad_accum": 8}
    (run,) = plan("llama-3.1-70b", "full", samples=128, **asked).runs
    assert run.given_up == ("gradients reduced in every micro-batch",)
    p = predict("llama-3.1-70b", "full", **asked, sync_each_batch=True)
    assert not predict("llama-3.1-70b", "full", **asked).fits
    assert run.prediction.memory.peak == p.memory.peak
    found = advise("llama-3.1-70b", "full", **asked)
    assert all(
        "every micro-batch" not in " ".join(c.changes) for c in found.front if c.prediction.setup.grad_accum == 1
    )
