"""The engine: the one way in which records become coverage, charges and quarantine.

Theory. Metering a batch takes two pure steps, with a look into the database between them:
`prepare` reads and rates the records and says what must be loaded, `meter` decides and says what
has changed. Records new from Kafka, records out of quarantine, released by the service or replayed
by an operator, and corrections that operators have approved all come this way, and `meter` fixes
the order for all of them: the validated intervals are covered and counted, and corrections applied
(`metering.core.corrected`), one after another, then the events of each source are
folded into its progress, then records that were rejected are quarantined, and last the counts of
records that turn out to be no usage are undone.

Every reported GPU-nanosecond ends in exactly one account of its UTC hour: *billed* (its bucket),
*duplicate*, *quarantined* (open or dismissed), or *voided* by a correction (in the bucket of the
terms as reported). What was *reported* is counted from the events themselves, not from where their
parts went, so that the identity `reported = billed + duplicate + quarantined + voided` can fail if
we err; it is checked per batch. Records are counted likewise: each read record is quarantined while
any part of it is, else accepted if any part was new, else a duplicate. When a record is judged
again, the count of its earlier verdict is undone first, then it is counted as it is now: so a
release moves what it must and nothing else.

A record that operators dismissed whole, before the database was restored, is quarantined again and
not judged: it may be in time now where it was late.

Whatever becomes of a record, it counts in the sequence of its source if its envelope could be read.

Reasons for quarantine, in order of precedence. `prepare` decides: those of `read_event`
(`undecodable`, `unknown-type`, `schema`, `hub-mismatch`), `unknown-tenant`, `unknown-sku`,
`no-price`, `clock-skew`; and `killed-process` for what must not be read. `meter` decides: `schema`
(more device time in one hour of one node than can be), `too-late` (on its first arrival a record
brings new time further behind the hub's watermark than the horizon), `conflict` (only the parts
that overlap are quarantined), `watermark` (a source's watermark goes back). Of a correction:
`unknown-tenant` and `unknown-sku` (of its replacement), `conflict` (another content of its revision
stands there; only that part), `needs-approval`, `conflict` (another allocation has the time that it
would take back), `no-price` (of its replacement).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from hisab_contracts import ids
from hisab_contracts.charges import BucketTotal
from hisab_contracts.events import (
    Correction,
    Device,
    Ended,
    HubFact,
    Interval,
    Refused,
    Replacement,
    Retired,
    Started,
    Watermark,
    read_event,
)
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    HoldId,
    HubCode,
    SourcePath,
    TenantId,
)
from hisab_contracts.invariants import invariant
from hisab_contracts.prices import PriceSeries
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import (
    GPU_NS_PER_GPU_HOUR,
    HOUR_MS,
    hour_floor_ms,
    instant_text,
    rated_micro,
)
from metering.core.allocations import AllocationKey
from metering.core.batch import (
    BucketTerms,
    Changes,
    CorrectionOrder,
    DeviceSpan,
    MeteredBucket,
    MeteringBatch,
    MeteringState,
    QuarantinedRecord,
    RatedHour,
    RatedInterval,
    RecordHeaders,
    Reference,
    RejectedRecord,
    RequeuedWatermark,
    StoredBucket,
    Tally,
    TallyKey,
    UsagePart,
    UsageRecord,
    claim_of,
    parts_of,
)
from metering.core.correcting import Correcting
from metering.core.corrections import hub_correction_id
from metering.core.coverage import (
    CoverageConflict,
    DeviceCoverage,
    DeviceKey,
    ShareSums,
    by_hour,
    day_floor_ms,
    days_touched_count,
    hours_of,
)
from metering.core.quarantine import QuarantineCause
from metering.core.sources import (
    SourceEvent,
    SourceProgress,
    SourceReport,
    WatermarkRegression,
    accept_watermark,
    fold_reports,
)

CLOCK_SKEW_MS: Final = 300_000
"""How far past its Kafka timestamp a record may speak: 5 minutes."""

LATENESS_MS: Final = 72 * HOUR_MS
"""How far behind its hub's watermark a record may bring new time on its first arrival."""

MAX_DEVICES_PER_HOUR: Final = 1_000_000
"""Keeps a bucket's GPU time and amount inside 64 bits, whatever a hub reports."""

MAX_ROWS: Final = 50_000
"""Device-days and bucket-hours that one batch may touch: what it needs of memory goes with them. A
Kafka batch of 4 000 one-hour events of eight devices fits; one record may touch 2 800 alone."""

UNDECODED: Final = frozenset({"undecodable", "unknown-type", "schema", "killed-process"})
"""Reasons under which a record counts as one even though it may not be an interval."""

_FULL_BUCKET_GPU_NS: Final = MAX_DEVICES_PER_HOUR * GPU_NS_PER_GPU_HOUR


def prepare(
    records: Sequence[UsageRecord],
    reference: Reference,
    *,
    approved: Sequence[CorrectionOrder] = (),
    max_rows: int = MAX_ROWS,
) -> MeteringBatch:
    """Read, validate and rate records in order of arrival; say what must be loaded for them.

    Reads records until they touch `max_rows` device-days and bucket-hours, one at least: the caller
    meters the batch, then goes on with the rest. `approved` corrections come before the records.
    """
    draft = _Draft(reference)
    for order in approved:
        draft.read_correction(order)
    for record in records:
        draft.read_record(record)
        if draft.rows >= max_rows:
            break
    return draft.batch()


def meter(batch: MeteringBatch, state: MeteringState) -> Changes:
    """Decide about a batch on top of what is stored; return all that must be stored and published.

    `state` is what the batch asked for, and must stay true until the changes are stored. The order
    of records is the order of arrival: of two that contradict each other the first one counts.
    """
    accounts = _Accounts(batch, state)
    for usage in batch.usages:
        if isinstance(usage, RatedInterval):
            accounts.cover(usage)
        else:
            accounts.correct(usage)
    sources = _update_sources(batch, state.sources, accounts)
    for rejected in batch.rejected:
        accounts.quarantine(rejected)
    for record in batch.requeued_without_usage:
        accounts.undo_count(record)
    return accounts.changes(batch, sources)


# Preparing: reading and rating.


@dataclass(slots=True)
class _ReportDraft:
    """What one source reports, while records are read."""

    source: ids.Source
    last_seen_ms: int
    events: list[SourceEvent] = field(default_factory=list)


class _Draft:
    """A batch in the making, record by record."""

    def __init__(self, reference: Reference) -> None:
        self.rows = 0
        self._reference = reference
        self._record_count = 0
        self._usages: list[RatedInterval | CorrectionOrder] = []
        self._rejected: list[RejectedRecord] = []
        self._reports: dict[SourcePath, _ReportDraft] = {}
        self._watermark_records: dict[tuple[SourcePath, int], UsageRecord] = {}
        self._requeued_watermarks: list[RequeuedWatermark] = []
        self._requeued_without_usage: list[UsageRecord] = []
        self._requeued_ids: list[int] = []
        self._started: dict[AllocationKey, Started] = {}
        self._ended: dict[AllocationKey, Ended] = {}
        self._unknown_tenants: set[TenantId] = set()
        self._device_spans: dict[DeviceKey, list[int]] = {}
        # Usage comes in short intervals: of each bucket there are dozens of records in a batch, and
        # naming it (a hash) and rating it is worth doing once.
        self._rated: dict[tuple[str | int, ...], RatedHour | QuarantineCause] = {}

    def batch(self) -> MeteringBatch:
        return MeteringBatch(
            record_count=self._record_count,
            usages=self._usages,
            rejected=self._rejected,
            reports={
                path: SourceReport(draft.source, draft.last_seen_ms, draft.events)
                for path, draft in self._reports.items()
            },
            watermark_records=self._watermark_records,
            requeued_watermarks=self._requeued_watermarks,
            requeued_without_usage=self._requeued_without_usage,
            requeued_ids=self._requeued_ids,
            started=self._started,
            ended=self._ended,
            unknown_tenants=frozenset(self._unknown_tenants),
            reference=self._reference,
            device_spans={
                key: DeviceSpan(day_floor_ms(from_ms), from_ms, until_ms)
                for key, (from_ms, until_ms) in self._device_spans.items()
            },
            bucket_ids=[
                rated.bucket_id for rated in self._rated.values() if isinstance(rated, RatedHour)
            ],
        )

    def read_record(self, record: UsageRecord) -> None:
        """Read one record: add it to the usages, to the rejected, or note what else it says."""
        self._record_count += 1
        if record.earlier is not None:
            self._requeued_ids.append(record.earlier.quarantine_id)
        if record.cause is not None:
            self._reject(record, record.cause, None)
            return
        event = read_event(record.value, record.headers, record.hub)
        if isinstance(event, Refused):
            # It has arrived, so it is no gap: what is wrong with it must not hold the hub back.
            if event.source is not None and event.sequence is not None:
                self._add_source_event(event.source, SourceEvent(event.sequence), record)
            self._reject(record, QuarantineCause(event.reason, event.detail), event.data)
            return
        reported, data = SourceEvent(event.sequence), event.data
        if record.dismissed is not None:
            self._add_source_event(event.source, reported, record)
            self._reject(record, record.dismissed, data)
            return
        match data:
            case Interval():
                self._read_interval(record, data)
            case Watermark():
                reported = self._read_watermark(record, data, event.source, event.sequence)
            case Retired():
                reported = SourceEvent(event.sequence, retires=True)
                self._note_requeued_without_usage(record)
            case Started():
                if self._has_come_to_pass(record, data, "started_ms", data.started_ms):
                    self._started[_allocation_of(data)] = data
            case Ended():
                if self._has_come_to_pass(record, data, "ended_ms", data.ended_ms):
                    # The latest end counts; of two equal ones the later event corrects the earlier.
                    known = self._ended.get(_allocation_of(data))
                    if known is None or known.ended_ms <= data.ended_ms:
                        self._ended[_allocation_of(data)] = data
            case Correction():
                self.read_correction(CorrectionOrder(hub_correction_id(data), data, record))
            case _:
                assert_never(data)
        self._add_source_event(event.source, reported, record)

    def read_correction(self, order: CorrectionOrder) -> None:
        """Read a correction: note what is missing for it, to be looked up."""
        correction = order.correction
        other = correction.replacement or Replacement()
        cause: QuarantineCause | None = None
        if other.tenant_id is not None and other.tenant_id not in self._reference.currencies:
            cause = _unknown_tenant(other.tenant_id)
            self._unknown_tenants.add(other.tenant_id)
        elif other.sku is not None and not self._reference.book.knows(other.sku):
            cause = _unknown_sku(other.sku)
        # What it touches is known once it is looked for: at most so many hours of each slice.
        slices_count = 1 if correction.slice_uuids is None else len(correction.slice_uuids)
        self.rows += slices_count * len(hours_of(correction.start_ms, correction.end_ms))
        self._usages.append(order._replace(cause=cause))

    def _read_watermark(
        self, record: UsageRecord, data: Watermark, source: ids.Source, sequence: int
    ) -> SourceEvent:
        """Read a watermark; return the event that it is in its source's sequence.

        If it is rejected, or judged again, the event has the sequence but no watermark: a rejected
        one must not count, and one that is judged again is added later, by `accept_watermark`.
        """
        self._watermark_records.setdefault((source.path, sequence), record)
        until_ms = _latest_ms(record)
        if data.watermark_ms > until_ms:
            self._reject(record, _skewed("watermark_ms", data.watermark_ms, until_ms), data)
            return SourceEvent(sequence)
        event = SourceEvent(sequence, data.watermark_ms)
        if record.earlier is None:
            return event
        self._requeued_watermarks.append(RequeuedWatermark(record, source.path, event))
        return SourceEvent(sequence)

    def _has_come_to_pass(
        self, record: UsageRecord, data: HubFact, member: str, instant_ms: int
    ) -> bool:
        """Say whether a start or an end may be told yet; if not, its record is rejected.

        The latest end counts, so one in a year to come would keep the allocation from its final,
        and its hold from its release, whatever the hub says afterwards.
        """
        until_ms = _latest_ms(record)
        if instant_ms > until_ms:
            self._reject(record, _skewed(member, instant_ms, until_ms), data)
            return False
        self._note_requeued_without_usage(record)
        return True

    def _note_requeued_without_usage(self, record: UsageRecord) -> None:
        if record.earlier is not None:
            self._requeued_without_usage.append(record)

    def _read_interval(self, record: UsageRecord, interval: Interval) -> None:
        hours: list[RatedHour] = []
        cause: QuarantineCause | None = None
        touched = hours_of(interval.start_ms, interval.end_ms)
        # Counted whether it can be rated or not: quarantined time is stored per hour, too.
        self.rows += len(touched)
        self.rows += len(interval.devices) * days_touched_count(interval.start_ms, interval.end_ms)
        for hour_ms in touched:
            rated = self._rate(interval, hour_ms)
            if isinstance(rated, QuarantineCause):
                # All of it is rejected: one that was billed in part would need its rest kept apart.
                cause = rated
                break
            hours.append(rated)
        until_ms = _latest_ms(record)
        if cause is None and interval.end_ms > until_ms:
            cause = _skewed("end_ms", interval.end_ms, until_ms)
        if cause is not None:
            self._reject(record, cause, interval)
            return
        self._usages.append(RatedInterval(record, interval, hours))
        spans, hub, node_id = self._device_spans, interval.hub, interval.node_id
        for device in interval.devices:
            key = (hub, node_id, device.device_uuid)
            span = spans.get(key)
            if span is None:
                spans[key] = [interval.start_ms, interval.end_ms]
                continue
            span[0] = min(span[0], interval.start_ms)
            span[1] = max(span[1], interval.end_ms)

    def _rate(self, interval: Interval, hour_ms: int) -> RatedHour | QuarantineCause:
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
            line = _rating_line(self._reference, interval, hour_ms)
            if isinstance(line, PriceLine):
                rated = RatedHour(_bucket_id(interval, line, hour_ms), interval, line, hour_ms)
            else:
                rated = line
            self._rated[key] = rated
        return rated

    def _add_source_event(
        self, source: ids.Source, event: SourceEvent, record: UsageRecord
    ) -> None:
        draft = self._reports.get(source.path)
        if draft is None:
            draft = self._reports[source.path] = _ReportDraft(source, record.record_ms)
        draft.events.append(event)
        draft.last_seen_ms = max(draft.last_seen_ms, record.record_ms)

    def _reject(self, record: UsageRecord, cause: QuarantineCause, data: HubFact | None) -> None:
        waits = cause.reason == "unknown-tenant" and record.dismissed is None
        if waits and isinstance(data, Interval):
            self._unknown_tenants.add(data.tenant_id)
        counts = isinstance(data, Interval) or cause.reason in UNDECODED
        self._rejected.append(RejectedRecord(record, cause, data, counts))


def _unknown_tenant(tenant_id: TenantId) -> QuarantineCause:
    return QuarantineCause("unknown-tenant", f"no tenant {tenant_id} is known")


def _unknown_sku(sku: ids.Sku) -> QuarantineCause:
    return QuarantineCause("unknown-sku", f"no price line names the SKU {sku}")


def _rating_line(
    reference: Reference, interval: Interval | BucketTerms, hour_ms: int
) -> PriceLine | QuarantineCause:
    """Return the line that rates an hour of an interval, or the fact that is missing for it."""
    currency = reference.currencies.get(interval.tenant_id)
    if currency is None:
        return _unknown_tenant(interval.tenant_id)
    if not reference.book.knows(interval.sku):
        return _unknown_sku(interval.sku)
    series = PriceSeries(currency, interval.sku, interval.price_class)
    line = reference.book.line_at(series, hour_ms)
    if line is None:
        return QuarantineCause(
            "no-price",
            f"no price in {currency} for {interval.sku}, {interval.price_class} "
            f"in the hour from {instant_text(hour_ms)}",
        )
    return line


def _bucket_id(interval: Interval | BucketTerms, line: PriceLine, hour_ms: int) -> BucketId:
    return ids.bucket_id(
        tenant_id=interval.tenant_id,
        project_id=interval.project_id,
        allocation_id=interval.allocation_id,
        hub=interval.hub,
        node_id=interval.node_id,
        rate_line_id=line.rate_line_id,
        hour_ms=hour_ms,
    )


def _allocation_of(data: Interval | Started | Ended) -> AllocationKey:
    return AllocationKey(data.hub, data.allocation_id, data.tenant_id)


def _allocation_named_by(data: HubFact | None) -> tuple[TenantId | None, AllocationId | None]:
    """Return the allocation that a rejected record speaks of, as far as it could be read."""
    match data:
        case Interval() | Started() | Ended():
            # Not only intervals: an end that was sent under another hub's name is rejected, too.
            return data.tenant_id, data.allocation_id
        case Correction():
            return None, data.allocation_id
        case Watermark() | Retired() | None:
            return None, None
        case _:
            assert_never(data)


def _latest_ms(record: UsageRecord) -> int:
    """Return the last instant of which a record may speak."""
    # Judged against Kafka's timestamp, never the wall clock alone: replaying old months is legal,
    # and a hub cannot date its own future.
    present_ms = record.record_ms
    if record.replayed_ms is not None:
        # An operator may replay what was in the future when it came and has come to pass since.
        present_ms = max(present_ms, record.replayed_ms)
    return present_ms + CLOCK_SKEW_MS


def _skewed(member: str, instant_ms: int, until_ms: int) -> QuarantineCause:
    return QuarantineCause(
        "clock-skew",
        f"{member} {instant_text(instant_ms)} lies after {instant_text(until_ms)}, "
        "the record's Kafka timestamp and 5 minutes",
    )


# Metering: covering and counting.


@dataclass(slots=True)
class _BucketSum:
    """What is covered in one bucket, while a batch is metered."""

    hour: RatedHour
    gpu_ns: int
    hold_id: HoldId | None
    """The first hold that usage in it named."""
    stored: StoredBucket | None
    """What was stored of it; None: nothing."""
    voided_gpu_ns: int = 0
    trace: RecordHeaders = ()
    """Of the record that last changed it."""

    @property
    def stored_gpu_ns(self) -> int:
        return 0 if self.stored is None else self.stored.gpu_ns

    @property
    def stored_voided_gpu_ns(self) -> int:
        return 0 if self.stored is None else self.stored.voided_gpu_ns

    @property
    def revision(self) -> int:
        """What made its total fall before is in the revision, and must stay there.

        The ledger takes a lower revision, and a lower total of the same, for an old message.
        """
        before = 0 if self.stored is None else self.stored.revision
        return before + 1 if self.gpu_ns < self.stored_gpu_ns else before


@dataclass(slots=True)
class _TallySum:
    """What is added to one tally, in the order of `Tally`."""

    reported_gpu_ns: int = 0
    duplicate_gpu_ns: int = 0
    read_records: int = 0
    accepted_records: int = 0
    duplicate_records: int = 0


class _Accounts:
    """The changes of one batch in the making, on top of the coverage and buckets in store."""

    def __init__(self, batch: MeteringBatch, state: MeteringState) -> None:
        self._reference = batch.reference
        self._stored = state.buckets
        self._coverage = {
            key: DeviceCoverage(key[2], state.coverage.get(key, ()))
            for key in {**batch.device_spans, **state.coverage}
        }
        self._buckets: dict[BucketId, _BucketSum] = {}
        self._tallies: dict[tuple[HubCode, int, int], _TallySum] = {}
        self._duplicates: dict[AllocationKey, int] = {}
        self._quarantined: list[QuarantinedRecord] = []
        self._quarantined_gpu_ns = 0
        self._undone_ids: set[int] = set()
        self._rated_terms: dict[tuple[BucketTerms, int], RatedHour | QuarantineCause] = {}
        self._correcting: Correcting | None = None
        if state.corrected is not None:
            currencies = {**batch.reference.currencies, **state.corrected.currencies}
            self._reference = replace(batch.reference, currencies=currencies)
            self._correcting = Correcting(self, state.corrected, self._coverage)

    def cover(self, usage: RatedInterval) -> None:
        """Split an interval against the coverage and count every part of it."""
        interval = usage.interval
        buckets = [self._bucket_sum(hour) for hour in usage.hours]
        correcting = self._correcting
        if correcting is not None and not correcting.concerns(interval):
            correcting = None
        cause = self._cause_of_rejection(usage, buckets, correcting)
        if cause is not None:
            self.quarantine(RejectedRecord(usage.record, cause, interval, counts=True))
            return
        if correcting is not None:
            correcting.judge_waiting(usage)
            rejected = correcting.rejection_of(usage)
            if rejected is not None:
                self.quarantine(rejected)
                return
        self.undo_count(usage.record)
        fresh: ShareSums = {}
        duplicate: ShareSums = {}
        conflicting_parts: list[UsagePart] = []
        conflicts: list[CoverageConflict] = []
        parts = parts_of(usage.record, interval)
        for device, start_ms, end_ms in parts:
            if correcting is None:
                split = self._device_coverage(interval, device).cover(
                    device.slice_uuid, start_ms, end_ms, claim_of(interval, device)
                )
            else:
                split = correcting.cover(usage, UsagePart(device, start_ms, end_ms))
            for ends in split.fresh:
                fresh[ends] = fresh.get(ends, 0) + device.share_ppm
            for ends in split.duplicates:
                duplicate[ends] = duplicate.get(ends, 0) + device.share_ppm
            for conflict in split.conflicts:
                conflicting_parts.append(UsagePart(device, conflict.start_ms, conflict.end_ms))
                conflicts.append(conflict)
        if fresh and correcting is None:
            _bill(usage, buckets, fresh)
        self._count(
            usage, parts, has_new=bool(fresh), duplicate=duplicate, conflicting=bool(conflicts)
        )
        if conflicts:
            self._quarantine_conflict(usage, conflicting_parts, conflicts, has_new=bool(fresh))

    def correct(self, order: CorrectionOrder) -> None:
        """Let a correction count from now on, as far as it can."""
        if self._correcting is None:
            raise LookupError("what corrections name is loaded with them")
        self._correcting.correct(order)

    def quarantine(self, rejected: RejectedRecord) -> None:
        """Quarantine a whole record; its GPU time counts as reported and as quarantined."""
        record, data = rejected.record, rejected.data
        self.undo_count(record)
        earlier = record.earlier
        usage = data if isinstance(data, Interval) else None
        hour_ms = hour_floor_ms(record.record_ms if usage is None else usage.start_ms)
        quarantined_gpu_ns = {} if usage is None else by_hour(_share_sums(parts_of(record, usage)))
        for usage_hour_ms, gpu_ns in quarantined_gpu_ns.items():
            self._tally_sum(record, usage_hour_ms).reported_gpu_ns += gpu_ns
        if rejected.counts:
            self._tally_sum(record, hour_ms).read_records += 1
        tenant_id, allocation_id = _allocation_named_by(data)
        self._add_quarantined(
            QuarantinedRecord(
                record=record,
                cause=rejected.cause,
                tenant_id=rejected.missing_tenant or tenant_id,
                allocation_id=allocation_id,
                counts=rejected.counts,
                hour_ms=hour_ms,
                had_new=earlier is not None and earlier.had_new,
                parts=None if earlier is None else earlier.parts,
                quarantined_gpu_ns=quarantined_gpu_ns,
            )
        )

    def undo_count(self, record: UsageRecord) -> None:
        """Undo how a record that is judged again was counted, before it is counted as it is now.

        Once: a correction that has left quarantine may be back there within the batch.
        """
        earlier = record.earlier
        if earlier is None or earlier.quarantine_id in self._undone_ids:
            return
        self._undone_ids.add(earlier.quarantine_id)
        for hour_ms, gpu_ns in earlier.quarantined_gpu_ns.items():
            self._tally_sum(record, hour_ms).reported_gpu_ns -= gpu_ns
            self._quarantined_gpu_ns -= gpu_ns
        if earlier.counts:
            self._tally_sum(record, earlier.hour_ms).read_records -= 1

    def changes(self, batch: MeteringBatch, sources: Sequence[SourceProgress]) -> Changes:
        """Read out what has changed."""
        coverage = {key: device.changes() for key, device in self._coverage.items()}
        buckets = [
            metered
            for bucket in self._buckets.values()
            if (metered := _metered(bucket)) is not None
        ]
        tallies = {
            TallyKey(*key): Tally(
                tally.reported_gpu_ns,
                tally.duplicate_gpu_ns,
                tally.read_records,
                tally.accepted_records,
                tally.duplicate_records,
            )
            for key, tally in self._tallies.items()
        }
        self._require_identity()
        still_ids = {
            earlier.quarantine_id
            for quarantined in self._quarantined
            if (earlier := quarantined.record.earlier) is not None
        }
        return Changes(
            coverage={key: changes for key, changes in coverage.items() if any(changes)},
            buckets=buckets,
            # A record that stays as it was had its count undone and made again: that is no change.
            tallies={key: tally for key, tally in tallies.items() if any(tally)},
            duplicates=self._duplicates,
            sources=sources,
            started=batch.started,
            ended=batch.ended,
            quarantined=[
                quarantined
                for quarantined in self._quarantined
                if quarantined.record.earlier is None
            ],
            still_quarantined=[
                quarantined
                for quarantined in self._quarantined
                if quarantined.record.earlier is not None
            ],
            released_ids=[number for number in batch.requeued_ids if number not in still_ids],
            corrections=None if self._correcting is None else self._correcting.changes(),
        )

    def _require_identity(self) -> None:
        """Hold what the batch reports against what became of it, over all hours."""
        reported_gpu_ns = sum(tally.reported_gpu_ns for tally in self._tallies.values())
        duplicate_gpu_ns = sum(tally.duplicate_gpu_ns for tally in self._tallies.values())
        billed_gpu_ns = voided_gpu_ns = 0
        for bucket in self._buckets.values():
            billed_gpu_ns += bucket.gpu_ns - bucket.stored_gpu_ns
            voided_gpu_ns += bucket.voided_gpu_ns - bucket.stored_voided_gpu_ns
        invariant(
            reported_gpu_ns
            == billed_gpu_ns + duplicate_gpu_ns + self._quarantined_gpu_ns + voided_gpu_ns,
            "reported = billed + duplicate + quarantined + voided",
        )

    def _count(
        self,
        usage: RatedInterval,
        parts: Sequence[UsagePart],
        *,
        has_new: bool,
        duplicate: ShareSums,
        conflicting: bool,
    ) -> None:
        """Count an interval as reported, and its record as accepted or duplicate.

        A record with a part in conflict is neither: it counts as quarantined, until it is released.
        """
        record, interval, earlier = usage.record, usage.interval, usage.record.earlier
        for hour_ms, gpu_ns in by_hour(_share_sums(parts)).items():
            self._tally_sum(record, hour_ms).reported_gpu_ns += gpu_ns
        for hour_ms, gpu_ns in by_hour(duplicate).items():
            self._tally_sum(record, hour_ms).duplicate_gpu_ns += gpu_ns
            key = _allocation_of(interval)
            self._duplicates[key] = self._duplicates.get(key, 0) + gpu_ns
        tally = self._tally_sum(record, usage.hours[0].hour_ms)
        tally.read_records += 1
        if conflicting:
            return
        if has_new or (earlier is not None and earlier.had_new):
            tally.accepted_records += 1
        else:
            tally.duplicate_records += 1

    def _quarantine_conflict(
        self,
        usage: RatedInterval,
        conflicting_parts: Sequence[UsagePart],
        conflicts: Sequence[CoverageConflict],
        *,
        has_new: bool,
    ) -> None:
        """Quarantine the parts of an interval that are in conflict; the rest of it is billed."""
        record, interval, earlier = usage.record, usage.interval, usage.record.earlier
        detail = _conflict_text(interval, conflicting_parts[0], conflicts)
        self._add_quarantined(
            QuarantinedRecord(
                record=record,
                cause=QuarantineCause("conflict", detail),
                tenant_id=interval.tenant_id,
                allocation_id=interval.allocation_id,
                counts=True,
                hour_ms=usage.hours[0].hour_ms,
                had_new=has_new or (earlier is not None and earlier.had_new),
                parts=tuple(conflicting_parts),
                quarantined_gpu_ns=by_hour(_share_sums(conflicting_parts)),
            )
        )

    def _add_quarantined(self, quarantined: QuarantinedRecord) -> None:
        self._quarantined.append(quarantined)
        self._quarantined_gpu_ns += sum(quarantined.quarantined_gpu_ns.values())

    def _cause_of_rejection(
        self,
        usage: RatedInterval,
        buckets: Sequence[_BucketSum],
        correcting: Correcting | None,
    ) -> QuarantineCause | None:
        for bucket in buckets:
            # Looked at before the record is added: one record more stays far inside 64 bits.
            if bucket.gpu_ns > _FULL_BUCKET_GPU_NS:
                return QuarantineCause(
                    "schema",
                    f"more than {MAX_DEVICES_PER_HOUR} devices of one allocation on one node in "
                    f"the hour from {instant_text(bucket.hour.hour_ms)}",
                )
        horizon_ms = self.horizon_ms(usage.interval.hub)
        # Lateness is judged once, on first arrival: whoever judges a record again wants it billed.
        if horizon_ms is None or usage.record.earlier is not None:
            return None
        # Only new time is late: a replay of what is covered stays a duplicate for ever.
        if usage.interval.start_ms >= horizon_ms:
            return None
        if correcting is None:
            is_new = self._has_fresh_before(usage.interval, horizon_ms)
        else:
            is_new = correcting.has_fresh_before(usage, horizon_ms)
        if not is_new:
            return None
        return QuarantineCause(
            "too-late",
            f"new time before {instant_text(horizon_ms)}: further behind the hub's watermark "
            f"{instant_text(horizon_ms + LATENESS_MS)} than 72 hours",
        )

    def _has_fresh_before(self, interval: Interval, horizon_ms: int) -> bool:
        return any(
            start_ms < horizon_ms
            for device in interval.devices
            for start_ms, _ in self._device_coverage(interval, device)
            .split(
                device.slice_uuid, interval.start_ms, interval.end_ms, claim_of(interval, device)
            )
            .fresh
        )

    def _device_coverage(self, interval: Interval, device: Device) -> DeviceCoverage:
        return self._coverage[interval.hub, interval.node_id, device.device_uuid]

    def _bucket_sum(self, hour: RatedHour) -> _BucketSum:
        bucket = self._buckets.get(hour.bucket_id)
        if bucket is None:
            stored = self._stored.get(hour.bucket_id)
            if stored is None:
                bucket = _BucketSum(hour, gpu_ns=0, hold_id=None, stored=None)
            else:
                bucket = _BucketSum(
                    hour,
                    gpu_ns=stored.gpu_ns,
                    hold_id=stored.hold_id,
                    stored=stored,
                    voided_gpu_ns=stored.voided_gpu_ns,
                )
            self._buckets[hour.bucket_id] = bucket
        return bucket

    def _tally_sum(self, record: UsageRecord, hour_ms: int) -> _TallySum:
        key = (record.hub, record.partition, hour_ms)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = _TallySum()
        return tally

    # What correcting needs of these accounts.

    def horizon_ms(self, hub: HubCode) -> int | None:
        """Return from when on usage of a hub is in time; None: nothing is late yet."""
        watermark_ms = self._reference.watermarks.get(hub)
        return None if watermark_ms is None else watermark_ms - LATENESS_MS

    def rate(self, terms: BucketTerms, hour_ms: int) -> RatedHour | QuarantineCause:
        """Return the bucket that an hour fills under these terms, or the fact that is missing."""
        rated = self._rated_terms.get((terms, hour_ms))
        if rated is None:
            line = _rating_line(self._reference, terms, hour_ms)
            if isinstance(line, PriceLine):
                rated = RatedHour(_bucket_id(terms, line, hour_ms), terms, line, hour_ms)
            else:
                rated = line
            self._rated_terms[terms, hour_ms] = rated
        return rated

    def hold_of(self, hour: RatedHour) -> HoldId | None:
        """Return the hold that a bucket has."""
        return self._bucket_sum(hour).hold_id

    def bill(
        self, hour: RatedHour, gpu_ns: int, hold_id: HoldId | None, trace: RecordHeaders
    ) -> None:
        """Add to what is billed in a bucket, or take from it; its first hold stays."""
        bucket = self._bucket_sum(hour)
        bucket.gpu_ns += gpu_ns
        bucket.trace = trace
        bucket.hold_id = bucket.hold_id or hold_id

    def void(
        self, hour: RatedHour, gpu_ns: int, hold_id: HoldId | None, trace: RecordHeaders
    ) -> None:
        """Add to what is voided of a bucket, or take from it; its first hold stays."""
        bucket = self._bucket_sum(hour)
        bucket.voided_gpu_ns += gpu_ns
        bucket.trace = trace
        bucket.hold_id = bucket.hold_id or hold_id


def _update_sources(
    batch: MeteringBatch, stored: Sequence[SourceProgress], accounts: _Accounts
) -> list[SourceProgress]:
    """Fold the events of a batch into the progress of their sources; return those that changed.

    A watermark that goes back is quarantined; its record still counts in the source's sequence.
    """
    progress, regressions = fold_reports(stored, batch.reports.values())
    for regression in regressions:
        record = batch.watermark_records[regression.path, regression.sequence]
        cause = QuarantineCause("watermark", regression.detail)
        accounts.quarantine(RejectedRecord(record, cause, None, counts=False))
    # After the reports: by its place in the sequence its source is known now, whoever reported it.
    for requeued in batch.requeued_watermarks:
        accepted = accept_watermark(progress[requeued.path], requeued.event)
        if isinstance(accepted, WatermarkRegression):
            cause = QuarantineCause("watermark", accepted.detail)
            accounts.quarantine(RejectedRecord(requeued.record, cause, None, counts=False))
        else:
            progress[requeued.path] = accepted
            accounts.undo_count(requeued.record)
    before = {source.path: source for source in stored}
    return [source for path, source in progress.items() if before.get(path) != source]


def _metered(bucket: _BucketSum) -> MeteredBucket | None:
    """Return what of a bucket must be stored and published; None when nothing has changed."""
    is_stated = bucket.gpu_ns != bucket.stored_gpu_ns
    is_voided = bucket.voided_gpu_ns != bucket.stored_voided_gpu_ns
    if not is_stated and not is_voided:
        return None
    return MeteredBucket(
        _total_of(bucket),
        bucket.hour.line.rate_line_id,
        bucket.stored is None,
        bucket.trace,
        bucket.voided_gpu_ns,
        is_corrected=is_voided or bucket.gpu_ns < bucket.stored_gpu_ns,
        is_stated=is_stated,
    )


def _total_of(bucket: _BucketSum) -> BucketTotal:
    """Return what is stated downstream of a bucket: its total, never what was added to it."""
    hour = bucket.hour
    usage = hour.interval
    return BucketTotal(
        tenant_id=usage.tenant_id,
        bucket_id=hour.bucket_id,
        project_id=usage.project_id,
        allocation_id=usage.allocation_id,
        hold_id=bucket.hold_id,
        hub=usage.hub,
        node_id=usage.node_id,
        sku=usage.sku,
        price_class=usage.price_class,
        price_version=hour.line.price_version,
        hour_ms=hour.hour_ms,
        revision=bucket.revision,
        total_gpu_ns=bucket.gpu_ns,
        total_micro=rated_micro(bucket.gpu_ns, hour.line.micro_per_gpu_hour),
    )


def _bill(usage: RatedInterval, buckets: Sequence[_BucketSum], fresh: ShareSums) -> None:
    # An interval touches every hour between its first and its last: the distance is the index.
    first_hour_ms = usage.hours[0].hour_ms
    for hour_ms, gpu_ns in by_hour(fresh).items():
        bucket = buckets[(hour_ms - first_hour_ms) // HOUR_MS]
        bucket.gpu_ns += gpu_ns
        bucket.trace = usage.record.trace
        # The first hold that is named stays: a charge that changed its hold would move money.
        if bucket.hold_id is None:
            bucket.hold_id = usage.interval.hold_id


def _share_sums(parts: Iterable[UsagePart]) -> ShareSums:
    """Add up the shares of parts with the same ends: they are cut at hours once, not per device."""
    sums: ShareSums = {}
    for device, start_ms, end_ms in parts:
        sums[start_ms, end_ms] = sums.get((start_ms, end_ms), 0) + device.share_ppm
    return sums


def _conflict_text(
    interval: Interval, part: UsagePart, conflicts: Sequence[CoverageConflict]
) -> str:
    """Name both claims of the first conflict, whose part this is, and how many more there are."""
    conflict = conflicts[0]
    claim = conflict.claim
    more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
    return (
        f"{part.device.slice_uuid} [{instant_text(part.start_ms)}, {instant_text(part.end_ms)}) "
        f"is claimed by {interval.allocation_id} of {interval.tenant_id} "
        f"({interval.sku}, {interval.price_class}, {part.device.share_ppm} ppm) but "
        f"{conflict.slice_uuid} is covered by {claim.allocation_id} of {claim.tenant_id} "
        f"({claim.sku}, {claim.price_class}, {claim.share_ppm} ppm){more}"
    )
