"""When a month may be closed, and what is named as standing in its way."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest

from hisab_contracts.charges import OpenQuarantine, SourceBehind
from hisab_contracts.ids import HubCode, TenantId
from invoicing.periods import (
    LASTING,
    HubMark,
    MonthState,
    blockers,
    complete_until,
)

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
) -> HubMark:
    return HubMark(partition, hub, revision, watermark_ms, silent, quarantined, behind)


COMPLETE = MonthState(
    month="2025-07",
    partitions=2,
    marks=(mark(0), mark(1)),
    quarantined_tenants=frozenset({A, B}),
    broken_books=(),
    unknown_tenants=(),
    taxed_hubs=frozenset({LHR, KHI}),
    billed_hubs=(LHR,),
    tax_point_on=dt.date(2025, 7, 31),
    has_seller=True,
)


def kinds(state: MonthState) -> list[tuple[str, str | None, str | None, str | None]]:
    return [(b.kind, b.hub, b.source, b.tenant_id) for b in blockers(state)]


@pytest.mark.defect("M22")
def test_a_month_is_closable_once_every_partition_has_passed_its_end() -> None:
    """The watermark at the end is enough: nothing before that instant is unreported."""
    assert () == blockers(COMPLETE)


@pytest.mark.defect("I20", "M21")
def test_one_millisecond_short_of_the_end_keeps_the_month_open() -> None:
    """23:59:59.999 PKT belongs to the month."""
    state = replace(COMPLETE, marks=(mark(0), mark(1, watermark_ms=END_MS - 1)))
    (blocker,) = blockers(state)
    assert ("watermark", "lhr") == (blocker.kind, blocker.hub)
    assert (
        "hub complete until 2025-07-31T18:59:59.999Z, needed until 2025-07-31T19:00:00.000Z"
        == blocker.detail
    )


def test_before_anything_was_emitted_no_month_is_closable() -> None:
    """Closing on silence would make everything that follows late."""
    assert [("no-watermark", None, None, None)] == kinds(replace(COMPLETE, marks=()))


def test_a_hub_seen_in_one_partition_counts_in_all() -> None:
    """What partition 1 has not said about khi may still be on its way."""
    state = replace(COMPLETE, marks=(mark(0), mark(1), mark(0, KHI)))
    assert [("watermark", "khi", None, None)] == kinds(state)


def test_a_hub_that_has_no_watermark_yet_counts() -> None:
    """It has emitted, and nothing of it is complete."""
    state = replace(COMPLETE, marks=(mark(0), mark(1, watermark_ms=None)))
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
    state = replace(COMPLETE, marks=(mark(0), mark(1), mark(0, KHI), newest))
    assert [
        ("silent-hub", "khi", "/hubs/khi/nodes/n2/epochs/e1", None),
        ("silent-hub", "khi", "/hubs/khi/nodes/n3/epochs/e1", None),
    ] == kinds(state)


def test_open_quarantine_of_the_month_blocks_until_every_partition_says_it_is_gone() -> None:
    """A partition that has not yet read the release still says so."""
    waiting = (OpenQuarantine(A, "2025-07", 600_000_000_000),)
    state = replace(COMPLETE, marks=(mark(0, quarantined=waiting), mark(1)))
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
    assert () == blockers(replace(COMPLETE, marks=(mark(0, quarantined=listed), mark(1))))


def test_what_leaves_nothing_to_bill_by_is_listed_last_and_lasts() -> None:
    """These no override can help."""
    state = replace(
        COMPLETE,
        broken_books=(A,),
        unknown_tenants=(B,),
        billed_hubs=(KHI, LHR),
        taxed_hubs=frozenset({LHR}),
        has_seller=False,
    )
    assert [
        ("entry-gap", None, None, A),
        ("tenant-unknown", None, None, B),
        ("legal-entity-missing", None, None, None),
        ("tax-missing", "khi", None, None),
    ] == kinds(state)
    assert {"entry-gap", "tenant-unknown", "legal-entity-missing", "tax-missing"} == LASTING


def test_complete_until_is_the_lowest_partition_of_each_hub() -> None:
    """Unknown while one partition has said nothing."""
    marks = (mark(0), mark(1, watermark_ms=END_MS - 1), mark(0, KHI))
    assert {LHR: END_MS - 1, KHI: None} == complete_until(marks, 2)
