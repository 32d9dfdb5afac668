"""The currencies there are, and how small their minor units are."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from hisab_contracts.currencies import EXPONENTS, CurrencyText, micro_per_minor_of
from hisab_contracts.units import minor_half_up


@pytest.mark.parametrize(
    ("currency", "expected"),
    [
        ("PKR", 10_000),
        ("USD", 10_000),
        ("EUR", 10_000),
        ("JPY", 1_000_000),
        ("KRW", 1_000_000),
        ("KWD", 1_000),
        ("BHD", 1_000),
        ("TND", 1_000),
        ("XAU", None),
        ("XTS", None),
        ("XXX", None),
        ("CLF", None),
        ("ABC", None),
        ("pkr", None),
        ("", None),
    ],
)
def test_a_minor_unit_is_as_small_as_iso_4217_says(currency: str, expected: int | None) -> None:
    """Metals, funds and codes for tests have none; what is not in the table is no currency."""
    assert expected == micro_per_minor_of(currency)


def test_each_currency_stands_in_one_group() -> None:
    """Three capital letters, and an exponent of 0, 2 or 3."""
    codes = get_args(CurrencyText)
    assert len(set(codes)) == len(codes) == len(EXPONENTS)
    assert all(len(code) == 3 and code.isalpha() and code.isupper() for code in codes)
    assert {0, 2, 3} == set(EXPONENTS.values())
    assert (16, 7) == tuple(list(EXPONENTS.values()).count(exponent) for exponent in (0, 3))


@pytest.mark.parametrize("text", ["XTS", "ZZZ", "pkr", "PK", "PKRX", " PKR", ""])
def test_a_request_that_names_another_code_is_malformed(text: str) -> None:
    """Where a body is read, before anything acts on it."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, CurrencyText)
    assert msgspec.convert("KWD", CurrencyText) == "KWD"


def test_an_amount_of_1935_48_in_three_currencies() -> None:
    """1 935 yen, 1 935.480 dinars, 1 935.48 rupees."""
    minors = {
        currency: minor_half_up(1_935_480_000, micro_per_minor_of(currency) or 0)
        for currency in ("JPY", "KWD", "PKR")
    }
    assert {"JPY": 1_935, "KWD": 1_935_480, "PKR": 193_548} == minors
