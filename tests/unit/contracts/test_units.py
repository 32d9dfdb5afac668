"""Units: every rounding and every edge of a month, worked by hand."""

from __future__ import annotations

import datetime as dt
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hisab_contracts import units

JULY_MS = 1_751_310_000_000
"""2025-07-01T00:00:00+05:00 = 2025-06-30T19:00:00Z."""
AUGUST_MS = 1_753_988_400_000
"""2025-08-01T00:00:00+05:00: 31 days later."""

micros = st.integers(min_value=-(2**63), max_value=2**63 - 1)
instants = st.integers(min_value=1_577_836_800_000, max_value=4_102_444_799_999)


@pytest.mark.parametrize(
    ("exact_micro", "minor"),
    [
        (0, 0),
        (4_999, 0),
        (5_000, 1),
        (9_999, 1),
        (10_000, 1),
        (14_999, 1),
        (15_000, 2),
        (-4_999, 0),
        (-5_000, 0),
        (-5_001, -1),
        (-15_000, -1),
        (2**63 - 1, 922_337_203_685_478),
        (316_438_200_000, 31_643_820),
    ],
)
@pytest.mark.defect("F62", "I1", "I4", "I6")
def test_line_is_rounded_half_up(exact_micro: int, minor: int) -> None:
    """One minor unit is 10 000 micro; a half goes up, towards plus infinity."""
    assert minor == units.minor_half_up(exact_micro, 10_000)


@given(micros)
@pytest.mark.defect("F62", "L14")
def test_rounding_of_a_line_is_the_exact_rational_rounded(exact_micro: int) -> None:
    """Half-up equals floor(x + 1/2) over exact rationals, at every size and in every currency."""
    for micro_per_minor in (1_000, 10_000, 1_000_000):
        exact = Fraction(exact_micro, micro_per_minor)
        minor = units.minor_half_up(exact_micro, micro_per_minor)
        assert (exact + Fraction(1, 2)).__floor__() == minor
        assert abs(minor * micro_per_minor - exact_micro) <= micro_per_minor // 2


@pytest.mark.parametrize(
    ("net_minor", "tax_bps", "tax_minor"),
    [
        (84_000, 1_500, 12_600),
        (14_000, 1_600, 2_240),
        (1, 1_600, 0),
        (3, 1_600, 0),
        (4, 1_600, 1),
        (10, 1_500, 2),
        (31_643_820, 1_600, 5_063_011),
        (-14_000, 1_600, -2_240),
    ],
)
@pytest.mark.defect("F62", "I1", "I2")
def test_tax_of_a_line_is_rounded_once_half_up(
    net_minor: int, tax_bps: int, tax_minor: int
) -> None:
    """Tax comes from the rounded net, in basis points, rounded once."""
    assert tax_minor == units.tax_minor_half_up(net_minor, tax_bps)


def test_tender_is_floored() -> None:
    """Credits tender whole minor units: what is below stays in the book."""
    tenders = [units.tender_minor_floor(m, 10_000) for m in (0, 9_999, 10_000, 1_009_999)]
    assert [0, 0, 1, 100] == tenders
    assert [0, 1] == [units.tender_minor_floor(m, 1_000_000) for m in (999_999, 1_999_999)]


@pytest.mark.parametrize(
    ("used_gpu_ns", "micro_per_gpu_hour", "micro"),
    [
        (3_600_000_000_000, 840_000_000, 840_000_000),
        (1_800_000_000_000, 840_000_000, 420_000_000),
        (600_000_000_000, 840_000_000, 140_000_000),
        (1, 840_000_000, 0),
        (4_286, 840_000_000, 1),
        (4_285, 840_000_000, 0),
        (2**63, 10**12, 2**63 * 10**12 // 3_600_000_000_000),
    ],
)
@pytest.mark.defect("M15", "L14")
def test_bucket_is_rated_by_floor_of_the_whole(
    used_gpu_ns: int, micro_per_gpu_hour: int, micro: int
) -> None:
    """A bucket's price is the floor of gpu_ns x rate / one GPU-hour, whatever its size."""
    assert micro == units.rated_micro(used_gpu_ns, micro_per_gpu_hour)


@given(st.lists(st.integers(min_value=0, max_value=10**15), max_size=20), st.integers(0, 10**12))
def test_rating_the_whole_is_never_less_than_rating_parts(
    parts_gpu_ns: list[int], micro_per_gpu_hour: int
) -> None:
    """Rating parts loses up to a micro a part: so the whole bucket is rated, never its parts."""
    whole = units.rated_micro(sum(parts_gpu_ns), micro_per_gpu_hour)
    parts = sum(units.rated_micro(part, micro_per_gpu_hour) for part in parts_gpu_ns)
    assert parts <= whole <= parts + max(0, len(parts_gpu_ns) - 1)


def test_gpu_time_of_a_share_is_exact() -> None:
    """One millisecond of a millionth of a device is one GPU-ns; display floors a sum once."""
    assert 60_000_000_000 == units.gpu_ns(JULY_MS, JULY_MS + 60_000, 1_000_000)
    assert 1 == units.gpu_ns(JULY_MS, JULY_MS + 1, 1)
    assert [0, 0, 1] == [units.floor_gpu_ms(x) for x in (0, 999_999, 1_000_000)]


@given(instants, st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 1_000_000))
@pytest.mark.defect("F61", "M14")
def test_splitting_an_interval_conserves_gpu_time(
    start_ms: int, first_ms: int, second_ms: int, share_ppm: int
) -> None:
    """Whatever instant an interval is cut at, the parts sum to the whole."""
    middle_ms, end_ms = start_ms + first_ms, start_ms + first_ms + second_ms
    parts = units.gpu_ns(start_ms, middle_ms, share_ppm) + units.gpu_ns(
        middle_ms, end_ms, share_ppm
    )
    assert units.gpu_ns(start_ms, end_ms, share_ppm) == parts


@pytest.mark.parametrize(
    ("instant_ms", "month"),
    [
        (JULY_MS - 1, "2025-06"),
        (JULY_MS, "2025-07"),
        (AUGUST_MS - 1, "2025-07"),
        (AUGUST_MS, "2025-08"),
        (1_709_146_799_999, "2024-02"),  # 2024-02-28T23:59:59.999+05:00
        (1_709_146_800_000, "2024-02"),  # 2024-02-29, a leap day
        (1_709_233_200_000, "2024-03"),  # 2024-03-01T00:00:00+05:00
        (1_735_671_600_000, "2025-01"),  # 2025-01-01T00:00:00+05:00
        (1_735_671_599_999, "2024-12"),
        (-18_000_001, "1969-12"),
    ],
)
@pytest.mark.defect("F60", "M14", "M21", "I20", "I27")
def test_month_turns_at_midnight_of_karachi(instant_ms: int, month: str) -> None:
    """A billing month ends at 18:59:59.999Z, on leap days and at new year too."""
    assert month == units.month_of(instant_ms)


@pytest.mark.parametrize(
    "text",
    [
        "\uff12\uff10\uff12\uff15-07",
        "\u0662\u0660\u0662\u0665-07",
        "2025-07\n",
        "2025-7",
        "2025-13",
    ],
)
def test_month_is_written_in_plain_digits_alone(text: str) -> None:
    """Other scripts' digits are numbers to Python, and would name a month a second time."""
    with pytest.raises(ValueError, match="yyyy-mm"):
        units.month_bounds_ms(text)


def test_month_bounds_are_half_open_and_meet() -> None:
    """July 2025 is [2025-06-30T19:00Z, 2025-07-31T19:00Z)."""
    assert (JULY_MS, AUGUST_MS) == units.month_bounds_ms("2025-07")
    assert ("2025-12", "2026-01") == ("2025-12", units.next_month("2025-12"))


@given(instants)
@pytest.mark.defect("F60", "I20")
def test_every_instant_lies_in_the_bounds_of_its_month(instant_ms: int) -> None:
    """Months tile time: each instant in exactly one, and the next begins where it ends."""
    month = units.month_of(instant_ms)
    from_ms, until_ms = units.month_bounds_ms(month)
    assert from_ms <= instant_ms < until_ms
    assert until_ms == units.month_bounds_ms(units.next_month(month))[0]
    assert units.is_whole_hour(from_ms)
    assert units.first_day_on(month) == units.karachi_date_on(from_ms)


@given(st.dates(min_value=dt.date(2000, 1, 1), max_value=dt.date(2099, 11, 30)))
@pytest.mark.defect("F60")
def test_pakistan_knows_no_daylight_saving_here(day_on: dt.date) -> None:
    """Also in 2002 and 2008 a day begins at 19:00Z: billing begins in 2020, one rule is enough."""
    midnight = dt.datetime.combine(day_on, dt.time(), tzinfo=dt.timezone(dt.timedelta(hours=5)))
    midnight_ms = (midnight - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(
        milliseconds=1
    )
    assert day_on == units.karachi_date_on(midnight_ms)
    assert day_on - dt.timedelta(days=1) == units.karachi_date_on(midnight_ms - 1)


@pytest.mark.parametrize("text", ["2025-7", "2025-13", "2025-00", "25-07", "2025-07-01", "", "x"])
def test_what_is_no_month_is_refused(text: str) -> None:
    """A billing month is written yyyy-mm."""
    with pytest.raises(ValueError, match="yyyy-mm"):
        units.month_bounds_ms(text)


@pytest.mark.parametrize(
    ("day_on", "year"),
    [
        (dt.date(2025, 6, 30), "2024-25"),
        (dt.date(2025, 7, 1), "2025-26"),
        (dt.date(2026, 6, 30), "2025-26"),
        (dt.date(1999, 7, 1), "1999-00"),
        (dt.date(2099, 12, 31), "2099-00"),
    ],
)
@pytest.mark.defect("I12")
def test_fiscal_year_runs_from_july_to_june(day_on: dt.date, year: str) -> None:
    """The 30th of June closes a year, the 1st of July opens the next."""
    assert year == units.fiscal_year(day_on)


def test_hours_are_those_of_utc() -> None:
    """An hour bucket begins on a UTC hour."""
    assert JULY_MS == units.hour_floor_ms(JULY_MS + 3_599_999)
    assert units.is_whole_hour(JULY_MS)
    assert not units.is_whole_hour(JULY_MS + 1)


@given(instants)
def test_written_instant_reads_back(instant_ms: int) -> None:
    """RFC 3339 with milliseconds loses nothing."""
    assert instant_ms == units.instant_ms(units.instant_text(instant_ms))


def test_an_instant_that_may_be_missing_stays_missing() -> None:
    """The optional twins pass None on, and are their plain ones otherwise; 1970 is no None."""
    assert units.optional_instant_text(None) is None
    assert units.optional_moment_of(None) is None
    assert units.optional_ms_of(None) is None
    for instant_ms in (0, 1_751_310_000_123):
        moment = units.moment_of(instant_ms)
        assert units.instant_text(instant_ms) == units.optional_instant_text(instant_ms)
        assert moment == units.optional_moment_of(instant_ms)
        assert instant_ms == units.optional_ms_of(moment)


def test_instant_is_written_with_three_digits_and_z() -> None:
    """The form of every API of ours."""
    assert "2025-06-30T19:00:00.000Z" == units.instant_text(JULY_MS)
    assert "2025-06-30T18:59:59.999Z" == units.instant_text(JULY_MS - 1)
    assert JULY_MS == units.instant_ms("2025-07-01T00:00:00+05:00")


@pytest.mark.parametrize(
    "text",
    ["2025-07-01T00:00:00", "2025-07-01", "2025-06-30T19:00:00.0001Z", "2025-06-30T19:00:60Z"],
)
@pytest.mark.defect("F60")
def test_instant_without_offset_or_below_a_millisecond_is_refused(text: str) -> None:
    """An instant says its offset, has whole milliseconds and no 60th second."""
    with pytest.raises(ValueError, match=r"."):
        units.instant_ms(text)
