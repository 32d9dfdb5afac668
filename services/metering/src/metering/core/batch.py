"""What the engine takes and gives: records, what must be loaded for them, and the changes.

Types, and what is read off them. The engine (`metering.core.engine`) turns records and `Reference`
into a `MeteringBatch`, which says what must be loaded; the shell loads a `MeteringState`; the
engine turns both into `Changes`, which the shell saves and publishes. Records carry their bytes and
their trace with them from end to end, so that whoever stores or publishes needs nothing else.

Types made per record are msgspec Structs: they cost a quarter of a NamedTuple or a dataclass, at
tens of thousands of records a second. They never form cycles, so the garbage collector skips them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import Struct

from hisab_contracts.charges import BucketTotal
from hisab_contracts.events import (
    Correction,
    Device,
    Ended,
    HubFact,
    Interval,
    Started,
)
from hisab_contracts.ids import (
    UNKNOWN_TOPIC,
    AllocationId,
    BucketId,
    CorrectionId,
    HoldId,
    HubCode,
    NodeId,
    PriceClass,
    ProjectId,
    Sku,
    SourcePath,
    TenantId,
    TopicId,
)
from hisab_contracts.prices import PriceBook
from hisab_contracts.reference import PriceLine
from metering.core.allocations import AllocationKey
from metering.core.corrected import FreedKey
from metering.core.corrections import CorrectedAllocation, CorrectionFact
from metering.core.coverage import Claim, CoverageChanges, CoveredInterval, DeviceKey
from metering.core.quarantine import QuarantineCause
from metering.core.sources import SourceEvent, SourceProgress, SourceReport

RecordHeaders = Sequence[tuple[str, bytes | None]]
"""Headers of a Kafka record, in order; Kafka lets a value be null."""


# What comes in.


class UsagePart(NamedTuple):
    """A part `[start_ms, end_ms)` of a reported interval, on one device slice."""

    device: Device
    start_ms: int
    end_ms: int


class EarlierVerdict(NamedTuple):
    """How a record that is judged again was counted when it was quarantined."""

    quarantine_id: int
    parts: tuple[UsagePart, ...] | None
    """What of it is in quarantine; None: the whole record."""
    had_new: bool
    """Whether another part of it was billed already."""
    counts: bool
    """Whether it was counted among the records, in the UTC hour `hour_ms`."""
    hour_ms: int
    quarantined_gpu_ns: Mapping[int, int]
    """Per UTC hour, the GPU time of it that is in quarantine."""


class UsageRecord(Struct, frozen=True, gc=False):
    """A record of a hub's topic, new from Kafka or out of quarantine, to be judged."""

    hub: HubCode
    """The topic's hub."""
    topic: str
    partition: int
    offset: int
    record_ms: int
    """When Kafka took it."""
    key: bytes | None
    value: bytes | None
    headers: RecordHeaders
    trace: RecordHeaders = ()
    """Headers that carry its trace on, for what is published because of it."""
    cause: QuarantineCause | None = None
    """Why it goes to quarantine without being read, if it must."""
    dismissed: QuarantineCause | None = None
    """Why all of it was in quarantine when an operator dismissed it. Set when it comes again since
    the database was restored: it goes there again, even if it would be taken now."""
    earlier: EarlierVerdict | None = None
    """Set when it comes out of quarantine."""
    replayed_ms: int | None = None
    """When an operator has it judged again: up to then it may speak, too. None otherwise."""
    topic_id: TopicId = UNKNOWN_TOPIC
    """The log it was read from; "" where that is not known."""

    def value_sha256(self) -> str:
        """Return the SHA-256 of its value, in hexadecimal; without a value that of no bytes."""
        return hashlib.sha256(self.value or b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Reference:
    """What is known beside the records when they are judged."""

    currencies: Mapping[TenantId, str]
    """Tenants and the currency of their books."""
    book: PriceBook
    watermarks: Mapping[HubCode, int | None]
    """Per hub, how far it is complete: what has passed a barrier."""
    generation: int = 0
    """The newest price line in `book`."""


# What is prepared.


class BucketTerms(Struct, frozen=True, gc=False):
    """What names a bucket beside its hour, as an interval would that was reported so."""

    hub: HubCode
    node_id: NodeId
    tenant_id: TenantId
    project_id: ProjectId
    allocation_id: AllocationId
    sku: Sku
    price_class: PriceClass


class RatedHour(Struct, frozen=True, gc=False):
    """A UTC hour of an allocation on a node, at the price line that rates it: names a bucket."""

    bucket_id: BucketId
    interval: Interval | BucketTerms
    """Any interval in it: they agree on all that names the bucket."""
    line: PriceLine
    hour_ms: int


class RatedInterval(Struct, frozen=True, gc=False):
    """An interval that can be rated, for coverage to decide about."""

    record: UsageRecord
    interval: Interval
    hours: Sequence[RatedHour]
    """One per UTC hour it touches, in order."""


class CorrectionOrder(NamedTuple):
    """A correction that is to count: of a hub, or one that operators have approved."""

    correction_id: CorrectionId
    correction: Correction
    record: UsageRecord | None
    """The hub's record; None: operators proposed and approved it."""
    cause: QuarantineCause | None = None
    """The fact that is missing for it: nobody knows whom or what it names."""


def parts_of(record: UsageRecord, interval: Interval) -> Sequence[UsagePart]:
    """Return the parts to judge: of a record out of quarantine only those that are in it."""
    if record.earlier is not None and record.earlier.parts is not None:
        return record.earlier.parts
    return [UsagePart(device, interval.start_ms, interval.end_ms) for device in interval.devices]


def claim_of(interval: Interval, device: Device) -> Claim:
    """Return who an interval says reserved a device."""
    return Claim(
        interval.tenant_id,
        interval.project_id,
        interval.allocation_id,
        interval.sku,
        interval.price_class,
        device.share_ppm,
    )


class RejectedRecord(NamedTuple):
    """A record that goes to quarantine whole."""

    record: UsageRecord
    cause: QuarantineCause
    data: HubFact | None
    """What could be read of it."""
    counts: bool
    """Whether it counts among the records: intervals, and what could not be decoded."""
    missing_tenant: TenantId | None = None
    """Whom it waits for, if it is not the tenant that it names."""


class RequeuedWatermark(NamedTuple):
    """A quarantined watermark that an operator has judged again."""

    record: UsageRecord
    path: SourcePath
    event: SourceEvent


class DeviceSpan(NamedTuple):
    """The span of a device that a batch can touch; both ends count, because rows merge there."""

    from_day_ms: int
    """The UTC midnight before it: no row that reaches into it starts earlier."""
    from_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class MeteringBatch:
    """Records that were read and validated, and what must be loaded to meter them."""

    record_count: int
    """How many records are in it, from the first that was given on."""
    usages: Sequence[RatedInterval | CorrectionOrder]
    """Intervals and corrections, in order of arrival."""
    rejected: Sequence[RejectedRecord]
    reports: Mapping[SourcePath, SourceReport]
    """By source, in order of first arrival."""
    watermark_records: Mapping[tuple[SourcePath, int], UsageRecord]
    """By source and sequence: the record that states a watermark there first."""
    requeued_watermarks: Sequence[RequeuedWatermark]
    requeued_without_usage: Sequence[UsageRecord]
    """Records judged again that turn out to be no usage: nothing of them is in quarantine."""
    requeued_ids: Sequence[int]
    """The quarantine ids of all records judged again."""
    started: Mapping[AllocationKey, Started]
    ended: Mapping[AllocationKey, Ended]
    """The latest end that was reported, by allocation."""
    unknown_tenants: frozenset[TenantId]
    """Tenants that usage names and nobody knows: prepare again if a look-up finds any of them."""
    reference: Reference
    """What the records are judged by."""
    device_spans: Mapping[DeviceKey, DeviceSpan]
    """Per device, the span whose coverage must be loaded."""
    bucket_ids: Sequence[BucketId]

    @property
    def corrections(self) -> list[Correction]:
        """The corrections among the usages: what they name must be loaded, too."""
        return [usage.correction for usage in self.usages if isinstance(usage, CorrectionOrder)]

    @property
    def nodes(self) -> set[tuple[HubCode, NodeId]]:
        """The nodes to lock: they guard their devices' coverage and their buckets."""
        return {(hub, node_id) for hub, node_id, _ in self.device_spans}

    @property
    def node_paths(self) -> set[str]:
        """The nodes whose active sources must be loaded, beside the sources that report."""
        return {report.source.node_path for report in self.reports.values()}


# What is loaded.


class StoredBucket(NamedTuple):
    """What is stored of a bucket."""

    gpu_ns: int
    hold_id: HoldId | None
    revision: int = 0
    """How often its total has fallen, or was stated anew by a repair."""
    voided_gpu_ns: int = 0
    """Time reported under its terms that corrections took back; it is in no `gpu_ns`."""


@dataclass(frozen=True, slots=True)
class MeteringState:
    """What is stored of all that a batch touches; locked, so it stays true until the commit."""

    coverage: Mapping[DeviceKey, Sequence[CoveredInterval]]
    buckets: Mapping[BucketId, StoredBucket]
    sources: Sequence[SourceProgress]
    """Every source that has a report, and all active ones of the same nodes."""
    corrected: CorrectedState | None = None
    """None: no allocation of the batch has a correction."""


class CorrectedState(NamedTuple):
    """What is stored of the allocations of a batch that have corrections."""

    known: Mapping[CorrectedAllocation, Sequence[CorrectionFact]]
    waiting_records: Mapping[int, UsageRecord]
    """By `counted_seq`, the records of those corrections that wait for their usage."""
    freed: Mapping[DeviceKey, Sequence[CoveredInterval]]
    """Time that they released, of the devices in the batch."""
    currencies: Mapping[TenantId, str]
    """Of the tenants that their coverage and their replacements name, where known."""


# What changes.


class MeteredBucket(NamedTuple):
    """The new total of a bucket: what is stored of it, and published."""

    total: BucketTotal
    rate_line_id: str
    is_new: bool
    """Whether nothing was stored of it."""
    trace: RecordHeaders
    """Of the record that last changed it."""
    voided_gpu_ns: int = 0
    is_corrected: bool = False
    """Whether more than its total has changed: what it has voided, or its revision."""
    is_stated: bool = True
    """Whether its total has changed: then it is published."""


class TallyKey(NamedTuple):
    """Which tally: one per hub, partition (so that consumers do not share any) and UTC hour."""

    hub: HubCode
    partition: int
    hour_ms: int


class Tally(NamedTuple):
    """What is added to the counts of one UTC hour of usage time; below zero for what is undone."""

    reported_gpu_ns: int = 0
    duplicate_gpu_ns: int = 0
    read_records: int = 0
    accepted_records: int = 0
    duplicate_records: int = 0


class QuarantinedRecord(NamedTuple):
    """What of a record is in quarantine from now on."""

    record: UsageRecord
    cause: QuarantineCause
    tenant_id: TenantId | None
    allocation_id: AllocationId | None
    counts: bool
    hour_ms: int
    had_new: bool
    """Whether another part of it is billed."""
    parts: tuple[UsagePart, ...] | None
    """None: the whole record."""
    quarantined_gpu_ns: Mapping[int, int]
    """Per UTC hour."""


class FreedTime(NamedTuple):
    """Time of a hub's devices in which a conflict may be one no more."""

    hub: HubCode
    start_ms: int
    end_ms: int


class CountedCorrection(NamedTuple):
    """A correction that counts from now on."""

    order: CorrectionOrder
    waits: bool


class CorrectionChanges(NamedTuple):
    """What becomes of corrections, and of the time that they release."""

    counted: Sequence[CountedCorrection]
    begun: Sequence[int]
    """By `counted_seq`: they have waited for their usage, and do no more."""
    parked: Sequence[int]
    """By `counted_seq`: they need an approval after all, and are in quarantine now."""
    waiting: Mapping[CorrectionId, QuarantineCause]
    """Approved corrections of operators that cannot count yet, or not everywhere, and why."""
    freed: Mapping[FreedKey, CoverageChanges]
    released: Sequence[FreedTime]
    """Where the service judges conflicts again."""


@dataclass(frozen=True, slots=True)
class Changes:
    """All that must be stored and published, in one transaction, so that a batch is metered."""

    coverage: Mapping[DeviceKey, CoverageChanges]
    buckets: Sequence[MeteredBucket]
    """Those that have changed: their totals are stored and, where they differ, published."""
    tallies: Mapping[TallyKey, Tally]
    duplicates: Mapping[AllocationKey, int]
    """GPU-ns that were reported twice, to be added per allocation."""
    sources: Sequence[SourceProgress]
    """Those that changed; new ones in order of first arrival, which orders a node's epochs."""
    started: Mapping[AllocationKey, Started]
    ended: Mapping[AllocationKey, Ended]
    quarantined: Sequence[QuarantinedRecord]
    """Records new in quarantine: stored with their bytes, and a notice of each is published."""
    still_quarantined: Sequence[QuarantinedRecord]
    """Records judged again of which something stays in quarantine."""
    released_ids: Sequence[int]
    """Records judged again of which nothing is left in quarantine."""
    corrections: CorrectionChanges | None = None
