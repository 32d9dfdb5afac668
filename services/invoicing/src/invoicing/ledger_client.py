"""What invoicing asks of the ledger, over its public API like anybody else.

Two calls: move what an invoice bills from receivable to invoiced, and read the entries after a
position of a book. Neither is made inside a transaction. The command's idempotency key is made of
the document, so however often it is repeated, after whatever crash, the ledger books it once. So a
connection that is lost under a call, often a kept one that the ledger closed in this moment, is
made anew and the call sent again, a few times; everything else is repeated by who calls, later.

Of an entry only what bills need is read (`core.billing.FetchedEntry`): what else the ledger says of
it, now or later, is passed over. From there on there is one way for entries, however they came.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from typing import Any, Final

import httpx2
import msgspec
from msgspec import Struct

from hisab_contracts.entries import Posting
from hisab_contracts.ids import DocumentId, HubCode, PriceClass, Sku, TenantId
from hisab_contracts.units import instant_ms
from invoicing.core.billing import FetchedCharge, FetchedEntry

TIMEOUT_S: Final = 10
SENT_AGAIN: Final = 2
"""How often a call goes out again whose connection was lost; a pause before each, doubling."""
PAUSE_S: Final = 0.1
PAGE_LIMIT: Final = 1_000
_LOST = (
    httpx2.ReadError,
    httpx2.WriteError,
    httpx2.CloseError,
    httpx2.RemoteProtocolError,
)
_CONTROL = re.compile(r"[\x00-\x1f]+")


class LedgerUnreachable(Exception):
    """No answer, or one that says to try again; whether anything was booked is not known."""


class BookRefused(Exception):
    """The ledger answers, and does not give this book's entries; others it may give."""


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
            answer = await self._send(
                "POST",
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

    async def entries_after(self, tenant_id: TenantId, seq: int) -> list[FetchedEntry]:
        """Return the entries of a book after a position, ascending, one page of them.

        Raises `LedgerUnreachable`, and `BookRefused` where asking for another book may help.
        """
        try:
            answer = await self._send(
                "GET",
                f"/v1/tenants/{tenant_id}/entries",
                params={"after_seq": str(seq), "limit": str(PAGE_LIMIT)},
            )
        except httpx2.HTTPError as error:
            raise LedgerUnreachable(repr(error)) from error
        if answer.status_code in {404, 422}:
            raise BookRefused(f"{answer.status_code} {_problem(answer).code}")
        if not answer.is_success:
            raise LedgerUnreachable(f"{answer.status_code} {_problem(answer).code}")
        return entries_of_page(tenant_id, answer.content)

    async def _send(self, method: str, path: str, **more: Any) -> httpx2.Response:
        """Send a call that may be made twice; raises what the client raised at last."""
        for number in range(SENT_AGAIN):
            with contextlib.suppress(*_LOST):
                return await self._client.request(method, path, **more)
            await asyncio.sleep(PAUSE_S * 2**number)
        return await self._client.request(method, path, **more)


def _problem(answer: httpx2.Response) -> _Problem:
    try:
        problem = msgspec.json.decode(answer.content, type=_Problem)
    except msgspec.MsgspecError:
        return _Problem("unknown", f"an answer that is no problem document: {answer.status_code}")
    # The detail becomes a reason in our database and in answers: one line, and no endless one.
    return _Problem(problem.code, _CONTROL.sub(" ", problem.detail)[:500], problem.retryable)


# A page of `GET /v1/tenants/{id}/entries`, as far as it is read here.


class _PageCharge(Struct, frozen=True):
    hub: HubCode
    sku: Sku
    price_class: PriceClass
    hour_at: str
    gpu_ns: int
    charge_micro: int


class _PageEntry(Struct, frozen=True):
    seq: int
    kind: str
    hash: str
    postings: list[Posting]
    charge: _PageCharge | None = None


class _EntriesPage(Struct, frozen=True):
    items: list[_PageEntry]


def entries_of_page(tenant_id: TenantId, page: bytes) -> list[FetchedEntry]:
    """Read a page of a book's entries, as far as bills need them."""
    # Not strict: the ledger's API writes whole numbers as text, which is then read as numbers.
    read = msgspec.json.decode(page, type=_EntriesPage, strict=False)
    return [
        FetchedEntry(
            tenant_id=tenant_id,
            seq=item.seq,
            kind=item.kind,
            hash=item.hash,
            postings=item.postings,
            charge=None if item.charge is None else _charge_of(item.charge),
        )
        for item in read.items
    ]


def _charge_of(charge: _PageCharge) -> FetchedCharge:
    return FetchedCharge(
        hub=charge.hub,
        sku=charge.sku,
        price_class=charge.price_class,
        hour_ms=instant_ms(charge.hour_at),
        gpu_ns=charge.gpu_ns,
        charge_micro=charge.charge_micro,
    )
