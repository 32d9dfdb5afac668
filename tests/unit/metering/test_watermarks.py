"""Completeness: barriers, what holds a hub back, and when it is told downstream."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import pytest

from hisab_contracts.charges import HubWatermark, OpenQuarantine, ReconcileResult, read_charge
from hisab_contracts.ids import HubCode, SourcePath, TenantId
from metering.core.sources import SequenceRange, SourceProgress
from metering.core.watermarks import (
    MAX_QUARANTINED,
    Barrier,
    HubCompleteness,
    HubView,
    blocking_sources,
    bound_quarantined,
    candidate_ms,
    complete_until_ms,
    has_passed,
    is_silent,
    passed_ms,
    statement_due,
)
from unit.metering.hub_events import HOUR_MS, NOON_MS

NOW_MS = NOON_MS + 1_000


def source(name: str, watermark_ms: int | None, **members: object) -> SourceProgress:
    """An active source of node `name` that spoke just now."""
    made = SourceProgress(
        HubCode("lhr"),
        SourcePath(f"/hubs/lhr/nodes/{name}/epochs/e1"),
        f"/hubs/lhr/nodes/{name}",
        contiguous_sequence=1,
        watermark_ms=watermark_ms,
        last_seen_ms=NOON_MS,
    )
    return replace(made, **members)  # type: ignore[arg-type]


def view(
    *sources: SourceProgress, watermark_ms: int | None = None, emitted: bool = True
) -> HubView:
    """A hub with these active sources."""
    return HubView(
        hub=HubCode("lhr"),
        heartbeat_ms=60_000,
        watermark_ms=watermark_ms,
        last_seen_ms=NOON_MS,
        sources=sources,
        emitted=emitted,
        ever_seen=emitted,
        quarantined=(),
    )


def due(
    hub: HubView, last: HubWatermark | None, stated_ms: int, now_ms: int
) -> HubWatermark | None:
    """What must be stated of a hub of which `last` was stated last."""
    return statement_due(replace(hub, last_statement=last, stated_ms=stated_ms), now_ms)


def test_partitions_that_were_told_nothing_yet_have_all_stated_anew() -> None:
    """Nothing has changed, and a hub that never emitted has nothing to be told."""
    hub = view(source("a", 5), watermark_ms=5)
    first = due(hub, None, 0, NOW_MS)
    assert first is not None
    told = replace(hub, last_statement=first, stated_ms=NOW_MS)
    assert statement_due(told, NOW_MS) is None
    again = statement_due(told, NOW_MS, anew=True)
    assert msgspec.structs.replace(first, revision=first.revision + 1) == again
    assert statement_due(view(emitted=False), NOW_MS, anew=True) is None


def test_candidate_is_the_minimum_of_active_sources() -> None:
    """One source without a watermark holds the hub; a hub that never spoke has none."""
    assert 5 == candidate_ms(view(source("a", 9), source("b", 5)), NOW_MS)
    assert candidate_ms(view(source("a", 9), source("b", None)), NOW_MS) is None
    assert candidate_ms(view(emitted=False), NOW_MS) is None


def test_hubs_are_complete_up_to_the_least_of_those_that_have_emitted() -> None:
    """One without a watermark leaves all incomplete; one that never emitted does not count."""
    lhr, khi, isb = (HubCode(code) for code in ("lhr", "khi", "isb"))
    nine, five = HubCompleteness(lhr, 9, emitted=True), HubCompleteness(khi, 5, emitted=True)
    assert 5 == complete_until_ms([nine, five, HubCompleteness(isb, None, emitted=False)])
    assert complete_until_ms([nine, HubCompleteness(isb, None, emitted=True)]) is None
    assert complete_until_ms([]) is None


def test_hub_without_active_sources_holds_nobody_up() -> None:
    """When all are retired it is complete up to the present hour."""
    assert NOON_MS == candidate_ms(view(), NOW_MS)


@pytest.mark.defect("M22")
def test_candidate_counts_only_after_every_partition_was_read() -> None:
    """A partition that lags behind the barrier, or was never read, holds it."""
    barrier = Barrier(9, {0: 10, 1: 4, 2: 0})
    assert not has_passed(barrier, {0: 10, 1: 3})
    assert not has_passed(barrier, {0: 10})
    assert has_passed(barrier, {0: 12, 1: 4})


def test_source_seen_behind_the_barrier_holds_the_hub() -> None:
    """A source that appears while it is waited for counts, and nothing goes back."""
    barrier = Barrier(9, {})
    assert 9 == passed_ms(view(source("a", 20)), barrier, NOW_MS)
    assert 7 == passed_ms(view(source("a", 20), source("b", 7)), barrier, NOW_MS)
    assert passed_ms(view(source("a", 20), source("b", None)), barrier, NOW_MS) is None
    late = view(source("a", 20), source("b", 2), watermark_ms=8)
    assert 8 == passed_ms(late, barrier, NOW_MS)
    assert 8 == passed_ms(view(source("b", None), watermark_ms=8), barrier, NOW_MS)


def test_hub_is_silent_after_two_heartbeats() -> None:
    """Nothing for longer than two of its heartbeats."""
    assert not is_silent(view(), NOON_MS + 120_000)
    assert is_silent(view(), NOON_MS + 120_001)


def test_blockers_are_named_with_their_reason() -> None:
    """Missing watermark, gap, silence and falling behind; none while all are in step."""
    in_step = source("ok", NOON_MS)
    assert [] == blocking_sources(view(in_step), NOW_MS)
    troubled = view(
        in_step,
        source("behind", NOON_MS - HOUR_MS),
        source("gap", NOON_MS, beyond=(SequenceRange(4, 5),)),
        source("gap1", NOON_MS, beyond=(SequenceRange(3, 5),)),
        source("mute", NOON_MS, last_seen_ms=0),
        source("new", None),
    )
    reasons = {
        behind.source.split("/")[4]: behind.reason for behind in blocking_sources(troubled, NOW_MS)
    }
    assert {
        "new": "no watermark yet",
        "behind": "behind the others: its watermark is 2025-07-31T09:00:00.000Z",
        "gap": "gap: sequence 2 to 3 is missing",
        "gap1": "gap: sequence 2 is missing",
        "mute": "silent since 1970-01-01T00:00:00.000Z",
    } == reasons


def test_statement_is_told_again_only_when_something_matters() -> None:
    """At once for the watermark and open time; throttled for the rest; never for nothing."""
    first = due(view(source("a", None)), None, 0, NOW_MS)
    assert first is not None
    assert (NOW_MS, None, "no watermark yet") == (
        first.revision,
        first.watermark_ms,
        first.behind[0].reason,
    )
    same = view(source("a", None))
    assert due(same, first, NOW_MS, NOW_MS + 9_999) is None
    moved = due(view(source("a", 5), watermark_ms=5), first, NOW_MS, NOW_MS)
    assert moved is not None
    assert (NOW_MS + 1, 5, ["the furthest behind"]) == (
        moved.revision,
        moved.watermark_ms,
        [behind.reason for behind in moved.behind],
    )
    waiting = replace(same, quarantined=[OpenQuarantine(TenantId("t"), "2025-07", 1)])
    assert due(waiting, first, NOW_MS, NOW_MS) is not None
    other = view(source("b", None))
    assert due(other, first, NOW_MS, NOW_MS + 999) is None
    assert due(other, first, NOW_MS, NOW_MS + 1_000) is not None
    assert due(view(emitted=False), None, 0, NOW_MS) is None


@pytest.mark.defect("F22")
def test_what_restored_metering_tells_is_newer_than_all_it_has_forgotten() -> None:
    """Readers take only a higher revision; it follows the clock, and counts up if that stands."""
    before = due(view(source("a", 5), watermark_ms=5), None, 0, NOW_MS)
    forgotten = due(view(source("a", 6), watermark_ms=6), before, NOW_MS, NOW_MS + 500)
    restored = due(view(source("a", 7), watermark_ms=7), before, NOW_MS, NOW_MS + 1_000)
    rebuilt = due(view(source("a", 7), watermark_ms=7), None, 0, NOW_MS + 1_000)
    assert before is not None
    assert forgotten is not None
    assert restored is not None
    assert rebuilt is not None
    assert before.revision < forgotten.revision < restored.revision == rebuilt.revision
    clock_went_back = due(view(source("a", 8), watermark_ms=8), restored, NOW_MS, NOW_MS)
    assert clock_went_back is not None
    assert restored.revision + 1 == clock_went_back.revision


@pytest.mark.defect("F63")
def test_statement_fits_a_message_however_much_waits() -> None:
    """200 tenants in 67 months: every month is held open for all that waits in it."""
    months = [f"{2020 + number // 12}-{number % 12 + 1:02d}" for number in range(67)]
    waiting = [
        OpenQuarantine(TenantId(f"t{tenant:03d}".ljust(128, "x")), month, 2**62)
        for tenant in range(200)
        for month in months
    ]
    statement = due(replace(view(), quarantined=waiting), None, 0, NOW_MS)
    assert statement is not None
    assert MAX_QUARANTINED == len(statement.quarantined)
    value = msgspec.json.encode(statement)
    assert len(value) < 600_000
    assert statement == read_charge(value)
    for of in (waiting, statement.quarantined):
        sums = Counter[str]()
        for item in of:
            sums[item.month] += item.quarantined_gpu_ns
        assert dict.fromkeys(months, 200 * 2**62) == sums
    named = {(item.tenant_id, item.month) for item in statement.quarantined}
    assert len(named) == len(statement.quarantined)
    assert bound_quarantined(waiting) == statement.quarantined
    few = waiting[:MAX_QUARANTINED]
    assert few == bound_quarantined(few)


def test_what_a_comparison_with_the_ledger_found_is_stated_after_a_second() -> None:
    """It is no hurry: nothing hangs on it."""
    hub = view(source("a", 5), watermark_ms=5)
    first = due(hub, None, 0, NOW_MS)
    compared = replace(hub, reconciled=ReconcileResult(NOW_MS, 2))
    assert first is not None
    assert first.reconciled is None
    assert due(compared, first, NOW_MS, NOW_MS + 999) is None
    again = due(compared, first, NOW_MS, NOW_MS + 1_000)
    assert again is not None
    assert ReconcileResult(NOW_MS, 2) == again.reconciled
    assert due(compared, again, NOW_MS, NOW_MS + 9_000) is None
