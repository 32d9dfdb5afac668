"""Accounts: what a batch changes, once it meets the coverage that is stored.

Theory. Every reported GPU-nanosecond ends in exactly one account of its UTC hour: *billed* (its
bucket), *duplicate*, or *quarantined* (waiting or dismissed). What was *reported* is counted from
the events themselves, not from where their parts went, so the identity
`reported = billed + duplicate + quarantined` can fail if we err. Records are counted likewise:
each read record is quarantined while any part of it waits, else accepted if any part was new, else
a duplicate.

A record that is judged again is first taken back from the accounts as it was, then counted as it
is now: so a release moves what it must and nothing else.

Reasons decided here, in order of precedence: `schema` (more device time in one hour of one node
than can be), `too-late` (a record on its first arrival has new time further behind the hub's
watermark than the horizon), `conflict`: only the overlapping part waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from hisab_contracts.charges import BucketTotal
from hisab_contracts.events import Device, Interval
from hisab_contracts.ids import AllocationId, DeviceId, HubCode, NodeId, TenantId
from hisab_contracts.units import (
    GPU_NS_PER_GPU_HOUR,
    HOUR_MS,
    hour_floor_ms,
    instant_text,
    rated_micro,
)
from metering.coverage import Claim, Conflict, DeviceCoverage
from metering.reading import (
    AllocationKey,
    Bucket,
    Facts,
    Job,
    Origin,
    Parked,
    Part,
    Prior,
    Waits,
)

LATENESS_MS: Final = 72 * HOUR_MS
"""How far behind its hub's watermark a record may bring new time on its first arrival."""

MAX_DEVICES_PER_HOUR: Final = 1_000_000
"""Keeps a bucket's GPU time and amount inside 64 bits, whatever a hub reports."""

_FULL_BUCKET_GPU_NS: Final = MAX_DEVICES_PER_HOUR * GPU_NS_PER_GPU_HOUR

DeviceKey = tuple[HubCode, NodeId, DeviceId]
_Spans = dict[tuple[int, int], int]
"""[start_ms, end_ms) → the sum of the shares that were reported for exactly this stretch."""


class TallyKey(NamedTuple):
    """Which tally: one per hub, partition (so that consumers do not share any) and UTC hour."""

    hub: HubCode
    partition: int
    hour_ms: int


@dataclass(slots=True)
class Tally:
    """Changes to what was counted in one UTC hour of usage time."""

    reported_gpu_ns: int = 0
    duplicate_gpu_ns: int = 0
    read_records: int = 0
    accepted_records: int = 0
    duplicate_records: int = 0


class Quarantined(NamedTuple):
    """What of a record waits from now on."""

    origin: Origin
    waits: Waits
    prior: Prior | None
    """Set when it waited before."""
    tenant_id: TenantId | None
    allocation_id: AllocationId | None
    counts: bool
    hour_ms: int
    had_new: bool
    parts: tuple[Part, ...] | None
    """None: the whole record."""
    waiting_gpu_ns: Mapping[int, int]
    """Per UTC hour."""


class Accounts:
    """The changes of one transaction, on top of the coverage and buckets that were loaded."""

    def __init__(self, facts: Facts, coverage: Mapping[DeviceKey, DeviceCoverage]) -> None:
        """Take the working coverage of every device that the jobs touch."""
        self._facts = facts
        self._coverage = coverage
        self.tallies: dict[TallyKey, Tally] = {}
        self.duplicates: dict[AllocationKey, int] = {}
        self.quarantined: list[Quarantined] = []

    def meter(self, job: Job) -> None:
        """Split a job against the coverage and count every part of it."""
        waits = self._refusal(job)
        if waits is not None:
            self.park(Parked(job.origin, waits, job.interval, True, job.prior))
            return
        if job.prior is not None:
            self.take_back(job.origin, job.prior)
        interval = job.interval
        fresh: _Spans = {}
        duplicate: _Spans = {}
        waiting: list[Part] = []
        met: list[Conflict] = []
        for device, start_ms, end_ms in _parts_of(job):
            split = self._device(interval, device).cover(
                device.slice_uuid, start_ms, end_ms, _claim_of(interval, device)
            )
            for stretch in split.fresh:
                fresh[stretch] = fresh.get(stretch, 0) + device.share_ppm
            for stretch in split.duplicates:
                duplicate[stretch] = duplicate.get(stretch, 0) + device.share_ppm
            for conflict in split.conflicts:
                waiting.append(Part(device, conflict.start_ms, conflict.end_ms))
                met.append(conflict)
        if fresh:
            self._bill(job, fresh)
        self._count(job, fresh, duplicate, waiting, met)

    def park(self, parked: Parked) -> None:
        """Have a whole record wait; its GPU time counts as reported and quarantined."""
        origin, prior, data = parked.origin, parked.prior, parked.data
        if prior is not None:
            self.take_back(origin, prior)
        usage = data if isinstance(data, Interval) else None
        hour_ms = hour_floor_ms(origin.record_ms if usage is None else usage.start_ms)
        parts = None if prior is None else prior.parts
        waiting_gpu_ns = {} if usage is None else _by_hour(_spans_of(_whole(usage, parts)))
        for usage_hour_ms, gpu_ns in waiting_gpu_ns.items():
            self._tally(origin, usage_hour_ms).reported_gpu_ns += gpu_ns
        if parked.counts:
            self._tally(origin, hour_ms).read_records += 1
        self.quarantined.append(
            Quarantined(
                origin=origin,
                waits=parked.waits,
                prior=prior,
                tenant_id=getattr(data, "tenant_id", None),
                allocation_id=getattr(data, "allocation_id", None),
                counts=parked.counts,
                hour_ms=hour_ms,
                had_new=prior is not None and prior.had_new,
                parts=parts,
                waiting_gpu_ns=waiting_gpu_ns,
            )
        )

    def take_back(self, origin: Origin, prior: Prior) -> None:
        """Undo how a quarantined record was counted, before it is counted as it is now."""
        for hour_ms, gpu_ns in prior.waiting_gpu_ns.items():
            self._tally(origin, hour_ms).reported_gpu_ns -= gpu_ns
        if prior.counts:
            self._tally(origin, prior.hour_ms).read_records -= 1

    def _bill(self, job: Job, fresh: _Spans) -> None:
        first_hour_ms = job.buckets[0].hour_ms
        for hour_ms, gpu_ns in _by_hour(fresh).items():
            bucket = job.buckets[(hour_ms - first_hour_ms) // HOUR_MS]
            bucket.gpu_ns += gpu_ns
            bucket.filled_by = job.origin
            if bucket.hold_id is None:
                bucket.hold_id = job.interval.hold_id

    def _count(
        self,
        job: Job,
        fresh: _Spans,
        duplicate: _Spans,
        waiting: Sequence[Part],
        met: Sequence[Conflict],
    ) -> None:
        origin, interval, prior = job.origin, job.interval, job.prior
        for hour_ms, gpu_ns in _by_hour(_spans_of(_parts_of(job))).items():
            self._tally(origin, hour_ms).reported_gpu_ns += gpu_ns
        for hour_ms, gpu_ns in _by_hour(duplicate).items():
            self._tally(origin, hour_ms).duplicate_gpu_ns += gpu_ns
            key = AllocationKey(interval.hub, interval.allocation_id, interval.tenant_id)
            self.duplicates[key] = self.duplicates.get(key, 0) + gpu_ns
        hour_ms = job.buckets[0].hour_ms
        tally = self._tally(origin, hour_ms)
        tally.read_records += 1
        had_new = bool(fresh) or (prior is not None and prior.had_new)
        if waiting:
            self.quarantined.append(
                Quarantined(
                    origin=origin,
                    waits=Waits("conflict", _conflict_text(job, waiting, met)),
                    prior=prior,
                    tenant_id=interval.tenant_id,
                    allocation_id=interval.allocation_id,
                    counts=True,
                    hour_ms=hour_ms,
                    had_new=had_new,
                    parts=tuple(waiting),
                    waiting_gpu_ns=_by_hour(_spans_of(waiting)),
                )
            )
        elif had_new:
            tally.accepted_records += 1
        else:
            tally.duplicate_records += 1

    def _refusal(self, job: Job) -> Waits | None:
        """Return why a job must wait whole, before anything of it is covered."""
        for bucket in job.buckets:
            if bucket.gpu_ns > _FULL_BUCKET_GPU_NS:
                return Waits(
                    "schema",
                    f"more than {MAX_DEVICES_PER_HOUR} devices of one allocation on one node in "
                    f"the hour from {instant_text(bucket.hour_ms)}",
                )
        watermark_ms = self._facts.watermarks.get(job.interval.hub)
        if watermark_ms is None or job.prior is not None:
            return None
        horizon_ms = watermark_ms - LATENESS_MS
        if job.interval.start_ms >= horizon_ms or not self._has_fresh_before(job, horizon_ms):
            return None
        return Waits(
            "too-late",
            f"new time before {instant_text(horizon_ms)}: further behind the hub's watermark "
            f"{instant_text(watermark_ms)} than 72 hours",
        )

    def _has_fresh_before(self, job: Job, horizon_ms: int) -> bool:
        interval = job.interval
        return any(
            start_ms < horizon_ms
            for device in interval.devices
            for start_ms, _ in self._device(interval, device)
            .split(
                device.slice_uuid, interval.start_ms, interval.end_ms, _claim_of(interval, device)
            )
            .fresh
        )

    def _device(self, interval: Interval, device: Device) -> DeviceCoverage:
        return self._coverage[interval.hub, interval.node_id, device.device_uuid]

    def _tally(self, origin: Origin, hour_ms: int) -> Tally:
        key = TallyKey(origin.hub, origin.partition, hour_ms)
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally()
        return tally


def charge_micro(bucket: Bucket) -> int:
    """Return what a bucket costs: a pure function of what is covered in its hour."""
    return rated_micro(bucket.gpu_ns, bucket.line.micro_per_gpu_hour)


def total_of(bucket: Bucket) -> BucketTotal:
    """Return what is stated downstream of a bucket: its total, never what was added to it."""
    usage = bucket.interval
    return BucketTotal(
        tenant_id=usage.tenant_id,
        bucket_id=bucket.bucket_id,
        project_id=usage.project_id,
        allocation_id=usage.allocation_id,
        hold_id=bucket.hold_id,
        hub=usage.hub,
        node_id=usage.node_id,
        sku=usage.sku,
        price_class=usage.price_class,
        price_version=bucket.line.price_version,
        hour_ms=bucket.hour_ms,
        revision=0,
        total_gpu_ns=bucket.gpu_ns,
        total_micro=charge_micro(bucket),
    )


def _parts_of(job: Job) -> Iterable[Part]:
    return _whole(job.interval, None if job.prior is None else job.prior.parts)


def _whole(interval: Interval, parts: tuple[Part, ...] | None) -> Iterable[Part]:
    if parts is not None:
        return parts
    return [Part(device, interval.start_ms, interval.end_ms) for device in interval.devices]


def _spans_of(parts: Iterable[Part]) -> _Spans:
    spans: _Spans = {}
    for device, start_ms, end_ms in parts:
        spans[start_ms, end_ms] = spans.get((start_ms, end_ms), 0) + device.share_ppm
    return spans


def _by_hour(spans: Mapping[tuple[int, int], int]) -> dict[int, int]:
    """Split stretches at UTC hours and add up their GPU-ns per hour; conserves the sum exactly."""
    hours: dict[int, int] = {}
    for (start_ms, end_ms), share_ppm in spans.items():
        _add_by_hour(hours, start_ms, end_ms, share_ppm)
    return hours


def _add_by_hour(
    hours: MutableMapping[int, int], start_ms: int, end_ms: int, share_ppm: int
) -> None:
    while start_ms < end_ms:
        hour_ms = hour_floor_ms(start_ms)
        until_ms = min(end_ms, hour_ms + HOUR_MS)
        hours[hour_ms] = hours.get(hour_ms, 0) + (until_ms - start_ms) * share_ppm
        start_ms = until_ms


def _claim_of(interval: Interval, device: Device) -> Claim:
    return Claim(
        interval.tenant_id,
        interval.project_id,
        interval.allocation_id,
        interval.sku,
        interval.price_class,
        device.share_ppm,
    )


def _conflict_text(job: Job, waiting: Sequence[Part], met: Sequence[Conflict]) -> str:
    """Name both claims of the first overlap, and how many there are."""
    part, conflict = waiting[0], met[0]
    claim = conflict.claim
    interval = job.interval
    more = f" (and {len(met) - 1} more)" if len(met) > 1 else ""
    return (
        f"{part.device.slice_uuid} [{instant_text(part.start_ms)}, {instant_text(part.end_ms)}) "
        f"is claimed by {interval.allocation_id} of {interval.tenant_id} "
        f"({interval.sku}, {interval.price_class}, {part.device.share_ppm} ppm) but "
        f"{conflict.slice_uuid} is covered by {claim.allocation_id} of {claim.tenant_id} "
        f"({claim.sku}, {claim.price_class}, {claim.share_ppm} ppm){more}"
    )
