"""What invoicing asks of the ledger, over its public API like anybody else.

Two calls: move what an invoice bills from receivable to invoiced, and read the entries after a
position of a book. Neither is made inside a transaction. The command's idempotency key is made of
the document, so however often it is repeated, after whatever crash, the ledger books it once.

The ledger's API writes whole numbers and instants as text. `entries_of_page` turns a page back into
the entries that the topic carries, every member of them, so that there is one way on from here and
an entry that came over HTTP can be hashed like one that came over Kafka.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import httpx2
import msgspec
from msgspec import Struct

from hisab_contracts.entries import ChargeDetail, Entry, GrantDetail, HoldDetail, Posting
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    DocumentId,
    EntryId,
    GrantId,
    HoldId,
    HubCode,
    NodeId,
    PriceClass,
    PriceVersion,
    ProgrammeId,
    ProjectId,
    Sku,
    TenantId,
)
from hisab_contracts.units import instant_ms

TIMEOUT_S: Final = 10
PAGE_LIMIT: Final = 1_000
_CONTROL = re.compile(r"[\x00-\x1f]+")


class LedgerUnreachable(Exception):
    """No answer, or one that says to try again; whether anything was booked is not known."""


@dataclass(frozen=True, slots=True)
class InvoicedCommand:
    """Move a document's share of a book from receivable to invoiced."""

    document_id: DocumentId
    tenant_id: TenantId
    period: str
    invoiced_micro: int
    first_seq: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class InvoicedEntry:
    """The ledger booked the entry, now or when it was asked before."""

    entry_id: str


@dataclass(frozen=True, slots=True)
class InvoicedRefused:
    """The ledger will not book it; somebody has to look."""

    code: str
    detail: str


class _Booked(Struct, frozen=True):
    entry_id: str


class _Problem(Struct, frozen=True):
    code: str = "unknown"
    detail: str = ""
    retryable: bool = False


class LedgerClient:
    """Speaks to the ledger with invoicing's finance key."""

    def __init__(self, url: str, key: str) -> None:
        """Describe the client; nothing is connected before the first call."""
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def post_invoiced(self, command: InvoicedCommand) -> InvoicedEntry | InvoicedRefused:
        """Command `invoiced`; raises `LedgerUnreachable` when it must simply be tried again."""
        body = {
            "document_id": command.document_id,
            "period": command.period,
            "invoiced_micro": str(command.invoiced_micro),
            "first_seq": str(command.first_seq),
            "last_seq": str(command.last_seq),
        }
        try:
            answer = await self._client.post(
                f"/v1/tenants/{command.tenant_id}/invoiced",
                json=body,
                headers={"Idempotency-Key": f"invoiced:{command.document_id}"},
            )
        except httpx2.HTTPError as error:
            raise LedgerUnreachable(repr(error)) from error
        if answer.is_success:
            return InvoicedEntry(msgspec.json.decode(answer.content, type=_Booked).entry_id)
        problem = _problem(answer)
        # A key the ledger does not know yet, or no more, is a matter for an operator, and of time.
        if problem.retryable or answer.status_code >= 500 or answer.status_code == 401:
            raise LedgerUnreachable(f"{answer.status_code} {problem.code}: {problem.detail}")
        return InvoicedRefused(problem.code, problem.detail)

    async def entries_after(self, tenant_id: TenantId, seq: int) -> list[Entry]:
        """Return the entries of a book after a position, ascending, one page of them."""
        try:
            answer = await self._client.get(
                f"/v1/tenants/{tenant_id}/entries",
                params={"after_seq": str(seq), "limit": str(PAGE_LIMIT)},
            )
        except httpx2.HTTPError as error:
            raise LedgerUnreachable(repr(error)) from error
        if not answer.is_success:
            raise LedgerUnreachable(f"{answer.status_code} {_problem(answer).code}")
        return entries_of_page(tenant_id, answer.content)


def _problem(answer: httpx2.Response) -> _Problem:
    try:
        problem = msgspec.json.decode(answer.content, type=_Problem)
    except msgspec.MsgspecError:
        return _Problem("unknown", f"an answer that is no problem document: {answer.status_code}")
    # The detail becomes a reason in our database and in answers: one line, and no endless one.
    return _Problem(problem.code, _CONTROL.sub(" ", problem.detail)[:500], problem.retryable)


# A page of `GET /v1/tenants/{id}/entries`, as the ledger writes it. Members that are not named here
# are passed over: a ledger that is newer than we are may add some.


class _PagePosting(Struct, frozen=True):
    account: str
    posting_micro: str
    balance_micro: str


class _PageCharge(Struct, frozen=True):
    allocation_id: AllocationId
    project_id: ProjectId
    hold_id: HoldId | None
    hub: HubCode
    node_id: NodeId
    sku: Sku
    price_class: PriceClass
    hour_at: str
    gpu_ns: str
    charge_micro: str
    price_version: PriceVersion
    bucket_id: BucketId
    revision: int
    over_limit: bool


class _PageReserved(Struct, frozen=True):
    place: str
    reserved_micro: str


class _PageHold(Struct, frozen=True):
    hold_id: HoldId
    hold_micro: str
    open_micro: str
    reserved: list[_PageReserved]
    cause: str
    allocation_id: AllocationId | None
    expires_at: str


class _PageGrant(Struct, frozen=True):
    grant_id: GrantId
    programme_id: ProgrammeId
    grant_micro: str
    priority: int
    effective_at: str
    expires_at: str | None


class _PageEntry(Struct, frozen=True):
    seq: str
    entry_id: EntryId
    kind: str
    effective_at: str
    recorded_at: str
    postings: list[_PagePosting]
    caused_by: str
    actor: str
    prev_hash: str
    hash: str
    charge: _PageCharge | None = None
    hold: _PageHold | None = None
    grant: _PageGrant | None = None


class _EntriesPage(Struct, frozen=True):
    items: list[_PageEntry]


def entries_of_page(tenant_id: TenantId, page: bytes) -> list[Entry]:
    """Read a page of a book's entries: the same facts as on the topic, hash for hash."""
    return [
        _entry_of(tenant_id, item) for item in msgspec.json.decode(page, type=_EntriesPage).items
    ]


def _entry_of(tenant_id: TenantId, item: _PageEntry) -> Entry:
    return Entry(
        tenant_id=tenant_id,
        seq=int(item.seq),
        entry_id=item.entry_id,
        kind=item.kind,
        effective_ms=instant_ms(item.effective_at),
        recorded_ms=instant_ms(item.recorded_at),
        postings=[
            Posting(
                account=posting.account,
                posting_micro=int(posting.posting_micro),
                balance_micro=int(posting.balance_micro),
            )
            for posting in item.postings
        ],
        caused_by=item.caused_by,
        actor=item.actor,
        prev_hash=item.prev_hash,
        hash=item.hash,
        charge=None if item.charge is None else _charge_of(item.charge),
        hold=None if item.hold is None else _hold_of(item.hold),
        grant=None if item.grant is None else _grant_of(item.grant),
    )


def _charge_of(charge: _PageCharge) -> ChargeDetail:
    return ChargeDetail(
        bucket_id=charge.bucket_id,
        allocation_id=charge.allocation_id,
        project_id=charge.project_id,
        hold_id=charge.hold_id,
        hub=charge.hub,
        node_id=charge.node_id,
        sku=charge.sku,
        price_class=charge.price_class,
        price_version=charge.price_version,
        hour_ms=instant_ms(charge.hour_at),
        revision=charge.revision,
        gpu_ns=int(charge.gpu_ns),
        charge_micro=int(charge.charge_micro),
        over_limit=charge.over_limit,
    )


def _hold_of(hold: _PageHold) -> HoldDetail:
    return HoldDetail(
        hold_id=hold.hold_id,
        hold_micro=int(hold.hold_micro),
        open_micro=int(hold.open_micro),
        reserved=[(part.place, int(part.reserved_micro)) for part in hold.reserved],
        cause=hold.cause,
        allocation_id=hold.allocation_id,
        expires_ms=instant_ms(hold.expires_at),
    )


def _grant_of(grant: _PageGrant) -> GrantDetail:
    return GrantDetail(
        grant_id=grant.grant_id,
        programme_id=grant.programme_id,
        grant_micro=int(grant.grant_micro),
        priority=grant.priority,
        effective_ms=instant_ms(grant.effective_at),
        expires_ms=None if grant.expires_at is None else instant_ms(grant.expires_at),
    )
