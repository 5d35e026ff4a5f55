"""Prices are data: each with a source and a date, and an answer says how old it is."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.questions.plan import prices
from perfmodel.questions.plan.prices import KINDS, Price, known_prices, price_of, typed_prices

TODAY = date(2026, 11, 30)
OWN = """
provider = "our cluster"
date = "2026-11-02"
source = "the contract"

[[price]]
device = "H100"
usd = 1.1

[[price]]
device = "rtx-3090"
usd = 0.2
gpus = 4
note = "by fours"
"""


def test_every_bundled_price_is_of_a_known_device_and_says_where_it_stands() -> None:
    """A price without a source and a date is a rumour."""
    found = [price for several in known_prices().values() for price in several]
    assert len(found) > 50
    for price in found:
        assert price.device in profile.names()
        assert price.source.startswith("https://")
        assert price.kind in KINDS
        assert prices.months_old(price.dated, TODAY) >= 6
        assert 0.05 < price.usd < 20


def test_the_lowest_price_of_a_single_gpu_comes_before_a_share_of_a_larger_machine() -> None:
    """Who needs one GPU cannot rent an eighth of a node."""
    h100, spot, b200 = price_of("h100-sxm"), price_of("h100-sxm", "spot"), price_of("b200")
    assert h100 is not None
    assert spot is not None
    assert b200 is not None
    assert (h100.gpus, b200.gpus) == (1, 8)
    assert (
        spot.usd < h100.usd == min(p.usd for p in known_prices()["h100-sxm"] if p.kind == "on demand" and p.gpus == 1)
    )
    assert "a GPU of a machine of 8" in b200.in_words(TODAY)
    assert price_of("p4") is None


def test_age_is_counted_from_the_end_of_what_the_date_says() -> None:
    """A snapshot of a year may be of its last day."""
    assert prices.age("2025", TODAY) == "11 months old at least"
    assert prices.age("2026-10-31", TODAY) == "1 month old"
    assert prices.age("2026-11", TODAY) == "not a month old"
    assert "2026-05 (6 months old)" in Price("t4", 1.0, "x", dated="2026-05").in_words(TODAY)


def test_what_is_typed_wins_and_own_files_replace_bundled_prices(tmp_path: Path, monkeypatch: Any) -> None:
    """A contract's price counts, not a list's."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    (tmp_path / "prices").mkdir()
    (tmp_path / "prices" / "ours.toml").write_text(OWN)
    h100, ours = price_of("h100-sxm"), price_of("rtx-3090")
    assert h100 is not None
    assert ours is not None
    assert (h100.usd, h100.provider, h100.dated) == (1.1, "our cluster", "2026-11-02")
    assert (ours.usd, ours.gpus, ours.note) == (0.2, 4, "by fours")
    assert price_of("l40s") is not None
    typed = typed_prices(["2.5", "H100=3"])
    for device, usd in (("h100-sxm", 3.0), ("l40s", 2.5)):
        price = price_of(device, typed=typed)
        assert price is not None
        assert price.usd == usd
        assert price.in_words(TODAY) == f"${usd:.2f} an hour, as you gave it"


@pytest.mark.parametrize("text", ["", "cheap", "-1", "nan", "inf", "1e9", "h100-sxm="])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="dollars an hour and GPU"):
        typed_prices([text])
    with pytest.raises(UserError, match="unknown device"):
        typed_prices(["h1000=2"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"prices are tables \[\[price\]\]"),
        (OWN.replace("usd = 1.1", "eur = 1.1"), "price 1: unknown key 'eur'"),
        (OWN.replace("2026-11-02", "last week"), "none such as 2026"),
        (OWN.replace('"H100"', '"H1000"'), "unknown device 'H1000'"),
        (OWN.replace('date = "2026-11-02"', ""), "date is missing"),
        (
            OWN.replace("usd = 0.2", 'usd = 0.2\nkind = "sport"'),
            "price 2: kind 'sport' is unknown: did you mean 'spot'",
        ),
    ],
)
def test_a_broken_own_file_is_named(tmp_path: Path, monkeypatch: Any, text: str, words: str) -> None:
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    (tmp_path / "prices").mkdir()
    (tmp_path / "prices" / "ours.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        known_prices()
