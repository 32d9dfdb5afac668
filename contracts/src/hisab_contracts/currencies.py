"""Currencies by ISO 4217, and how many micro-units their minor unit has.

Books, prices and charges are in micro: one millionth of a unit of the currency, whichever it is.
Invoices speak in minor units, and how small those are is the currency's: 100 paisa to a rupee, no
part of a yen, 1 000 fils to a Kuwaiti dinar. With exponent E a minor unit is 10^(6 - E) micro, the
`M` of every rounding.

The table is closed: a request that names another code is malformed. It holds the currencies that
are legal tender somewhere and have 0, 2 or 3 decimals; metals, funds and codes for tests have no
minor unit that could be billed. A currency that ISO withdraws stays here, because books stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, get_args

WholeCurrency = Literal[
    "BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV",
    "XAF", "XOF", "XPF",
]  # fmt: skip
"""Currencies without a smaller unit: exponent 0."""

CentCurrency = Literal[
    "AED", "AFN", "ALL", "AMD", "ANG", "AOA", "ARS", "AUD", "AWG", "AZN", "BAM", "BBD", "BDT",
    "BGN", "BMD", "BND", "BOB", "BRL", "BSD", "BTN", "BWP", "BYN", "BZD", "CAD", "CDF", "CHF",
    "CNY", "COP", "CRC", "CUP", "CVE", "CZK", "DKK", "DOP", "DZD", "EGP", "ERN", "ETB", "EUR",
    "FJD", "FKP", "GBP", "GEL", "GHS", "GIP", "GMD", "GTQ", "GYD", "HKD", "HNL", "HTG", "HUF",
    "IDR", "ILS", "INR", "IRR", "JMD", "KES", "KGS", "KHR", "KPW", "KYD", "KZT", "LAK", "LBP",
    "LKR", "LRD", "LSL", "MAD", "MDL", "MGA", "MKD", "MMK", "MNT", "MOP", "MRU", "MUR", "MVR",
    "MWK", "MXN", "MYR", "MZN", "NAD", "NGN", "NIO", "NOK", "NPR", "NZD", "PAB", "PEN", "PGK",
    "PHP", "PKR", "PLN", "QAR", "RON", "RSD", "RUB", "SAR", "SBD", "SCR", "SDG", "SEK", "SGD",
    "SHP", "SLE", "SOS", "SRD", "SSP", "STN", "SVC", "SYP", "SZL", "THB", "TJS", "TMT", "TOP",
    "TRY", "TTD", "TWD", "TZS", "UAH", "USD", "UYU", "UZS", "VED", "VES", "WST", "XCD", "XCG",
    "YER", "ZAR", "ZMW", "ZWG",
]  # fmt: skip
"""Currencies with a hundredth: exponent 2."""

MillCurrency = Literal["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"]
"""Currencies with a thousandth: exponent 3."""

CurrencyText = Literal[WholeCurrency, CentCurrency, MillCurrency]
"""A currency as a request states it: a code of the table; any other is malformed."""

EXPONENTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        **dict.fromkeys(get_args(WholeCurrency), 0),
        **dict.fromkeys(get_args(CentCurrency), 2),
        **dict.fromkeys(get_args(MillCurrency), 3),
    }
)
"""Decimals of the minor unit of every currency there is, by its code."""

_MICRO_EXPONENT: Final = 6


def micro_per_minor_of(currency: str) -> int | None:
    """Return M: the micro-units of one minor unit of a currency; None for a code not in the table.

    10 000 for PKR and USD, 1 000 000 for JPY, 1 000 for KWD.
    """
    exponent = EXPONENTS.get(currency)
    return None if exponent is None else 10 ** (_MICRO_EXPONENT - exponent)
