"""What the API takes and answers: models, and how what is looked up becomes them.

Whole numbers that are amounts, GPU time or sequences are JSON strings; instants are RFC 3339.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated

import msgspec

from hisab_contracts.ids import HUB_PATTERN, ID_PATTERN
from hisab_contracts.units import floor_gpu_ms, instant_text
from metering import lookup
from metering.completeness import blockers, is_silent
from metering.sources import Source
from runtime.http import IntegerText, Model

_ID = Annotated[str, msgspec.Meta(pattern=rf"^{ID_PATTERN}$")]
_REASON = Annotated[str, msgspec.Meta(min_length=1, max_length=1_000)]


class EventProblem(msgspec.Struct, frozen=True):
    """Why one event was rejected."""

    type: str
    code: str
    title: str
    detail: str


class EventResult(msgspec.Struct, frozen=True):
    """The outcome of one event."""

    id: str | None
    outcome: str
    problem: EventProblem | None


class EventResults(msgspec.Struct, frozen=True):
    """One outcome per event, in order."""

    results: list[EventResult]


class RecordCounts(msgspec.Struct, frozen=True):
    """Records of a hub: read = accepted + duplicate + quarantined."""

    read: int
    accepted: int
    duplicate: int
    quarantined: int


class ReconciliationAnswer(msgspec.Struct, frozen=True):
    """The accounts of a hub; `difference_gpu_ns` is what they fail to explain."""

    reported_gpu_ns: str
    billed_gpu_ns: str
    duplicate_gpu_ns: str
    quarantined_gpu_ns: str
    voided_gpu_ns: str
    difference_gpu_ns: str
    records: RecordCounts
    buckets: int
    charge_micro: str
    complete_until: str | None


class IntervalView(msgspec.Struct, frozen=True):
    """A stretch of a slice that is sold to the allocation."""

    start_ms: int
    end_ms: int
    slice_uuid: str
    share_ppm: int


class HeldUpView(msgspec.Struct, frozen=True):
    """A record of the allocation that is or was in quarantine."""

    quarantine_id: str
    reason: str
    state: str
    gpu_ns: str


class BucketView(msgspec.Struct, frozen=True):
    """One bucket of an allocation."""

    hour_at: str
    node_id: str
    sku: str
    price_class: str
    revision: int
    gpu_ns: str
    gpu_ms: str
    charge_micro: str
    refunded_micro: str
    price_version: str


class AllocationAnswer(msgspec.Struct, frozen=True):
    """All that is known of an allocation."""

    tenant_id: str
    intervals: list[IntervalView]
    billed_gpu_ms: str
    duplicate_gpu_ms: str
    quarantined: list[HeldUpView]
    buckets: list[BucketView]


class HeaderView(msgspec.Struct, frozen=True):
    """One header of a record."""

    name: str
    value_base64: str | None


class QuarantineItem(msgspec.Struct, frozen=True):
    """A quarantined record, its bytes as they were received."""

    quarantine_id: str
    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    payload_base64: str | None
    headers: list[HeaderView]
    state: str


class QuarantineState(msgspec.Struct, frozen=True):
    """What became of a command on a quarantined record."""

    quarantine_id: str
    state: str


class Dismissal(Model, frozen=True, kw_only=True):
    """Why a record is dismissed."""

    reason: _REASON


class PriceView(Model, frozen=True, kw_only=True):
    """One price of a list."""

    sku: _ID
    price_class: _ID
    micro_per_gpu_hour: IntegerText


class ProposedPrices(Model, frozen=True, kw_only=True):
    """A price list."""

    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}$")]
    valid_from: str | None
    valid_until: str | None
    prices: Annotated[list[PriceView], msgspec.Meta(min_length=1, max_length=1_000)]


class PriceVersionAnswer(msgspec.Struct, frozen=True):
    """The content hash of a list that was added."""

    price_version: str


class QuoteRequest(Model, frozen=True, kw_only=True):
    """What a job would take: whole devices for a duration."""

    sku: _ID
    price_class: _ID
    gpus: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    duration_ms: Annotated[int, msgspec.Meta(ge=1, le=366 * 86_400_000)]


class Quote(msgspec.Struct, frozen=True):
    """What it would cost at the price in force now."""

    quote_micro: str
    price_version: str


class NewHub(Model, frozen=True, kw_only=True):
    """A hub to register."""

    hub: Annotated[str, msgspec.Meta(pattern=rf"^{HUB_PATTERN}$")]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    heartbeat_ms: Annotated[int, msgspec.Meta(ge=1_000, le=86_400_000)] = 60_000


class HubAnswer(msgspec.Struct, frozen=True):
    """A hub that was registered, and the topic it writes to."""

    hub: str
    name: str
    heartbeat_ms: int
    topic: str


class Blocker(msgspec.Struct, frozen=True):
    """A source that keeps its hub from going on, and why."""

    source: str
    reason: str


class HubState(msgspec.Struct, frozen=True):
    """How far a hub is complete, and what holds it."""

    hub: str
    complete_until: str | None
    silent: bool
    last_seen_at: str | None
    blocked_by: list[Blocker]


class Gap(msgspec.Struct, frozen=True):
    """Sequences that never arrived, both ends included."""

    first_sequence: str
    last_sequence: str


class SourceView(msgspec.Struct, frozen=True):
    """A source: up to which sequence its spool may forget, its watermark, what is missing."""

    source: str
    committed_sequence: str
    watermark_at: str | None
    gaps: list[Gap]
    standing: str


class Retirement(Model, frozen=True, kw_only=True):
    """A source that counts no longer."""

    source: str
    reason: _REASON


class RetirementAnswer(msgspec.Struct, frozen=True):
    """The source that was retired."""

    source: str
    standing: str


def reconciliation(
    found: lookup.Reconciliation, hubs: Sequence[lookup.Complete]
) -> ReconciliationAnswer:
    """Show the accounts of hubs; complete while every one that has emitted is."""
    complete = [hub.watermark_ms for hub in hubs if hub.emitted]
    known = [watermark_ms for watermark_ms in complete if watermark_ms is not None]
    until = min(known) if known and len(known) == len(complete) else None
    explained = found.billed_gpu_ns + found.duplicate_gpu_ns + found.quarantined_gpu_ns
    return ReconciliationAnswer(
        reported_gpu_ns=str(found.reported_gpu_ns),
        billed_gpu_ns=str(found.billed_gpu_ns),
        duplicate_gpu_ns=str(found.duplicate_gpu_ns),
        quarantined_gpu_ns=str(found.quarantined_gpu_ns),
        voided_gpu_ns="0",
        difference_gpu_ns=str(found.reported_gpu_ns - explained),
        records=RecordCounts(
            found.read_records,
            found.accepted_records,
            found.duplicate_records,
            found.quarantined_records,
        ),
        buckets=found.buckets,
        charge_micro=str(found.charge_micro),
        complete_until=None if until is None else instant_text(until),
    )


def allocation(found: lookup.Allocation) -> AllocationAnswer:
    """Show an allocation."""
    billed_gpu_ns = sum(bucket.gpu_ns for bucket in found.buckets)
    return AllocationAnswer(
        tenant_id=found.tenant_id,
        intervals=[
            IntervalView(one.start_ms, one.end_ms, one.slice_uuid, one.share_ppm)
            for one in found.intervals
        ],
        billed_gpu_ms=str(floor_gpu_ms(billed_gpu_ns)),
        duplicate_gpu_ms=str(floor_gpu_ms(found.duplicate_gpu_ns)),
        quarantined=[
            HeldUpView(str(one.quarantine_id), one.reason, one.state, str(one.waiting_gpu_ns))
            for one in found.held_up
        ],
        buckets=[
            BucketView(
                hour_at=instant_text(one.hour_ms),
                node_id=one.node_id,
                sku=one.sku,
                price_class=one.price_class,
                revision=one.revision,
                gpu_ns=str(one.gpu_ns),
                gpu_ms=str(floor_gpu_ms(one.gpu_ns)),
                charge_micro=str(one.charge_micro),
                refunded_micro="0",
                price_version=one.price_version,
            )
            for one in found.buckets
        ],
    )


def quarantine_item(item: lookup.Item) -> QuarantineItem:
    """Show a quarantined record."""
    payload = None if item.payload is None else base64.b64encode(item.payload).decode()
    return QuarantineItem(
        quarantine_id=str(item.quarantine_id),
        topic=item.topic,
        partition=item.partition,
        offset=item.offset,
        reason=item.reason,
        detail=item.detail,
        payload_base64=payload,
        headers=[
            HeaderView(name, None if value is None else base64.b64encode(value).decode())
            for name, value in item.headers
        ],
        state=item.state,
    )


def hub_state(told: lookup.Told, now_ms: int) -> HubState:
    """Show how far a hub is complete."""
    view = told.view
    return HubState(
        hub=view.hub,
        complete_until=_optional_text(view.watermark_ms),
        silent=is_silent(view, now_ms),
        last_seen_at=instant_text(view.last_seen_ms) if told.ever_seen else None,
        blocked_by=[Blocker(one.source, one.reason) for one in blockers(view, now_ms)],
    )


def source_view(source: Source) -> SourceView:
    """Show a source."""
    return SourceView(
        source=source.path,
        committed_sequence=str(source.contiguous_sequence),
        watermark_at=_optional_text(source.watermark_ms),
        gaps=[Gap(str(first), str(until - 1)) for first, until in source.gaps],
        standing=source.standing,
    )


def complete_until(hubs: Sequence[lookup.Complete]) -> dict[str, str | None]:
    """Say per hub up to when it is complete."""
    return {one.hub: _optional_text(one.watermark_ms) for one in hubs}


def _optional_text(moment_ms: int | None) -> str | None:
    return None if moment_ms is None else instant_text(moment_ms)
