"""Which tax row a hub's lines carry, by place and by date."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest

from hisab_contracts.ids import HubCode
from invoicing.core.tax import (
    TaxRow,
    TaxRowDiffers,
    record_tax_row,
    rows_in_force,
    tax_point_on,
    version_of,
)

LHR, KHI = HubCode("lhr"), HubCode("khi")


def row(version: int, hub: HubCode, tax_bps: int, valid_from: str) -> TaxRow:
    return TaxRow(version, hub, "PRA", tax_bps, dt.date.fromisoformat(valid_from), "an Act, s. 1")


@pytest.mark.parametrize(
    ("month", "expected"),
    [
        ("2025-07", dt.date(2025, 7, 31)),
        ("2024-02", dt.date(2024, 2, 29)),
        ("2025-02", dt.date(2025, 2, 28)),
        ("2025-12", dt.date(2025, 12, 31)),
    ],
)
@pytest.mark.defect("F60")
def test_tax_point_is_the_last_day_of_the_month(month: str, expected: dt.date) -> None:
    """Leap years and the turn of the year included."""
    assert expected == tax_point_on(month)


def test_the_newest_row_not_after_the_date_is_in_force() -> None:
    """Whatever the order in which the rows arrive."""
    old, new, later = (
        row(1, LHR, 1600, "2020-01-01"),
        row(2, LHR, 1700, "2025-07-01"),
        row(3, LHR, 1800, "2025-08-01"),
    )
    at_on = dt.date(2025, 7, 31)
    assert {LHR: new} == rows_in_force([old, new, later], at_on, 3)
    assert {LHR: new} == rows_in_force([later, new, old], at_on, 3)


def test_a_row_is_in_force_on_its_first_day() -> None:
    """Dates from `valid_from` on, that day included."""
    only = row(1, LHR, 1600, "2025-07-31")
    assert {LHR: only} == rows_in_force([only], dt.date(2025, 7, 31), 1)
    assert {} == rows_in_force([only], dt.date(2025, 7, 30), 1)


@pytest.mark.defect("I24")
def test_a_row_recorded_after_the_close_never_changes_an_old_bill() -> None:
    """The version pins the table: a later row with an earlier date is not seen."""
    known, backdated = row(1, LHR, 1600, "2025-01-01"), row(2, LHR, 500, "2025-06-01")
    at_on = dt.date(2025, 7, 31)
    assert {LHR: known} == rows_in_force([known, backdated], at_on, 1)
    assert {LHR: backdated} == rows_in_force([known, backdated], at_on, 2)


def test_every_hub_has_its_own_authority() -> None:
    """A row of one hub says nothing about another."""
    lahore, karachi = row(1, LHR, 1600, "2025-01-01"), row(2, KHI, 1500, "2025-01-01")
    assert {LHR: lahore, KHI: karachi} == rows_in_force([lahore, karachi], dt.date(2025, 7, 31), 2)


def test_a_new_authority_for_a_fourth_hub_is_one_row_under_the_next_number() -> None:
    """Peshawar's hub: nothing but data; the number that is asked for does not count."""
    table = [row(1, LHR, 1600, "2025-01-01"), row(2, KHI, 1500, "2025-01-01")]
    fourth = row(0, HubCode("pew"), 1500, "2025-01-01")
    assert replace(fourth, tax_version=3) == record_tax_row(table, fourth)
    assert (2, 0) == (version_of(table), version_of([]))


def test_a_row_that_is_recorded_already_is_answered_and_not_recorded_again() -> None:
    """The same hub, date, rate, authority and citation."""
    table = [row(1, LHR, 1600, "2025-01-01"), row(2, KHI, 1500, "2025-01-01")]
    assert table[1] == record_tax_row(table, replace(table[1], tax_version=0))


def test_a_row_is_never_changed() -> None:
    """Another rate from the same date on is refused; from another date on it is a new row."""
    table = [row(1, LHR, 1600, "2025-01-01")]
    assert TaxRowDiffers() == record_tax_row(table, row(0, LHR, 200, "2025-01-01"))
    later = row(0, LHR, 200, "2025-07-01")
    assert replace(later, tax_version=2) == record_tax_row(table, later)


def test_a_row_taken_up_counts_only_for_a_hub_that_had_none() -> None:
    """A new rate of a hub that had one stays without effect, whatever else is taken up."""
    at_on = dt.date(2025, 7, 31)
    known = TaxRow(1, LHR, "PRA", 1600, dt.date(2025, 1, 1), "cited")
    newer = TaxRow(2, LHR, "PRA", 1900, dt.date(2025, 7, 1), "cited")
    missing = TaxRow(3, KHI, "SRB", 1500, dt.date(2025, 1, 1), "cited")
    after = TaxRow(4, KHI, "SRB", 1300, dt.date(2025, 7, 1), "cited")
    rows = [known, newer, missing, after]
    assert {LHR: known, KHI: missing} == rows_in_force(rows, at_on, 1, [3])
    assert {LHR: known, KHI: after} == rows_in_force(rows, at_on, 1, [4])
    assert {LHR: known} == rows_in_force(rows, at_on, 1, [2])


def test_what_was_taken_up_for_a_hub_stands_when_more_is_taken_up() -> None:
    """One rate per hub in a month: bills of the first taking up may be out."""
    at_on = dt.date(2025, 7, 31)
    first = TaxRow(2, LHR, "PRA", 1500, dt.date(2025, 1, 1), "cited")
    newer = TaxRow(3, LHR, "PRA", 1600, dt.date(2025, 7, 1), "cited")
    other = TaxRow(4, KHI, "SRB", 1500, dt.date(2025, 1, 1), "cited")
    assert {LHR: first, KHI: other} == rows_in_force([first, newer, other], at_on, 1, [2, 4])
