"""The engine: why a record waits, in order of precedence, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hisab_contracts.ids import DeviceId, HoldId, HubCode, NodeId, SourcePath
from metering.core import engine
from metering.core.batch import (
    Changes,
    EarlierVerdict,
    MeteringBatch,
    MeteringState,
    QuarantinedRecord,
    Reference,
    StoredBucket,
    Tally,
    UsageRecord,
)
from metering.core.coverage import CoveredInterval, DeviceKey
from metering.core.quarantine import QuarantineCause
from metering.core.sources import SourceProgress
from property.metered import facts
from unit.metering.hub_events import (
    HEADERS,
    HOUR_MS,
    NOON_MS,
    device,
    ended,
    event,
    interval,
    started,
    watermark,
)

LHR = HubCode("lhr")
RECORD_MS = NOON_MS + 24 * HOUR_MS
NODE_PATH = "/hubs/lhr/nodes/n1"
NOTHING_STORED = MeteringState({}, {}, [])


def record(value: bytes | None, offset: int = 0, **members: Any) -> UsageRecord:
    """A record of lhr's topic."""
    return UsageRecord(
        LHR, "hub.lhr.usage.v1", 0, offset, RECORD_MS, None, value, HEADERS, **members
    )


def prepare(*values: bytes | None, known: Reference | None = None) -> MeteringBatch:
    """Prepare records that arrive in order."""
    records = [record(value, offset) for offset, value in enumerate(values)]
    return engine.prepare(records, known or facts())


def judge_again(value: bytes | None, earlier: EarlierVerdict, **members: Any) -> MeteringBatch:
    """Prepare a record that was quarantined before."""
    return engine.prepare([record(value, earlier=earlier, **members)], facts())


def meter(batch: MeteringBatch, state: MeteringState = NOTHING_STORED) -> Changes:
    """Meter a batch, on nothing unless said."""
    return engine.meter(batch, state)


def covered_by(changes: Changes) -> MeteringState:
    """The coverage that is stored after changes to nothing."""
    rows: dict[DeviceKey, Sequence[CoveredInterval]] = {
        key: device_changes.added for key, device_changes in changes.coverage.items()
    }
    return MeteringState(rows, {}, [])


def verdict_of(waiting: QuarantinedRecord) -> EarlierVerdict:
    """The verdict on a record as it is stored under the id 1."""
    return EarlierVerdict(
        1,
        waiting.parts,
        waiting.had_new,
        waiting.counts,
        waiting.hour_ms,
        waiting.quarantined_gpu_ns,
    )


def total(changes: Changes) -> Tally:
    """Add the hours up."""
    return Tally(*(sum(column) for column in zip(*changes.tallies.values(), strict=True)))


def source(epoch: str = "e1", contiguous: int = 0) -> SourceProgress:
    """A source of lhr's first node."""
    return SourceProgress(LHR, SourcePath(f"{NODE_PATH}/epochs/{epoch}"), NODE_PATH, contiguous)


def with_sources(*sources: SourceProgress) -> MeteringState:
    """Nothing but sources is stored."""
    return MeteringState({}, {}, sources)


@pytest.mark.defect("M14", "M16", "M17", "M18", "F6", "F7", "F26", "F63")
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "undecodable"),
        (b"\xff\xfe garbage", "undecodable"),
        (event(interval(), 1).replace(b'"share_ppm": 1000000', b'"share_ppm": NaN'), "undecodable"),
        (event(interval(), 1, type="pk.hisab.usage.of-tomorrow.v1"), "unknown-type"),
        (event(interval(), 1, kind="correction"), "schema"),
        (event(interval(end_ms=NOON_MS), 1), "schema"),
        (event(interval(devices=[device(share_ppm=1_000_001)]), 1), "schema"),
        (event(interval(end_ms=2**63), 1), "schema"),
        (event(interval(hub="khi"), 1, source="/hubs/lhr/nodes/n1/epochs/e1"), "hub-mismatch"),
        (event(interval(tenant_id="nobody", sku="b300"), 1), "unknown-tenant"),
        (event(interval(sku="b300", price_class="gold"), 1), "unknown-sku"),
        (event(interval(price_class="gold", end_ms=RECORD_MS + HOUR_MS), 1), "no-price"),
        (event(interval(end_ms=RECORD_MS + 300_001), 1), "clock-skew"),
        (event(watermark(RECORD_MS + 300_001), 1, "watermark"), "clock-skew"),
        (event(ended(RECORD_MS + 300_001, 1), 1, "ended"), "clock-skew"),
        (event(started(RECORD_MS + 300_001), 1, "started"), "clock-skew"),
    ],
)
def test_bad_record_waits_under_its_reason(value: bytes | None, reason: str) -> None:
    """Each has a clear reason, and its neighbours are billed."""
    batch = prepare(event(interval(), 7), value)
    assert [reason] == [rejected.cause.reason for rejected in batch.rejected]
    assert batch.rejected[0].cause.detail
    assert 1 == len(batch.usages)
    changes = meter(batch)
    assert [reason] == [waiting.cause.reason for waiting in changes.quarantined]
    assert [3_600_000_000_000] == [bucket.total.total_gpu_ns for bucket in changes.buckets]


def test_record_at_the_edge_of_the_skew_is_taken() -> None:
    """Five minutes past its timestamp is allowed."""
    batch = prepare(
        event(interval(end_ms=RECORD_MS + 300_000), 1),
        event(watermark(RECORD_MS + 300_000), 2, "watermark"),
        event(ended(RECORD_MS + 300_000, 1), 3, "ended"),
        event(started(RECORD_MS + 300_000), 4, "started"),
    )
    assert [] == batch.rejected


def test_quarantined_record_counts_in_its_sources_sequence() -> None:
    """Only a record without a readable envelope belongs to nobody."""
    batch = prepare(event(interval(tenant_id="nobody"), 1), event(interval(end_ms=1), 2), b"?")
    [report] = batch.reports.values()
    assert [1, 2] == [reported.sequence for reported in report.events]
    assert {"nobody"} == batch.unknown_tenants


def test_batch_says_what_must_be_loaded() -> None:
    """Nodes to lock, the span of each device, the buckets, and nodes whose sources count."""
    batch = prepare(
        event(interval(NOON_MS, NOON_MS + 2 * HOUR_MS), 1),
        event(interval(NOON_MS - HOUR_MS, NOON_MS), 2),
        event(interval(node_id="n2", tenant_id="nobody"), 1),
    )
    assert {("lhr", "n1")} == batch.nodes
    midnight_ms = NOON_MS - 10 * HOUR_MS
    assert {
        ("lhr", "n1", "GPU-1"): (midnight_ms, NOON_MS - HOUR_MS, NOON_MS + 2 * HOUR_MS)
    } == batch.device_spans
    assert 3 == len(set(batch.bucket_ids))
    assert {NODE_PATH, "/hubs/lhr/nodes/n2"} == batch.node_paths


def test_interval_that_lacks_a_price_in_one_hour_waits_whole() -> None:
    """Nothing of it is billed before every hour has a price."""
    changes = meter(prepare(event(interval(price_class="none"), 1)))
    [waiting] = changes.quarantined
    assert "no-price" == waiting.cause.reason
    assert {NOON_MS: 3_600_000_000_000} == waiting.quarantined_gpu_ns
    assert (3_600_000_000_000, 1) == (total(changes).reported_gpu_ns, total(changes).read_records)


def late(data: dict[str, Any], watermark_ms: int, earlier: EarlierVerdict | None = None) -> Changes:
    """Meter one interval at a hub that is complete up to `watermark_ms`."""
    known = replace(facts(), watermarks={LHR: watermark_ms})
    return meter(engine.prepare([record(event(data, 1), earlier=earlier)], known))


@pytest.mark.defect("M9", "M20", "F27")
def test_new_time_beyond_the_horizon_is_too_late_on_first_arrival_only() -> None:
    """72 hours behind the hub's watermark; a release is never too late."""
    horizon_ms = 72 * HOUR_MS
    assert [] == late(interval(), NOON_MS + horizon_ms).quarantined
    [waiting] = late(interval(), NOON_MS + horizon_ms + 1).quarantined
    assert "too-late" == waiting.cause.reason
    earlier = EarlierVerdict(1, None, False, True, NOON_MS, {NOON_MS: 3_600_000_000_000})
    released = late(interval(), NOON_MS + horizon_ms + 1, earlier)
    assert [] == released.quarantined
    assert [1] == released.released_ids
    assert (0, 0, 1) == (
        total(released).reported_gpu_ns,
        total(released).read_records,
        total(released).accepted_records,
    )


def test_replay_beyond_the_horizon_is_a_duplicate() -> None:
    """Sealed coverage still knows what it has sold."""
    value = event(interval(), 1)
    sold = covered_by(meter(prepare(value)))
    assert [(LHR, NodeId("n1"), DeviceId("GPU-1"))] == list(sold.coverage)
    known = replace(facts(), watermarks={LHR: NOON_MS + 900 * HOUR_MS})
    changes = meter(prepare(value, known=known), sold)
    assert [] == changes.quarantined
    assert {} == changes.coverage
    assert (3_600_000_000_000, 1) == (
        total(changes).duplicate_gpu_ns,
        total(changes).duplicate_records,
    )


@pytest.mark.defect("M10", "F2", "F5")
def test_conflict_waits_with_both_claims_and_only_where_it_overlaps() -> None:
    """Step 6 of the worked example: [10:20, 10:30) waits, [10:30, 10:40) is billed."""
    minute = 60_000
    first = interval(NOON_MS, NOON_MS + 30 * minute)
    second = interval(
        NOON_MS + 20 * minute,
        NOON_MS + 40 * minute,
        tenant_id="indus-foundry",
        allocation_id="job-3",
    )
    changes = meter(prepare(event(first, 1), event(second, 2)))
    [waiting] = changes.quarantined
    assert {NOON_MS: 600_000_000_000} == waiting.quarantined_gpu_ns
    assert ("conflict", True) == (waiting.cause.reason, waiting.had_new)
    assert "job-1 of ravi-health" in waiting.cause.detail
    assert "job-3 of indus-foundry" in waiting.cause.detail
    assert [1_800_000_000_000, 600_000_000_000] == [
        bucket.total.total_gpu_ns for bucket in changes.buckets
    ]
    assert (2, 1) == (total(changes).read_records, total(changes).accepted_records)


def test_conflict_that_still_conflicts_moves_nothing() -> None:
    """Judged again on the same coverage: every account is as it was."""
    two = [device(), device("GPU-2")]
    rival = event(interval(allocation_id="job-3", devices=two), 2)
    changes = meter(prepare(event(interval(devices=two), 1), rival))
    [waiting] = changes.quarantined
    assert "(and 1 more)" in waiting.cause.detail
    repeated = meter(judge_again(rival, verdict_of(waiting)), covered_by(changes))
    assert waiting.quarantined_gpu_ns == repeated.still_quarantined[0].quarantined_gpu_ns
    assert [] == repeated.released_ids
    assert {} == repeated.tallies


def test_conflict_whose_rival_is_gone_is_billed_for_the_part_that_waited() -> None:
    """Of a record judged again only the part that waits is looked at; the rest stays billed."""
    rival = event(interval(NOON_MS, NOON_MS + 2 * HOUR_MS, allocation_id="job-3"), 2)
    [waiting] = meter(prepare(event(interval(), 1), rival)).quarantined
    assert {NOON_MS: 3_600_000_000_000} == waiting.quarantined_gpu_ns
    changes = meter(judge_again(rival, verdict_of(waiting)))
    assert [1] == changes.released_ids
    assert [NOON_MS] == [bucket.total.hour_ms for bucket in changes.buckets]
    assert (0, 0, 1) == (
        total(changes).reported_gpu_ns,
        total(changes).read_records,
        total(changes).accepted_records,
    )


@pytest.mark.defect("M18")
def test_record_that_waits_on_whole_moves_nothing() -> None:
    """Judged again while its tenant, or its time, is still to come: every account is as it was."""
    unknown = event(interval(tenant_id="nobody"), 1)
    early = event(watermark(RECORD_MS + HOUR_MS), 1, "watermark")
    for value, counts in ((unknown, True), (early, False)):
        [waiting] = meter(prepare(value)).quarantined
        assert counts == waiting.counts
        again = record(value, earlier=verdict_of(waiting))
        repeated = meter(engine.prepare([again], facts()))
        assert [waiting._replace(record=again)] == repeated.still_quarantined
        assert {} == repeated.tallies


def test_bucket_keeps_the_first_hold_that_was_named_in_it() -> None:
    """Usage of one allocation under two holds: the charge names one, stored or new."""
    second = event(interval(NOON_MS + 1, NOON_MS + 2, hold_id="second"), 2)
    changes = meter(prepare(event(interval(end_ms=NOON_MS + 1, hold_id="first"), 1), second))
    [bucket] = changes.buckets
    assert ("first", 2_000_000, True) == (
        bucket.total.hold_id,
        bucket.total.total_gpu_ns,
        bucket.is_new,
    )
    stored = {bucket.total.bucket_id: StoredBucket(7, HoldId("stored"))}
    [grown] = meter(prepare(second), MeteringState({}, stored, [])).buckets
    assert ("stored", 1_000_007, False) == (
        grown.total.hold_id,
        grown.total.total_gpu_ns,
        grown.is_new,
    )


def test_more_devices_than_an_hour_can_hold_wait() -> None:
    """A bucket never leaves 64 bits, whatever a hub reports."""
    batch = prepare(event(interval(), 1))
    full = StoredBucket(3_600_000_000_000 * 1_000_000 + 1, None)
    changes = meter(batch, MeteringState({}, {batch.bucket_ids[0]: full}, []))
    [waiting] = changes.quarantined
    assert "schema" == waiting.cause.reason
    assert [] == changes.buckets


def test_lifecycle_events_are_noted_the_latest_end_counts() -> None:
    """They are no usage and count as no record."""
    started = {
        name: value for name, value in interval().items() if name not in {"start_ms", "end_ms"}
    }
    changes = meter(
        prepare(
            event(started | {"started_ms": NOON_MS}, 1, "started"),
            event(ended(NOON_MS + 5, 7), 2, "ended"),
            event(ended(NOON_MS + 3, 9), 3, "ended"),
            event({"hub": "lhr", "node_id": "n1", "reason": "gone"}, 4, "retired"),
        )
    )
    assert [NOON_MS] == [data.started_ms for data in changes.started.values()]
    assert [7] == [data.reserved_gpu_ms for data in changes.ended.values()]
    assert ["retired"] == [changed.standing for changed in changes.sources]
    assert {} == changes.tallies


def test_record_set_aside_unread_counts_as_one_record() -> None:
    """It killed the process: nothing of it is read again."""
    cause = QuarantineCause("killed-process", "it ended the process")
    changes = meter(engine.prepare([record(event(interval(), 1), cause=cause)], facts()))
    assert [cause] == [waiting.cause for waiting in changes.quarantined]
    assert [] == changes.sources
    assert 1 == total(changes).read_records


def test_released_lifecycle_event_is_counted_as_a_record_no_longer() -> None:
    """A record that could not be read turned out to be no usage."""
    earlier = EarlierVerdict(1, None, False, True, NOON_MS, {})
    retired = {"hub": "lhr", "node_id": "n1", "reason": "gone"}
    for data, kind in (
        (ended(NOON_MS, 1), "ended"),
        (started(NOON_MS), "started"),
        (retired, "retired"),
    ):
        changes = meter(judge_again(event(data, 1, kind), earlier))
        assert -1 == total(changes).read_records
        assert [1] == changes.released_ids


def test_newer_epoch_closes_the_older_and_watermarks_that_go_back_wait() -> None:
    """Sources are taken in in order of first arrival."""
    batch = prepare(
        event(watermark(NOON_MS), 1, "watermark"),
        event(watermark(NOON_MS - 1), 2, "watermark"),
    )
    changes = meter(batch, with_sources(source("e0", 4)))
    assert ["closed", "active"] == [changed.standing for changed in changes.sources]
    assert ["watermark"] == [waiting.cause.reason for waiting in changes.quarantined]
    assert {} == changes.tallies


@pytest.mark.defect("M17")
def test_retirement_behind_a_later_watermark_waits_for_nothing() -> None:
    """It arrives late, at a lower sequence: the source is retired, nothing is quarantined."""
    retired = {"hub": "lhr", "node_id": "n1", "reason": "node removed"}
    changes = meter(
        prepare(
            event(watermark(NOON_MS), 3, "watermark"),
            event(retired, 2, "retired"),
            event(watermark(NOON_MS - HOUR_MS), 1, "watermark"),
        )
    )
    assert [] == changes.quarantined
    assert [("retired", NOON_MS)] == [
        (changed.standing, changed.watermark_ms) for changed in changes.sources
    ]


def test_first_watermark_at_a_sequence_is_the_one_that_waits() -> None:
    """Sequence 2 comes twice and the first goes back: that one waits, the other is ignored."""
    changes = meter(
        prepare(
            event(watermark(NOON_MS), 1, "watermark"),
            event(watermark(NOON_MS - 1), 2, "watermark"),
            event(watermark(NOON_MS + 1), 2, "watermark"),
        )
    )
    assert [1] == [waiting.record.offset for waiting in changes.quarantined]


def test_vouched_watermark_is_accepted_or_waits_on() -> None:
    """An operator's replay of a watermark that was ahead of its time."""
    earlier = EarlierVerdict(1, None, False, False, NOON_MS, {})
    ahead = event(watermark(RECORD_MS + 2 * HOUR_MS), 1, "watermark")
    early = judge_again(ahead, earlier, replayed_ms=RECORD_MS)
    assert ["clock-skew"] == [rejected.cause.reason for rejected in early.rejected]
    now = meter(judge_again(ahead, earlier, replayed_ms=RECORD_MS + 2 * HOUR_MS))
    assert [RECORD_MS + 2 * HOUR_MS] == [changed.watermark_ms for changed in now.sources]
    assert [1] == now.released_ids
    back = judge_again(event(watermark(NOON_MS), 1, "watermark"), earlier, replayed_ms=RECORD_MS)
    changes = meter(back, with_sources(*now.sources))
    assert ["watermark"] == [waiting.cause.reason for waiting in changes.still_quarantined]
    assert ([], []) == (changes.released_ids, changes.sources)


@pytest.mark.defect("F4")
def test_vouched_watermark_jumps_no_gap() -> None:
    """Replayed at sequence 3 while 2 is missing: the hub must not be declared complete."""
    earlier = EarlierVerdict(1, None, False, False, NOON_MS, {})
    value = event(watermark(NOON_MS), 3, "watermark")
    changes = meter(
        judge_again(value, earlier, replayed_ms=RECORD_MS), with_sources(source("e1", 1))
    )
    assert [(None, [(2, 3)])] == [
        (changed.watermark_ms, changed.gaps) for changed in changes.sources
    ]
    assert [1] == changes.released_ids


@pytest.mark.defect("F70")
def test_batch_is_full_by_what_its_records_touch() -> None:
    """What can be rated and what waits count alike: hours and device-days, one record at least."""
    records = [
        record(event(interval(NOON_MS + 1, NOON_MS + 2 * HOUR_MS + 1, sku=sku), sequence))
        for sequence, sku in enumerate(("h100-sxm-80", "b300", "h100-sxm-80"), start=1)
    ]
    for max_rows, taken in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        assert taken == engine.prepare(records, facts(), max_rows=max_rows).record_count
    unread = [record(None, cause=QuarantineCause("killed-process", "unread"))] * 9
    assert 9 == engine.prepare(unread, facts(), max_rows=1).record_count


def test_a_record_dismissed_whole_before_a_restore_is_not_judged_again() -> None:
    """It would be billed now: it was late then. Its time counts, and its place in the sequence."""
    cause = QuarantineCause("too-late", "as it was before a restore: dismissed")
    batch = engine.prepare([record(event(interval(), 1), dismissed=cause)], facts())
    changes = engine.meter(batch, NOTHING_STORED)
    [waiting] = changes.quarantined
    assert cause == waiting.cause
    assert waiting.parts is None
    assert HOUR_MS * 1_000_000 == sum(waiting.quarantined_gpu_ns.values())
    assert [] == list(changes.buckets)
    assert [1] == [source.contiguous_sequence for source in changes.sources]


def test_a_tenant_named_by_a_dismissed_record_is_not_asked_for() -> None:
    """Whether it is known by now changes nothing, so the batch need not be prepared again."""
    cause = QuarantineCause("unknown-tenant", "as it was before a restore: dismissed")
    said = event(interval(tenant_id="nobody"), 1)
    batch = engine.prepare([record(said, dismissed=cause)], facts())
    assert frozenset() == batch.unknown_tenants


def test_a_bucket_keeps_the_revision_that_is_stored_of_it() -> None:
    """A repair has stated it anew: a total at a lower revision would be taken for an old one."""
    batch = prepare(event(interval(), 1))
    stored = StoredBucket(0, None, 3)
    buckets = dict.fromkeys(batch.bucket_ids, stored)
    changes = engine.meter(batch, replace(NOTHING_STORED, buckets=buckets))
    [bucket] = changes.buckets
    assert (3, HOUR_MS * 1_000_000) == (bucket.total.revision, bucket.total.total_gpu_ns)
    assert not bucket.is_new
