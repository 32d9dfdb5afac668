"""What becomes of a month whose closing is parked: finance asks for it again, on the record.

A closing is *parked* while something of it has failed: a bill cannot be computed (a hub without a
tax row, a currency without a minor unit, a defect of ours), a PDF cannot be made, the ledger does
not enter what an invoice bills. All of it is tried again by itself, ever later, at most a minute
apart; but a bill never changes what it is computed by, so what it lacks must be *taken up*. The
same command that closed the month does so, and what it did is one *resumption* on the record:

* Without an override, tax rows that were recorded since the close are taken up for the hubs that
  had none, and for no other; whatever failed is tried again at once. What was taken up for a hub
  stands, whatever is recorded and taken up after: a month has one rate per hub.
* With an override, finance goes on without what failed: bills that cannot be computed are *set
  aside* (their charges show in the reconciliation under that name, no number is burnt), and steps
  of numbered invoices are *waived*: the month does not wait for them any more, while they are still
  tried for ever and the invoice says so.

Refusals, in order: `PeriodClosed` where the month is closed, nothing of it has failed, or finance
names another date than the closing's; `TaxRowsMissing` where a hub still has no row and nobody
overrides it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hisab_contracts.ids import HubCode
from invoicing.core.periods import (
    CloseRequest,
    OutstandingBill,
    PeriodBlocker,
    PeriodClosed,
    RecordedClosing,
    unfinished,
)
from invoicing.core.tax import TaxRow, rows_in_force, tax_point_on, version_of


@dataclass(frozen=True, slots=True)
class ParkedClosing:
    """A month that finance has asked to close, and what of it has failed."""

    recorded: RecordedClosing
    failed: tuple[OutstandingBill, ...]
    """What has failed at least once and is not done; the first thousand."""
    failed_count: int
    """All of it, however many."""
    pending_hubs: tuple[HubCode, ...]
    """Hubs of the bills that are still to compute."""
    tax_rows: tuple[TaxRow, ...]
    """The whole tax table."""
    taken_up_versions: tuple[int, ...]
    """Versions of it that earlier resumptions took up, ascending: the rows of their hubs stand."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """A parked closing that goes on, as it is put on the record."""

    period: str
    override_reason: str | None
    """Why finance goes on without what failed; None tries it again."""
    tax_version: int | None
    """The tax table's version that pending bills take up; None where they lack no row."""
    taken_up: tuple[TaxRow, ...]
    """The rows of it that count: those of hubs that had none."""
    failed: tuple[PeriodBlocker, ...]
    """What had failed, the first thousand; by an override, what the month goes on without."""
    failed_count: int
    """All that had."""
    actor: str


@dataclass(frozen=True, slots=True)
class TaxRowsMissing:
    """These hubs still have no tax row: one must be recorded, or the bills set aside."""

    failed: tuple[PeriodBlocker, ...]
    hubs: tuple[HubCode, ...]


ResumptionRefused = PeriodClosed | TaxRowsMissing
"""Why a closing does not go on, in order of precedence."""


def resume_closing(parked: ParkedClosing, request: CloseRequest) -> Resumption | ResumptionRefused:
    """Decide whether a closing that is asked for again goes on, and with what."""
    closing = parked.recorded.closing
    another_date = request.issued_on not in (None, closing.issued_on)
    if parked.recorded.closed_at is not None or not parked.failed or another_date:
        return PeriodClosed(closing.period)
    failed = tuple(unfinished(bill) for bill in parked.failed)
    at_on = tax_point_on(closing.period)
    had = rows_in_force(parked.tax_rows, at_on, closing.tax_version, parked.taken_up_versions)
    has = rows_in_force(parked.tax_rows, at_on, version_of(parked.tax_rows))
    lacking = sorted(set(parked.pending_hubs) - set(had))
    taken_up = tuple(has[hub] for hub in lacking if hub in has)
    missing = tuple(hub for hub in lacking if hub not in has)
    if missing and request.override_reason is None:
        return TaxRowsMissing(failed, missing)
    return Resumption(
        period=closing.period,
        override_reason=request.override_reason,
        tax_version=version_of(parked.tax_rows) if taken_up else None,
        taken_up=taken_up,
        failed=failed,
        failed_count=parked.failed_count,
        actor=request.actor,
    )
