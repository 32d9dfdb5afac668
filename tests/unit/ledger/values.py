"""Values that the ledger's tests are written with, and a ledger that is nothing but the core."""

from __future__ import annotations

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import Entry
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    DocumentId,
    GrantId,
    HoldId,
    HubCode,
    KeyId,
    NodeId,
    PriceClass,
    PriceVersion,
    ProgrammeId,
    ProjectId,
    Sku,
    TenantId,
)
from ledger.book import Book, BookKind, Bucket, Page, available_micro, evolve
from ledger.decisions import Command, PlaceHold, RecordInvoiced, Refusal, ReleaseHold, decide
from ledger.grants import Grant, GrantState
from ledger.holds import Hold, HoldEnd

HOUR_MS = 3_600_000
DAY_MS = 1_753_920_000_000
"""2025-07-31T00:00:00Z."""


def at(hour: int, minute: int = 0) -> int:
    """An instant of 31 July 2025, UTC."""
    return DAY_MS + hour * HOUR_MS + minute * 60_000


def book(kind: BookKind = "commercial", *, limit_micro: int = 0, tenant_id: str = "t") -> Book:
    """A book with no entries."""
    return Book(TenantId(tenant_id), kind, "PKR", limit_micro)


def grant(
    grant_id: str,
    grant_micro: int,
    *,
    priority: int = 0,
    effective_ms: int = 0,
    expires_ms: int | None = None,
    tenant_id: str = "t",
    proposed_by: str = "officer",
    state: GrantState = "approved",
) -> Grant:
    """A grant of programme `p`."""
    return Grant(
        grant_id=GrantId(grant_id),
        tenant_id=TenantId(tenant_id),
        programme_id=ProgrammeId("p"),
        grant_micro=grant_micro,
        priority=priority,
        effective_ms=effective_ms,
        expires_ms=expires_ms,
        state=state,
        proposed_by=KeyId(proposed_by),
        approved_by=None,
    )


def total(
    charge_micro: int,
    *,
    bucket: str = "b",
    gpu_ns: int | None = None,
    hour_ms: int = DAY_MS,
    revision: int = 0,
    hold_id: str | None = None,
    allocation_id: str = "a",
    tenant_id: str = "t",
    hub: str = "lhr",
) -> BucketTotal:
    """The new total of one bucket; a micro-unit is a GPU-ns unless said otherwise."""
    return BucketTotal(
        tenant_id=TenantId(tenant_id),
        bucket_id=BucketId(bucket.rjust(32, "0")),
        project_id=ProjectId("main"),
        allocation_id=AllocationId(allocation_id),
        hold_id=None if hold_id is None else HoldId(hold_id),
        hub=HubCode(hub),
        node_id=NodeId("n1"),
        sku=Sku("h100-sxm-80"),
        price_class=PriceClass("on_demand"),
        price_version=PriceVersion("v1"),
        hour_ms=hour_ms,
        revision=revision,
        total_gpu_ns=charge_micro if gpu_ns is None else gpu_ns,
        total_micro=charge_micro,
    )


def hold(
    hold_id: str, hold_micro: int, *, allocation_id: str | None = None, expires_ms: int = 2**60
) -> PlaceHold:
    """A hold asked for by a scheduler."""
    allocation = None if allocation_id is None else AllocationId(allocation_id)
    return PlaceHold(HoldId(hold_id), hold_micro, allocation, expires_ms, "key:scheduler")


def invoiced(document_id: str, invoiced_micro: int) -> RecordInvoiced:
    """A finalised document, told by invoicing."""
    return RecordInvoiced(DocumentId(document_id), invoiced_micro, "key:finance")


class CoreLedger:
    """One book kept in memory by `decide` and `evolve` alone: what the shell does, without I/O."""

    def __init__(self, opening: Book) -> None:
        self.opening = opening
        self.book = opening
        self.buckets: dict[BucketId, Bucket] = {}
        self.holds: dict[HoldId, Hold] = {}
        self.entries: list[Entry] = []

    def do(self, command: Command, now_ms: int = DAY_MS) -> tuple[Entry, ...] | Refusal:
        """Decide a command and fold what it enters."""
        bucket_id: BucketId | None = None
        hold_id: HoldId | None = None
        if isinstance(command, BucketTotal):
            bucket_id, hold_id = command.bucket_id, command.hold_id
        elif isinstance(command, PlaceHold):
            hold_id = command.hold_id
        return self._do(command, now_ms, bucket_id, hold_id)

    def release(
        self, hold_id: str, end: HoldEnd = "released", now_ms: int = DAY_MS
    ) -> tuple[Entry, ...] | Refusal:
        """End a hold."""
        return self._do(
            ReleaseHold(end, f"hold:{hold_id}", "ledger"), now_ms, None, HoldId(hold_id)
        )

    def available(self, now_ms: int = DAY_MS) -> int:
        """What a hold placed now could reserve."""
        return available_micro(self.book, now_ms)

    def _do(
        self, command: Command, now_ms: int, bucket_id: BucketId | None, hold_id: HoldId | None
    ) -> tuple[Entry, ...] | Refusal:
        page = Page(
            self.book,
            None if bucket_id is None else self.buckets.get(bucket_id),
            None if hold_id is None else self.holds.get(hold_id),
        )
        decided = decide(page, command, now_ms)
        if not isinstance(decided, tuple):
            return decided
        for entry in decided:
            page = evolve(page, entry)
            self.entries.append(entry)
        self.book = page.book
        if page.bucket is not None:
            self.buckets[page.bucket.bucket_id] = page.bucket
        if page.hold is not None:
            self.holds[page.hold.hold_id] = page.hold
        return decided
