"""Values that the ledger's tests are written with, and a ledger that is nothing but the core."""

from __future__ import annotations

from hisab_contracts.charges import BucketTotal, HubWatermark
from hisab_contracts.entries import Entry, GrantScope
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
from ledger.core.book import (
    PROGRAMME_BOOK,
    Book,
    BookedBucket,
    BookKind,
    available_micro,
)
from ledger.core.decisions import BookChanges, BookCommand, BookRefusal, UnitOfWork
from ledger.core.expiry import ExpireLots, book_at, holds_over
from ledger.core.grants import ApproveGrant, Grant, GrantState
from ledger.core.holds import Hold, HoldEnd, PlaceHold, ReleaseHold
from ledger.core.lots import WHOLE_BPS, UsageTerms
from ledger.core.movements import RecordInvoiced
from ledger.core.withdrawals import ReverseEntry

HOUR_MS = 3_600_000
DAY_MS = 1_753_920_000_000
"""2025-07-31T00:00:00Z."""
BUDGET_MICRO = 10**15


def at(hour: int, minute: int = 0) -> int:
    """An instant of 31 July 2025, UTC."""
    return DAY_MS + hour * HOUR_MS + minute * 60_000


def book(kind: BookKind = "commercial", *, limit_micro: int = 0, tenant_id: str = "t") -> Book:
    """A book with no entries."""
    return Book(
        tenant_id=TenantId(tenant_id),
        kind=kind,
        currency="PKR",
        credit_limit_micro=limit_micro,
    )


def grant(
    grant_id: str,
    grant_micro: int,
    *,
    priority: int = 0,
    effective_ms: int = 0,
    expires_ms: int | None = None,
    scope: GrantScope | None = None,
    coverage_bps: int = WHOLE_BPS,
    tenant_id: str = "t",
    proposed_by: str = "officer",
    state: GrantState = "proposed",
    after_grant: str | None = None,
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
        scope=scope,
        coverage_bps=coverage_bps,
        after_grant=None if after_grant is None else GrantId(after_grant),
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
    sku: str = "h100-sxm-80",
    project_id: str = "main",
    price_class: str = "on_demand",
    refunded_micro: int = 0,
) -> BucketTotal:
    """The new total of one bucket; a micro-unit is a GPU-ns unless said otherwise."""
    return BucketTotal(
        tenant_id=TenantId(tenant_id),
        bucket_id=BucketId(bucket.rjust(32, "0")),
        project_id=ProjectId(project_id),
        allocation_id=AllocationId(allocation_id),
        hold_id=None if hold_id is None else HoldId(hold_id),
        hub=HubCode(hub),
        node_id=NodeId("n1"),
        sku=Sku(sku),
        price_class=PriceClass(price_class),
        price_version=PriceVersion("v1"),
        hour_ms=hour_ms,
        revision=revision,
        total_gpu_ns=charge_micro if gpu_ns is None else gpu_ns,
        total_micro=charge_micro,
        refunded_micro=refunded_micro,
    )


def watermark(hub: str, revision: int, watermark_ms: int | None) -> HubWatermark:
    """How far a hub is, with nothing that holds it back."""
    return HubWatermark(
        hub=HubCode(hub),
        revision=revision,
        watermark_ms=watermark_ms,
        silent=False,
        quarantined=[],
        behind=[],
    )


def hold(
    hold_id: str,
    hold_micro: int,
    *,
    allocation_id: str | None = None,
    hub: str = "lhr",
    sku: str = "h100-sxm-80",
    project_id: str = "main",
    price_class: str | None = None,
    expires_ms: int = 2**60,
) -> PlaceHold:
    """A hold asked for by a scheduler."""
    return PlaceHold(
        hold_id=HoldId(hold_id),
        hold_micro=hold_micro,
        project_id=ProjectId(project_id),
        job_ref="job",
        allocation_id=None if allocation_id is None else AllocationId(allocation_id),
        hub=HubCode(hub),
        sku=Sku(sku),
        price_class=None if price_class is None else PriceClass(price_class),
        expires_ms=expires_ms,
        actor="key:scheduler",
    )


def held(
    hold_id: str,
    hold_micro: int,
    *reserved: tuple[str, int],
    allocation_id: str | None = None,
    expires_ms: int = 2**60,
    ended_by: HoldEnd | None = None,
    placed_seq: int = 1,
    short_micro: int = 0,
    drawn_micro: int = 0,
) -> Hold:
    """A hold as it stands, or as it has ended."""
    return Hold(
        hold_id=HoldId(hold_id),
        hold_micro=hold_micro,
        allocation_id=None if allocation_id is None else AllocationId(allocation_id),
        expires_ms=expires_ms,
        ended_by=ended_by,
        reserved=reserved,
        placed_seq=placed_seq,
        short_micro=short_micro,
        drawn_micro=drawn_micro,
    )


def release(hold_id: str, ended_by: HoldEnd = "released") -> ReleaseHold:
    """The end of a hold."""
    return ReleaseHold(
        hold_id=HoldId(hold_id),
        ended_by=ended_by,
        caused_by=f"hold:{hold_id}",
        actor="key:scheduler",
    )


def approve(proposed: Grant, *, by: str = "approver") -> ApproveGrant:
    """An approval by a key."""
    return ApproveGrant(grant=proposed, actor=f"key:{by}")


def invoiced(document_id: str, invoiced_micro: int) -> RecordInvoiced:
    """A finalised document, told by invoicing."""
    return RecordInvoiced(
        document_id=DocumentId(document_id), invoiced_micro=invoiced_micro, actor="key:finance"
    )


class CoreLedger:
    """One tenant's book, and the programme `p` that grants to it, kept by units of work alone.

    Each command is a unit of its own, opened with all there is, and what it says has changed is all
    that is kept of it: so a change that a unit forgets to name is missed here as in the database.
    """

    def __init__(self, opening: Book, *, budget_micro: int = BUDGET_MICRO) -> None:
        self.opening = opening
        programme = Book(
            tenant_id=TenantId(PROGRAMME_BOOK + "p"),
            kind="fund",
            currency=opening.currency,
            credit_limit_micro=0,
            accounts={"authority": -budget_micro, "budget": budget_micro},
        )
        self._books: dict[str, Book] = {programme.tenant_id: programme, opening.tenant_id: opening}
        self.programme_id = programme.tenant_id
        self.buckets: dict[BucketId, BookedBucket] = {}
        self.holds: dict[HoldId, Hold] = {}
        self.terms: dict[HoldId, UsageTerms] = {}
        self.entries: list[Entry] = []
        """Those of the tenant's book."""
        self.complete_until_ms: int | None = None
        """Until when the tenant's usage has been heard of: as far as the hubs' watermarks are."""

    @property
    def book(self) -> Book:
        """The tenant's book as it stands."""
        return self._books[self.opening.tenant_id]

    @property
    def programme(self) -> Book:
        """The programme's book as it stands."""
        return self._books[self.programme_id]

    def do(
        self, command: BucketTotal | BookCommand, now_ms: int = DAY_MS
    ) -> tuple[Entry, ...] | BookRefusal:
        """Decide a command, and keep what it changed."""
        tenant_id = self.opening.tenant_id
        unit = UnitOfWork(
            self._books,
            now_ms,
            buckets={(tenant_id, bucket_id): bucket for bucket_id, bucket in self.buckets.items()},
            holds={(tenant_id, hold_id): hold for hold_id, hold in self.holds.items()},
            due=[(tenant_id, hold) for hold in holds_over(self.holds.values(), now_ms)],
            terms={(tenant_id, hold_id): terms for hold_id, terms in self.terms.items()},
            complete_until_ms={tenant_id: self.complete_until_ms},
        )
        decided = unit.enter(tenant_id, command)
        if isinstance(command, PlaceHold) and isinstance(decided, tuple) and decided:
            self.terms[command.hold_id] = command.terms
        self._keep(unit.changes())
        return decided

    def expire_lots(
        self, complete_until_ms: int, now_ms: int = DAY_MS
    ) -> tuple[Entry, ...] | BookRefusal:
        """Hear from every hub that nothing before an instant is missing; lots expire by it."""
        self.complete_until_ms = complete_until_ms
        return self.do(ExpireLots(), now_ms)

    def reverse(self, entry: Entry, now_ms: int = DAY_MS) -> tuple[Entry, ...] | BookRefusal:
        """Negate an entry."""
        return self.do(ReverseEntry(entry=entry, actor="key:approver", reason="wrong"), now_ms)

    def sweep(self, now_ms: int = DAY_MS) -> None:
        """Put on the record what is over, as the ledger does by itself."""
        tenant_id = self.opening.tenant_id
        loaded = {(str(tenant_id), str(name)): hold for name, hold in self.holds.items()}
        unit = UnitOfWork(self._books, now_ms, holds=loaded)
        unit.release_expired()
        self._keep(unit.changes())

    def _keep(self, changes: BookChanges) -> None:
        self._books |= {book.tenant_id: book for book in changes.books}
        self.buckets |= {bucket.bucket_id: bucket for _, bucket in changes.buckets}
        self.holds |= {hold.hold_id: hold for _, _, hold in changes.placed}
        self.holds |= {hold.hold_id: hold for _, hold in changes.holds}
        own_id = self.opening.tenant_id
        self.entries += [entry for entry in changes.entries if entry.tenant_id == own_id]

    def release(
        self, hold_id: str, ended_by: HoldEnd = "released", now_ms: int = DAY_MS
    ) -> tuple[Entry, ...] | BookRefusal:
        """End a hold."""
        return self.do(release(hold_id, ended_by), now_ms)

    def available(self, now_ms: int = DAY_MS) -> int:
        """What a hold placed now could reserve."""
        return available_micro(self.book_at(now_ms), now_ms)

    def book_at(self, now_ms: int) -> Book:
        """The tenant's book as it stands at an instant, whether or not its entries are written."""
        over = holds_over(self.holds.values(), now_ms)
        return book_at(self.book, [draw for hold in over for draw in hold.reserved])
