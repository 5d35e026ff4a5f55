"""The house stays one: few rooms a floor, small files, arrows that only go down, and a face that can be called."""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import perfmodel
from perfmodel.architectures import from_config, load
from perfmodel.architectures.traits import Traits
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.devices.profile import DeviceProfile
from perfmodel.recording.step import Step
from perfmodel.report.figures import FigureCell, FigureRow, figures

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("perfmodel", "validate")
# From the roof to the ground: what stands higher may know what stands lower, never the other way round.
FLOORS = (
    "__main__", "cli", "commands", "app", "integrations", "report", "questions", "imports", "tracing", "prediction",
    "recording", "passes", "objectives", "methods", "architectures", "setup", "optimizers", "tape", "network",
    "devices", "calls", "program", "partitions", "shown", "units", "resources", "today", "registry", "values", "errors",
)  # fmt: skip
REGISTRIES = ("methods", "architectures", "optimizers", "objectives")  # one file an entry: as many as there are entries
OF_GRADIO = ("perfmodel.app.page", "perfmodel.app.form")  # modules that need the extra `app`
ROOMS_AT_THE_TOP, FILES_IN_A_ROOM, LINES = 12, 22, 400


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of the project that one imports, wherever in it: inside functions and for types alone too."""
    path = modules()[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in modules() else source for a in node.names}
    return frozenset(found & modules().keys() - {name})


def floor(module: str) -> str:
    return module.split(".")[1] if "." in module else "face"


def test_no_import_runs_in_a_circle() -> None:
    """A circle is two rooms that are one; a deferred import only hides it."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in imports(name):
                visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.startswith("perfmodel.")))
def test_arrows_go_down(module: str) -> None:
    """A floor may know what is below it; `perfmodel` never needs `validate` but to run its commands."""
    assert floor(module) in FLOORS, f"{module} stands on no floor"
    level = FLOORS.index(floor(module))
    for other in imports(module):
        if other.startswith("validate"):
            assert floor(module) == "commands", f"{module} needs {other}"
        elif other != "perfmodel":
            assert FLOORS.index(floor(other)) >= level, f"{module} knows {other}, which stands above it"


def test_a_newcomer_is_told_of_every_floor() -> None:
    """The table of CONTRIBUTING.md: a room that is not in it is found by chance."""
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [name for name in FLOORS if f"`{name}/`" not in told and f"`{name}.py`" not in told] == []


def test_rooms_and_files_are_small() -> None:
    """What needs minutes of scrolling wants splitting."""
    top = list((ROOT / "perfmodel").glob("*.py"))
    assert len(top) <= ROOMS_AT_THE_TOP, sorted(p.name for p in top)
    tests = list((ROOT / "tests").rglob("*.py"))
    for folder in {path.parent for path in [*modules().values(), *tests]}:
        files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert folder.name in REGISTRIES or len(files) <= FILES_IN_A_ROOM, f"{folder.relative_to(ROOT)}: {len(files)}"
    for path in [*modules().values(), *tests]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LINES, f"{path.relative_to(ROOT)}: {lines} lines"


def test_tests_stand_in_the_rooms_that_they_test() -> None:
    """Where a test of something is, or has to go, is known from where the thing is."""
    rooms = {path.parent.name for path in modules().values() if path.name == "__init__.py"} | {"house"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.parent.parent == ROOT / "tests", path
        assert path.parent.name in rooms, path


def imported(name: str) -> ModuleType:
    """A module; those that need torch are skipped where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.importorskip("peft")
        raise


def public() -> Iterator[tuple[str, str]]:
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                yield from ((name, entry) for entry in ast.literal_eval(node.value))


QUESTION: dict[str, Any] = {"model": "llama-3.2-1b", "seq": 16}


def module_predicted(predict_module: Callable[..., Any]) -> Any:
    """One layer of a user's own, where torch is installed."""
    torch = pytest.importorskip("torch")
    return predict_module(torch.nn.Linear(4, 4), (torch.ones(2, 4),), loss=lambda y: y.sum(), device="l40s")


def model_traced(traced: Callable[..., Any]) -> Any:
    """A model that the tape knows, traced, where torch is installed."""
    pytest.importorskip("peft")
    return traced("gpt2")


# How a newcomer uses every name of the face; what a class makes is an instance of it, built anew from its own fields.
USES: dict[str, Callable[[Any], Any]] = {
    "predict": lambda f: f(**QUESTION),
    "compare": lambda f: f(**QUESTION),
    "explain": lambda f: f(**QUESTION, axes=()),
    "advise": lambda f: f("gpt2", seq=16, device="l40s", methods=[]),
    "sweep": lambda f: f("llama-3.2-1b", seq=[16, 32]),
    "plan": lambda f: f("gpt2", "lora", device="l40s", seq=16, samples=10),
    "Job": lambda f: f(samples=10),
    "Plan": lambda f: replace(perfmodel.plan("gpt2", "lora", device="l40s", seq=16, samples=10)),
    "traced": model_traced,
    "predict_module": module_predicted,
    "Setup": lambda f: f(batch=2),
    "Device": lambda f: f(f.load("l40s").profile),
    "Node": lambda f: f(f.load("dgx-h100").file),
    "UserError": lambda f: f("wrong"),
    "Prediction": lambda f: replace(perfmodel.predict(**QUESTION)),
    "Comparison": lambda f: replace(perfmodel.compare(**QUESTION)),
    "SpeedUp": lambda f: replace(perfmodel.compare(**QUESTION).speedups[0]),
    "Explanation": lambda f: replace(perfmodel.explain(**QUESTION, axes=())),
    "Advice": lambda f: replace(perfmodel.advise("gpt2", seq=16, device="l40s", methods=[])),
    "Sweep": lambda f: replace(perfmodel.sweep("llama-3.2-1b", seq=[16, 32])),
}


def test_every_name_of_the_face_can_be_used_after_every_module_was_imported() -> None:
    """Functions and modules shared names once: which of the two `from perfmodel import sweep` gave hung on luck."""
    for name in modules():
        if name.startswith("perfmodel.") and (name not in OF_GRADIO or find_spec("gradio")):
            imported(name)
    assert set(perfmodel.__all__) == USES.keys()


@pytest.mark.parametrize("name", USES)
def test_every_name_of_the_face_is_called_or_instantiated(name: str) -> None:
    """A name that is there but cannot be used is a broken promise."""
    found = getattr(perfmodel, name)
    made = USES[name](found)
    assert type(made) is found if inspect.isclass(found) else made is not None


@pytest.mark.parametrize(("module", "name"), sorted(public()))
def test_every_public_name_is_there_and_is_no_module(module: str, name: str) -> None:
    found = getattr(imported(module), name)
    assert not inspect.ismodule(found), f"{module}.{name}"


def homes(kind: type[ast.ClassDef | ast.FunctionDef]) -> dict[str, set[str]]:
    """Public name -> modules that define it at their top. What has the name of what it stands for does not count: the
    functions of the face, a command and what completes it."""
    found: dict[str, set[str]] = {}
    for name, path in modules().items():
        if kind is ast.FunctionDef and floor(name) in ("face", "cli", "commands"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kind) and not node.name.startswith("_"):
                found.setdefault(node.name, set()).add(name)
    return found


def test_no_two_public_classes_share_a_name() -> None:
    """Who reads `Row` must not have to ask of what."""
    assert {name: where for name, where in homes(ast.ClassDef).items() if len(where) > 1} == {}


# Functions that may share a name, because it is one matter in each of these modules:
IDIOMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "what people name (models, devices, hosts, nodes) is loaded and listed alike": (
        "load names forget from_table bundled",
        ("perfmodel.architectures.config", "perfmodel.devices.host", "perfmodel.devices.profile",
         "perfmodel.network.files"),
    ),
    "the config of another tool is read by its module, and by the one that finds out which tool's it is": (
        "read", ("perfmodel.imports",)
    ),
    "a call's products, what records it and a package's form of it have PyTorch's name for it": (
        "mm addmm bmm baddbmm layer_norm rms_norm",
        ("perfmodel.calls", "perfmodel.tape", "perfmodel.architectures.norms"),
    ),
}  # fmt: skip


def test_no_two_public_functions_share_a_name() -> None:
    """Fourteen functions were called `load`: a line with one said what it does only with its imports in view."""

    def idiom(name: str, where: set[str]) -> bool:
        return any(
            name in names.split() and all(f"{module}.".startswith(tuple(f"{p}." for p in places)) for module in where)
            for names, places in IDIOMS.values()
        )

    shared = {name: where for name, where in homes(ast.FunctionDef).items() if len(where) > 1}
    assert {name: sorted(where) for name, where in shared.items() if not idiom(name, where)} == {}
    assert {name for names, _ in IDIOMS.values() for name in names.split()} <= shared.keys(), "nobody follows an idiom"


def values(x: Any) -> Iterator[Any]:
    """The project's dataclasses and named tuples in an answer, but for recorded steps, which are built up."""
    if hasattr(x, "_fields"):
        yield x
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        for part in x:
            yield from values(part)
    elif is_dataclass(x) and not isinstance(x, (type, Step)):
        yield x
        yield from values([getattr(x, f.name) for f in fields(x)])


def test_answers_and_what_they_share_cannot_be_changed() -> None:
    """Devices, hosts and traits are loaded once for everybody: who changed one would change all later answers."""
    found = perfmodel.compare("gpt2", ["full", "lora"], device="l40s", batch=2, seq=16)
    shared = (profile.load("l40s"), hosts.load(), from_config(load("gpt2")).traits, perfmodel.Setup())
    met = {type(x): x for x in values([found, figures(found), *shared])}
    assert {DeviceProfile, Traits, FigureRow, FigureCell, perfmodel.Setup} <= met.keys()
    for x in met.values():
        with pytest.raises(AttributeError):  # a FrozenInstanceError is one
            setattr(x, x._fields[0] if isinstance(x, tuple) else fields(x)[0].name, None)
