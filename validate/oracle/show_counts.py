"""What `perfmodel validate counts` prints."""

import importlib.util
from collections import Counter
from functools import partial
from typing import Any

from click import style

from perfmodel import units
from perfmodel.architectures import has_form
from perfmodel.program.installed import unmirrored
from perfmodel.report.plain import print_json, show, table
from perfmodel.report.progress import progress

from ..quiet import without_warnings_of_packages
from . import cases, compiled, counts, parallel, parallel_cases, pipeline, traced_ranks, zero
from .megatron.cases import has_megatron, megatron_grid
from .megatron.compare import compare_megatron


def show_counts(grid: str, *, cuda_forward: bool, several: bool, as_json: bool) -> bool:
    """Run the comparison over a grid and print it; returns whether anything differs.

    Args:
        several: compare ranks of programs of several GPUs.
    """
    without_warnings_of_packages()
    for text in unmirrored(counts.MIRRORED):
        show(f"installed: {text}: differences may be theirs", colour="yellow")
    if several:
        chosen = [
            *parallel_cases.rank_grid(grid), *parallel_cases.compiled_grid(grid), *parallel_cases.pipeline_grid(grid),
            *traced_ranks.traced_grid(grid), *_of_deepspeed(grid), *_of_megatron(grid),
        ]  # fmt: skip
    else:
        chosen = list(cases.cuda_forward_grid() if cuda_forward else cases.grid(grid))
    compare = _compared if several else partial(counts.compare_case, cuda_forward=cuda_forward, fakes=True)
    results = []
    with progress() as bar:
        task = bar.add_task("tracing", total=len(chosen))
        for case in chosen:
            bar.update(task, description=f"{case.config.name} {case.method}")
            results.append(compare(case))
            bar.advance(task)
    if as_json:
        print_json([_row(r) for r in results])
        return any(r.differences for r in results)
    _summary(results)
    bad = [r for r in results if r.differences]
    for r in bad[:20]:
        show("\n" + style(f"{r.case.config.name} {r.case.method}", fg="red") + f" {_changed(r)}")
        for line in r.differences[:8]:
            show(f"  {line}")
    differ = style(f"{len(bad)} cases differ", fg="red" if bad else "green")
    show(f"\n{len(results)} cases, {sum(r.calls for r in results):,} ATen calls compared, {differ}")
    return bool(bad)


def _of_deepspeed(grid: str) -> list[cases.Case]:
    if importlib.util.find_spec("deepspeed") is None:
        show("deepspeed is not installed: ZeRO is left out", colour="yellow")
        return []
    return list(parallel_cases.zero_grid(grid))


def _of_megatron(grid: str) -> list[cases.Case]:
    missing = [f"megatron-{part}" for part in ("core", "bridge") if not has_megatron(part)]
    if missing:
        show(f"{' and '.join(missing)} not installed: Megatron's program is left out", colour="yellow")
        return []
    return list(megatron_grid(grid))


def _compared(case: cases.Case) -> counts.Result:
    if case.config.kind == "megatron_gpt":
        return compare_megatron(case)
    if not has_form(case.config.kind):
        return traced_ranks.compare_traced(case)
    if case.setup.pp > 1:
        return pipeline.compare_pipeline(case)
    if case.setup.compile != "none":
        return compiled.compare_compiled(case)
    deepspeed = case.setup.parallel in parallel_cases.ZERO
    return zero.compare_collectives(case) if deepspeed else parallel.compare_rank(case)


def _changed(result: Any) -> str:
    from perfmodel.setup import Setup

    usual = Setup().as_dict()
    return ", ".join(f"{k}={v}" for k, v in result.case.setup.as_dict().items() if v != usual[k])


def _form(setup: Any) -> str:
    stages = f"pp {setup.pp_schedule}" if setup.pp > 1 else f"cp {setup.cp_rotate}" if setup.cp > 1 else ""
    stages = stages or ("compiled" if setup.compile != "none" else "")
    return " ".join(filter(None, [stages, setup.parallel if setup.replicas > 1 else "", "tp" if setup.tp > 1 else ""]))


def _row(r: Any) -> dict[str, Any]:
    return {
        "model": r.case.config.name, "method": r.case.method, "setup": r.case.setup.as_dict(), "calls": r.calls,
        "flops": r.flops, "bytes": r.bytes, "collectives": r.collectives, "peak_ratio": r.peak_ratio,
        "differences": r.differences,
    }  # fmt: skip


def _summary(results: list[Any]) -> None:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    several = any(r.collectives for r in results)
    for r in results:
        form = f" {_form(r.case.setup)}" if several else ""
        groups.setdefault((r.case.config.name, r.case.method, form), []).append(r)
    rows = []
    for (name, method, form), members in groups.items():
        setups = Counter(_changed(r) for r in members)
        calls, flops, collectives = (
            sum(getattr(r, what) for r in members) for what in ("calls", "flops", "collectives")
        )
        rows.append(
            [
                name, method + form, _changed(members[0]) if len(members) == 1 else f"{len(setups)} setups",
                f"{calls:,}", f"{collectives:,}" if several else units.count(flops),
                units.nbytes(sum(r.bytes for r in members)),
                f"{max(abs(r.peak_ratio - 1) for r in members) * 100:.2f} %", sum(len(r.differences) for r in members),
            ]
        )  # fmt: skip
    counted = "collectives" if several else "FLOPs"
    show(
        table(
            ("model", "method", "setup", "ATen calls", counted, "bytes", "peak off by", "differ"), rows, left=(0, 1, 2)
        )
    )
