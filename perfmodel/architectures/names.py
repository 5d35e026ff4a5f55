"""Which bundled config a repository's name stands for: `NousResearch/Meta-Llama-3-8B-Instruct` is llama-3-8b.

A name is read as words: `Qwen2.5-7B-Instruct` is qwen, 2.5, 7b, instruct. It stands for the bundled name (or alias)
with the most words that it holds in their order, with nothing but plain words in between, so that family, version and
size agree exactly. What is left over may be a tuner's own words where family, version and size are named; it may be no
other family or size, no word of another program (vl, moe, reward, ...) and no version where the family has several.
`data/models/names.toml` holds the words and aliases. No config is read.
"""

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

from ..resources import DATA, read_toml, stems

MODELS = DATA / "models"
SIZE = r"[ae]?\d+(\.\d+)?(x\d+(\.\d+)?)?[bm]"  # 7b, 135m, 8x7b; a3b: active parameters
VERSION = r"v\d+(\.\d+)*"
STAMP = r"\d{4,8}|\d+k"  # a date, a length of context
ALIKE = 0.7  # share of characters in which a typing error agrees with what was meant

Words = tuple[str, ...]


class BundledMatch(NamedTuple):
    """The bundled name, and the words that say how the repository's weights are packed."""

    name: str
    packed: Words


@cache
def model_names() -> Words:
    """Names of the bundled models."""
    return stems(MODELS, ".json")


def bundled_for(name: str) -> BundledMatch | None:
    """The bundled config of a repository's name (`owner/name`, or the name alone), None where it is not certain."""
    words = _words(name)
    matches = [(used, known) for known in _known() if (used := _places(words, known))]
    most = max((len(used) for used, _ in matches), default=0)
    found = {_known()[known] for used, known in matches if len(used) == most and _fits(words, used, known)}
    if len(found) != 1 or _begins(words, "unlike"):
        return None
    bundled = found.pop()
    packed = tuple(w for w in words if w in _data()["packed"])
    return BundledMatch(bundled, packed or _kept(bundled, words))


def is_own_code(name: str) -> bool:
    """Whether a repository's name is of a model whose program is code of its own."""
    return _begins(_words(name), "own_code")


def family(name: str) -> list[str]:
    """The bundled names of the family that a name holds."""
    held = [w for w in _words(name) if w in _families()]
    return sorted((n for n in model_names() if _words(n)[0] in held[:1]), key=name_order)


def misspelt(name: str) -> str:
    """The bundled name that a name without a known family differs little from, empty if there is none."""
    import difflib

    return "".join(difflib.get_close_matches(name.lower(), model_names(), n=1, cutoff=ALIKE))


def size(name: str) -> str:
    """The word for the size in a name, empty if there is none."""
    return next((w for w in _words(name) if re.fullmatch(SIZE, w)), "")


def name_order(name: str) -> tuple[tuple[float, str], ...]:
    """A key that sorts names by family, then version and size as numbers."""
    return tuple((_number(word), word) for word in _words(name))


def _number(word: str) -> float:
    found = re.match(r"v?(\d+(?:\.\d+)?)(m?)", word)
    return float(found[1]) / (1000 if found[2] else 1) if found else 0.0


def _kept(bundled: str, words: Words) -> Words:
    """How the repositories of a bundled model pack its weights, though the name does not say so."""
    whole = not {*words}.isdisjoint(_data()["whole"])
    return () if whole or bundled not in _data()["kept"] else (_data()["kept"][bundled],)


def _begins(words: Words, kind: str) -> bool:
    """Whether a name begins as one of a list of `names.toml`."""
    return any(words[: len(_words(u))] == _words(u) for u in _data()[kind])


def _fits(words: Words, used: set[int], known: Words) -> bool:
    """Whether what a name holds besides a bundled one leaves no doubt."""
    rest = [w for i, w in enumerate(words) if i not in used and not _plain(w) and w not in _data()["packed"]]
    others = [k for k in _known() if len(k) > len(known) == 2 and k[0] == known[0]]
    if not any(re.fullmatch(SIZE, w) for w in known) or any(k[-1] == known[-1] for k in others):
        return not rest  # no size, or the first generation of several
    versions = any(k[:2] == known and re.fullmatch(VERSION, k[2]) for k in others)
    no = {*_data()["other"], *_families()}
    return not any(w in no or re.fullmatch(SIZE, w) or (versions and re.fullmatch(VERSION, w)) for w in rest)


def _places(words: Words, known: Words) -> set[int]:
    """Where the words of a bundled name stand in another, empty if they do not or others stand between them."""
    for first in (i for i, w in enumerate(words) if w == known[0]):
        used, at = {first}, first + 1
        for word in known[1:]:
            while at < len(words) and words[at] != word and _plain(words[at]):
                at += 1
            if at == len(words) or words[at] != word:
                break
            used.add(at)
            at += 1
        if len(used) == len(known):
            return used
    return set()


def _plain(word: str) -> bool:
    return word in _data()["plain"] or bool(re.fullmatch(STAMP, word))


@lru_cache(maxsize=1024)
def _words(name: str) -> Words:
    return tuple(_split(name))


def _split(name: str) -> Iterator[str]:
    """Words and numbers in lower case; `llama3.2` is two, `int4` and `t5` are one."""
    text = re.sub(r"(?<=\d)_(?=\d)", ".", name.rpartition("/")[2].lower())
    for chunk in re.findall(r"[a-z0-9]+(?:\.[a-z0-9]+)*", text):
        parts = re.fullmatch(r"([a-z]{2,})(\d.*)", chunk)
        if parts and not any(chunk in _data()[kind] for kind in ("plain", "packed")):
            yield from parts.groups()
        else:
            yield chunk


@cache
def _known() -> dict[Words, str]:
    """Words of each bundled name and alias → bundled name."""
    aliases: dict[str, str] = _data()["aliases"]
    return {_words(name): name for name in model_names()} | {_words(alias): name for alias, name in aliases.items()}


@cache
def _families() -> frozenset[str]:
    return frozenset(words[0] for words in _known())


@cache
def _data() -> dict[str, Any]:
    return read_toml(MODELS / "names.toml")
