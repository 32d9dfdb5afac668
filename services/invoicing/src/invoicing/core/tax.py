"""Which sales tax a line carries: dated rows, one authority per hub, chosen by place and by date.

Services are taxed where they are delivered: Lahore's hub by PRA (Punjab), Karachi's by SRB
(Sindh), Islamabad's by FBR (Capital Territory). None of these stands in code: hubs, authorities and
rates are data. **A new hub or a new authority is one `POST /v1/tax-rates`** (`api/tax_rates.py`);
until its row is there, a month in which commercial tenants used that hub says `tax-missing` and
cannot be closed.

A row says from which Karachi date on an authority asks how many basis points, and cites the law
that says so. Rows are immutable: a change of the law is a new row with a later date.

**Tax point.** A line is taxed at the rate in force on the *last day of the billing month*, the day
on which the month's service is fully rendered, not on the day the invoice happens to be issued: the
tax then follows from what was used, and closing a month late, or under another issue date, cannot
change it. (Sales Tax Act 1990 s. 2(44)(c) dates a supply of services to the time they are rendered;
the provincial acts are taken to agree. Secondary sources: confirm before production.) A rate that
changes within a month therefore applies to the whole of it.

**Version.** Rows are numbered as they are recorded. An invoice pins the highest number known when
its month was closed, so a row recorded later, whatever its date, never changes an old invoice.
Where a month is parked because a hub had no row at all, finance may have rows recorded later *taken
up* (`resumptions`): the bill pins that version too, and it counts only for hubs that had no row.

Refusals: `TaxMissing` when no row covers a hub on the tax point; `TaxRowDiffers` when a row is to
be recorded for a hub and a date that have another one.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hisab_contracts.ids import HubCode
from hisab_contracts.units import first_day_on, next_month


@dataclass(frozen=True, slots=True)
class TaxRow:
    """From `valid_from` (a Karachi date) on, this authority asks `tax_bps` of what a hub sells."""

    tax_version: int
    hub: HubCode
    authority: str
    tax_bps: int
    valid_from: dt.date
    citation: str
    """The law, section and source the row rests on, and how sure that is."""


@dataclass(frozen=True, slots=True)
class TaxMissing:
    """No row covers this hub on the tax point: nobody may guess a rate."""

    hub: HubCode
    tax_point_on: dt.date


@dataclass(frozen=True, slots=True)
class TaxRowDiffers:
    """This hub has another row from this date on; a row is never changed."""


def record_tax_row(rows: Sequence[TaxRow], wanted: TaxRow) -> TaxRow | TaxRowDiffers:
    """Decide what recording a row comes to: the row under the next number, or the one there is.

    `rows` is the whole table. The number that `wanted` carries does not count. Asking again for
    what is recorded already is not an error and records nothing. Refusal: `TaxRowDiffers`.
    """
    for row in rows:
        if (row.hub, row.valid_from) == (wanted.hub, wanted.valid_from):
            same = replace(wanted, tax_version=row.tax_version) == row
            return row if same else TaxRowDiffers()
    return replace(wanted, tax_version=version_of(rows) + 1)


def version_of(rows: Iterable[TaxRow]) -> int:
    """Return the version of a tax table: the number of its newest row, 0 when it is empty."""
    return max((row.tax_version for row in rows), default=0)


def tax_point_on(month: str) -> dt.date:
    """Return the tax point of a billing month (`yyyy-mm`): its last day in Karachi."""
    return first_day_on(next_month(month)) - dt.timedelta(days=1)


def rows_in_force(
    rows: Collection[TaxRow],
    at_on: dt.date,
    tax_version: int,
    taken_up_versions: Iterable[int] = (),
) -> Mapping[HubCode, TaxRow]:
    """Return each hub's row in force on a date, as the table stood at a version.

    The newest `valid_from` not after the date wins. Two rows of one hub never begin on one day (a
    constraint of the table), so the order in which rows arrive cannot matter. A hub that had no row
    in force gets the one it had at the first of `taken_up_versions` (ascending) at which it had
    any; once a hub has a row, that never changes: bills that rest on it may be out.
    """
    chosen = _in_force(rows, at_on, tax_version)
    for version in taken_up_versions:
        chosen = {**_in_force(rows, at_on, version), **chosen}
    return chosen


def _in_force(rows: Iterable[TaxRow], at_on: dt.date, tax_version: int) -> dict[HubCode, TaxRow]:
    chosen: dict[HubCode, TaxRow] = {}
    for row in rows:
        if row.tax_version > tax_version or row.valid_from > at_on:
            continue
        known = chosen.get(row.hub)
        if known is None or row.valid_from > known.valid_from:
            chosen[row.hub] = row
    return chosen
