"""`/v1/tenants/{tenant_id}/invoiced`: invoicing tells what it has billed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request, Response

from hisab_contracts.entries import Entry
from hisab_contracts.ids import DocumentId, IdText, MonthText
from hisab_contracts.reference import Role
from ledger.api.problems import problem_of
from ledger.api.requests import parse_micro
from ledger.commands import Commands
from ledger.core.movements import RecordInvoiced
from ledger.store import directory
from runtime.http import IntegerText, Model, Problem, Resource, post
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection


class Invoiced(Model, frozen=True, kw_only=True):
    """A finalised document and the ledger amount it bills."""

    document_id: IdText
    period: MonthText
    invoiced_micro: IntegerText
    first_seq: IntegerText
    last_seq: IntegerText


class InvoicedAnswer(Model, frozen=True, kw_only=True):
    """The entry that was made."""

    entry_id: str
    seq: str


class InvoicedDocuments(Resource):
    """What finalised documents bill of a tenant: entered once per document."""

    def __init__(self, kit: Kit, commands: Commands) -> None:
        self._kit = kit
        self._commands = commands

    @post(
        "/v1/tenants/{tenant_id}/invoiced",
        roles=(Role.FINANCE,),
        body=Invoiced,
        answer=InvoicedAnswer,
        status=201,
        idempotent=True,
        problems=("not-receivable", "already-exists"),
    )
    async def record_invoiced(self, request: Request, tenant_id: str) -> Response:
        """A finalised document bills what was receivable; its key is its document."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            if await directory.find_tenant(connection, tenant_id) is None:
                raise Problem("not-found", "no such tenant")
        command = await read_command(request, Invoiced)
        body = command.body
        invoiced_micro = parse_micro(body.invoiced_micro, "invoiced_micro", least=1)
        first_seq = parse_micro(body.first_seq, "first_seq", least=0)
        parse_micro(body.last_seq, "last_seq", least=first_seq)
        # The key is the document, so a teller that lost its memory cannot bill a document twice.
        if command.key != f"invoiced:{body.document_id}":
            raise Problem("malformed", "the Idempotency-Key is invoiced:<document_id>")
        record = RecordInvoiced(
            document_id=DocumentId(body.document_id),
            invoiced_micro=invoiced_micro,
            actor=principal.actor,
        )

        async def run(connection: Connection) -> Answer:
            entry = await self._commands.record_invoiced(connection, tenant_id, record)
            if not isinstance(entry, Entry):
                raise problem_of(entry)
            return Answer(201, InvoicedAnswer(entry_id=entry.entry_id, seq=str(entry.seq)))

        return await run_command(
            self._kit.api, command, run, scope=tenant_id, tenant=principal.sees
        )
