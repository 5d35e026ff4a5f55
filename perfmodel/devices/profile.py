"""A device profile: datasheet, fitted parameters and where they come from, read from data/devices/NAME.toml.

A file holds `name`, `kind` ("cuda" or "cpu"), `architecture`, `compute_capability`, `aliases`, `host`, `residual` (the
silicon whose factor `Device.gemm` has in 16 bit), the tables [datasheet] and [source] (one URL per datasheet key),
and per fitted block `[fitted.gemm.bf16]`, `[fitted.gemm.fp32]`, `[fitted.attention]`, `[fitted.attention_cudnn]`
(Hopper and data-centre Blackwell), `[fitted.pointwise]` its provenance and the tables `parameters` and `residuals`. A
block that is missing comes from classes.toml, by the device's family; `[fitted.grouped]`, products by expert, and
`[fitted.gemm.early]`, cuBLAS's older kernels on Hopper, may be missing there, too. The blocks of a CPU hold the
parameters of `devices.cpu`. Own devices: `perfmodel calibrate` writes one for this machine (see
`perfmodel.devices.own`), or pass the path of a file.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple

from ..errors import UserError, nearest
from ..program.software import SoftwareStack
from ..resources import DATA, is_file, parsed, read_text, read_toml, stems
from ..values import immutable
from . import own, toml
from .attention import AttentionParameters
from .gemm import GemmParameters
from .gemm_parameters import EarlyGemmParameters, GroupedParameters, for_each_dtype
from .hardware import Hardware
from .pointwise import PointwiseParameters
from .toml import P, Table

if TYPE_CHECKING:
    from ..program.ranks import JobNetwork
    from .cpu import CpuKernels

DEVICES = DATA / "devices"
CLASSES = "classes"  # the file of class defaults, no device
BLOCKS = ("gemm.bf16", "gemm.fp32", "attention", "pointwise")
GROUPED = "grouped"  # a block that a device may lack: its products by expert are then priced as dense ones
EARLY = "gemm.early"  # the same of products under CUDA before 12.6: they are then priced as today's
CUDNN = ("wgmma", "tcgen05")  # families on which PyTorch prefers cuDNN's attention (`calls.sdpa`)
CUDNN_ATTENTION = "attention_cudnn"  # its block
CPU_ATTENTION16 = "attention_bf16"  # a block that a CPU may lack: 16-bit attention is then priced as fp32's
KINDS = ("cuda", "cpu")
RESIDUALS = ("mean", "median", "p90")
NOT_MODELLED = {  # kinds of devices without a profile, and how their names begin
    "AMD cards": r"amd|instinct|radeon|mi\d|rx-?\d|gfx\d",
    "Intel GPUs": r"arc-|gaudi|intel-(r-)?(arc|data-center-gpu)",
    "Apple chips": r"apple|m\d(-|$)|mps$",
    "TPUs": r"tpu|google-tpu|v\d[ep]?$",
    "GeForce GTX cards": r"gtx",
    "Laptop GPUs": r".*(laptop|mobile|max-q)",
    "MIG slices": r".*-mig-",
}

Origin = Literal["fitted", "sibling", "class"]


@immutable
class DeviceProfile:
    """Everything that prices need to know about a device.

    Attributes:
        slug: the file's name without its ending.
        name: the maker's name.
        kind: "cuda" or "cpu".
        architecture: "ampere", "hopper", ….
        compute_capability: "8.0"; empty for a CPU.
        hardware: datasheet figures.
        gemm: parameters by dtype of the operands: bf16, fp16, tf32, fp32; those of a CPU are in `cpu`.
        early: what products have under CUDA before 12.6 in place of today's figures; None: nothing, or it is unknown.
        grouped: of products by expert in one kernel.
        attention, pointwise: parameters of those kernels; `attention` is FlashAttention-2.
        cudnn_attention: cuDNN's attention where PyTorch prefers it, else the same as `attention`.
        provenance: block -> source, date, software, rows_fitted, rows_left_out, notes.
        residuals: block -> mean, median, p90 of |predicted/measured - 1| on rows that no fit saw.
        fitted: block -> "fitted" (own measurements), "sibling" (those of a like device) or "class" (class defaults).
            Where a device has no tensor cores for a dtype, `gemm` holds the fp32 block for it.
        sources: figure of the datasheet -> where it comes from.
        host: the host whose costs go with the device unless another is named; "" for the usual one.
        residual: the file of what measurements leave of the price of 16-bit products (`devices.residual`); or empty.
        network: what prices the collectives of a job on several such devices; None for one.
        cpu: what prices the work of a CPU; None for a GPU. The blocks above say nothing about a CPU.
    """

    slug: str
    name: str
    kind: str
    architecture: str
    compute_capability: str
    hardware: Hardware
    gemm: Mapping[str, GemmParameters]
    attention: AttentionParameters
    cudnn_attention: AttentionParameters
    pointwise: PointwiseParameters
    grouped: GroupedParameters
    provenance: Mapping[str, Mapping[str, Any]]
    residuals: Mapping[str, Mapping[str, float]]
    fitted: Mapping[str, Origin]
    sources: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    residual: str = ""
    early: EarlyGemmParameters | None = None
    cpu: "CpuKernels | None" = None
    network: "JobNetwork | None" = None

    @property
    def capacity(self) -> float:
        """Bytes of memory that programs find there."""
        return self.hardware.offered if self.kind == "cuda" else self.hardware.memory_bytes

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s that products of a dtype can reach: the datasheet's.

        Of a CPU those of its best kernel, which may beat the program that its peak was measured with; one of 16 bits
        may widen its operands, as attention's does, and be as fast as in fp32.
        """
        if self.cpu is None:
            return self.hardware.peak(dtype)
        kinds = ("bf16", "fp32") if dtype in ("bf16", "fp16") else ("fp32",)
        return max(self.hardware.peak(kind) * max(1.0, *self.cpu.gemm[kind].efficiency.values()) for kind in kinds)

    def under(self, stack: SoftwareStack) -> "DeviceProfile":
        """The same with what other versions of PyTorch and CUDA run."""
        on = self
        if not stack.streams_downcasts and self.cpu is None:
            on = replace(on, pointwise=replace(self.pointwise, downcast_rate=self.pointwise.cast_rate))
        if stack.early_products and self.early is not None:
            bf16 = self.early.on(self.gemm["bf16"])
            gemm = for_each_dtype(bf16, self.gemm["fp32"], self.hardware)
            residuals = {**self.residuals, "gemm.bf16": self.residuals[EARLY]}
            on = replace(on, gemm=gemm, residuals=residuals, residual="")
        return on

    __eq__, __hash__ = object.__eq__, object.__hash__


def names() -> list[str]:
    """Bundled devices, by the names of their files."""
    return list(_names())


def load(name_or_path: str | PathLike[str]) -> DeviceProfile:
    """A bundled device by name or alias (in any case), an own one by name, or any by the path of its TOML file.

    Raises:
        UserError: unknown device; broken TOML; a key that is missing, unknown, mistyped or negative.
    """
    text = str(name_or_path).strip()
    if slug := bundled(text):
        return _bundled(slug)
    if (mine := own.find(text)) is not None:
        return from_table(mine.stem, read_toml(mine), str(mine))
    path = Path(name_or_path)
    exists = is_file(path)
    if path.suffix.lower() == ".toml" or exists:
        if not exists:
            raise UserError(f"no such device file: {path}")
        return from_table(path.stem, read_toml(path), str(path))
    raise UserError(f"unknown device {text!r}: {_hint(text)} (or give the path of a .toml file)")


def _hint(name: str) -> str:
    """That cards of the kind are not modelled, or the nearest device."""
    *_, plain = _written(name)
    for kind, pattern in NOT_MODELLED.items():
        if re.match(pattern, plain):
            return f"{kind} are not modelled; perfmodel devices lists what is"
    known = [*names(), *own.calibrated()]
    return nearest(plain, known, also=_aliases(), otherwise="perfmodel devices lists those that are known")


def bundled(name: str) -> str:
    """The bundled device that a name or alias stands for, as people, torch or nvidia-smi write it; empty if for none.

    `RTX 4090`, `NVIDIA GeForce RTX 4090` and `rtx-4090` are one; so are `H100 80GB HBM3` and `h100-80gb-hbm3`, `3060ti`
    and `RTX 3060 Ti`.
    """
    for known in _written(name):
        if known in names():
            return known
        if known in _aliases():
            return _aliases()[known]
    return ""


def _written(name: str) -> Iterator[str]:
    """A name in lower case: as it is, its words joined by hyphens, and those without maker and brand."""
    yield name.strip().lower()
    apart = re.sub(r"\brtx(?=\d)|(?<=\d)(?=(ti|super)\b)", lambda found: f"{found[0]}-", name.lower())
    yield (slug := "-".join(re.findall(r"[a-z0-9]+", apart)))
    yield re.sub(r"^(nvidia-)?((geforce|tesla|quadro)-)?", "", slug)


def by_makers_name(name: str) -> DeviceProfile | None:
    """The profile of a device that calls itself `NVIDIA H100 80GB HBM3`: an own one, else a bundled one."""
    found = next((mine for mine in own_profiles()[0] if mine.name == name), None)
    return found or bundled_by_makers_name(name)


def own_profiles() -> tuple[list[DeviceProfile], list[str]]:
    """The user's own devices, and what is wrong with the files that hold none: one of them must not hide the others."""
    found, complaints = [], []
    for name in own.calibrated():
        try:
            found.append(load(name))
        except UserError as error:
            complaints.append(str(error))
    return found, complaints


def bundled_by_makers_name(name: str) -> DeviceProfile | None:
    """The bundled profile of a device that calls itself `NVIDIA H100 80GB HBM3` (h100-80gb-hbm3 is an alias)."""
    found = bundled(name)
    return load(found) if found else None


def forget() -> None:
    """Drop what was cached: for after a file was rewritten."""
    for cached in (_names, _bundled, _aliases, _class_tables):
        cached.cache_clear()


def from_table(slug: str, table: Table, where: str) -> DeviceProfile:
    """A profile from the parsed TOML; `where` names the file in error messages."""
    kind, architecture, capability, hardware, family = _identity(table, where)
    fitted = table.get("fitted", {})
    if kind == "cpu":
        gpu, family = {}, "sync_mma"
        on_cpu = _cpu_blocks(fitted, where)
    else:
        gpu, on_cpu = fitted, None
    bf16 = _block("gemm.bf16", GemmParameters, gpu, family, where)
    fp32 = _block("gemm.fp32", GemmParameters, gpu, family, where)
    attention = _block("attention", AttentionParameters, gpu, family, where)
    cudnn = _block(CUDNN_ATTENTION, AttentionParameters, gpu, family, where) if family in CUDNN else attention
    pointwise = _block("pointwise", PointwiseParameters, gpu, family, where)
    blocks: dict[str, _Block[Any]] = on_cpu or dict(zip(BLOCKS, (bf16, fp32, attention, pointwise), strict=True))
    if cudnn is not attention and not on_cpu:
        blocks[CUDNN_ATTENTION] = cudnn
    for block, of in ((GROUPED, GroupedParameters), (EARLY, EarlyGemmParameters)):
        if (found := _find(gpu, block)) is not None:
            blocks[block] = _parse(of, found, f"{where}: [fitted.{block}]")
    return DeviceProfile(
        slug=slug,
        name=toml.text(table, "name", where),
        kind=kind,
        architecture=architecture,
        compute_capability=capability,
        hardware=hardware,
        gemm=for_each_dtype(bf16.parameters, fp32.parameters, hardware),
        attention=attention.parameters,
        cudnn_attention=cudnn.parameters,
        pointwise=pointwise.parameters.on(capability),
        grouped=blocks[GROUPED].parameters if GROUPED in blocks else GroupedParameters(),
        early=blocks[EARLY].parameters if EARLY in blocks else None,
        provenance={b: x.provenance for b, x in blocks.items()},
        residuals={b: x.residuals for b, x in blocks.items()},
        fitted={b: x.origin for b, x in blocks.items()},
        sources={k: str(v) for k, v in toml.subtable(table, "source", where).items()} if "source" in table else {},
        host=toml.text(table, "host", where) if "host" in table else "",
        residual=toml.text(table, "residual", where) if "residual" in table else "",
        cpu=_cpu_kernels(blocks) if on_cpu else None,
    )


def _cpu_blocks(fitted: Any, where: str) -> dict[str, "_Block[Any]"]:
    """The blocks of a CPU, under the names that those of a GPU have."""
    from .cpu import CpuAttentionParameters, CpuGemmParameters, CpuStreamParameters

    kinds = (CpuGemmParameters, CpuGemmParameters, CpuAttentionParameters, CpuStreamParameters)
    pairs = zip(BLOCKS, kinds, strict=True)
    blocks: dict[str, _Block[Any]] = {name: _block(name, kind, fitted, "cpu", where) for name, kind in pairs}
    if CPU_ATTENTION16 in fitted:
        blocks[CPU_ATTENTION16] = _parse(kinds[2], fitted[CPU_ATTENTION16], f"{where}: [fitted.{CPU_ATTENTION16}]")
    return blocks


def _cpu_kernels(blocks: dict[str, "_Block[Any]"]) -> "CpuKernels":
    from .cpu import CpuKernels

    bf16, fp32, attention, stream = (blocks[name].parameters for name in BLOCKS)
    of_16_bits = blocks.get(CPU_ATTENTION16, blocks["attention"]).parameters
    return CpuKernels({"bf16": bf16, "fp32": fp32}, {"bf16": of_16_bits, "fp32": attention}, stream)


def _identity(table: Table, where: str) -> tuple[str, str, str, Hardware, str]:
    """Kind, architecture, compute capability, hardware and family."""
    kind = toml.text(table, "kind", where)
    if kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r} is unknown: {nearest(kind, KINDS)}")
    architecture = toml.text(table, "architecture", where)
    capability = toml.text(table, "compute_capability", where) if kind == "cuda" else ""
    if kind == "cuda" and not (capability.isascii() and capability.replace(".", "", 1).isdigit()):
        raise UserError(f"{where}: compute_capability must be a version such as '8.6', got {capability!r}")
    hardware = _hardware(toml.subtable(table, "datasheet", where), f"{where}: [datasheet]")
    return kind, architecture, capability, hardware, _family(kind, architecture, capability, hardware, where)


class _Block(NamedTuple, Generic[P]):
    parameters: P
    provenance: Table
    residuals: dict[str, float]
    origin: Origin


def _block(block: str, kind: type[P], fitted: Any, family: str, where: str) -> _Block[P]:
    """A block from the device's file, else the class default of its family, else the one of any."""
    own = _find(fitted, block)
    if own is not None:
        return _parse(kind, own, f"{where}: [fitted.{block}]")
    for name in (family, "any"):
        for section in ("assumed", "fitted"):
            path = f"{section}.{block}.{name}"
            found = _find(_classes(path), path)
            if found is not None:
                return _parse(kind, found, f"{CLASSES}.toml: [{section}.{block}.{name}]")._replace(origin="class")
    raise UserError(f"{where}: no [fitted.{block}], and {CLASSES}.toml has none for {family!r}")


def _find(tables: Any, path: str) -> Any:
    """The value at a dotted path, None if it is not there."""
    for part in path.split("."):
        tables = tables.get(part) if isinstance(tables, dict) else None
    return tables


def _parse(kind: type[P], table: Any, where: str) -> _Block[P]:
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table")
    parameters = toml.parameters(kind, toml.subtable(table, "parameters", where), f"{where} parameters")
    residual = toml.subtable(table, "residuals", where)
    rows = toml.number(table, "rows_fitted", where, whole=True)
    for key in ("source", "date"):
        toml.text(table, key, where)
    return _Block(
        parameters=parameters,
        provenance={key: table[key] for key in toml.PROVENANCE if key in table},
        residuals={key: toml.number(residual, key, f"{where} residuals") for key in RESIDUALS},
        origin="fitted" if rows else "sibling",
    )


def _family(kind: str, architecture: str, capability: str, hardware: Hardware, where: str) -> str:
    """Whose class defaults a device takes: by compute capability, else by architecture."""
    if kind == "cpu":
        return "cpu"
    families: Table = _classes("family")["family"]
    family = families.get(capability, families.get(architecture))
    if family is None:
        hint = nearest(architecture, [f for f in families if f[0].isalpha()])
        raise UserError(f"{where}: architecture {architecture!r} is unknown: {hint}")
    return "half_rate" if hardware.half_rate else str(family)


def _hardware(table: Table, where: str) -> Hardware:
    known = {f.name: f for f in fields(Hardware)}
    toml.no_others(table, known, where)
    values = {
        name: toml.number(table, name, where, whole=name == "sm_count")
        for name, field in known.items()
        if name in table or field.default is not None
    }
    return Hardware(**values)


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    return tuple(stem for stem in stems(DEVICES, ".toml") if stem != CLASSES)


@lru_cache(maxsize=256)
def _bundled(slug: str) -> DeviceProfile:
    path = DEVICES / f"{slug}.toml"
    return from_table(slug, read_toml(path), path.name)


def _classes(wanted: str) -> Table:
    """The tables whose names begin with `wanted`; the rest of that long file is left unparsed."""
    path = DEVICES / f"{CLASSES}.toml"
    tables = "\n".join(f"[{table}" for table in _class_tables() if table.startswith(wanted))
    return parsed(tables, tomllib.loads, "TOML", str(path))


@lru_cache(maxsize=1)
def _class_tables() -> list[str]:
    return read_text(DEVICES / f"{CLASSES}.toml").split("\n[")[1:]


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    """Alias or a GPU's own name, in lower case -> slug, from the heads of the files alone: `AMD EPYC` is many CPUs."""
    found = {}
    for slug in names():
        head = tomllib.loads((DEVICES / f"{slug}.toml").read_text(encoding="utf-8").partition("\n[")[0])
        own_name = [head["name"]] if head["kind"] == "cuda" else []
        found.update({str(known).lower(): slug for known in (*own_name, *head.get("aliases", []))})
    return found
