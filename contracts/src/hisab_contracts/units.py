"""Units, and every rounding there is, by name.

GPU time is kept in GPU-nanoseconds: one millisecond of one millionth of a device is exactly one
GPU-ns. Amounts are integer micro-units of the book's currency; invoices speak in minor units, each
of `micro_per_minor` micro (`currencies`: 10 000 for PKR). No float anywhere. Months and fiscal
years are Asia/Karachi's (UTC+5, no daylight saving since 2009); fiscal years run July to June.
"""

from __future__ import annotations

import datetime as dt
import re
from functools import lru_cache
from typing import Final

HOUR_MS: Final = 3_600_000
GPU_NS_PER_GPU_HOUR: Final = 3_600_000_000_000
WHOLE_DEVICE_PPM: Final = 1_000_000
MAX_MICRO: Final = 2**63 - 1
"""Largest amount a book or an event may carry (int64)."""

KARACHI: Final = dt.timezone(dt.timedelta(hours=5), "PKT")
_KARACHI_OFFSET_MS: Final = 5 * HOUR_MS
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,3})?(Z|[+-]\d\d:\d\d)", re.ASCII)
_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MILLISECOND: Final = dt.timedelta(milliseconds=1)


def gpu_ns(start_ms: int, end_ms: int, share_ppm: int) -> int:
    """Return the GPU time of a share of one device over [start_ms, end_ms)."""
    return (end_ms - start_ms) * share_ppm


def floor_gpu_ms(used_gpu_ns: int) -> int:
    """GPU-milliseconds for display: floor, once, of a sum."""
    return used_gpu_ns // WHOLE_DEVICE_PPM


def rated_micro(bucket_gpu_ns: int, micro_per_gpu_hour: int) -> int:
    """Price the whole of one bucket: floor(gpu_ns x rate / one GPU-hour).

    A pure function of the bucket's total: order and chunking of what filled it cannot matter.
    """
    return bucket_gpu_ns * micro_per_gpu_hour // GPU_NS_PER_GPU_HOUR


def minor_half_up(exact_micro: int, micro_per_minor: int) -> int:
    """Round an invoice line's micro-units to minor units, half up (towards plus infinity)."""
    return (2 * exact_micro + micro_per_minor) // (2 * micro_per_minor)


def tax_minor_half_up(net_minor: int, tax_bps: int) -> int:
    """Tax of one line, from its rounded net, half up: once."""
    return (2 * net_minor * tax_bps + 10_000) // 20_000


def tender_minor_floor(funded_micro: int, micro_per_minor: int) -> int:
    """Minor units that credits tender for a month: floor."""
    return funded_micro // micro_per_minor


def mean_micro_half_up(sum_micro: int, count: int) -> int:
    """Share a sum, not negative, among so many; half-up: shares need not add up to it again."""
    return (2 * sum_micro + count) // (2 * count)


def hour_floor_ms(instant_ms: int) -> int:
    """Return the start of the UTC hour that holds an instant."""
    return instant_ms - instant_ms % HOUR_MS


def is_whole_hour(instant_ms: int) -> bool:
    """Say whether an instant lies on a UTC hour."""
    return instant_ms % HOUR_MS == 0


def month_of(instant_ms: int) -> str:
    """Return the billing month (`yyyy-mm`, Asia/Karachi) that holds an instant."""
    day = _EPOCH + dt.timedelta(milliseconds=instant_ms + _KARACHI_OFFSET_MS)
    return f"{day.year:04d}-{day.month:02d}"


def month_bounds_ms(month: str) -> tuple[int, int]:
    """Return [from, until) of a billing month in milliseconds; ValueError unless `yyyy-mm`."""
    match = _MONTH.fullmatch(month)
    if match is None:
        raise ValueError(f"a billing month is written yyyy-mm, got {month!r}")
    year, number = int(match[1]), int(match[2])
    first = dt.datetime(year, number, 1, tzinfo=KARACHI)
    after = dt.datetime(year + number // 12, number % 12 + 1, 1, tzinfo=KARACHI)
    return ms_of(first), ms_of(after)


def next_month(month: str) -> str:
    """Return the billing month after this one."""
    return month_of(month_bounds_ms(month)[1])


def first_day_on(month: str) -> dt.date:
    """Return the first calendar day of a billing month."""
    month_bounds_ms(month)
    return dt.date(int(month[:4]), int(month[5:7]), 1)


def fiscal_year(day_on: dt.date) -> str:
    """Return the fiscal year (July to June) of a Karachi date, written `2025-26`."""
    start = day_on.year if day_on.month >= 7 else day_on.year - 1
    return f"{start:04d}-{(start + 1) % 100:02d}"


def karachi_date_on(instant_ms: int) -> dt.date:
    """Return the Asia/Karachi calendar day that holds an instant."""
    return (_EPOCH + dt.timedelta(milliseconds=instant_ms + _KARACHI_OFFSET_MS)).date()


def instant_text(instant_ms: int) -> str:
    """Write an instant as RFC 3339 UTC with milliseconds, as every API of ours does."""
    moment = moment_of(instant_ms)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def optional_instant_text(instant_ms: int | None) -> str | None:
    """Write an instant that may be missing, as answers do."""
    return None if instant_ms is None else instant_text(instant_ms)


def instant_ms(text: str) -> int:
    """Read an RFC 3339 instant with an offset and at most milliseconds; ValueError for any other.

    Only what RFC 3339 says: Python's own reader also takes dates alone, weeks and decimal commas.
    """
    if _INSTANT.fullmatch(text) is None:
        raise ValueError(f"write an instant like 2025-07-01T00:00:00.000Z: got {text[:64]!r}")
    return ms_of(dt.datetime.fromisoformat(text))


@lru_cache(maxsize=65_536)
def moment_of(instant_ms: int) -> dt.datetime:
    """Return an instant as PostgreSQL's driver takes it; usage hours come again and again."""
    return _EPOCH + dt.timedelta(milliseconds=instant_ms)


def optional_moment_of(instant_ms: int | None) -> dt.datetime | None:
    """Return an instant that may be missing as PostgreSQL's driver takes it."""
    return None if instant_ms is None else moment_of(instant_ms)


def ms_of(moment: dt.datetime) -> int:
    """Return an instant of PostgreSQL's driver in milliseconds since 1970, floored."""
    return (moment - _EPOCH) // _MILLISECOND


def optional_ms_of(moment: dt.datetime | None) -> int | None:
    """Return an instant of PostgreSQL's driver that may be missing in milliseconds since 1970."""
    return None if moment is None else ms_of(moment)
