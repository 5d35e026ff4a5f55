"""What the project is made of: its dependencies are those that CI runs, and a bill of materials names them all."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLAIN = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["report"]]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_ci_runs_the_oldest_dependencies_that_are_promised() -> None:
    """A lower bound that nobody has run is a guess: click 8.1, once promised, lacked a name that is used."""
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    promised = dict(line.partition(",")[0].split(">=") for line in PLAIN)
    assert set(oldest) == set(promised)
    for name, version in oldest.items():
        assert re.fullmatch(rf"{re.escape(promised[name])}(\.0)*", version), name


def test_every_dependency_has_a_lower_bound() -> None:
    """Without one, whatever lies in somebody's environment is taken for good."""
    extras = PROJECT["optional-dependencies"]
    lines = {line for name in ("hub", "report", "validate", "cluster", "diffusion", "engine") for line in extras[name]}
    for line in {*PROJECT["dependencies"], *lines}:
        assert line.startswith("perfmodel[") or re.search(r">=|==", line), line


def test_ci_runs_every_python_that_is_promised() -> None:
    """From the first that `requires-python` lets in."""
    pythons = re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", WORKFLOW)[1])  # type: ignore[index]
    assert pythons == [f"3.{minor}" for minor in range(11, 15)]
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def test_a_release_is_tested_built_and_of_the_version_that_its_tag_says() -> None:
    """What is published cannot be taken back: only what was tested, by a job that can do nothing else."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    release = yaml.safe_load(text)
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML takes `on` for true
    jobs = release["jobs"]
    assert set(jobs["publish"]["needs"]) == {"test", "build"}
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in yaml.safe_load(WORKFLOW)[True]
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    assert "secrets." not in text
    check = next(step["run"] for step in jobs["build"]["steps"] if step.get("name") == "the tag is the version")
    for tag, code in ((f"v{PROJECT['version']}", 0), (f"v{PROJECT['version']}1", 1)):
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        assert subprocess.run(["bash", "-ec", check], cwd=ROOT, env=environment, check=False).returncode == code


def test_the_citation_and_the_command_are_those_of_the_project() -> None:
    """A citation of another version misleads; `pipx run` and `uvx` look for a command named like the package."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {key: cited[key] for key in ("version", "license", "keywords")} == {
        key: PROJECT[key] for key in ("version", "license", "keywords")
    }
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format asks for
    assert PROJECT["name"] in PROJECT["scripts"]


def test_the_bill_of_materials_names_what_is_installed() -> None:
    """Whoever has to know whether a bad release is among them reads it there."""
    pytest.importorskip("packaging")
    done = subprocess.run([sys.executable, ".ci/sbom.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if "No package metadata" in done.stderr:
        pytest.skip("perfmodel is not installed here")
    assert done.returncode == 0, done.stderr
    bill = json.loads(done.stdout)
    names = {entry["name"].lower() for entry in bill["components"]}
    assert {re.split("[>=]", line)[0] for line in PROJECT["dependencies"]} <= names
    known = {bill["metadata"]["component"]["bom-ref"], *(entry["bom-ref"] for entry in bill["components"])}
    for entry in bill["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= known
