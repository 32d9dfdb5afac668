"""Metering is restored to any earlier point, follows its own facts, replays, repairs: each once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.ids import BucketId, HubCode, PriceClass, Sku, TenantId, TopicId
from hisab_contracts.prices import PriceBook
from hisab_contracts.quarantine import QuarantineDecision
from hisab_contracts.reference import PriceLine
from metering.core.batch import QuarantinedRecord, Reference, UsageRecord
from metering.core.decisions import (
    RecordName,
    added_up,
    cause_of_dismissal,
    dismissed,
    name_of,
    replay_that_counts,
    replayed,
)
from metering.core.pricing import (
    ListedPrice,
    PriceList,
    displaced_lines,
    price_lines_of,
    rate_line_id,
    reject_overlap,
    reject_rated,
)
from metering.core.repair import BucketState, ComparedBucket, is_difference, repair, state_of
from property.metered import LATER_MS, LONG_AGO_MS, Metered, facts
from property.test_coverage import SLICES, STEP_MS, TENANTS, without_conflict
from unit.ledger.values import CoreLedger, book
from unit.metering.hub_events import HEADERS, HOUR_MS, NOON_MS, device, event, interval

HUB = HubCode("lhr")
LOG = TopicId("log-1")
PARTITIONS = 2
SKUS = ("h100-sxm-80", "l40s-48")
FIRST_LIST = PriceList(
    "PKR", LONG_AGO_MS, None, (ListedPrice(Sku(SKUS[0]), PriceClass("on_demand"), 840_000_000),)
)
"""Of the second SKU there is no price at first."""


@dataclass
class Outside:
    """What a restore of metering does not touch: what was published, and the ledger."""

    topic: list[list[dict[str, Any]]]
    prices: list[PriceLine] = field(default_factory=list)
    decisions: dict[RecordName, QuarantineDecision] = field(default_factory=dict)
    stated: dict[BucketId, BucketTotal] = field(default_factory=dict)
    """The last statement of each bucket: it has the terms."""
    ledgers: dict[TenantId, CoreLedger] = field(
        default_factory=lambda: {
            TenantId(name): CoreLedger(book(tenant_id=name)) for name in TENANTS
        }
    )

    def hear(self, totals: Sequence[BucketTotal]) -> None:
        """Have the ledger book what metering states."""
        for total in totals:
            self.stated[total.bucket_id] = total
            assert isinstance(self.ledgers[total.tenant_id].do(total), tuple)

    def booked(self) -> dict[BucketId, BucketState]:
        """What the ledger has booked of each bucket."""
        return {
            bucket_id: BucketState(bucket.revision, bucket.gpu_ns, bucket.charged_micro)
            for ledger in self.ledgers.values()
            for bucket_id, bucket in ledger.buckets.items()
        }


@dataclass
class Inside:
    """All that metering has in its database. A copy of it is a backup."""

    metered: Metered = field(default_factory=Metered)
    lines: list[PriceLine] = field(default_factory=list)
    decisions: dict[RecordName, QuarantineDecision] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=lambda: [0] * PARTITIONS)
    watermark_ms: int | None = None

    def reference(self) -> Reference:
        """What records are judged by."""
        return Reference(facts().currencies, PriceBook(self.lines), {HUB: self.watermark_ms})


def name_of_waiting(waiting: QuarantinedRecord) -> RecordName:
    """Name a record; that its value is hashed is the shell's part."""
    record = waiting.record
    return RecordName(record.hub, record.topic, record.partition, record.offset, "0" * 64, LOG)


def must_agree(inside: Inside) -> None:
    """Reported = billed + duplicate + quarantined, dismissed time included."""
    outcome = inside.metered.outcome()
    billed = sum(outcome.billed.values())
    explained = billed + outcome.duplicate_gpu_ns + outcome.quarantined_gpu_ns
    assert outcome.reported_gpu_ns == explained
    assert outcome.records[0] == sum(outcome.records[1:])


def read(inside: Inside, outside: Outside, partition: int, count: int) -> None:
    """Meter the next records of a partition, and apply what was decided on those in quarantine."""
    first = inside.offsets[partition]
    records = []
    for offset, data in enumerate(outside.topic[partition][first : first + count], first):
        name = RecordName(HUB, "t", partition, offset, "0" * 64, LOG)
        decision = inside.decisions.get(name)
        value = event(data, 1 + offset * PARTITIONS + partition)
        record = UsageRecord(HUB, "t", partition, offset, LATER_MS, None, value, HEADERS)
        cause = None if decision is None else cause_of_dismissal(decision)
        records.append(replace(record, dismissed=cause))
    inside.offsets[partition] += len(records)
    before = set(inside.metered.open)
    outside.hear(inside.metered.meter_records(records, inside.reference()))
    for number in sorted(set(inside.metered.open) - before):
        known = inside.decisions.get(name_of_waiting(inside.metered.open[number]))
        if known is not None:
            apply(inside, outside, number, known)
    must_agree(inside)


def apply(inside: Inside, outside: Outside, number: int, decision: QuarantineDecision) -> None:
    """Replay an open record, then dismiss what is still open, as was decided."""
    replay = replay_that_counts(decision)
    if replay is not None:
        outside.hear(inside.metered.replay([number], inside.reference(), replayed_ms=replay[0]))
    if decision.dismissed_ms is not None and number in inside.metered.open:
        inside.metered.dismiss(number)


def decide(inside: Inside, outside: Outside, number: int, *, replays: bool) -> None:
    """An operator replays or dismisses an open record; the decision is published."""
    waiting = inside.metered.open[number]
    name = name_of_waiting(waiting)
    known = inside.decisions.get(name)
    if replays:
        decision = replayed(known, name, LATER_MS, "replayed")
    else:
        whole = None if waiting.parts is not None else waiting.cause.reason
        decision = dismissed(known, name, LATER_MS, "dismissed", whole_reason=whole)
    inside.decisions[name] = outside.decisions[name] = decision
    if replays:
        outside.hear(inside.metered.replay([number], inside.reference(), replayed_ms=LATER_MS))
    else:
        inside.metered.dismiss(number)
    must_agree(inside)


def add_prices(inside: Inside, outside: Outside, proposed: PriceList) -> None:
    """Add a list where the rules allow it, publish it, and release what waited for it."""
    lines, known = price_lines_of(proposed), PriceBook(inside.lines)
    if reject_overlap(known, lines) is not None:
        return
    displaced = displaced_lines(known, lines)
    rated: dict[str, int] = {}
    for line in displaced:
        for total in inside.metered.totals.values():
            of = rate_line_id(total.price_version, total.sku, total.price_class)
            if of == line.rate_line_id and total.hour_ms >= line.from_ms and total.total_gpu_ns:
                rated[of] = total.hour_ms
    if reject_rated(rated, displaced) is None:
        inside.lines += lines
        outside.prices += lines
        release(inside, outside)


def release(inside: Inside, outside: Outside) -> None:
    """Judge again what lacked a price."""
    lacked = [
        number
        for number, waiting in inside.metered.open.items()
        if waiting.cause.reason in {"unknown-sku", "no-price"}
    ]
    outside.hear(inside.metered.replay(sorted(lacked), inside.reference()))
    must_agree(inside)


def follow(inside: Inside, outside: Outside) -> None:
    """Take up what was published and is forgotten, before anything is rated."""
    known = {line.rate_line_id for line in inside.lines}
    inside.lines += [line for line in outside.prices if line.rate_line_id not in known]
    numbers = {name_of_waiting(waiting): number for number, waiting in inside.metered.open.items()}
    for name, heard in outside.decisions.items():
        total = added_up(inside.decisions.get(name), heard)
        assert name == name_of(total)
        if total != inside.decisions.get(name):
            inside.decisions[name] = total
            if name in numbers:
                apply(inside, outside, numbers[name], total)
    release(inside, outside)


def compared(inside: Inside, outside: Outside) -> list[ComparedBucket]:
    """Every bucket of either side, while nothing is on its way."""
    booked, totals = outside.booked(), inside.metered.totals
    pairs = []
    for bucket_id in sorted(booked.keys() | totals.keys()):
        total = totals.get(bucket_id)
        if total is None:
            said = outside.stated[bucket_id]
            total = replace(said, revision=0, total_gpu_ns=0, total_micro=0)
        stands = booked.get(bucket_id, BucketState(0, 0, 0))
        pairs.append(ComparedBucket(total, state_of(total), stands))
    return pairs


def mend(inside: Inside, outside: Outside) -> list[BucketTotal]:
    """Repair once; return what was stated for it."""
    totals = repair(compared(inside, outside))
    inside.metered.restate(totals)
    outside.hear(totals)
    return totals


def must_be_booked_once(inside: Inside, outside: Outside) -> None:
    """The ledger has of every bucket what metering has, and of the whole what was billed."""
    metered = {
        bucket_id: (total.total_gpu_ns, total.total_micro)
        for bucket_id, total in inside.metered.totals.items()
        if total.total_gpu_ns
    }
    booked = {bucket_id: state[1:] for bucket_id, state in outside.booked().items() if state[1]}
    assert metered == booked
    assert not any(map(is_difference, compared(inside, outside)))
    billed = sum(end_ms - start for (*_, start), (end_ms, _) in inside.metered.rows.items())
    assert (billed > 0) == (sum(gpu_ns for gpu_ns, _ in booked.values()) > 0)


@st.composite
def crowded(draw: st.DrawFn) -> dict[str, Any]:
    """An interval on a node where everybody wants the same devices in the same few hours."""
    start = draw(st.integers(0, 11))
    tenant = draw(st.sampled_from(TENANTS))
    return interval(
        NOON_MS + start * STEP_MS * 2,
        NOON_MS + (start + draw(st.integers(1, 8))) * STEP_MS * 2,
        tenant_id=tenant,
        allocation_id=f"job-{tenant}",
        sku=draw(st.sampled_from((*SKUS, SKUS[0]))),
        devices=[device(*draw(st.sampled_from(SLICES[:2])))],
    )


def by_time(said: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As hubs report: in order of time. So prices of later hours can still be added."""
    return sorted(said, key=lambda usage: int(usage["start_ms"]))


def live(inside: Inside, outside: Outside, data: st.DataObject) -> tuple[Inside, int | None]:
    """Anything happens; return a backup of some instant of it, and the hub's last watermark."""
    kinds = st.sampled_from(("read", "read", "read", "prices", "prices", "decide", "watermark"))
    steps = data.draw(st.lists(kinds, min_size=2, max_size=12))
    backup_at = data.draw(st.integers(0, len(steps) - 1))
    backup = inside
    for place, step in enumerate(steps):
        if place == backup_at:
            backup = deepcopy(inside)
        match step:
            case "read":
                partition = data.draw(st.integers(0, PARTITIONS - 1))
                read(inside, outside, partition, data.draw(st.integers(1, 8)))
            case "prices":
                from_ms = NOON_MS + data.draw(st.integers(0, 12)) * HOUR_MS
                until = data.draw(st.sampled_from((None, from_ms + 2 * HOUR_MS)))
                price = data.draw(st.sampled_from((100_000_000, 777_777_777)))
                listed = tuple(
                    ListedPrice(Sku(sku), PriceClass("on_demand"), price)
                    for sku in data.draw(st.sets(st.sampled_from(SKUS), min_size=1))
                )
                add_prices(inside, outside, PriceList("PKR", from_ms, until, listed))
            case "decide":
                if inside.metered.open:
                    number = data.draw(st.sampled_from(sorted(inside.metered.open)))
                    decide(inside, outside, number, replays=data.draw(st.booleans()))
            case _:
                later_ms = NOON_MS + (72 + data.draw(st.integers(0, 20))) * HOUR_MS
                inside.watermark_ms = max(inside.watermark_ms or 0, later_ms)
    read_all(inside, outside, data)
    return backup, inside.watermark_ms


def read_all(inside: Inside, outside: Outside, data: st.DataObject) -> None:
    """Read what is left of every partition, in any order among them."""
    while left := [
        number
        for number in range(PARTITIONS)
        if inside.offsets[number] < len(outside.topic[number])
    ]:
        read(inside, outside, data.draw(st.sampled_from(left)), data.draw(st.integers(1, 6)))


def world(said: Sequence[dict[str, Any]], data: st.DataObject) -> tuple[Inside, Outside]:
    """A metering that has read nothing, and records in partitions, whatever node they are of."""
    topic: list[list[dict[str, Any]]] = [[] for _ in range(PARTITIONS)]
    for usage in said:
        topic[data.draw(st.integers(0, PARTITIONS - 1))].append(usage)
    inside, outside = Inside(), Outside(topic)
    add_prices(inside, outside, FIRST_LIST)
    return inside, outside


@pytest.mark.defect("M3", "M9", "F22", "F24")
@settings(max_examples=120, deadline=None)
@given(said=st.lists(crowded(), min_size=3, max_size=16), data=st.data())
def test_restored_metering_repaired_is_booked_once_whatever_was_priced_or_decided(
    said: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Prices added, conflicts read in another order, operators' decisions: ledger = metering."""
    inside, outside = world(by_time(said[1:]), data)
    backup, watermark_ms = live(inside, outside, data)
    follow(backup, outside)
    read_all(backup, outside, data)
    backup.watermark_ms = watermark_ms
    mend(backup, outside)
    must_agree(backup)
    must_be_booked_once(backup, outside)
    assert [] == mend(backup, outside)
    # Life goes on: what is stated afterwards is not taken for old, in repaired buckets either.
    outside.topic[0] += [said[0], *said[1:3]]
    read_all(backup, outside, data)
    must_be_booked_once(backup, outside)


@pytest.mark.defect("M3", "F22")
@settings(max_examples=80, deadline=None)
@given(said=without_conflict(), data=st.data())
def test_without_conflicts_a_restored_metering_has_nothing_to_repair(
    said: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Not a micro is booked otherwise than before: prices and decisions were taken up."""
    inside, outside = world(by_time(said), data)
    backup, watermark_ms = live(inside, outside, data)
    # What waits as too late is decided: a restored hub's watermark judges an open one otherwise.
    for number, waiting in sorted(inside.metered.open.items()):
        if waiting.cause.reason == "too-late":
            decide(inside, outside, number, replays=data.draw(st.booleans()))
    booked = outside.booked()
    follow(backup, outside)
    read_all(backup, outside, data)
    backup.watermark_ms = watermark_ms
    must_agree(backup)
    assert [] == mend(backup, outside)
    assert booked == outside.booked()


@pytest.mark.defect("M9", "F22")
def test_conflicting_claims_read_in_another_order_are_charged_once() -> None:
    """840 for the one that had the device, 840 for the other since the restore: then 840 in all."""
    claims = [
        interval(tenant_id=tenant, allocation_id=f"job-{tenant}", devices=[device("GPU-1")])
        for tenant in TENANTS[:2]
    ]
    inside, outside = Inside(), Outside([[claims[0]], [claims[1]]])
    add_prices(inside, outside, FIRST_LIST)
    backup = deepcopy(inside)
    read(inside, outside, 0, 1)
    read(inside, outside, 1, 1)
    follow(backup, outside)
    read(backup, outside, 1, 1)
    read(backup, outside, 0, 1)
    assert [840_000_000] * 2 == [state.charge_micro for state in outside.booked().values()]
    assert [0] == [total.total_micro for total in mend(backup, outside)]
    assert [0, 840_000_000] == sorted(state.charge_micro for state in outside.booked().values())
    must_be_booked_once(backup, outside)


@pytest.mark.defect("F22")
def test_a_record_replayed_in_vain_and_dismissed_is_not_billed_after_a_restore() -> None:
    """It had no price then and has one now; what was dismissed whole stays dismissed."""
    inside, outside = Inside(), Outside([[interval(sku=SKUS[1])], []])
    add_prices(inside, outside, FIRST_LIST)
    read(inside, outside, 0, 1)
    [number] = inside.metered.open
    backup = deepcopy(inside)
    decide(inside, outside, number, replays=True)
    decide(inside, outside, number, replays=False)
    listed = ListedPrice(Sku(SKUS[1]), PriceClass("on_demand"), 100_000_000)
    add_prices(inside, outside, PriceList("PKR", NOON_MS, None, (listed,)))
    follow(backup, outside)
    assert {} == outside.booked()
    assert [] == mend(backup, outside)
