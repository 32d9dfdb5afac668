"""When a month may be closed, and what is named as standing in its way."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import get_args

import msgspec
import pytest

from hisab_contracts.charges import OpenQuarantine, ReconcileResult, SourceBehind
from hisab_contracts.ids import HubCode, LegalEntityId, TenantId
from invoicing.core.periods import (
    LASTING,
    WAYS_OUT,
    BlockerKind,
    CloseRequest,
    Closing,
    IssueDateOrder,
    IssuedTooEarly,
    NothingToBillBy,
    OutstandingBill,
    PartitionWatermark,
    PeriodBlocker,
    PeriodClosed,
    PeriodIncomplete,
    PeriodProgress,
    PeriodState,
    RecordedClosing,
    TenantCurrency,
    blockers,
    close_period,
    close_request,
    complete_until,
    describe,
    last_reconciled,
    progress_of,
)
from invoicing.core.sellers import Seller
from invoicing.core.tax import TaxRow

LHR, KHI = HubCode("lhr"), HubCode("khi")
A, B = TenantId("indus-foundry"), TenantId("ravi-health")
END_MS = 1_753_988_400_000  # 2025-07-31T19:00:00Z: the first instant of August in Karachi


def mark(
    partition: int,
    hub: HubCode = LHR,
    watermark_ms: int | None = END_MS,
    *,
    revision: int = 1,
    silent: bool = False,
    quarantined: tuple[OpenQuarantine, ...] = (),
    behind: tuple[SourceBehind, ...] = (),
) -> PartitionWatermark:
    return PartitionWatermark(partition, hub, revision, watermark_ms, silent, quarantined, behind)


PRA = TaxRow(1, LHR, "PRA", 1600, dt.date(2025, 1, 1), "cited")
SRB = TaxRow(2, KHI, "SRB", 1500, dt.date(2025, 1, 1), "cited")
SELLER = Seller(LegalEntityId("ignite-haas"), "Ignite HaaS", "INV")
COMPLETE = PeriodState(
    period="2025-07",
    partitions=2,
    watermarks=(mark(0), mark(1)),
    quarantined_tenants=frozenset({A, B}),
    broken_books=(),
    unknown_tenants=(),
    unknown_currencies=(),
    billed_hubs=(LHR,),
    tax_rows=(PRA, SRB),
    sellers=(SELLER,),
    last_issued_on=None,
    recorded=None,
    outstanding=(),
)
INCOMPLETE = replace(COMPLETE, watermarks=(mark(0), mark(1, watermark_ms=END_MS - 1)))
REQUEST = CloseRequest("2025-07", None, None, "key:finance")
FORCED = replace(REQUEST, override_reason="khi burned down")
CLOSING = Closing(
    period="2025-07",
    legal_entity_id=SELLER.legal_entity_id,
    issued_on=dt.date(2025, 8, 1),
    override_reason=None,
    overridden=(),
    tax_version=2,
    actor="key:finance",
)
ASKED_AT = dt.datetime(2025, 8, 2, tzinfo=dt.UTC)


def kinds(state: PeriodState) -> list[tuple[str, str | None, str | None, str | None]]:
    return [
        (blocker.kind, blocker.hub, blocker.source, blocker.tenant_id)
        for blocker in blockers(state)
    ]


@pytest.mark.defect("M22")
def test_a_month_is_closable_once_every_partition_has_passed_its_end() -> None:
    """The watermark at the end is enough: nothing before that instant is unreported."""
    assert () == blockers(COMPLETE)


@pytest.mark.defect("I20", "M21")
def test_one_millisecond_short_of_the_end_keeps_the_month_open() -> None:
    """23:59:59.999 PKT belongs to the month."""
    state = replace(COMPLETE, watermarks=(mark(0), mark(1, watermark_ms=END_MS - 1)))
    (blocker,) = blockers(state)
    assert ("watermark", "lhr") == (blocker.kind, blocker.hub)
    assert (
        "hub complete until 2025-07-31T18:59:59.999Z, needed until 2025-07-31T19:00:00.000Z"
        == blocker.detail
    )


def test_before_anything_was_emitted_no_month_is_closable() -> None:
    """Closing on silence would make everything that follows late."""
    assert [("no-watermark", None, None, None)] == kinds(replace(COMPLETE, watermarks=()))


def test_a_hub_seen_in_one_partition_counts_in_all() -> None:
    """What partition 1 has not said about khi may still be on its way."""
    state = replace(COMPLETE, watermarks=(mark(0), mark(1), mark(0, KHI)))
    assert [("watermark", "khi", None, None)] == kinds(state)


def test_a_hub_that_has_no_watermark_yet_counts() -> None:
    """It has emitted, and nothing of it is complete."""
    state = replace(COMPLETE, watermarks=(mark(0), mark(1, watermark_ms=None)))
    assert "complete until not stated" in blockers(state)[0].detail


@pytest.mark.defect("M22")
def test_a_silent_hub_is_named_with_the_sources_that_hold_it_back() -> None:
    """Only sources behind the month's end, from the newest watermark."""
    behind = (
        SourceBehind("/hubs/khi/nodes/n2/epochs/e1", END_MS - 7 * 3_600_000, "behind"),
        SourceBehind("/hubs/khi/nodes/n3/epochs/e1", None, "gap"),
        SourceBehind("/hubs/khi/nodes/n4/epochs/e1", END_MS, "behind"),
    )
    newest = mark(1, KHI, END_MS - 7 * 3_600_000, revision=2, silent=True, behind=behind)
    state = replace(COMPLETE, watermarks=(mark(0), mark(1), mark(0, KHI), newest))
    assert [
        ("silent-hub", "khi", "/hubs/khi/nodes/n2/epochs/e1", None),
        ("silent-hub", "khi", "/hubs/khi/nodes/n3/epochs/e1", None),
    ] == kinds(state)


def test_open_quarantine_of_the_month_blocks_until_every_partition_says_it_is_gone() -> None:
    """A partition that has not yet read the release still says so."""
    waiting = (OpenQuarantine(A, "2025-07", 600_000_000_000),)
    state = replace(COMPLETE, watermarks=(mark(0, quarantined=waiting), mark(1)))
    (blocker,) = blockers(state)
    assert ("quarantine", "lhr", A) == (blocker.kind, blocker.hub, blocker.tenant_id)
    assert "600000000000 GPU-ns of this month wait in quarantine" == blocker.detail


def test_quarantine_of_another_month_of_nothing_or_of_an_unknown_tenant_blocks_nobody() -> None:
    """Unknown tenants are listed by metering and block nobody."""
    listed = (
        OpenQuarantine(A, "2025-08", 5),
        OpenQuarantine(B, "2025-07", 0),
        OpenQuarantine(TenantId("nobody"), "2025-07", 5),
    )
    assert () == blockers(replace(COMPLETE, watermarks=(mark(0, quarantined=listed), mark(1))))


def test_what_leaves_nothing_to_bill_by_is_listed_last_and_lasts() -> None:
    """These no override can help."""
    state = replace(
        COMPLETE,
        broken_books=(A,),
        unknown_tenants=(B,),
        unknown_currencies=(TenantCurrency(A, "XTS"),),
        billed_hubs=(KHI, LHR),
        tax_rows=(PRA,),
        sellers=(),
    )
    assert [
        ("entry-gap", None, None, A),
        ("tenant-unknown", None, None, B),
        ("currency-unknown", None, None, A),
        ("legal-entity-missing", None, None, None),
        ("tax-missing", "khi", None, None),
    ] == kinds(state)
    assert {"entry-gap", "tenant-unknown", "legal-entity-missing", "tax-missing"} == LASTING


def test_complete_until_is_the_lowest_partition_of_each_hub() -> None:
    """Unknown while one partition has said nothing."""
    marks = (mark(0), mark(1, watermark_ms=END_MS - 1), mark(0, KHI))
    assert {LHR: END_MS - 1, KHI: None} == complete_until(marks, 2)
    assert {LHR: None, KHI: None} == complete_until(marks, 0)


def test_a_complete_month_is_closed_by_the_tax_table_as_it_stands() -> None:
    """What goes on the record; also for a month that nobody used anything in."""
    assert CLOSING == close_period(COMPLETE, REQUEST)
    assert replace(CLOSING, tax_version=0) == close_period(
        replace(COMPLETE, billed_hubs=(), tax_rows=()), REQUEST
    )


def test_an_incomplete_month_is_refused_unless_finance_overrides_it_on_the_record() -> None:
    """What was overridden is recorded with the reason."""
    found = blockers(INCOMPLETE)
    assert PeriodIncomplete(found) == close_period(INCOMPLETE, REQUEST)
    assert replace(CLOSING, override_reason="khi burned down", overridden=found) == close_period(
        INCOMPLETE, FORCED
    )


def test_no_override_helps_where_nothing_correct_can_be_computed() -> None:
    """Only the lasting blockers are why; all of them are told."""
    state = replace(INCOMPLETE, tax_rows=(SRB,))
    behind, missing = blockers(state)
    assert "tax-missing" == missing.kind
    assert NothingToBillBy((behind, missing), (missing,)) == close_period(state, FORCED)


@pytest.mark.parametrize("closed_at", [None, ASKED_AT])
def test_a_month_is_closed_once_whatever_else_is_wrong(closed_at: dt.datetime | None) -> None:
    """This refusal comes first."""
    state = replace(INCOMPLETE, recorded=RecordedClosing(CLOSING, ASKED_AT, closed_at))
    assert PeriodClosed("2025-07") == close_period(state, REQUEST)


def test_a_date_is_never_before_the_tax_point() -> None:
    """The last day of the month itself is early enough; without one the service chooses."""
    assert REQUEST == close_request("2025-07", None, None, "key:finance")
    last_on = dt.date(2025, 7, 31)
    assert replace(FORCED, issued_on=last_on) == close_request(
        "2025-07", last_on, "khi burned down", "key:finance"
    )
    assert IssuedTooEarly() == close_request("2025-07", dt.date(2025, 7, 30), None, "")


SEPTEMBER_ON = dt.date(2025, 9, 1)


@pytest.mark.parametrize(
    ("last_on", "given_on", "issued_on"),
    [
        (None, None, dt.date(2025, 8, 1)),
        (dt.date(2025, 7, 1), None, dt.date(2025, 8, 1)),
        (SEPTEMBER_ON, None, SEPTEMBER_ON),
        (SEPTEMBER_ON, SEPTEMBER_ON, SEPTEMBER_ON),
        (SEPTEMBER_ON, dt.date(2026, 7, 1), dt.date(2026, 7, 1)),
        (None, dt.date(2025, 7, 31), dt.date(2025, 7, 31)),
    ],
)
def test_a_chosen_date_is_the_later_of_the_default_and_the_series_last(
    last_on: dt.date | None, given_on: dt.date | None, issued_on: dt.date
) -> None:
    """And finance's own is taken where it does not fall behind."""
    state = replace(COMPLETE, last_issued_on=last_on)
    request = replace(REQUEST, issued_on=given_on)
    assert replace(CLOSING, issued_on=issued_on) == close_period(state, request)


def test_a_date_of_finances_before_the_series_last_is_refused_with_the_earliest() -> None:
    """Before anything else is looked at, and whatever is overridden."""
    state = replace(INCOMPLETE, last_issued_on=SEPTEMBER_ON)
    given_on = dt.date(2025, 8, 31)
    request = replace(FORCED, issued_on=given_on)
    assert IssueDateOrder(given_on, SEPTEMBER_ON) == close_period(state, request)


def test_every_kind_of_blocker_has_a_way_out() -> None:
    """A kind that is added without one fails here."""
    kinds = {kind for part in get_args(BlockerKind) for kind in flat(part)}
    assert kinds == set(WAYS_OUT)
    assert all(WAYS_OUT.values())


def flat(part: object) -> list[str]:
    """The strings of a union of literals, however it is nested."""
    return [kind for inner in get_args(part) for kind in flat(inner)] or [str(part)]


def test_a_month_goes_from_open_to_closable_to_closing_to_closed() -> None:
    """While it is closing, what its bills still need is what blocks it, and nothing else does."""
    assert PeriodProgress("open", blockers(INCOMPLETE)) == progress_of(INCOMPLETE)
    assert PeriodProgress("closable", ()) == progress_of(COMPLETE)
    closing = replace(
        INCOMPLETE,
        recorded=RecordedClosing(CLOSING, ASKED_AT, None),
        outstanding=(
            OutstandingBill(A, "ledger", None, 2, "ledger unreachable"),
            OutstandingBill(B, "pdf", None, 0, None),
        ),
    )
    assert PeriodProgress(
        "closing",
        (
            PeriodBlocker(kind="ledger", tenant_id=A, detail="attempt 2: ledger unreachable"),
            PeriodBlocker(kind="pdf", tenant_id=B, detail="in progress"),
        ),
    ) == progress_of(closing)
    done = replace(INCOMPLETE, recorded=RecordedClosing(CLOSING, ASKED_AT, ASKED_AT))
    assert PeriodProgress("closed", ()) == progress_of(done)


@pytest.mark.parametrize(
    "kind", [*sorted(LASTING), "no-watermark", "silent-hub", "quarantine", "compute"]
)
def test_what_was_overridden_is_read_back_as_it_was_recorded(kind: BlockerKind) -> None:
    """Closings keep it as JSON for ever, whatever it is about."""
    recorded = (PeriodBlocker(kind=kind, hub=LHR, detail="late"),)
    stored = msgspec.json.encode(recorded)
    assert recorded == msgspec.json.decode(stored, type=tuple[PeriodBlocker, ...])


def test_a_blocker_is_described_in_one_line() -> None:
    """With whom or what it is about, the nearest first; or by itself."""
    about_all = PeriodBlocker(
        kind="watermark",
        hub=LHR,
        source="/hubs/lhr/nodes/n1/epochs/e",
        tenant_id=A,
        detail="late",
    )
    assert "watermark (/hubs/lhr/nodes/n1/epochs/e): late" == describe(about_all)
    assert "watermark (indus-foundry): late" == describe(replace(about_all, source=None))
    assert "watermark (lhr): late" == describe(replace(about_all, source=None, tenant_id=None))
    assert "no hub has emitted" == describe(
        PeriodBlocker(kind="no-watermark", detail="no hub has emitted")
    )


def test_the_newest_comparison_of_metering_is_that_of_the_month() -> None:
    """Whichever hub and partition has said it; none before any has."""
    assert last_reconciled([mark(0), mark(1)]) is None
    marks = [
        replace(mark(0), reconciled=ReconcileResult(5, 0)),
        replace(mark(1, KHI), reconciled=ReconcileResult(7, 3)),
        mark(2),
    ]
    assert ReconcileResult(7, 3) == last_reconciled(marks)
