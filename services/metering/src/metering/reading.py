"""Reading: what a batch of records says, before it meets what is stored.

Theory. Every record goes one of three ways. It *waits* (quarantine) for a reason that can be told
from the record and the facts known: tenants, price lines. Or it is an interval that can be rated:
a *job* for coverage, with the buckets it may fill. Or it speaks about its source or an allocation.
Whatever the way, a record whose envelope could be read counts in the sequence of its source.
Nothing is looked up: the result says what must be loaded, so that a batch needs a fixed number of
statements.

Reasons decided here, in order of precedence: those of `read_event` (`undecodable`, `unknown-type`,
`schema`, `hub-mismatch`), `unknown-tenant`, `unknown-sku`, `no-price`, `clock-skew`. Coverage
decides the rest (see `accounts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, assert_never

from hisab_contracts import ids
from hisab_contracts.events import (
    Device,
    Ended,
    HubFact,
    Interval,
    QuarantineReason,
    Refused,
    Retired,
    Started,
    Watermark,
    read_event,
)
from hisab_contracts.ids import AllocationId, BucketId, HoldId, HubCode, SourcePath, TenantId
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import instant_text
from metering.rating import PriceBook, Series, hours_of
from metering.sources import Said

CLOCK_SKEW_MS: Final = 300_000
"""How far past its Kafka timestamp a record may speak: 5 minutes."""

MAX_HOURS: Final = 100_000
"""Hours of usage that one reading holds: what it needs of memory goes with them."""

UNDECODED: Final = frozenset({"undecodable", "unknown-type", "schema", "killed-process"})
"""Reasons under which a record counts as one even though it may not be an interval."""


class Origin(NamedTuple):
    """Where a record came from: its place in Kafka, and when Kafka took it."""

    hub: HubCode
    """The topic's hub."""
    topic: str
    partition: int
    offset: int
    record_ms: int


class Waits(NamedTuple):
    """Why a record waits in quarantine."""

    reason: QuarantineReason
    detail: str


KILLED: Final = Waits(
    "killed-process",
    "reading or metering this record ended the process: it was set aside unread",
)


class Part(NamedTuple):
    """A reported stretch of one device slice."""

    device: Device
    start_ms: int
    end_ms: int


@dataclass(slots=True)
class Bucket:
    """A working copy of one bucket: tenant, project, allocation, hub, node, rate line, UTC hour."""

    bucket_id: BucketId
    interval: Interval
    """Any interval of it: they agree on all that names the bucket."""
    line: PriceLine
    hour_ms: int
    hold_id: HoldId | None = None
    """The first hold that usage in it named."""
    gpu_ns: int = 0
    loaded: bool = False
    """Whether it was looked up."""
    stored: bool = False
    """Whether it was found."""
    filled_by: Origin | None = None
    """The record that last added to it."""


class Prior(NamedTuple):
    """A record that is judged again: what was decided about it when it was quarantined."""

    quarantine_id: int
    parts: tuple[Part, ...] | None
    """What of it waits; None: the whole record."""
    had_new: bool
    """Whether another part of it was billed already."""
    counts: bool
    """Whether it was counted among the records, in the UTC hour `hour_ms`."""
    hour_ms: int
    waiting_gpu_ns: Mapping[int, int]
    """Per UTC hour, the GPU time of it that waits."""


class Job(NamedTuple):
    """An interval that can be rated, for coverage to decide about."""

    origin: Origin
    interval: Interval
    buckets: tuple[Bucket, ...]
    """One per UTC hour it touches, in order."""
    prior: Prior | None = None


class Parked(NamedTuple):
    """A record, or what is left of it, that waits."""

    origin: Origin
    waits: Waits
    data: HubFact | None
    """What could be read of it."""
    counts: bool
    """Whether it counts among the records: intervals, and what could not be decoded."""
    prior: Prior | None = None


@dataclass(slots=True)
class SourceEvents:
    """What one source says in a batch, in the order it arrived."""

    source: ids.Source
    last_seen_ms: int
    said: list[Said] = field(default_factory=list)
    origins: dict[int, tuple[Origin, Watermark]] = field(default_factory=dict)
    """By sequence: the watermark said there first, and the record that says it."""


class Vouched(NamedTuple):
    """A quarantined watermark that is judged again."""

    path: SourcePath
    said: Said
    watermark: Watermark
    origin: Origin
    prior: Prior


class AllocationKey(NamedTuple):
    """Who an allocation is: its id is unique within a hub."""

    hub: HubCode
    allocation_id: AllocationId
    tenant_id: TenantId


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when a batch is judged."""

    currencies: Mapping[TenantId, str]
    """Tenants and the currency of their books."""
    book: PriceBook
    watermarks: Mapping[HubCode, int | None]
    """Per hub, how far it is complete: what has passed a barrier."""


@dataclass(slots=True)
class Reading:
    """What a batch says: made by `take`, record by record, in order of arrival.

    One record may touch all the hours of a month. A reading that `is_full` is settled before the
    rest of its batch is read.
    """

    facts: Facts
    max_hours: int = MAX_HOURS
    records: int = 0
    """Records read so far."""
    hours: int = 0
    """Hours that the intervals among them touch."""
    jobs: list[Job] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    sources: dict[SourcePath, SourceEvents] = field(default_factory=dict)
    """In order of first arrival."""
    vouched: list[Vouched] = field(default_factory=list)
    resolved: list[tuple[Origin, Prior]] = field(default_factory=list)
    """Records judged again that turned out to be no usage and wait no more."""
    started: dict[AllocationKey, Started] = field(default_factory=dict)
    ended: dict[AllocationKey, Ended] = field(default_factory=dict)
    _rated: dict[tuple[str | int, ...], Bucket | Waits] = field(default_factory=dict)
    """Per allocation, node, class and hour: the bucket it fills, or why it cannot."""

    @property
    def is_full(self) -> bool:
        """Say whether no more should be taken before this is settled."""
        return self.hours >= self.max_hours

    @property
    def buckets(self) -> list[Bucket]:
        """Return the working buckets that the jobs may fill."""
        return [rated for rated in self._rated.values() if isinstance(rated, Bucket)]

    def take(
        self,
        origin: Origin,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes | None]],
        prior: Prior | None = None,
        spoken_ms: int | None = None,
    ) -> None:
        """Read one record; with `prior`, one that was quarantined before.

        A record may speak of instants up to `spoken_ms` (and the allowed skew): its Kafka
        timestamp, or the present when an operator vouches for it.
        """
        self.records += 1
        event = read_event(value, headers, origin.hub)
        if isinstance(event, Refused):
            if event.source is not None and event.sequence is not None:
                self._note(event.source, Said(event.sequence), origin)
            self._park(origin, Waits(event.reason, event.detail), event.data, prior)
            return
        until_ms = (origin.record_ms if spoken_ms is None else spoken_ms) + CLOCK_SKEW_MS
        said, data = Said(event.sequence), event.data
        match data:
            case Interval():
                self._take_interval(origin, data, prior, until_ms)
            case Watermark() if data.watermark_ms > until_ms:
                self._park(
                    origin, _skewed("watermark_ms", data.watermark_ms, until_ms), data, prior
                )
            case Watermark() if prior is not None:
                vouched = Said(event.sequence, data.watermark_ms)
                self.vouched.append(Vouched(event.source.path, vouched, data, origin, prior))
            case Watermark():
                said = Said(event.sequence, data.watermark_ms)
            case Retired():
                said = Said(event.sequence, retires=True)
            case Started():
                self.started[_allocation_of(data)] = data
            case Ended():
                known = self.ended.get(_allocation_of(data))
                if known is None or known.ended_ms <= data.ended_ms:
                    self.ended[_allocation_of(data)] = data
            case _:
                assert_never(data)
        if prior is not None and isinstance(data, Started | Ended | Retired):
            self.resolved.append((origin, prior))
        self._note(event.source, said, origin, data)

    def take_unread(self, origin: Origin, waits: Waits = KILLED) -> None:
        """Have a record wait for a reason that lies outside of it, without reading it."""
        self.records += 1
        self._park(origin, waits, None, None)

    def _note(
        self, source: ids.Source, said: Said, origin: Origin, data: HubFact | None = None
    ) -> None:
        events = self.sources.get(source.path)
        if events is None:
            events = self.sources[source.path] = SourceEvents(source, origin.record_ms)
        events.said.append(said)
        events.last_seen_ms = max(events.last_seen_ms, origin.record_ms)
        if isinstance(data, Watermark):
            events.origins.setdefault(said.sequence, (origin, data))

    def _park(
        self, origin: Origin, waits: Waits, data: HubFact | None, prior: Prior | None
    ) -> None:
        counts = isinstance(data, Interval) or waits.reason in UNDECODED
        self.parked.append(Parked(origin, waits, data, counts, prior))

    def _take_interval(
        self, origin: Origin, interval: Interval, prior: Prior | None, until_ms: int
    ) -> None:
        buckets: list[Bucket] = []
        waits: Waits | None = None
        hours = hours_of(interval.start_ms, interval.end_ms)
        self.hours += len(hours)
        for hour_ms in hours:
            rated = self._rate(interval, hour_ms)
            if isinstance(rated, Waits):
                waits = rated
                break
            buckets.append(rated)
        if waits is None and interval.end_ms > until_ms:
            waits = _skewed("end_ms", interval.end_ms, until_ms)
        if waits is None:
            self.jobs.append(Job(origin, interval, tuple(buckets), prior))
        else:
            self._park(origin, waits, interval, prior)

    def _rate(self, interval: Interval, hour_ms: int) -> Bucket | Waits:
        """Return the bucket that an hour of an interval fills, or why it cannot be rated."""
        key = (
            hour_ms,
            interval.allocation_id,
            interval.node_id,
            interval.tenant_id,
            interval.sku,
            interval.price_class,
            interval.project_id,
            interval.hub,
        )
        rated = self._rated.get(key)
        if rated is None:
            line = rating_line(self.facts, interval, hour_ms)
            rated = line if isinstance(line, Waits) else _bucket_of(interval, line, hour_ms)
            self._rated[key] = rated
        return rated


def missing_tenants(reading: Reading) -> set[TenantId]:
    """Return the tenants that records of a reading wait for."""
    return {
        parked.data.tenant_id
        for parked in reading.parked
        if parked.waits.reason == "unknown-tenant" and isinstance(parked.data, Interval)
    }


def rating_line(facts: Facts, interval: Interval, hour_ms: int) -> PriceLine | Waits:
    """Return the line that rates an hour of an interval, or the fact that is missing for it."""
    currency = facts.currencies.get(interval.tenant_id)
    if currency is None:
        return Waits("unknown-tenant", f"no tenant {interval.tenant_id} is known")
    if not facts.book.knows(interval.sku):
        return Waits("unknown-sku", f"no price line names the SKU {interval.sku}")
    line = facts.book.line_at(Series(currency, interval.sku, interval.price_class), hour_ms)
    if line is None:
        return Waits(
            "no-price",
            f"no price in {currency} for {interval.sku}, {interval.price_class} "
            f"in the hour from {instant_text(hour_ms)}",
        )
    return line


def device_spans(jobs: Iterable[Job]) -> dict[tuple[HubCode, ids.NodeId, ids.DeviceId], list[int]]:
    """Return per device `[from_ms, until_ms]`: the stretch that the jobs can touch."""
    spans: dict[tuple[HubCode, ids.NodeId, ids.DeviceId], list[int]] = {}
    for job in jobs:
        interval = job.interval
        for device in interval.devices:
            key = (interval.hub, interval.node_id, device.device_uuid)
            span = spans.get(key)
            if span is None:
                spans[key] = [interval.start_ms, interval.end_ms]
                continue
            span[0] = min(span[0], interval.start_ms)
            span[1] = max(span[1], interval.end_ms)
    return spans


def _bucket_of(interval: Interval, line: PriceLine, hour_ms: int) -> Bucket:
    bucket_id = ids.bucket_id(
        tenant_id=interval.tenant_id,
        project_id=interval.project_id,
        allocation_id=interval.allocation_id,
        hub=interval.hub,
        node_id=interval.node_id,
        rate_line_id=line.rate_line_id,
        hour_ms=hour_ms,
    )
    return Bucket(bucket_id, interval, line, hour_ms)


def _allocation_of(data: Started | Ended) -> AllocationKey:
    return AllocationKey(data.hub, data.allocation_id, data.tenant_id)


def _skewed(member: str, instant_ms: int, until_ms: int) -> Waits:
    return Waits(
        "clock-skew",
        f"{member} {instant_text(instant_ms)} lies after {instant_text(until_ms)}, "
        "the record's Kafka timestamp and 5 minutes",
    )
