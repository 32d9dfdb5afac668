"""What invoicing asks of the ledger, over its public API like anybody else.

Two calls: move what an invoice bills from receivable to invoiced, and read the entries after a
position of a book. Neither is made inside a transaction. The command's idempotency key is made of
the document, so however often it is repeated, after whatever crash, the ledger books it once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import httpx2
import msgspec

from hisab_contracts.ids import DocumentId, TenantId
from invoicing.books import FeedPage, KeptEntry, kept_from_feed

TIMEOUT_S: Final = 10
PAGE_LIMIT: Final = 1_000
_DETAIL = re.compile(r"[\x00-\x1f]+")


class LedgerUnreachable(Exception):
    """No answer, or one that says to try again; whether anything was booked is not known."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The ledger booked the entry, now or when it was asked before."""

    entry_id: str


@dataclass(frozen=True, slots=True)
class MoveRefused:
    """The ledger will not book it; somebody has to look."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Move:
    """Move a document's share of a book from receivable to invoiced."""

    document_id: DocumentId
    tenant_id: TenantId
    period: str
    invoiced_micro: int
    first_seq: int
    last_seq: int


class _Booked(msgspec.Struct, frozen=True):
    entry_id: str


class _Problem(msgspec.Struct, frozen=True):
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

    async def move(self, move: Move) -> Moved | MoveRefused:
        """Command `invoiced`; raises `LedgerUnreachable` when it must simply be tried again."""
        body = {
            "document_id": move.document_id,
            "period": move.period,
            "invoiced_micro": str(move.invoiced_micro),
            "first_seq": str(move.first_seq),
            "last_seq": str(move.last_seq),
        }
        try:
            answer = await self._client.post(
                f"/v1/tenants/{move.tenant_id}/invoiced",
                json=body,
                headers={"Idempotency-Key": f"invoiced:{move.document_id}"},
            )
        except httpx2.HTTPError as error:
            raise LedgerUnreachable(repr(error)) from error
        if answer.is_success:
            return Moved(msgspec.json.decode(answer.content, type=_Booked).entry_id)
        problem = _problem(answer)
        # A key the ledger does not know yet, or no more, is a matter for an operator, and of time.
        if problem.retryable or answer.status_code >= 500 or answer.status_code == 401:
            raise LedgerUnreachable(f"{answer.status_code} {problem.code}: {problem.detail}")
        return MoveRefused(problem.code, problem.detail)

    async def entries_after(self, tenant_id: TenantId, seq: int) -> list[KeptEntry]:
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
        page = msgspec.json.decode(answer.content, type=FeedPage)
        return [kept_from_feed(tenant_id, item) for item in page.items]


def _problem(answer: httpx2.Response) -> _Problem:
    try:
        said = msgspec.json.decode(answer.content, type=_Problem)
    except msgspec.MsgspecError:
        return _Problem("unknown", f"an answer that is no problem document: {answer.status_code}")
    return _Problem(said.code, _DETAIL.sub(" ", said.detail)[:500], said.retryable)
