"""Runs the pure core of metering over usage as a hub says it, batch by batch, and reads it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

import oracle
from hisab_contracts.charges import BucketTotal, HubWatermark, OpenQuarantine
from hisab_contracts.events import Interval
from hisab_contracts.ids import (
    HubCode,
    PriceClass,
    PriceVersion,
    Sku,
    SliceId,
    SourcePath,
    TenantId,
)
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import month_of
from metering.accounts import Accounts, charge_micro, total_of
from metering.completeness import HubView, candidate_ms, restated
from metering.coverage import Claim, Covered, DeviceCoverage
from metering.hearing import hear
from metering.rating import PriceBook
from metering.reading import Facts, Origin, Reading, device_spans
from metering.sources import Source
from unit.metering.said import HEADERS, event

LONG_AGO_MS = 1_577_836_800_000
LATER_MS = 1_900_000_000_000


def facts(watermarks: dict[HubCode, int | None] | None = None) -> Facts:
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
    return Facts(currencies, PriceBook(lines), watermarks or {})


class Outcome(NamedTuple):
    """What came of it, in the oracle's words."""

    billed: dict[oracle.Bucket, int]
    charged: dict[oracle.Bucket, int]
    reported_gpu_ns: int
    duplicate_gpu_ns: int
    waiting_gpu_ns: int
    rows: dict[tuple[str, str, str, str, int], tuple[int, Claim]]
    """(hub, node, device, slice, start_ms) → (end_ms, claim): the coverage as it is stored."""
    records: list[int]
    """Read, accepted, duplicate, quarantined."""


class CoreMetering:
    """Metering that is nothing but the core: what the shell stores, without I/O.

    A copy of it is a backup.
    """

    def __init__(self) -> None:
        self.billed: dict[oracle.Bucket, int] = defaultdict(int)
        self.charged: dict[oracle.Bucket, int] = {}
        self.rows: dict[tuple[str, str, str, str, int], tuple[int, Claim]] = {}
        self.reported = self.duplicate = 0
        self.waiting: dict[tuple[TenantId, str], int] = defaultdict(int)
        self.records = [0, 0, 0, 0]
        self.sources: dict[SourcePath, Source] = {}
        self.told: tuple[HubWatermark | None, int] = (None, 0)
        self._offset = 0

    def take(self, batch: Sequence[dict[str, Any]]) -> list[BucketTotal]:
        """Meter a batch of intervals (and watermarks); return what is stated of its buckets."""
        reading = Reading(facts())
        for data in batch:
            self._offset += 1
            kind = "watermark" if "watermark_ms" in data else "interval"
            origin = Origin(data["hub"], "t", 0, self._offset, LATER_MS)
            reading.take(origin, event(data, self._offset, kind), HEADERS)
        coverage = {
            key: DeviceCoverage(
                key[2],
                [
                    Covered(SliceId(row[3]), row[4], end_ms, claim)
                    for row, (end_ms, claim) in self.rows.items()
                    if row[:3] == key
                ],
            )
            for key in device_spans(reading.jobs)
        }
        for bucket in reading.buckets:
            bucket.gpu_ns = self.billed[_name(bucket.interval, bucket.hour_ms)]
        accounts = Accounts(reading.facts, coverage)
        for job in reading.jobs:
            accounts.meter(job)
        for bucket in reading.buckets:
            name = _name(bucket.interval, bucket.hour_ms)
            self.billed[name] = bucket.gpu_ns
            self.charged[name] = charge_micro(bucket)
        _store(self.rows, coverage)
        self.sources |= {one.path: one for one in hear(reading, self.sources.values()).changed}
        self._count(accounts)
        return [total_of(bucket) for bucket in reading.buckets if bucket.filled_by is not None]

    def view(self) -> HubView:
        """What is committed about the only hub; every partition of it has been read."""
        quarantined = [
            OpenQuarantine(*of, gpu_ns) for of, gpu_ns in sorted(self.waiting.items()) if gpu_ns
        ]
        sources = list(self.sources.values())
        view = HubView(HubCode("lhr"), 60_000, None, 0, sources, bool(sources), quarantined)
        return replace(view, watermark_ms=candidate_ms(view, 0))

    def tell(self, now_ms: int) -> HubWatermark | None:
        """Say downstream how far the hub is complete, if that must be said now."""
        statement = restated(self.view(), *self.told, now_ms)
        if statement is not None:
            self.told = (statement, now_ms)
        return statement

    def outcome(self) -> Outcome:
        """Read it out."""
        return Outcome(
            {name: gpu_ns for name, gpu_ns in self.billed.items() if gpu_ns},
            {name: micro for name, micro in self.charged.items() if self.billed[name]},
            self.reported,
            self.duplicate,
            sum(self.waiting.values()),
            self.rows,
            self.records,
        )

    def _count(self, accounts: Accounts) -> None:
        for tally in accounts.tallies.values():
            self.reported += tally.reported_gpu_ns
            self.duplicate += tally.duplicate_gpu_ns
            self.records[0] += tally.read_records
            self.records[1] += tally.accepted_records
            self.records[2] += tally.duplicate_records
        for parked in accounts.quarantined:
            self.records[3] += 1
            for hour_ms, gpu_ns in parked.waiting_gpu_ns.items():
                self.waiting[parked.tenant_id or TenantId(""), month_of(hour_ms)] += gpu_ns


def meter(batches: Iterable[Sequence[dict[str, Any]]]) -> Outcome:
    """Meter batches of interval data in order, storing nothing but what `changes` says."""
    metering = CoreMetering()
    for batch in batches:
        metering.take(batch)
    return metering.outcome()


def _store(
    rows: dict[tuple[str, str, str, str, int], tuple[int, Claim]], coverage: dict[Any, Any]
) -> None:
    for key, device in coverage.items():
        removed, grown, added = device.changes()
        for slice_uuid, start_ms in removed:
            del rows[(*key, slice_uuid, start_ms)]
        for slice_uuid, start_ms, end_ms in grown:
            rows[(*key, slice_uuid, start_ms)] = (end_ms, rows[(*key, slice_uuid, start_ms)][1])
        for slice_uuid, start_ms, end_ms, claim in added:
            if (*key, slice_uuid, start_ms) in rows:
                raise AssertionError("a row is added twice")
            rows[(*key, slice_uuid, start_ms)] = (end_ms, claim)


def _name(interval: Interval, hour_ms: int) -> oracle.Bucket:
    said = msgspec.to_builtins(interval)
    return oracle.Bucket._make([*(said[name] for name in oracle.Bucket._fields[:-1]), hour_ms])
