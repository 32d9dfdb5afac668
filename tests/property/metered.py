"""Drives metering's engine batch by batch over values, and reads them out in the oracle's words.

What metering stores is a value here: `Changes` are applied to it as they say. Whatever is decided,
the engine decides it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

import oracle
from hisab_contracts.charges import BucketTotal, HubWatermark, OpenQuarantine
from hisab_contracts.ids import (
    BucketId,
    CorrectionId,
    HubCode,
    PriceClass,
    PriceVersion,
    Sku,
    SourcePath,
    TenantId,
)
from hisab_contracts.prices import PriceBook
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import month_of
from metering.core import engine
from metering.core.batch import (
    Changes,
    CorrectedState,
    CorrectionOrder,
    EarlierVerdict,
    MeteringBatch,
    MeteringState,
    QuarantinedRecord,
    Reference,
    StoredBucket,
    UsageRecord,
)
from metering.core.corrections import CorrectionFact
from metering.core.coverage import Claim, CoverageChanges, CoveredInterval, DeviceKey
from metering.core.quarantine import QuarantineCause
from metering.core.sources import SourceProgress
from metering.core.watermarks import HubView, candidate_ms, statement_due
from unit.metering.hub_events import HEADERS, event

LONG_AGO_MS = 1_577_836_800_000
LATER_MS = 1_900_000_000_000

Rows = dict[tuple[str, str, str, str, int], tuple[int, Claim]]
"""(hub, node, device, slice, start_ms) → (end_ms, claim)."""


def facts(watermarks: dict[HubCode, int | None] | None = None) -> Reference:
    """The twelve tenants and the seeded prices of the trace."""
    lines = [
        PriceLine(
            rate_line_id=f"{sku}/{price_class}",
            price_version=PriceVersion("v"),
            currency="PKR",
            sku=Sku(sku),
            price_class=PriceClass(price_class),
            micro_per_gpu_hour=micro,
            valid_from_ms=LONG_AGO_MS,
            valid_until_ms=None,
        )
        for (sku, price_class), micro in oracle.MICRO_PER_GPU_HOUR.items()
    ]
    currencies = {TenantId(name): "PKR" for name in (*oracle.COMMERCIAL, *oracle.OTHERS)}
    return Reference(currencies, PriceBook(lines), watermarks or {})


class Outcome(NamedTuple):
    """What came of it, in the oracle's words."""

    billed: dict[oracle.Bucket, int]
    charged: dict[oracle.Bucket, int]
    reported_gpu_ns: int
    duplicate_gpu_ns: int
    quarantined_gpu_ns: int
    rows: Rows
    """The coverage as it is stored."""
    records: list[int]
    """Read, accepted, duplicate, quarantined."""
    voided: dict[oracle.Bucket, int]
    """Where there is any, by the bucket of the terms as reported."""


class Metered:
    """All that metering has stored, as a value. A copy of it is a backup."""

    def __init__(self) -> None:
        self.buckets: dict[BucketId, StoredBucket] = {}
        self.totals: dict[BucketId, BucketTotal] = {}
        self.rows: Rows = {}
        self.freed: dict[str, Rows] = defaultdict(dict)
        """By allocation, the time that voids of it have released."""
        self.corrections: dict[int, tuple[CorrectionFact, UsageRecord | None]] = {}
        self.waiting: dict[CorrectionId, QuarantineCause] = {}
        """Approved corrections that do not count, or not everywhere, yet."""
        self.reported = self.duplicate = 0
        self.open: dict[int, QuarantinedRecord] = {}
        self.dismissed: dict[int, QuarantinedRecord] = {}
        self.records = [0, 0, 0]
        self.sources: dict[SourcePath, SourceProgress] = {}
        self.last: tuple[HubWatermark | None, int] = (None, 0)
        self._offset = 0
        self._quarantine_id = 0
        self._counted = 0
        self._not_counting: dict[CorrectionId, CorrectionOrder] = {}

    def take(
        self, batch: Sequence[dict[str, Any]], reference: Reference | None = None
    ) -> list[BucketTotal]:
        """Meter intervals (and watermarks) new from Kafka; return what is stated of buckets."""
        records = []
        for data in batch:
            self._offset += 1
            kind = "watermark" if "watermark_ms" in data else "interval"
            kind = "correction" if "revision" in data else kind
            value = event(data, self._offset, kind)
            records.append(
                UsageRecord(data["hub"], "t", 0, self._offset, LATER_MS, None, value, HEADERS)
            )
        return self.meter_records(records, reference or facts())

    def replay(
        self,
        quarantine_ids: Iterable[int],
        reference: Reference,
        replayed_ms: int | None = None,
    ) -> list[BucketTotal]:
        """Judge open records again; return what is stated of buckets."""
        records = [
            msgspec.structs.replace(
                waiting.record,
                earlier=EarlierVerdict(
                    quarantine_id,
                    waiting.parts,
                    waiting.had_new,
                    waiting.counts,
                    waiting.hour_ms,
                    waiting.quarantined_gpu_ns,
                ),
                replayed_ms=replayed_ms,
            )
            for quarantine_id in quarantine_ids
            for waiting in (self.open[quarantine_id],)
        ]
        return self.meter_records(records, reference)

    def dismiss(self, quarantine_id: int) -> None:
        """Leave an open record in quarantine for good."""
        self.dismissed[quarantine_id] = self.open.pop(quarantine_id)

    def restate(self, totals: Iterable[BucketTotal]) -> None:
        """Remember at which revisions a repair has stated buckets; unknown ones as 0."""
        for total in totals:
            self.totals[total.bucket_id] = total
            self.buckets[total.bucket_id] = StoredBucket(
                total.total_gpu_ns, total.hold_id, total.revision
            )

    def view(self) -> HubView:
        """What is committed about the only hub; every partition of it has been read."""
        waiting: dict[tuple[TenantId, str], int] = defaultdict(int)
        for record in self.open.values():
            for hour_ms, gpu_ns in record.quarantined_gpu_ns.items():
                waiting[record.tenant_id or TenantId(""), month_of(hour_ms)] += gpu_ns
        quarantined = [OpenQuarantine(*of, gpu_ns) for of, gpu_ns in sorted(waiting.items())]
        sources = list(self.sources.values())
        last, stated_ms = self.last
        view = HubView(
            hub=HubCode("lhr"),
            heartbeat_ms=60_000,
            watermark_ms=None,
            last_seen_ms=0,
            sources=sources,
            emitted=bool(sources),
            ever_seen=bool(sources),
            quarantined=quarantined,
            last_statement=last,
            stated_ms=stated_ms,
        )
        return replace(view, watermark_ms=candidate_ms(view, 0))

    def state_hub(self, now_ms: int) -> HubWatermark | None:
        """State downstream how far the hub is complete, if that must be stated now."""
        statement = statement_due(self.view(), now_ms)
        if statement is not None:
            self.last = (statement, now_ms)
        return statement

    def outcome(self) -> Outcome:
        """Read it out."""
        left = [*self.open.values(), *self.dismissed.values()]
        waiting = [sum(record.quarantined_gpu_ns.values()) for record in left]
        quarantined = sum(record.counts for record in left)
        return Outcome(
            {_name(total): total.total_gpu_ns for total in self.totals.values()},
            {_name(total): total.total_micro for total in self.totals.values()},
            self.reported,
            self.duplicate,
            sum(waiting),
            self.rows,
            [*self.records, quarantined],
            {
                _name(self.totals[bucket_id]): stored.voided_gpu_ns
                for bucket_id, stored in self.buckets.items()
                if stored.voided_gpu_ns
            },
        )

    def meter_records(
        self, records: Sequence[UsageRecord], reference: Reference
    ) -> list[BucketTotal]:
        """Meter records, new or out of quarantine; return what is stated of buckets."""
        stated: list[BucketTotal] = []
        while records:
            batch = engine.prepare(records, reference)
            changes = engine.meter(batch, self._state_for(batch))
            self._apply(changes)
            stated += [bucket.total for bucket in changes.buckets if bucket.is_stated]
            records = records[batch.record_count :]
        return stated

    def approve(self, order: CorrectionOrder, reference: Reference) -> list[BucketTotal]:
        """Let a correction count that operators have approved; return what is stated."""
        self._not_counting[order.correction_id] = order
        batch = engine.prepare([], reference, approved=[order])
        changes = engine.meter(batch, self._state_for(batch))
        self._apply(changes)
        return [bucket.total for bucket in changes.buckets if bucket.is_stated]

    def count_waiting(self, reference: Reference) -> list[BucketTotal]:
        """Try again to have approved corrections count, as the service does now and then."""
        waiting = list(self._not_counting.values())
        return [total for order in waiting for total in self.approve(order, reference)]

    def judge_released(self, reference: Reference) -> list[BucketTotal]:
        """Judge conflicts again, as the service does where a correction may have ended them."""
        conflicts = [n for n, found in self.open.items() if found.cause.reason == "conflict"]
        return self.replay(conflicts, reference)

    def _state_for(self, batch: MeteringBatch) -> MeteringState:
        coverage = _by_device(self.rows)
        known: dict[Any, list[CorrectionFact]] = defaultdict(list)
        for fact, _ in self.corrections.values():
            known[fact.correction.hub, fact.correction.allocation_id].append(fact)
        corrected: CorrectedState | None = None
        if known or batch.corrections:
            freed: dict[DeviceKey, list[CoveredInterval]] = defaultdict(list)
            for rows in self.freed.values():
                for key, found in _by_device(rows).items():
                    freed[key] += found
                    coverage.setdefault(key, [])
            records = {n: record for n, (_, record) in self.corrections.items() if record}
            corrected = CorrectedState(known, records, freed, batch.reference.currencies)
        return MeteringState(coverage, self.buckets, list(self.sources.values()), corrected)

    def _apply_corrections(self, changes: Changes) -> None:
        if changes.corrections is None:
            return
        for (key, allocation_id), changed in changes.corrections.freed.items():
            _apply_coverage(self.freed[allocation_id], {key: changed})
        for counted_seq in changes.corrections.parked:
            del self.corrections[counted_seq]
        for counted_seq in changes.corrections.begun:
            fact, record = self.corrections[counted_seq]
            self.corrections[counted_seq] = (CorrectionFact(counted_seq, fact.correction), record)
        for order, waits in changes.corrections.counted:
            # Numbered when it begins to count, whenever it was proposed.
            self._counted += 1
            fact = CorrectionFact(self._counted, order.correction, waits)
            kept = (
                None
                if order.record is None
                else msgspec.structs.replace(order.record, earlier=None)
            )
            self.corrections[self._counted] = (fact, kept)
            self.waiting.pop(order.correction_id, None)
            self._not_counting.pop(order.correction_id, None)
        self.waiting.update(changes.corrections.waiting)

    def _apply(self, changes: Changes) -> None:
        _apply_coverage(self.rows, changes.coverage)
        self._apply_corrections(changes)
        for bucket in changes.buckets:
            total = bucket.total
            if bucket.is_new == (total.bucket_id in self.buckets):
                raise AssertionError("a bucket is stored twice, or was never stored")
            if not bucket.is_corrected:
                known = self.buckets.get(total.bucket_id, StoredBucket(0, None))
                kept = (known.revision, known.voided_gpu_ns)
                if kept != (total.revision, bucket.voided_gpu_ns):
                    raise AssertionError("what is not stored has changed")
            self.buckets[total.bucket_id] = StoredBucket(
                total.total_gpu_ns, total.hold_id, total.revision, bucket.voided_gpu_ns
            )
            self.totals[total.bucket_id] = total
        for tally in changes.tallies.values():
            self.reported += tally.reported_gpu_ns
            self.duplicate += tally.duplicate_gpu_ns
            for place, count in enumerate(tally[2:]):
                self.records[place] += count
        self.sources |= {source.path: source for source in changes.sources}
        for waiting in changes.quarantined:
            if _place_of(waiting) in map(_place_of, self.open.values()):
                raise AssertionError("a record is opened in quarantine that is open already")
            self._quarantine_id += 1
            self.open[self._quarantine_id] = waiting
        for waiting in changes.still_quarantined:
            if waiting.record.earlier is None:
                raise AssertionError("a record that never waited waits on")
            self.open[waiting.record.earlier.quarantine_id] = waiting
        for quarantine_id in changes.released_ids:
            del self.open[quarantine_id]


def _place_of(waiting: QuarantinedRecord) -> tuple[str, int, int]:
    """Where a record stands: each partition counts its offsets by itself."""
    record = waiting.record
    return record.topic, record.partition, record.offset


def meter(batches: Iterable[Sequence[dict[str, Any]]]) -> Outcome:
    """Meter batches of interval data in order, storing nothing but what `Changes` say."""
    metered = Metered()
    for batch in batches:
        metered.take(batch)
    return metered.outcome()


def _by_device(rows: Rows) -> dict[DeviceKey, list[CoveredInterval]]:
    coverage: dict[DeviceKey, list[CoveredInterval]] = defaultdict(list)
    for (hub, node_id, device, part, start_ms), (end_ms, claim) in rows.items():
        row: Any = (part, start_ms, end_ms, claim)
        coverage[hub, node_id, device].append(CoveredInterval(*row))  # type: ignore[index]
    return coverage


def _apply_coverage(rows: Rows, changes: Mapping[DeviceKey, CoverageChanges]) -> None:
    for key, (removed, grown, added) in changes.items():
        for slice_uuid, start_ms in removed:
            del rows[(*key, slice_uuid, start_ms)]
        for slice_uuid, start_ms, end_ms in grown:
            rows[(*key, slice_uuid, start_ms)] = (end_ms, rows[(*key, slice_uuid, start_ms)][1])
        for slice_uuid, start_ms, end_ms, claim in added:
            if (*key, slice_uuid, start_ms) in rows:
                raise AssertionError("a row is added twice")
            rows[(*key, slice_uuid, start_ms)] = (end_ms, claim)


def _name(total: BucketTotal) -> oracle.Bucket:
    stated = msgspec.to_builtins(total)
    return oracle.Bucket._make(stated[name] for name in oracle.Bucket._fields)
