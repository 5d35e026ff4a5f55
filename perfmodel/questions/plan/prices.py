"""What an hour of a GPU costs: data/prices/*.toml, the user's own files, or a figure that is typed.

A file holds tables [[price]]: `device` (its name or an alias), `usd` for an hour of one GPU, `provider`, `kind` ("on
demand", "spot" or "reserved"), `gpus` of the machine that is rented (1 if it is not said), `date` (YYYY, YYYY-MM or
YYYY-MM-DD), `source`, `note`; provider, date and source may stand above the tables, for all of them. Own files lie in
prices/ of $PERFMODEL_HOME (`perfmodel.devices.own`); for a device that they name, the bundled prices do not count.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

from ...devices import own, profile, toml
from ...errors import UserError, as_given, nearest, one_or_several
from ...resources import DATA, read_toml
from ...values import immutable

Known = Mapping[str, Sequence["Price"]]  # by the slug of the device
PRICES = DATA / "prices"
KINDS = ("on demand", "spot", "reserved")
KEYS = ("device", "usd", "provider", "kind", "gpus", "date", "source", "note")
FOR_ALL = ("provider", "date", "source")  # keys that may stand above the tables
DATE = re.compile(r"(\d{4})(?:-(\d\d))?(?:-\d\d)?")
DEAREST = 1e4  # USD an hour and GPU; beyond this it is a typing error
TYPED = "as you gave it"


@immutable
class Price:
    """Dollars for an hour of one GPU, and where that stands.

    Attributes:
        usd: an hour and GPU.
        gpus: GPUs of the machine that is rented as a whole.
        dated: YYYY, YYYY-MM or YYYY-MM-DD; empty of a price that was typed.
    """

    device: str
    usd: float
    provider: str
    kind: str = "on demand"
    gpus: int = 1
    dated: str = ""
    source: str = ""
    note: str = ""

    def in_words(self, today: date) -> str:
        """The price with who asks it, of when it is, and how old that makes it."""
        said = [self.kind, *([f"a GPU of a machine of {self.gpus}"] if self.gpus > 1 else []), self.note]
        when = f", {self.dated} ({age(self.dated, today)})" if self.dated else ""
        of = "" if self.provider == TYPED else f", {', '.join(filter(None, said))}"
        return f"${self.usd:,.2f} an hour, {self.provider}{of}{when}"

    def as_dict(self, today: date) -> dict[str, Any]:
        """Plain values."""
        months = months_old(self.dated, today) if self.dated else None
        return {
            "usd_per_gpu_hour": self.usd, "provider": self.provider, "kind": self.kind, "gpus": self.gpus,
            "date": self.dated or None, "months_old": months, "source": self.source or None, "note": self.note or None,
        }  # fmt: skip


def price_of(
    device: str, kind: str = KINDS[0], typed: Mapping[str, float] | None = None, known: Known | None = None
) -> Price | None:
    """The lowest known price of a device, of a machine with one GPU if there is one; None where none is known.

    Args:
        device: its slug.
        typed: prices by slug, or by an empty name for all devices (`typed_prices`).
        known: `known_prices`, for those who ask for many.
    """
    typed = typed or {}
    usd = typed.get(device, typed.get(""))
    if usd is not None:
        return Price(device, usd, TYPED)
    known = known_prices() if known is None else known
    found = [price for price in known.get(device, ()) if price.kind == kind]
    return min(found, key=lambda price: (price.gpus > 1, price.usd), default=None)


GivenPrices = str | float | Iterable[str | float] | Mapping[str, float]


def typed_prices(given: GivenPrices, slugs: Container[str] = ()) -> dict[str, float]:
    """Prices by slug of `2.5`, for all devices, and `h100-sxm=2.5`; or of a mapping from names of devices.

    Args:
        slugs: of devices that may have no file.

    Raises:
        UserError: no price, or a device that is not known.
    """
    found = {}
    if isinstance(given, Mapping):
        given = [f"{device}={usd}" if device else f"{usd}" for device, usd in given.items()]
    for text in map(str, one_or_several("price", given, (str, Real))):
        device, equals, number = text.rpartition("=")
        try:
            usd = float(number)
        except ValueError:
            usd = -1.0
        if not 0 <= usd <= DEAREST:
            raise UserError(
                f"price {as_given(text)}: dollars an hour and GPU are expected, such as 2.5 or h100-sxm=2.5"
            )
        found[device if not equals or device in slugs else profile.load(device).slug] = usd
    return found


def known_prices() -> Known:
    """Prices by the slug of the device: bundled ones, and own ones in their place.

    Raises:
        UserError: an own file that holds something else.
    """
    mine: dict[str, list[Price]] = {}
    for path in _own_files():
        _add(mine, path)
    return {**_bundled(), **mine}


def _own_files() -> list[Path]:
    with suppress(UserError):  # a user without a folder for files
        return sorted((own.home() / "prices").glob("*.toml"))
    return []


@lru_cache(maxsize=1)
def _bundled() -> dict[str, list[Price]]:
    found: dict[str, list[Price]] = {}
    for path in sorted(PRICES.glob("*.toml")):
        _add(found, path)
    return found


def _add(found: dict[str, list[Price]], path: Path) -> None:
    """Add the prices of a file to those of its devices."""
    table = read_toml(path)
    toml.no_others(table, ("price", *FOR_ALL), str(path))
    rows = table.get("price")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: prices are tables [[price]]; it has none")
    for i, row in enumerate(rows, 1):
        made = _price({**{key: table[key] for key in FOR_ALL if key in table}, **row}, f"{path}, price {i}")
        found.setdefault(made.device, []).append(made)


def _price(row: dict[str, Any], where: str) -> Price:
    toml.no_others(row, KEYS, where)
    named = toml.text(row, "device", where)
    slug = profile.bundled(named) or (mine.stem if (mine := own.find(named)) else "")
    if not slug:
        raise UserError(f"{where}: unknown device {named!r}: {nearest(named, profile.names())}")
    kind = toml.text(row, "kind", where) if "kind" in row else KINDS[0]
    if kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r} is unknown: {nearest(kind, KINDS)}")
    when = toml.text(row, "date", where)
    if not DATE.fullmatch(when):
        raise UserError(f"{where}: date {when!r} is none such as 2026, 2026-05 or 2026-05-31")
    return Price(
        device=slug,
        usd=float(toml.number(row, "usd", where)),
        provider=toml.text(row, "provider", where),
        kind=kind,
        gpus=toml.number(row, "gpus", where, whole=True) if "gpus" in row else 1,
        dated=when,
        source=toml.text(row, "source", where),
        note=toml.text(row, "note", where) if "note" in row else "",
    )


def months_old(when: str, today: date) -> int:
    """Whole months at least since a date; of a year alone since its end.

    >>> months_old("2025", date(2026, 11, 30)), months_old("2026-05", date(2026, 11, 30))
    (11, 6)
    """
    found = DATE.fullmatch(when)
    assert found is not None
    return max(0, (today.year - int(found[1])) * 12 + today.month - int(found[2] or 12))


def age(when: str, today: date) -> str:
    """How old a price of a date is, in words."""
    months = months_old(when, today)
    many = "1 month" if months == 1 else f"{months} months"
    return "not a month old" if not months else f"{many} old{' at least' if len(when) == 4 else ''}"
