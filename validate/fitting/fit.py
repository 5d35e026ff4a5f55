"""Fits the price models of devices to published measurements and writes the parameters into data/devices/*.toml.

The measurements are not part of the project: the user names the folder that holds them. Every block is judged on a
fixed third of its rows that the fit never saw; class defaults by leaving out one device at a time.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from perfmodel.devices import profile
from perfmodel.devices.attention import AttentionParameters
from perfmodel.devices.gemm import GemmParameters
from perfmodel.devices.pointwise import PointwiseParameters
from perfmodel.devices.profile import BLOCKS, CLASSES, CUDNN_ATTENTION, DEVICES, EARLY, GROUPED
from perfmodel.devices.residual import FOLDER as RESIDUALS
from perfmodel.errors import UserError
from perfmodel.partitions import Workers, answered

from . import early, gemm, grouped, layouts, pointwise, residual, sgemm, squares
from .attention import fit as attention
from .judging import Fit, FitErrors, file, hardware
from .siblings import A100, SIBLINGS
from .write import write_blocks, write_one, write_residual

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what comes next or was done
Row = dict[str, Any]
ALONE = Workers()

FITTED = (*BLOCKS[:3], CUDNN_ATTENTION, *BLOCKS[3:], GROUPED, EARLY)
# (dtype, device, like device): both measured.
GEMM_PAIRS = (
    ("bf16", "gb200", "b200"),
    ("bf16", "gb300", "b300"),
    ("fp32", "a100-40gb-pcie", "a100-80gb-pcie"),
    ("fp32", "a100-80gb-pcie", "a100-40gb-pcie"),
)
GEMMS = [*(("bf16", slug) for slug in gemm.BF16_FILES), *(("fp32", slug) for slug in sgemm.GPUS)]
# (dtype, family): members, dtype, where the fit starts.
GEMM_CLASSES = {
    ("bf16", "any"): (gemm.ASYNC, "bf16", gemm.ASYNC_MMA),
    ("fp32", "any"): (gemm.AMPERE_SGEMM, "fp32", sgemm.limited(sgemm.AMPERE)),
}
BLACKWELL = ("b200", "b300", "gb200", "gb300")
L40S_STREAM = 0.735e12  # B/s: weights read by bf16 GEMMs of one row in aiconfigurator's L40S measurements
WITHIN_POWER = (
    "L2 in one part, not in halves. Residuals: of an L40S priced within its power; that figure alone is from its own "
    "(long) products."
)
LAYOUT_NOTE = "Backward layouts by SimuMax (https://github.com/MooreThreads/SimuMax)."


@dataclass
class _Steps:
    """Counts the long steps for a progress bar."""

    progress: Progress | None
    total: int
    done: int = 0

    def __call__(self, label: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, label)


@dataclass
class _Fitted:
    """Blocks by device and by family, and the errors of leaving a device out."""

    devices: dict[str, dict[str, Fit]] = field(default_factory=lambda: {b: {} for b in FITTED})
    classes: dict[str, dict[str, Fit]] = field(default_factory=lambda: {b: {} for b in FITTED})
    left_out: dict[str, dict[str, FitErrors]] = field(default_factory=lambda: {b: {} for b in FITTED})
    pairs: dict[str, list[FitErrors]] = field(
        default_factory=lambda: {b: [] for b in FITTED}
    )  # errors of SIBLINGS' kind
    residuals: dict[str, residual.Learned] = field(default_factory=dict)  # of 16-bit products, by device


def fit_kernels(
    folder: str | PathLike[str], progress: Progress | None = None, *, write: bool, workers: Workers = ALONE
) -> list[Row]:
    """Fit every block that the measurements cover, and return the table of errors.

    Args:
        folder: holds the published measurements.
        progress: called as progress(steps done, steps in all, label).
        write: put the parameters into data/devices/*.toml.
        workers: who fits products; they read the same folder.

    Returns:
        One row a block, device and slice: block, device, slice, rows, mean, median, p90, roofline_mean; in that of all
        left-out rows `kept` and `at_bound` too, the parameters in doubt (`FitCaveats`).

    Raises:
        UserError: the folder or a file in it is missing.
    """
    fitted = _fit_all(_folder(folder), progress, workers)
    if write:
        today = date.today().isoformat()
        for slug in profile.names():
            blocks = {b: fitted.devices[b][slug] for b in FITTED if slug in fitted.devices[b]}
            if not blocks:
                continue  # nothing here covers it; what others wrote stays
            write_blocks(DEVICES / f"{slug}.toml", blocks, today)
        classes = {f"{b}.{name}": fit for b in FITTED for name, fit in fitted.classes[b].items()}
        write_blocks(DEVICES / f"{CLASSES}.toml", classes, today)
        _write_residuals(fitted, today)
    return _table(fitted, set(profile.names()))


def fit_grouped(folder: str | PathLike[str], progress: Progress | None = None, *, write: bool) -> list[Row]:
    """As `fit_kernels`, of products by expert alone, on top of the dense products that the files have."""
    steps, fitted = _Steps(progress, len(grouped.ROWS_OF)), _Fitted()
    _grouped(_folder(folder), fitted, {slug: profile.load(slug).gemm["bf16"] for slug in grouped.ROWS_OF}, steps)
    return _written(fitted, GROUPED, write=write)


def fit_early(folder: str | PathLike[str], progress: Progress | None = None, *, write: bool) -> list[Row]:
    """As `fit_kernels`, of cuBLAS's older kernels for Hopper alone, on top of the products that the files have."""
    steps, fitted = _Steps(progress, 1), _Fitted()
    _early(_folder(folder), fitted, profile.load(early.H100).gemm["bf16"], steps)
    return _written(fitted, EARLY, write=write)


def _written(fitted: _Fitted, block: str, *, write: bool) -> list[Row]:
    """The table of one block, that of like devices included; into the files, too."""
    _siblings(fitted, block)
    if write:
        for slug, fit in fitted.devices[block].items():
            write_one(DEVICES / f"{slug}.toml", block, fit, date.today().isoformat())
    return _table(fitted, set(profile.names()))


def fit_residuals(folder: str | PathLike[str], progress: Progress | None = None, *, write: bool) -> list[Row]:
    """As `fit_kernels`, of the residual of 16-bit products alone, on top of the prices that the files have."""
    steps, fitted = _Steps(progress, len(gemm.BF16_FILES)), _Fitted()
    _residuals(_folder(folder), fitted, {slug: profile.load(slug).gemm["bf16"] for slug in gemm.BF16_FILES}, steps)
    if write:
        _write_residuals(fitted, date.today().isoformat())
    return _table(fitted, set(profile.names()))


def leave_one_device_out(
    folder: str | PathLike[str], progress: Progress | None = None, *, workers: Workers = ALONE
) -> list[Row]:
    """Each device priced from its datasheet and the other devices' measurements; writes nothing."""
    rows = fit_kernels(folder, progress=progress, write=False, workers=workers)
    return [r for r in rows if r["slice"] == "device left out"]


def _folder(folder: str | PathLike[str]) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"no such folder: {path}")
    return path


def _fit_all(folder: Path, progress: Progress | None, workers: Workers) -> _Fitted:
    for name in (*gemm.BF16_FILES.values(), sgemm.FILE, grouped.FILE):
        file(folder, name)
    many = 2 * len(GEMMS) + len(gemm.BF16_FILES) + len(GEMM_CLASSES) + 1 + 10 + len(grouped.ROWS_OF) + 1
    steps = _Steps(progress, many)
    fitted = _Fitted()
    _gemms(folder, fitted, steps, workers)
    _gemm_pairs(folder, fitted)
    _layouts(folder, fitted)
    _fp32_in_steps(fitted)
    _attention(folder, fitted)
    steps("attention")
    _pointwise(folder, fitted, steps)
    fits = fitted.devices["gemm.bf16"].items()
    bf16 = {slug: fit.parameters for slug, fit in fits if isinstance(fit.parameters, GemmParameters)}
    _grouped(folder, fitted, {slug: bf16[slug] for slug in grouped.ROWS_OF}, steps)
    _early(folder, fitted, bf16[early.H100], steps)
    _residuals(folder, fitted, {slug: bf16[slug] for slug in gemm.BF16_FILES}, steps)
    _siblings(fitted, *SIBLINGS)
    fitted.devices["gemm.fp32"]["l40s"] = squares.of_l40s(fitted.classes["gemm.fp32"]["any"])
    return fitted


def _gemms(folder: Path, fitted: _Fitted, steps: _Steps, workers: Workers) -> None:
    """Each device by itself, each left out, and the classes: none of them needs another."""
    jobs: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for dtype, slug in GEMMS:
        jobs["device", dtype, slug] = partial(gemm.fit_device, folder, slug, dtype)
        jobs["left out", dtype, slug] = partial(gemm.leave_out, folder, slug, dtype)
    for (dtype, name), value in GEMM_CLASSES.items():
        jobs["class", dtype, name] = partial(gemm.fit_class, folder, *value)
    keys, found = list(jobs), {}
    for number, answer in answered(enumerate(jobs.values()), workers):
        found[keys[number]] = answer
        steps("GEMM {1} {2}, {0}".format(*keys[number]))
    for dtype, slug in GEMMS:
        fitted.devices[f"gemm.{dtype}"][slug] = found["device", dtype, slug]
        fitted.left_out[f"gemm.{dtype}"][slug] = found["left out", dtype, slug]
    for dtype, name in GEMM_CLASSES:
        of_class = _gemm_class(fitted, *GEMM_CLASSES[dtype, name][:2], *found["class", dtype, name])
        fitted.classes[f"gemm.{dtype}"][name] = of_class
    _mma_sync(folder, fitted)
    _derived_classes(fitted)


def _mma_sync(folder: Path, fitted: _Fitted) -> None:
    """bf16 on boards of mma.sync: ratios of the A100, whose SXM board is never short of power, within a board's power.

    An L40S would need 680 of its 350 W at its peak: a fit to both takes for a lack of efficiency what it throttles. Of
    these chips only the A100's has its L2 in halves.
    """
    bf16, a100 = fitted.classes["gemm.bf16"], fitted.devices["gemm.bf16"][A100]
    assert isinstance(a100.parameters, GemmParameters)
    p = replace(a100.parameters, power_share=1.0, **gemm.IN_ONE_PART)
    errors = gemm.judge_gemms(gemm.gemm_rows(folder, "l40s", "bf16"), hardware("l40s"), gemm.Found(p))["all"]
    bf16["sync_mma"] = replace(a100.sibling(p, A100, errors), notes=WITHIN_POWER)
    half = replace(p, tile_balance=p.tile_balance / 2, math_efficiency=1.0, derating=gemm.BOUNDS["derating"][0])
    note = "Derived, not measured: loads like a full-rate card, at half the peak, which a dozen boards hold in long "
    note += f"products ({squares.SOURCE}). Residuals: those of sync_mma."
    bf16["half_rate"] = replace(bf16["sync_mma"], parameters=half, notes=note)


def _derived_classes(fitted: _Fitted) -> None:
    """fp32: SMs of 128 units, and families of generated kernels, as on the H100."""
    fp32, h100 = fitted.classes["gemm.fp32"], fitted.devices["gemm.fp32"]["h100-sxm"]
    assert isinstance(h100.parameters, GemmParameters)
    generated = gemm.in_steps(h100.parameters, gemm.LAUNCH_CLOCKS)
    errors = fitted.left_out["gemm.fp32"]["h100-sxm"]
    for family in ("wgmma", "tcgen05"):
        fp32[family] = h100.sibling(generated, "h100-sxm", errors, "launch_clocks as in bf16.")
    for family in ("sync_mma", "half_rate"):  # boards of 64 units an SM have fits of their own, or a like one's
        fp32[family] = squares.wide(fp32["any"])


def _gemm_class(fitted: _Fitted, members: tuple[str, ...], dtype: str, found: gemm.Found, used: int) -> Fit:
    block, p = f"gemm.{dtype}", found.parameters
    base = fitted.devices[block][members[0]]
    return Fit(
        parameters=replace(p, power_share=1.0) if dtype == "bf16" else gemm.in_steps(p, gemm.LAUNCH_CLOCKS),
        caveats=found.caveats if dtype == "bf16" else found.caveats.but_kept(("launch_clocks",)),
        source=f"{base.source}: {', '.join(members)}",
        software=base.software if dtype == "fp32" else "SGLang, TensorRT-LLM; short bursts in CUDA graphs",
        rows_fitted=used,
        rows_left_out=sum(fitted.devices[block][m].rows_left_out for m in members),
        errors=FitErrors.average(fitted.left_out[block][m] for m in members),
        notes="" if dtype == "bf16" else "launch_clocks as in bf16: the measured floors contain the host.",
    )


def _gemm_pairs(folder: Path, fitted: _Fitted) -> None:
    """How well a like device's parameters do: the evidence for SIBLINGS."""
    for dtype, slug, donor in GEMM_PAIRS:
        p = fitted.devices[f"gemm.{dtype}"][donor].parameters
        assert isinstance(p, GemmParameters)
        fitted.pairs[f"gemm.{dtype}"].append(
            gemm.judge_gemms(gemm.gemm_rows(folder, slug, dtype), hardware(slug), gemm.Found(p))["all"]
        )


def _layouts(folder: Path, fitted: _Fitted) -> None:
    """Backward layouts of the A100s and Blackwells, and what the A100 PCIe sustains.

    SimuMax's B200 holds 1,100 TFLOP/s in long products of whatever shape: its power, as `mma_energy` has it, not an
    efficiency. Runs of others, of 50 ms at most, reach 1,700.
    """
    bf16 = fitted.devices["gemm.bf16"]
    burst, b200 = bf16[A100].parameters, bf16["b200"].parameters
    assert isinstance(burst, GemmParameters)
    assert isinstance(b200, GemmParameters)
    pcie, board = layouts.fit_board(folder, "a100-80gb-pcie", burst), layouts.fit_board(folder, "b200", b200)
    bf16["a100-80gb-pcie"] = replace(
        pcie,
        source=f"{pcie.source} on top of burst parameters of {A100} ({bf16[A100].source})",
        errors=pcie.errors.worse(bf16[A100].errors),
        slices={"own_rows": pcie.errors, **pcie.slices},
        notes=f"Residuals: the larger of {A100}'s in bursts and those of the own rows, all of them big shapes.",
    )
    for slug, measured in ((A100, pcie), *((s, board) for s in BLACKWELL)):
        own, seen = bf16[slug].parameters, measured.parameters
        assert isinstance(own, GemmParameters)
        assert isinstance(seen, GemmParameters)
        p, note = replace(own, nn_slowdown=seen.nn_slowdown, nt_slowdown=seen.nt_slowdown), LAYOUT_NOTE
        if slug in BLACKWELL:
            p, note = replace(p, power_share=1.0), f"{LAYOUT_NOTE} Residuals: of bursts, which no power limits."
        caveats = bf16[slug].caveats
        if slug == "b200":  # the others' layouts are a like device's
            caveats = caveats.but(("nn_slowdown", "nt_slowdown"), measured.caveats)
        bf16[slug] = replace(bf16[slug], parameters=p, notes=note, caveats=caveats)


def _fp32_in_steps(fitted: _Fitted) -> None:
    """From products alone to those of a step: launch floors without the host, those of bf16; power left by others."""
    bf16 = fitted.devices["gemm.bf16"]
    for slug, fit in fitted.devices["gemm.fp32"].items():
        own = bf16[slug].parameters if slug in bf16 else None
        clocks = own.launch_clocks if isinstance(own, GemmParameters) else gemm.LAUNCH_CLOCKS
        assert isinstance(fit.parameters, GemmParameters)
        floor = fit.parameters.launch_clocks / hardware(slug).clock_hz
        note = f"launch_clocks as in bf16: the measured floor of {floor * 1e6:.0f} us contains the host. {fit.notes}"
        p = gemm.in_steps(fit.parameters, clocks)
        caveats = fit.caveats.but_kept(("launch_clocks",))
        fitted.devices["gemm.fp32"][slug] = replace(fit, parameters=p, notes=note.strip(), caveats=caveats)


def _attention(folder: Path, fitted: _Fitted) -> None:
    found = attention.fit_attention(folder)
    fitted.devices["attention"] = dict(found.fits)
    fitted.classes["attention"] = found.classes
    fitted.left_out["attention"] = found.left_out_device
    fitted.devices[CUDNN_ATTENTION] = dict(found.cudnn)
    fitted.classes[CUDNN_ATTENTION] = {"wgmma": found.cudnn["h100-sxm"], "tcgen05": found.cudnn["b200"]}
    fitted.pairs["attention"] = [found.left_out_device[slug] for slug in ("h100-sxm", "b200")]  # one with the other's


def _pointwise(folder: Path, fitted: _Fitted, steps: _Steps) -> None:
    found = pointwise.fit_pointwise_blocks(folder, steps)
    fitted.devices["pointwise"] = dict(found.fits)
    fitted.classes["pointwise"] = {"any": found.default}
    fitted.left_out["pointwise"] = found.left_out_device
    fitted.pairs["pointwise"] = found.pairs
    l4, default = found.fits["l4"].parameters, found.default.parameters
    ada = {n: getattr(l4, n) for n in pointwise.BOUNDS if n.startswith(("norm_", "softmax_")) and "backward" not in n}
    assert isinstance(default, PointwiseParameters)
    p = replace(default, stream=L40S_STREAM / hardware("l40s").memory_bandwidth, **ada)
    note = "Class defaults; norms and softmax of the L4; stream from weights read at 0.735 TB/s in bf16 GEMMs."
    composed = found.default.sibling(p, "the class and l4", found.default.errors)
    fitted.devices["pointwise"]["l40s"] = replace(composed, notes=f"{note} Residuals: those of the class.")


def _grouped(folder: Path, fitted: _Fitted, dense: dict[str, GemmParameters], steps: _Steps) -> None:
    for slug, parameters in dense.items():
        fitted.devices[GROUPED][slug] = grouped.fit_layers(folder, slug, parameters)
        steps(f"products by expert, {slug}")


def _early(folder: Path, fitted: _Fitted, current: GemmParameters, steps: _Steps) -> None:
    fitted.devices[EARLY][early.H100] = early.fit_linears(folder, current)
    steps("older products of Hopper")


def _residuals(folder: Path, fitted: _Fitted, physics: dict[str, GemmParameters], steps: _Steps) -> None:
    for slug, parameters in physics.items():
        fitted.residuals[slug] = residual.fit_residual(folder, slug, parameters)
        steps(f"residual of GEMMs, {slug}")


def _write_residuals(fitted: _Fitted, today: str) -> None:
    for slug, found in fitted.residuals.items():
        write_residual(RESIDUALS / f"{slug}.toml", found, today)


def _siblings(fitted: _Fitted, *blocks: str) -> None:
    """Blocks of devices without rows: a like device's ratios, with the errors of leaving a device out."""
    for block in blocks:
        whose, fits = SIBLINGS[block], fitted.devices[block]
        for slug, donor in whose.items():
            parameters = fits[donor].parameters
            if block == "attention" and slug in ("h200", "h100-pcie", "h100-nvl", "gh200", *BLACKWELL):
                assert isinstance(parameters, AttentionParameters)
                parameters = attention.carried(parameters, hardware(donor), hardware(slug))
            if block == "gemm.bf16":  # the donor's own rate has its own limit in it
                assert isinstance(parameters, GemmParameters)
                parameters = replace(parameters, power_share=1.0)
            if block == "gemm.fp32" and slug == A100:
                bf16 = fitted.devices["gemm.bf16"][slug].parameters
                assert isinstance(parameters, GemmParameters)
                assert isinstance(bf16, GemmParameters)
                parameters = replace(parameters, launch_clocks=bf16.launch_clocks)
            errors = fits[donor].errors
            if fitted.pairs[block]:
                errors = errors.worse(FitErrors.average(fitted.pairs[block]))
            fits[slug] = fits[donor].sibling(parameters, donor, errors)


def _table(fitted: _Fitted, chosen: set[str]) -> list[Row]:
    """One row a block, device and slice."""
    rows: list[Row] = []
    for block in FITTED:
        for slug, fit in fitted.devices[block].items():
            if slug not in chosen or not fit.rows_fitted:
                continue
            rows.append({**_row(block, slug, "left-out rows", fit.errors), **asdict(fit.caveats)})
            rows += [_row(block, slug, name, e) for name, e in fit.slices.items()]
        for slug, errors in fitted.left_out[block].items():
            if slug in chosen:
                rows.append(_row(block, slug, "device left out", errors))
    for slug, found in fitted.residuals.items():
        for name, errors in found.after.items():
            rows.append(_row("residual", slug, f"{name}, physics alone", found.before[name]))
            rows.append(_row("residual", slug, name, errors))
    return rows


def _row(block: str, device: str, part: str, errors: FitErrors) -> Row:
    return {"block": block, "device": device, "slice": part, **errors.rounded()}
