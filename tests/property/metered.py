"""Runs the pure core of metering over usage as a hub says it, batch by batch, and reads it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

import oracle
from hisab_contracts.events import Interval
from hisab_contracts.ids import HubCode, PriceClass, PriceVersion, Sku, SliceId, TenantId
from hisab_contracts.reference import PriceLine
from metering.accounts import Accounts, charge_micro
from metering.coverage import Claim, Covered, DeviceCoverage
from metering.rating import PriceBook
from metering.reading import Facts, Origin, Reading, device_spans
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


def meter(batches: Iterable[Sequence[dict[str, Any]]]) -> Outcome:
    """Meter batches of interval data in order, storing nothing but what `changes` says."""
    billed: dict[oracle.Bucket, int] = defaultdict(int)
    charged: dict[oracle.Bucket, int] = {}
    rows: dict[tuple[str, str, str, str, int], tuple[int, Claim]] = {}
    reported = duplicate = waiting = 0
    records = [0, 0, 0, 0]
    offset = 0
    for batch in batches:
        reading = Reading(facts())
        for data in batch:
            offset += 1
            origin = Origin(data["hub"], "t", 0, offset, LATER_MS)
            reading.take(origin, event(data, offset), HEADERS)
        coverage = {
            key: DeviceCoverage(
                key[2],
                [
                    Covered(SliceId(row[3]), row[4], end_ms, claim)
                    for row, (end_ms, claim) in rows.items()
                    if row[:3] == key
                ],
            )
            for key in device_spans(reading.jobs)
        }
        for bucket in reading.buckets:
            bucket.gpu_ns = billed[_name(bucket.interval, bucket.hour_ms)]
        accounts = Accounts(reading.facts, coverage)
        for job in reading.jobs:
            accounts.meter(job)
        for bucket in reading.buckets:
            name = _name(bucket.interval, bucket.hour_ms)
            billed[name] = bucket.gpu_ns
            charged[name] = charge_micro(bucket)
        _store(rows, coverage)
        for tally in accounts.tallies.values():
            reported += tally.reported_gpu_ns
            duplicate += tally.duplicate_gpu_ns
            records[0] += tally.read_records
            records[1] += tally.accepted_records
            records[2] += tally.duplicate_records
        for parked in accounts.quarantined:
            waiting += sum(parked.waiting_gpu_ns.values())
            records[3] += 1
    return Outcome(
        {name: gpu_ns for name, gpu_ns in billed.items() if gpu_ns},
        {name: micro for name, micro in charged.items() if billed[name]},
        reported,
        duplicate,
        waiting,
        rows,
        records,
    )


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
