"""Models whose steps come from traces of their real program, kept as files: the second question needs no torch.

A program lies in $PERFMODEL_HOME/programs (beside the user's own devices, see `devices.own`), under a name made of all
that decides it: the config, the method, the fields of the setup that change a program, the sizes that share it, and the
versions of the packages whose program it is. Where these packages are not installed, what other versions recorded will
do, and the prediction names them. A file that is broken, or comes from elsewhere, is recorded anew.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..architectures import Config, load
from ..architectures.config import CLASS, MEGATRON
from ..architectures.traits import Targets, Traits
from ..calls.sdpa import cudnn_head_size
from ..devices import own
from ..devices.device import profile_of
from ..devices.profile import DeviceProfile
from ..errors import UserError, check_kind
from ..methods import Method
from ..methods.parts.peft_adapter import PeftAdapter
from ..prediction.predict import method_of
from ..program.dims import only
from ..program.installed import PACKAGES, installed, needed
from ..program.polynomials import NoPolynomial
from ..program.software import SoftwareStack
from ..recording import files
from ..recording.program import Program, RecordedModel, its_own_norm
from ..recording.record import build
from ..resources import is_file
from ..setup import Setup
from ..values import once
from .regions import Region, region_of
from .setups import check_setup

TRACER = 10  # raised where a trace of the same program comes out differently: 10, how operands of experts lie
TRACE = "a first trace"  # what needs the packages
# fields of a setup that change what is traced
OF_PROGRAM = ("dtype", "amp", "checkpoint", "attention", "kernels", "padded", "images", "image_size", "engine")
OF_OBJECTIVE = ("objective", "reference", "prompt")
MOST_TRACED = 4  # sizes of a grid that are traced one by one where they do not follow from each other


def traced(model: str | PathLike[str] | Config, folder: Path | None = None) -> RecordedModel:
    """A model whose steps come from traces of its real program; `perfmodel.traced` says what it takes and raises.

    Args:
        folder: where programs are kept; default: the user's.
    """
    check_kind("model", model, (str, PathLike, Config), "a name, the path of a config.json, a hub id or a Config")
    config = model if isinstance(model, Config) else load(str(model))
    if MEGATRON in config.values:
        raise UserError(f"{config.name}: Megatron's program has no trace; leave --traced out")
    store = Store(config, folder or own.home() / "programs")
    return replace(store.facts, name=config.name, note=config.note, recorder=store.program)


@dataclass(frozen=True)
class KeptProgram:
    """A program that lies in a file."""

    method: str
    file: Path
    program: Program

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `size` is the one batch and length that it holds for, None where it holds for any."""
        size = self.program.at
        told = {"made_with": dict(self.program.made_with), "notes": self.program.told}
        return {"method": self.method, "file": str(self.file), "size": list(size) if size else None, **told}


def keep(
    model: str | PathLike[str] | Config,
    chosen: Sequence[str | Method],
    setup: Setup,
    device: str | DeviceProfile,
    folder: Path | None = None,
) -> list[KeptProgram]:
    """Record the programs of methods in a setup, where they are not yet known, and say where they lie.

    Raises:
        UserError: one cannot be recorded, or not be written.
    """
    on = profile_of(device)
    config = model if isinstance(model, Config) else load(str(model))
    store = Store(config, folder or own.home() / "programs")
    kept = []
    for method in chosen:
        bound = method_of(method).bind(store.facts)
        program = store.of_step(bound, setup, on)
        path = store.path(next(name for name, found in store.known.items() if found is program))
        if not is_file(path):
            raise UserError(f"{path}: cannot be written")
        kept.append(KeptProgram(bound.spec(), path, program))
    return kept


@dataclass
class Store:
    """The recorded programs of one model: those of this process, and their files."""

    config: Config
    folder: Path
    known: dict[str, Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = {k: v for k, v in self.config.values.items() if k == CLASS or not k.startswith("_")}
        called = re.sub(r"[^a-z0-9.]+", "-", self.config.name.lower())[:32]
        self.start = f"{called}-{_digest(config)}"

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages whose programs they are."""
        return (*PACKAGES, "diffusers") if self.config.of_diffusers else PACKAGES

    @once
    def facts(self) -> RecordedModel:
        """What methods must know of the model."""
        for path in self._files("model"):
            try:
                return _facts(files.read_object(path))
            except (files.NotAProgram, *files.FAULTS):
                continue
        return self._built()

    def _built(self) -> RecordedModel:
        with needed(TRACE):
            from .programs import build_model
            from .programs.adapt import layers_of
            from .trace import without_remarks

        with without_remarks():
            found = layers_of(build_model(self.config, Setup()), self.config.name)
        self._keep("model", _plain_facts(found))
        return found

    def of_step(self, method: Method, setup: Setup, on: DeviceProfile) -> Program:
        """The program that a step runs: of several GPUs it may be another one."""
        found: list[Program] = []

        def recorder(*asked: Any) -> Program:
            found.append(self.program(*asked))
            return found[-1]

        build(replace(self.facts, recorder=recorder), method, setup, on.kind, on.compute_capability or "8.0")
        return found[-1]

    def program(self, method: Method, setup: Setup, kind: str, capability: str) -> Program:
        """The program of a method in a setup, recorded if it is not known; arguments as of `recording.record.build`.

        Raises:
            UserError: it cannot be recorded, or a grid has many sizes whose programs do not follow from each other.
            MixedStructure: the sizes of a grid do not share one program.
        """
        check_setup(setup)
        single: dict[str, Any] = {f.name: only(v) for f in fields(method) if _is_array(v := getattr(method, f.name))}
        method = replace(method, **single)
        if setup.objective != "sft":  # rows of logits are gone through one by one
            return self._fixed(method, setup, kind, capability, self._inputs(method, setup, kind, capability))
        region = region_of(setup, self.facts.limits)
        if setup.images:  # shorter samples may not hold them
            region = replace(region, low=max(region.low, int(np.min(setup.seq))))
        entry = {"region": str(region), **self._inputs(method, setup, kind, capability)}
        found = self._read(entry)
        if found is not None and found.at is None:
            return found
        if found is None:
            found = self._record(method, setup, kind, capability, region, entry)
            if found.at is None:
                return found
        return self._fixed(method, setup, kind, capability, entry)

    def _fixed(self, method: Method, setup: Setup, kind: str, capability: str, entry: dict[str, Any]) -> Program:
        """The program of one size."""
        if _is_array(setup.batch) or _is_array(setup.seq):
            points = np.unique(np.stack(np.broadcast_arrays(setup.batch, setup.seq)), axis=1).shape[1]
            if points > MOST_TRACED:
                raise UserError(
                    f"the program of {self.config.name} at one batch and length does not follow from others: ask for "
                    f"single ones, or for up to {MOST_TRACED}"
                )
        setup = replace(setup, batch=only(setup.batch), seq=only(setup.seq))
        entry = {**entry, "size": [setup.batch, setup.seq]}
        return self._read(entry) or self._record(method, setup, kind, capability, None, entry)

    def _record(
        self, method: Method, setup: Setup, kind: str, capability: str, region: Region | None, entry: dict[str, Any]
    ) -> Program:
        """Trace a program and keep it: for a region, or where that does not work, or there is none, for one size."""
        with needed(TRACE):
            from .traced import trace_model

        one = replace(setup, batch=_first(setup.batch), seq=_first(setup.seq), grad_accum=min(setup.grad_accum, 2))
        unbound = replace(method, architecture=None)
        try:
            _, _, program = trace_model(self.config, unbound, one, kind, capability, region)
        except NoPolynomial:
            _, _, program = trace_model(self.config, unbound, one, kind, capability)
        program = replace(program, made_with={name: found for name in self.packages if (found := installed(name))})
        for name in {_digest(entry), _digest({**entry, "size": list(program.at)} if program.at else entry)}:
            self.known[name] = program
            self._keep(name, files.encoded(program))
        return program

    def _inputs(self, method: Method, setup: Setup, kind: str, capability: str) -> dict[str, Any]:
        return {
            "method": method.text if isinstance(method, PeftAdapter) else method.spec(),
            "setup": {name: getattr(setup, name) for name in OF_PROGRAM},
            "accumulated": setup.grad_accum > 1,
            **({name: getattr(setup, name) for name in OF_OBJECTIVE} if setup.objective != "sft" else {}),
            "dispatch": dispatch_class(kind, capability, setup.stack),
        }

    def _read(self, entry: dict[str, Any]) -> Program | None:
        name = _digest(entry)
        if name not in self.known:
            for path in self._files(name):
                try:
                    self.known[name] = files.read_program(path)
                    break
                except files.NotAProgram:
                    continue
        return self.known.get(name)

    def _keep(self, name: str, values: dict[str, Any]) -> None:
        """Write a file; where that is not possible, the next process will have to record again."""
        with suppress(UserError):
            files.write_object(self.path(name), values)

    def path(self, name: str) -> Path:
        """The file of what is called so."""
        return self.folder / f"{self.start}-{name}-{_versions(self.packages)}.json.gz"

    def _files(self, name: str) -> Iterator[Path]:
        """Files that hold what is called so: that of the installed packages, of others where there are none."""
        if all(map(installed, self.packages)):
            yield self.path(name)
        else:
            yield from sorted(self.folder.glob(f"{self.start}-{name}-*.json.gz"), key=_changed, reverse=True)


def dispatch_class(kind: str, capability: str, stack: SoftwareStack) -> str:
    """Devices with one name run the same program: what their attention kernels are chosen by (`cuda_forms`)."""
    if kind != "cuda":
        return kind
    if stack.prefers_cudnn(capability):
        return f"cuda with cuDNN's attention, heads up to {cudnn_head_size(capability, 0, 0)}"
    return "cuda with flash attention" if int(capability.split(".")[0]) >= 8 else "cuda"


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _first(value: Any) -> int:
    return int(value.flat[0]) if _is_array(value) else int(value)


def _digest(values: Any) -> str:
    text = json.dumps([files.FORM, TRACER, values], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def _versions(packages: Sequence[str]) -> str:
    return _digest([installed("perfmodel") or "", *map(installed, packages)])[:8]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _plain_facts(model: RecordedModel) -> dict[str, Any]:
    """What methods must know of a model, as plain values."""
    skipped = ("found", "recorder")
    dims = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in skipped}
    traits = {f.name: getattr(model.traits, f.name) for f in fields(Traits) if f.name not in ("norm", "targets")}
    targets = {f.name: getattr(model.traits.targets, f.name) for f in fields(Targets)}
    return {**dims, "traits": traits, "targets": targets}


def _facts(values: dict[str, Any]) -> RecordedModel:
    """The model that `_plain_facts` made plain values of."""

    def tuples(table: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}

    traits, targets = tuples(values.pop("traits")), tuples(values.pop("targets"))
    return RecordedModel(**tuples(values), found=Traits(norm=its_own_norm, targets=Targets(**targets), **traits))
