"""Packages of other versions: those that no trace can come from are named in one line, before anything is built.

The oldest ones (`OLDEST`) were found by `predict --traced` with LoRA: it works under transformers 5.20, 5.16, 5.12, 5.4
and 5.0 and under peft 0.20, but not under transformers 4.57, peft 0.19 or 0.18.
"""

from importlib.metadata import PackageNotFoundError

import pytest
from click.testing import CliRunner

from perfmodel import UserError, predict_module, traced
from perfmodel.cli import main
from perfmodel.program import installed
from perfmodel.program.installed import OLDEST, needed, unmirrored

CURRENT = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "peft": "0.21.2"}
TOO_OLD = [("torch", "2.7.1"), ("transformers", "4.57.6"), ("peft", "0.17.1"), ("peft", "0.19.1")]


def have(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let other versions of packages be installed, or none."""
    told = {**CURRENT, **versions}

    def version(name: str) -> str:
        if (found := told.get(name)) is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(installed, "version", version)


@pytest.mark.parametrize(("package", "version"), TOO_OLD)
@pytest.mark.parametrize(
    "words",
    [
        "predict --model gpt2 --device l40s --traced",
        "record --model gpt2 --device l40s",
        "validate counts",
        "validate coverage --quick",
        "validate tuners",
        "validate measure --device cpu",
        "validate campaign --device cpu",
        "validate host",
        "calibrate --device cpu",
    ],
)
def test_a_package_that_is_too_old_is_one_line(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, words: str
) -> None:
    """Deep inside, the first name that a release lacks would be an AttributeError without a hint of the cause."""
    have(monkeypatch, **{package: version})
    done = CliRunner().invoke(main, words.split())
    oldest = ".".join(map(str, OLDEST[package]))
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert f"needs {package} {oldest} or newer, and {package} {version} is installed" in line


def test_from_python_it_is_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports the library reads no command's messages."""
    have(monkeypatch, transformers="4.57.6", peft="0.17.0")
    for ask in (lambda: traced("gpt2").layers, lambda: predict_module(None, None)):
        with pytest.raises(UserError, match=r"transformers 4\.57\.6, peft 0\.17\.0 is installed"):
            ask()


FIRST = {name: ".".join(map(str, oldest)) for name, oldest in OLDEST.items()}


@pytest.mark.parametrize("versions", [CURRENT, FIRST, {"torch": "2.14.0a0+git123"}, {"peft": None}])
def test_what_works_or_is_missing_is_not_called_old(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]
) -> None:
    """A missing package has a line of its own; a newer one may work."""
    pytest.importorskip("peft")
    have(monkeypatch, **versions)
    with needed():
        pass


def test_what_needs_no_trace_needs_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of other machines are read whatever is installed here."""
    have(monkeypatch, transformers="4.57.6")
    with needed(traces=False):
        pass


NOT_FOUND = ModuleNotFoundError("No module named 'x.y'", name="x.y")
REFUSED = ImportError("hub<2.0 is required, but found hub==2.4\nTry: pip install")


@pytest.mark.parametrize(
    ("error", "why"), [(NOT_FOUND, r"x\.y is missing"), (REFUSED, r"hub<2\.0 is required, but found hub==2\.4")]
)
def test_what_cannot_be_imported_is_named(error: ImportError, why: str) -> None:
    """The extra is what brings it; transformers refuses other versions of what it needs itself, over sixty lines."""
    line = rf"a test needs the validate extra \({why}\): pip"
    with pytest.raises(UserError, match=line), needed("a test", traces=False):
        raise error


def test_versions_that_the_tape_does_not_mirror_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another transformers installed, differences may be theirs."""
    have(monkeypatch, transformers="5.24.3", peft="0.21.0")
    assert unmirrored() == []
    have(monkeypatch, transformers="5.240.0", torch="2.12.1")
    assert unmirrored() == ["torch 2.12.1 (mirrored: 2.13)", "transformers 5.240.0 (mirrored: 5.24)"]
    assert unmirrored(("transformers",)) == ["transformers 5.240.0 (mirrored: 5.24)"]
