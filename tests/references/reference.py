"""The programs of `perfmodel.tracing.programs.references`, and those that only tests need, against the tape."""

from functools import partial
from typing import Any

from helpers import architecture_of, config_of, setup_of

from perfmodel import methods
from perfmodel.recording.record import build
from perfmodel.tracing.programs import models
from perfmodel.tracing.programs.references import (
    apply_reference,
    as_lora,
    freeze,
    make_update,
    program,
    sizes,
    updater,
    wrap,
)
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import Case

__all__ = ["as_lora", "differences", "freeze", "program", "sizes", "updater", "wrap"]


def differences(name: str, spec: str, layers: int | None = None, **options: Any) -> list[str]:
    """What tape and reference program disagree about."""
    config, architecture, setup = config_of(name, layers), architecture_of(name, layers), setup_of(name, **options)
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu")
    model = apply_reference(models.build_model(config, setup), method, architecture, setup)
    trace = trace_step(model, setup, step.optimizer, make=partial(make_update, method=method))
    trace.peak += getattr(model, "kept_bytes", 0)
    trace.total -= getattr(model, "counted_twice", 0)
    result = counts.judge_step(Case(config, spec, setup), step, trace)
    assert result.flops > 0
    assert step.trainable <= step.total
    return result.differences
