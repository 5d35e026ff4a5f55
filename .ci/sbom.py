"""Prints what an installation of perfmodel consists of, as CycloneDX 1.6 JSON: `python .ci/sbom.py [EXTRA...]`.

It reads the metadata of what is installed in this Python (which needs `packaging`) and nothing else: no network.
"""

import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

ROOT = "perfmodel"


def needed_by(found: Distribution, extras: set[str]) -> list[Requirement]:
    """The requirements of a distribution that hold in this Python."""
    lines = map(Requirement, found.requires or [])
    asked = [{"extra": extra} for extra in ("", *extras)]
    return [line for line in lines if line.marker is None or any(map(line.marker.evaluate, asked))]


def closure(extras: set[str]) -> tuple[dict[str, Distribution], dict[str, list[str]]]:
    """Distributions by package URL, and which needs which."""
    found: dict[str, Distribution] = {}
    edges: dict[str, list[str]] = {}
    waiting = [(distribution(ROOT), extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        this, of = waiting.pop()
        if (url(this), frozenset(of)) in seen:
            continue
        seen.add((url(this), frozenset(of)))
        found[url(this)] = this
        for line in needed_by(this, of):
            try:
                other = distribution(line.name)
            except PackageNotFoundError:
                sys.exit(f"{line.name}, which {this.name} needs, is not installed")
            edges.setdefault(url(this), []).append(url(other))
            waiting.append((other, set(line.extras)))
    return found, edges


def url(found: Distribution) -> str:
    """A package URL (https://github.com/package-url/purl-spec)."""
    return f"pkg:pypi/{found.name.lower().replace('_', '-')}@{found.version}"


def component(at: str, found: Distribution) -> dict[str, object]:
    """A distribution as CycloneDX has it; licences as its metadata names them."""
    told = found.metadata.get("License-Expression") or found.metadata.get("License") or ""
    known = {"licenses": [{"license": {"name": told.splitlines()[0]}}]} if told.strip() else {}
    return {"type": "library", "bom-ref": at, "name": found.name, "version": found.version, "purl": at, **known}


def main() -> None:
    """Print the bill of materials."""
    found, edges = closure(set(sys.argv[1:]))
    first, *others = (component(at, each) for at, each in found.items())
    bill = {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {"component": {**first, "type": "application"}},
        "components": sorted(others, key=lambda entry: str(entry["purl"])),
        "dependencies": [{"ref": at, "dependsOn": sorted(set(edges.get(at, [])))} for at in sorted(found)],
    }  # fmt: skip
    print(json.dumps(bill, indent=1))


if __name__ == "__main__":
    main()
