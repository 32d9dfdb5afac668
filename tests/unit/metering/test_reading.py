"""Reading and accounts: why a record waits, in order of precedence, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hisab_contracts.ids import DeviceId, HubCode, SourcePath
from metering.accounts import Accounts, Tally, total_of
from metering.coverage import DeviceCoverage
from metering.hearing import hear
from metering.reading import Facts, Origin, Prior, Reading, device_spans, missing_tenants
from metering.sources import Source
from property.metered import facts
from unit.metering.said import HEADERS, HOUR_MS, NOON_MS, device, ended, event, interval, watermark

RECORD_MS = NOON_MS + 24 * HOUR_MS


def origin(offset: int = 0, record_ms: int = RECORD_MS) -> Origin:
    """A place in lhr's topic."""
    return Origin(HubCode("lhr"), "hub.lhr.usage.v1", 0, offset, record_ms)


def read(*values: bytes | None, known: Facts | None = None) -> Reading:
    """Read records that arrive in order."""
    reading = Reading(known or facts())
    for offset, value in enumerate(values):
        reading.take(origin(offset), value, HEADERS)
    return reading


def account(reading: Reading) -> Accounts:
    """Meter a reading on empty coverage."""
    coverage = {key: DeviceCoverage(key[2]) for key in device_spans(reading.jobs)}
    accounts = Accounts(reading.facts, coverage)
    for job in reading.jobs:
        accounts.meter(job)
    for parked in reading.parked:
        accounts.park(parked)
    return accounts


def total(accounts: Accounts) -> Tally:
    """Add the hours up."""
    sums = Tally()
    for tally in accounts.tallies.values():
        sums.reported_gpu_ns += tally.reported_gpu_ns
        sums.duplicate_gpu_ns += tally.duplicate_gpu_ns
        sums.read_records += tally.read_records
        sums.accepted_records += tally.accepted_records
        sums.duplicate_records += tally.duplicate_records
    return sums


@pytest.mark.defect("M14", "M16", "M17", "M18", "F6", "F7", "F26", "F63")
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "undecodable"),
        (b"\xff\xfe garbage", "undecodable"),
        (event(interval(), 1).replace(b'"share_ppm": 1000000', b'"share_ppm": NaN'), "undecodable"),
        (event(interval(), 1, kind="correction"), "unknown-type"),
        (event(interval(end_ms=NOON_MS), 1), "schema"),
        (event(interval(devices=[device(share_ppm=1_000_001)]), 1), "schema"),
        (event(interval(end_ms=2**63), 1), "schema"),
        (event(interval(hub="khi"), 1, source="/hubs/lhr/nodes/n1/epochs/e1"), "hub-mismatch"),
        (event(interval(tenant_id="nobody", sku="b300"), 1), "unknown-tenant"),
        (event(interval(sku="b300", price_class="gold"), 1), "unknown-sku"),
        (event(interval(price_class="gold", end_ms=RECORD_MS + HOUR_MS), 1), "no-price"),
        (event(interval(end_ms=RECORD_MS + 300_001), 1), "clock-skew"),
        (event(watermark(RECORD_MS + 300_001), 1, "watermark"), "clock-skew"),
    ],
)
def test_bad_record_waits_under_its_reason(value: bytes | None, reason: str) -> None:
    """Each has a clear reason, and its neighbours are billed."""
    reading = read(event(interval(), 7), value)
    assert [reason] == [parked.waits.reason for parked in reading.parked]
    assert reading.parked[0].waits.detail
    assert 1 == len(reading.jobs)


def test_record_at_the_edge_of_the_skew_is_taken() -> None:
    """Five minutes past its timestamp is allowed."""
    reading = read(
        event(interval(end_ms=RECORD_MS + 300_000), 1),
        event(watermark(RECORD_MS + 300_000), 2, "watermark"),
    )
    assert [] == reading.parked


def test_quarantined_record_counts_in_its_sources_sequence() -> None:
    """Only a record without a readable envelope belongs to nobody."""
    reading = read(event(interval(tenant_id="nobody"), 1), event(interval(end_ms=1), 2), b"?")
    [events] = reading.sources.values()
    assert [1, 2] == [said.sequence for said in events.said]
    assert {"nobody"} == missing_tenants(reading)


def test_interval_that_lacks_a_price_in_one_hour_waits_whole() -> None:
    """Nothing of it is billed before every hour has a price."""
    reading = read(event(interval(price_class="none"), 1))
    accounts = account(reading)
    [waiting] = accounts.quarantined
    assert "no-price" == waiting.waits.reason
    assert {NOON_MS: 3_600_000_000_000} == waiting.waiting_gpu_ns
    assert (3_600_000_000_000, 1) == (total(accounts).reported_gpu_ns, total(accounts).read_records)


def late(said: dict[str, Any], watermark_ms: int, prior: Prior | None = None) -> Accounts:
    """Meter one interval at a hub that is complete up to `watermark_ms`."""
    reading = Reading(replace(facts(), watermarks={HubCode("lhr"): watermark_ms}))
    reading.take(origin(), event(said, 1), HEADERS, prior)
    return account(reading)


@pytest.mark.defect("M9", "M20", "F27")
def test_new_time_beyond_the_horizon_is_too_late_on_first_arrival_only() -> None:
    """72 hours behind the hub's watermark; a release is never too late."""
    horizon_ms = 72 * HOUR_MS
    assert [] == late(interval(), NOON_MS + horizon_ms).quarantined
    [waiting] = late(interval(), NOON_MS + horizon_ms + 1).quarantined
    assert "too-late" == waiting.waits.reason
    prior = Prior(1, None, False, True, NOON_MS, {NOON_MS: 3_600_000_000_000})
    released = late(interval(), NOON_MS + horizon_ms + 1, prior)
    assert [] == released.quarantined
    assert (0, 0, 1) == (
        total(released).reported_gpu_ns,
        total(released).read_records,
        total(released).accepted_records,
    )


def test_replay_beyond_the_horizon_is_a_duplicate() -> None:
    """Sealed coverage still knows what it has sold."""
    reading = Reading(replace(facts(), watermarks={HubCode("lhr"): NOON_MS + 900 * HOUR_MS}))
    reading.take(origin(), event(interval(), 1), HEADERS)
    key = (HubCode("lhr"), reading.jobs[0].interval.node_id, DeviceId("GPU-1"))
    first = read(event(interval(), 1))
    device_coverage = DeviceCoverage(key[2])
    Accounts(first.facts, {key: device_coverage}).meter(first.jobs[0])
    accounts = Accounts(reading.facts, {key: device_coverage})
    accounts.meter(reading.jobs[0])
    assert [] == accounts.quarantined
    assert (3_600_000_000_000, 1) == (
        total(accounts).duplicate_gpu_ns,
        total(accounts).duplicate_records,
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
    reading = read(event(first, 1), event(second, 2))
    accounts = account(reading)
    [waiting] = accounts.quarantined
    assert {NOON_MS: 600_000_000_000} == waiting.waiting_gpu_ns
    assert ("conflict", True) == (waiting.waits.reason, waiting.had_new)
    assert "job-1 of ravi-health" in waiting.waits.detail
    assert "job-3 of indus-foundry" in waiting.waits.detail
    assert [1_800_000_000_000, 600_000_000_000] == [one.gpu_ns for one in reading.buckets]
    assert (2, 1) == (total(accounts).read_records, total(accounts).accepted_records)


def test_conflict_that_still_conflicts_moves_nothing() -> None:
    """Judged again on the same coverage: every account is as it was."""
    reading = read(
        event(interval(devices=[device(), device("GPU-2")]), 1),
        event(interval(allocation_id="job-3", devices=[device(), device("GPU-2")]), 2),
    )
    coverage = {key: DeviceCoverage(key[2]) for key in device_spans(reading.jobs)}
    accounts = Accounts(reading.facts, coverage)
    for job in reading.jobs:
        accounts.meter(job)
    [waiting] = accounts.quarantined
    assert "(and 1 more)" in waiting.waits.detail
    prior = Prior(1, waiting.parts, False, True, NOON_MS, waiting.waiting_gpu_ns)
    again = Reading(facts())
    again.take(
        waiting.origin,
        event(interval(allocation_id="job-3", devices=[device()]), 2),
        HEADERS,
        prior,
    )
    repeated = Accounts(again.facts, coverage)
    repeated.meter(again.jobs[0])
    assert waiting.waiting_gpu_ns == repeated.quarantined[0].waiting_gpu_ns
    assert Tally() == total(repeated)


@pytest.mark.defect("M18")
def test_record_that_waits_on_whole_moves_nothing() -> None:
    """Judged again while its tenant, or its time, is still to come: every account is as it was."""
    unknown = event(interval(tenant_id="nobody"), 1)
    early = event(watermark(RECORD_MS + HOUR_MS), 1, "watermark")
    for value, counts in ((unknown, True), (early, False)):
        [waiting] = account(read(value)).quarantined
        assert counts == waiting.counts
        prior = Prior(1, None, False, counts, NOON_MS, waiting.waiting_gpu_ns)
        again = Reading(facts())
        again.take(origin(), value, HEADERS, prior)
        repeated = account(again)
        assert [waiting._replace(prior=prior)] == repeated.quarantined
        assert Tally() == total(repeated)


def test_bucket_keeps_the_first_hold_that_was_named_in_it() -> None:
    """Usage of one allocation under two holds: the charge names one."""
    reading = read(
        event(interval(end_ms=NOON_MS + 1, hold_id="first"), 1),
        event(interval(NOON_MS + 1, NOON_MS + 2, hold_id="second"), 2),
    )
    account(reading)
    [total_stated] = [total_of(bucket) for bucket in reading.buckets]
    assert ("first", 2_000_000) == (total_stated.hold_id, total_stated.total_gpu_ns)


def test_more_devices_than_an_hour_can_hold_wait() -> None:
    """A bucket never leaves 64 bits, whatever a hub reports."""
    reading = read(event(interval(), 1))
    reading.buckets[0].gpu_ns = 3_600_000_000_000 * 1_000_000 + 1
    [waiting] = account(reading).quarantined
    assert "schema" == waiting.waits.reason


def test_lifecycle_events_are_noted_the_latest_end_counts() -> None:
    """They are no usage and count as no record."""
    started = {name: one for name, one in interval().items() if name not in {"start_ms", "end_ms"}}
    reading = read(
        event(started | {"started_ms": NOON_MS}, 1, "started"),
        event(ended(NOON_MS + 5, 7), 2, "ended"),
        event(ended(NOON_MS + 3, 9), 3, "ended"),
        event({"hub": "lhr", "node_id": "n1", "reason": "gone"}, 4, "retired"),
    )
    assert [NOON_MS] == [one.started_ms for one in reading.started.values()]
    assert [7] == [one.reserved_gpu_ms for one in reading.ended.values()]
    assert ["retired"] == [one.standing for one in hear(reading, []).changed]
    assert {} == account(reading).tallies


def test_record_set_aside_unread_counts_as_one_record() -> None:
    """It killed the process: nothing of it is read again."""
    reading = Reading(facts())
    reading.take_unread(origin())
    accounts = account(reading)
    assert "killed-process" == accounts.quarantined[0].waits.reason
    assert 1 == total(accounts).read_records


def test_released_lifecycle_event_is_taken_back_from_the_records() -> None:
    """A record that could not be read turned out to be no usage."""
    prior = Prior(1, None, False, True, NOON_MS, {})
    reading = Reading(facts())
    reading.take(origin(), event(ended(NOON_MS, 1), 1, "ended"), HEADERS, prior)
    accounts = account(reading)
    for place, resolved in reading.resolved:
        accounts.take_back(place, resolved)
    assert -1 == total(accounts).read_records


def test_newer_epoch_closes_the_older_and_watermarks_that_go_back_wait() -> None:
    """Hearing a batch: sources in order of first arrival."""
    old = Source(
        HubCode("lhr"), SourcePath("/hubs/lhr/nodes/n1/epochs/e0"), "/hubs/lhr/nodes/n1", 4
    )
    reading = read(
        event(watermark(NOON_MS), 1, "watermark"),
        event(watermark(NOON_MS - 1), 2, "watermark"),
    )
    heard = hear(reading, [old])
    assert ["closed", "active"] == [one.standing for one in heard.changed]
    assert ["watermark"] == [one.waits.reason for one in heard.parked]
    assert {} == {key: one for key, one in account(reading).tallies.items() if one != Tally()}


@pytest.mark.defect("M17")
def test_retirement_behind_a_later_watermark_waits_for_nothing() -> None:
    """It arrives late, at a lower sequence: the source is retired, nothing is quarantined."""
    retired = {"hub": "lhr", "node_id": "n1", "reason": "node removed"}
    reading = read(
        event(watermark(NOON_MS), 3, "watermark"),
        event(retired, 2, "retired"),
        event(watermark(NOON_MS - HOUR_MS), 1, "watermark"),
    )
    heard = hear(reading, [])
    assert [] == heard.parked
    assert [("retired", NOON_MS)] == [(one.standing, one.watermark_ms) for one in heard.changed]


def test_first_watermark_at_a_sequence_is_the_one_that_waits() -> None:
    """Sequence 2 comes twice and the first goes back: that one is parked, the other ignored."""
    reading = read(
        event(watermark(NOON_MS), 1, "watermark"),
        event(watermark(NOON_MS - 1), 2, "watermark"),
        event(watermark(NOON_MS + 1), 2, "watermark"),
    )
    assert [origin(1)] == [parked.origin for parked in hear(reading, []).parked]


def test_vouched_watermark_is_accepted_or_waits_on() -> None:
    """An operator's replay of a watermark that was ahead of its time."""
    prior = Prior(1, None, False, False, NOON_MS, {})
    ahead = event(watermark(RECORD_MS + 2 * HOUR_MS), 1, "watermark")
    early = Reading(facts())
    early.take(origin(), ahead, HEADERS, prior, RECORD_MS)
    assert ["clock-skew"] == [one.waits.reason for one in early.parked]
    now = Reading(facts())
    now.take(origin(), ahead, HEADERS, prior, RECORD_MS + 2 * HOUR_MS)
    heard = hear(now, [])
    assert [RECORD_MS + 2 * HOUR_MS] == [one.watermark_ms for one in heard.changed]
    assert 1 == len(heard.accepted)
    [after] = heard.changed
    back = Reading(facts())
    back.take(origin(), event(watermark(NOON_MS), 1, "watermark"), HEADERS, prior, RECORD_MS)
    assert ["watermark"] == [one.waits.reason for one in hear(back, [after]).parked]


@pytest.mark.defect("F4")
def test_vouched_watermark_jumps_no_gap() -> None:
    """Replayed at sequence 3 while 2 is missing: the hub must not be declared complete."""
    prior = Prior(1, None, False, False, NOON_MS, {})
    reading = Reading(facts())
    reading.take(origin(), event(watermark(NOON_MS), 3, "watermark"), HEADERS, prior, RECORD_MS)
    first = Source(
        HubCode("lhr"), SourcePath("/hubs/lhr/nodes/n1/epochs/e1"), "/hubs/lhr/nodes/n1", 1
    )
    heard = hear(reading, [first])
    assert [(None, [(2, 3)])] == [(one.watermark_ms, one.gaps) for one in heard.changed]
    assert 1 == len(heard.accepted)


@pytest.mark.defect("F70")
def test_reading_is_full_by_the_hours_of_its_records() -> None:
    """What can be rated and what waits count alike: both are kept per hour."""
    reading = Reading(facts(), max_hours=5)
    for sequence, sku in enumerate(("h100-sxm-80", "b300"), start=1):
        assert not reading.is_full
        long = interval(NOON_MS + 1, NOON_MS + 2 * HOUR_MS + 1, sku=sku)
        reading.take(origin(), event(long, sequence), HEADERS)
    assert (True, 2, 6) == (reading.is_full, reading.records, reading.hours)
    reading.take_unread(origin())
    assert 3 == reading.records
