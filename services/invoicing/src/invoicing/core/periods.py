"""When a billing month may be closed: by what the hubs say, never by a clock.

A month is *complete* when every hub that has ever emitted says, in every partition, that all usage
before the month's end has been stated (its watermark), and no known tenant's GPU time of that
month is in quarantine. Watermarks travel in-band behind the charges they cover, so a partition
whose watermark has passed has also been read that far: no lag needs to be asked for. All partitions
count, whoever's tenants they carry: it is simpler, and the month's sums are then complete for
everybody.

Before any hub has emitted nothing is known to be complete, so no month is: closing then would make
everything that follows late. A month that lies before all usage is closable as soon as every hub's
watermark has passed it; it closes without invoices.

`blockers` lists everything in the way, in a fixed order. The first kinds are matters of
completeness, which finance may override on the record; the last (`LASTING`) leave nothing to bill
by and cannot be overridden.

A month goes from `open` to `closable` by watermark, to `closing` by finance's command, and to
`closed` when each of its invoices is done. `close_period` decides about the command. Refusals, in
order: `PeriodClosed` (closed or closing already), `IssueDateOrder` (finance's date lies before one
that the series has already), `PeriodIncomplete` (something is missing and nobody overrides it),
`NothingToBillBy` (an override does not help). Before that, `close_request` refuses a date of issue
that lies before the tax point (`IssuedTooEarly`).

Whatever keeps a month from going on has a way out that a person can take through an API
(`WAYS_OUT`); of a closing month, `resumptions` says what becomes of it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from hisab_contracts.charges import OpenQuarantine, ReconcileResult, SourceBehind
from hisab_contracts.ids import HubCode, LegalEntityId, TenantId
from hisab_contracts.units import instant_text, month_bounds_ms
from invoicing.core.document import InvoiceStep, default_issued_on, issue_date_on
from invoicing.core.sellers import Seller
from invoicing.core.tax import TaxRow, rows_in_force, tax_point_on, version_of

BillStep = Literal["compute", "number"] | InvoiceStep
"""What a bill of a closing month still needs: to be computed, a number, what an invoice needs."""

BlockerKind = (
    Literal[
        "no-watermark",
        "watermark",
        "silent-hub",
        "quarantine",
        "entry-gap",
        "tenant-unknown",
        "legal-entity-missing",
        "tax-missing",
        "currency-unknown",
    ]
    | BillStep
)
"""What keeps a month open; while it is closing, a step of a bill, or why it cannot be computed.

Closings keep what they overrode for ever: a kind may be added here, and none is ever taken away.
"""

_CLOSE_AGAIN: Final = "POST /v1/periods/{month}/close again (under a new Idempotency-Key)"

WAYS_OUT: Final[Mapping[BlockerKind, str]] = MappingProxyType(
    {
        "no-watermark": "it goes once a hub emits; or close with an override",
        "watermark": "the source's agent catches up, or an operator retires it at metering (POST "
        "/v1/hubs/{hub}/sources/retire); or close with an override",
        "silent-hub": "the hub emits again, or an operator retires its sources at metering (POST "
        "/v1/hubs/{hub}/sources/retire); or close with an override",
        "quarantine": "an operator replays or dismisses the records at metering (POST "
        "/v1/quarantine/{id}/replay or /dismiss); or close with an override",
        "entry-gap": "the entries are fetched from the ledger's API as soon as it answers: see "
        "that the ledger runs and knows invoicing's key",
        "tenant-unknown": "it goes once the ledger's record of the tenant is read: see lag_records "
        "of GET /v1/status",
        "legal-entity-missing": "an operator registers who sells: POST /v1/legal-entities",
        "tax-missing": "an operator records the hub's row: POST /v1/tax-rates; if the month is "
        f"closing, {_CLOSE_AGAIN} takes the row up",
        "currency-unknown": f"{_CLOSE_AGAIN} with an override sets the tenant's bill aside",
        "compute": "it is tried again within a minute, as after a new release; "
        f"{_CLOSE_AGAIN} with an override sets the tenant's bill aside",
        "number": "it is numbered once each bill of the month is computed, skipped or set aside",
        "pdf": f"it is tried again within a minute; {_CLOSE_AGAIN} with an override lets the month "
        "close, and the PDF follows when it can be made",
        "ledger": "it is asked again within a minute: see that the ledger runs and knows "
        "invoicing's key; where it refuses, mend the tenant's book there; "
        f"{_CLOSE_AGAIN} with an override lets the month close, and the entry follows",
    }
)
"""What a person can do about each kind: no month is ever in a state without a way out."""

LASTING: Final[frozenset[BlockerKind]] = frozenset(
    {"entry-gap", "tenant-unknown", "legal-entity-missing", "tax-missing"}
)
"""Kinds of blockers that no override can help: nothing correct can be computed."""

PeriodStatus = Literal["open", "closable", "closing", "closed"]
"""How far a month is: incomplete, complete, being closed, done."""


@dataclass(frozen=True, slots=True)
class PartitionWatermark:
    """What a hub's newest watermark in one partition said."""

    partition: int
    hub: HubCode
    revision: int
    watermark_ms: int | None
    silent: bool
    quarantined: tuple[OpenQuarantine, ...]
    behind: tuple[SourceBehind, ...]
    reconciled: ReconcileResult | None = None
    """What metering found when it was last compared with the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodBlocker:
    """One thing that keeps a month open, and where to look: what it is not about is None."""

    kind: BlockerKind
    hub: HubCode | None = None
    source: str | None = None
    tenant_id: TenantId | None = None
    detail: str


@dataclass(frozen=True, slots=True)
class CloseRequest:
    """What finance asks for: close a month, date its invoices, perhaps in spite of something."""

    period: str
    issued_on: dt.date | None
    """The date that finance gave; None lets the service choose."""
    override_reason: str | None
    """Why the month is closed although it is not complete; None does not override."""
    actor: str


@dataclass(frozen=True, slots=True)
class Closing:
    """The close of a month as it goes on the record: what was overridden, what it is taxed by."""

    period: str
    legal_entity_id: LegalEntityId
    issued_on: dt.date
    override_reason: str | None
    overridden: tuple[PeriodBlocker, ...]
    tax_version: int
    """The tax table as it stood: rows recorded later never change this month's bills."""
    actor: str


@dataclass(frozen=True, slots=True)
class RecordedClosing:
    """A closing on the record, and when; `closed_at` once each of its invoices is done."""

    closing: Closing
    requested_at: dt.datetime
    closed_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class OutstandingBill:
    """What one tenant's bill of a month that is being closed still needs, and why."""

    tenant_id: TenantId
    kind: BlockerKind
    """The step it is at, or by its kind why it cannot be computed."""
    hub: HubCode | None
    attempts: int
    reason: str | None
    """Why the last attempt failed; None while it is in progress."""


@dataclass(frozen=True, slots=True)
class TenantCurrency:
    """The currency of a tenant's book."""

    tenant_id: TenantId
    currency: str


@dataclass(frozen=True, slots=True)
class PeriodState:
    """All that decides whether a month may be closed, and how far it is."""

    period: str
    partitions: int
    watermarks: tuple[PartitionWatermark, ...]
    quarantined_tenants: frozenset[TenantId]
    """Those of the tenants named by `watermarks` whom we know: others are listed, block nobody."""
    broken_books: tuple[TenantId, ...]
    """Tenants some of whose entries are still missing here: they are being fetched."""
    unknown_tenants: tuple[TenantId, ...]
    """Tenants with charges in the month of whom nothing has been said yet."""
    unknown_currencies: tuple[TenantCurrency, ...]
    """Commercial tenants with charges in the month whose currency ISO 4217 does not know."""
    billed_hubs: tuple[HubCode, ...]
    """Hubs at which commercial tenants used something in the month."""
    tax_rows: tuple[TaxRow, ...]
    """The whole tax table."""
    sellers: tuple[Seller, ...]
    last_issued_on: dt.date | None
    """The seller's latest date: of a number, or given to a closing whose numbers are to come."""
    recorded: RecordedClosing | None
    outstanding: tuple[OutstandingBill, ...]
    """Empty unless the month is being closed."""


@dataclass(frozen=True, slots=True)
class PeriodProgress:
    """How far a month is, and what is in its way."""

    status: PeriodStatus
    blocked_by: tuple[PeriodBlocker, ...]


@dataclass(frozen=True, slots=True)
class IssuedTooEarly:
    """Invoices cannot be dated before the service they bill is rendered: the tax point."""


@dataclass(frozen=True, slots=True)
class PeriodClosed:
    """The month is closed, or being closed, already."""

    period: str


@dataclass(frozen=True, slots=True)
class IssueDateOrder:
    """The date that finance gave lies before one that the series has: dates never fall."""

    issued_on: dt.date
    earliest_on: dt.date


@dataclass(frozen=True, slots=True)
class PeriodIncomplete:
    """Something is missing, and the command does not override it."""

    blocked_by: tuple[PeriodBlocker, ...]


@dataclass(frozen=True, slots=True)
class NothingToBillBy:
    """Something is missing without which no correct bill can be computed: no override helps."""

    blocked_by: tuple[PeriodBlocker, ...]
    lasting: tuple[PeriodBlocker, ...]


CloseRefused = PeriodClosed | IssueDateOrder | PeriodIncomplete | NothingToBillBy
"""Why a month is not closed, in order of precedence."""


def close_request(
    period: str, issued_on: dt.date | None, override_reason: str | None, actor: str
) -> CloseRequest | IssuedTooEarly:
    """Read what finance sent; a date before the month's service is rendered is refused."""
    if issued_on is not None and issued_on < tax_point_on(period):
        return IssuedTooEarly()
    return CloseRequest(
        period=period, issued_on=issued_on, override_reason=override_reason, actor=actor
    )


def close_period(state: PeriodState, request: CloseRequest) -> Closing | CloseRefused:
    """Decide whether a month is closed; everything in its way that is overridden is recorded.

    Without a date of finance's, invoices carry the first day after the month, or the last date of
    their series where that is later.
    """
    if state.recorded is not None:
        return PeriodClosed(state.period)
    last_on, given_on = state.last_issued_on, request.issued_on
    if given_on is not None and last_on is not None and given_on < last_on:
        return IssueDateOrder(given_on, last_on)
    found = blockers(state)
    if found and request.override_reason is None:
        return PeriodIncomplete(found)
    lasting = tuple(blocker for blocker in found if blocker.kind in LASTING)
    if lasting:
        return NothingToBillBy(found, lasting)
    # Exactly one: without a seller the month is blocked, and a second one is refused registration.
    (seller,) = state.sellers
    return Closing(
        period=state.period,
        legal_entity_id=seller.legal_entity_id,
        issued_on=given_on or issue_date_on(default_issued_on(state.period), last_on),
        override_reason=request.override_reason,
        overridden=found,
        tax_version=version_of(state.tax_rows),
        actor=request.actor,
    )


def progress_of(state: PeriodState) -> PeriodProgress:
    """Say how far a month is. While it is being closed, what its bills need is what blocks it."""
    if state.recorded is None:
        found = blockers(state)
        return PeriodProgress("open" if found else "closable", found)
    if state.recorded.closed_at is None:
        return PeriodProgress("closing", tuple(unfinished(bill) for bill in state.outstanding))
    return PeriodProgress("closed", ())


def unfinished(bill: OutstandingBill) -> PeriodBlocker:
    """Say what a bill of a closing month still needs as something that blocks the month."""
    detail = f"attempt {bill.attempts}: {bill.reason}" if bill.reason else "in progress"
    return PeriodBlocker(kind=bill.kind, hub=bill.hub, tenant_id=bill.tenant_id, detail=detail)


def describe(blocker: PeriodBlocker) -> str:
    """Say in one line what is in the way and whom or what it is about."""
    about = blocker.source or blocker.tenant_id or blocker.hub
    return f"{blocker.kind} ({about}): {blocker.detail}" if about else blocker.detail


def blockers(state: PeriodState) -> tuple[PeriodBlocker, ...]:
    """List what keeps a month open, in a fixed order; empty when it may be closed."""
    return (
        *_incomplete_hubs(state),
        *_open_quarantine(state),
        *(
            PeriodBlocker(
                kind="entry-gap",
                tenant_id=tenant_id,
                detail="entries are missing and being fetched",
            )
            for tenant_id in state.broken_books
        ),
        *(
            PeriodBlocker(
                kind="tenant-unknown",
                tenant_id=tenant_id,
                detail="nothing says yet who this tenant is",
            )
            for tenant_id in state.unknown_tenants
        ),
        *(
            PeriodBlocker(
                kind="currency-unknown",
                tenant_id=book.tenant_id,
                detail=f"ISO 4217 gives {book.currency} no minor unit that could be billed",
            )
            for book in state.unknown_currencies
        ),
        *_nothing_to_bill_by(state),
    )


def complete_until(
    watermarks: Iterable[PartitionWatermark], partitions: int
) -> Mapping[HubCode, int | None]:
    """Return, for each hub that has emitted, the instant its usage is complete to everywhere.

    None while any partition has no watermark of that hub, or while there are no partitions at all.
    """
    lowest: dict[HubCode, int | None] = {}
    for hub, by_partition in _by_hub(watermarks).items():
        known = [by_partition[p].watermark_ms for p in range(partitions) if p in by_partition]
        stated = [watermark for watermark in known if watermark is not None]
        lowest[hub] = min(stated) if stated and len(stated) == partitions else None
    return lowest


def last_reconciled(watermarks: Iterable[PartitionWatermark]) -> ReconcileResult | None:
    """Return what metering found when it was last compared with the ledger, as far as is known.

    It is of all hubs, and every watermark says it; a hub that has nothing new to say is behind.
    """
    known = [mark.reconciled for mark in watermarks if mark.reconciled is not None]
    return max(known, key=lambda result: result.at_ms, default=None)


def _by_hub(
    watermarks: Iterable[PartitionWatermark],
) -> dict[HubCode, dict[int, PartitionWatermark]]:
    by_hub: dict[HubCode, dict[int, PartitionWatermark]] = {}
    for mark in sorted(watermarks, key=lambda mark: (mark.hub, mark.partition)):
        by_hub.setdefault(mark.hub, {})[mark.partition] = mark
    return by_hub


def _incomplete_hubs(state: PeriodState) -> Iterable[PeriodBlocker]:
    if not state.watermarks:
        yield PeriodBlocker(kind="no-watermark", detail="no hub has emitted anything yet")
        return
    end_ms = month_bounds_ms(state.period)[1]
    complete = complete_until(state.watermarks, state.partitions)
    for hub, by_partition in _by_hub(state.watermarks).items():
        until_ms = complete[hub]
        # A watermark that equals the end is enough: nothing before that instant is unreported.
        if until_ms is None or until_ms < end_ms:
            # Partitions are read at different paces; the newest revision knows best who is behind.
            newest = max(by_partition.values(), key=lambda mark: (mark.revision, mark.partition))
            yield from _behind(newest, until_ms, end_ms)


def _behind(mark: PartitionWatermark, until_ms: int | None, end_ms: int) -> Iterable[PeriodBlocker]:
    """Name the sources that hold a hub back; the hub itself when none is named."""
    kind: BlockerKind = "silent-hub" if mark.silent else "watermark"
    needed = f"complete until {_instant(until_ms)}, needed until {_instant(end_ms)}"
    named = [
        source
        for source in mark.behind
        if source.watermark_ms is None or source.watermark_ms < end_ms
    ]
    for source in named:
        detail = f"{source.reason}; its watermark is {_instant(source.watermark_ms)}; hub {needed}"
        yield PeriodBlocker(kind=kind, hub=mark.hub, source=source.source, detail=detail)
    if not named:
        yield PeriodBlocker(kind=kind, hub=mark.hub, detail=f"hub {needed}")


def _open_quarantine(state: PeriodState) -> Iterable[PeriodBlocker]:
    """Per hub and tenant the most that any partition still reports."""
    most: dict[tuple[HubCode, TenantId], int] = {}
    for mark in state.watermarks:
        for item in mark.quarantined:
            if item.month == state.period and item.tenant_id in state.quarantined_tenants:
                # Every partition repeats the hub's whole sum, and some have read further than
                # others: the most is what may still be there, a sum would count it many times.
                key = (mark.hub, item.tenant_id)
                most[key] = max(most.get(key, 0), item.quarantined_gpu_ns)
    for (hub, tenant_id), quarantined_gpu_ns in sorted(most.items()):
        if quarantined_gpu_ns > 0:
            detail = f"{quarantined_gpu_ns} GPU-ns of this month wait in quarantine"
            yield PeriodBlocker(kind="quarantine", hub=hub, tenant_id=tenant_id, detail=detail)


def _nothing_to_bill_by(state: PeriodState) -> Iterable[PeriodBlocker]:
    if not state.sellers:
        detail = "no legal entity that sells is registered"
        yield PeriodBlocker(kind="legal-entity-missing", detail=detail)
    point_on = tax_point_on(state.period)
    taxed = rows_in_force(state.tax_rows, point_on, version_of(state.tax_rows))
    for hub in sorted(set(state.billed_hubs) - set(taxed)):
        detail = f"no tax row covers {point_on}"
        yield PeriodBlocker(kind="tax-missing", hub=hub, detail=detail)


def _instant(instant_ms: int | None) -> str:
    return "not stated" if instant_ms is None else instant_text(instant_ms)
