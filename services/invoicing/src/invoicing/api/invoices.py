"""`/v1/invoices`: lists, single invoices, their PDFs, and a recomputation of each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import get_args

import msgspec
from fastapi import Request, Response
from msgspec import Struct

from hisab_contracts.canonical import content_sha256
from hisab_contracts.reference import Role
from hisab_contracts.units import instant_ms, instant_text, moment_of, ms_of
from invoicing.api.access import INVOICE_READERS, require_month
from invoicing.core.billing import RatedUsage
from invoicing.core.differences import Difference, differences
from invoicing.core.document import Content, InvoiceFacts, InvoiceState, OutstandingStep
from invoicing.pdf import RenderFailed
from invoicing.recompute import RecomputeBusy, RecomputeInput, RecomputePool
from invoicing.store import documents, entries, tax_rates
from invoicing.store.documents import InvoiceFilter, StoredInvoice
from runtime.auth import require_own_tenant
from runtime.database import ALL_TENANTS
from runtime.http import Problem, Resource, get, json_response, page_of, page_response, post
from runtime.service import Kit


class InvoiceAnswer(Content, frozen=True, kw_only=True):
    """An invoice: its content, and how far its processing is."""

    # The content leaves out what is null. These members are no content: none of them has a default,
    # so all of them are always shown, `pdf_sha256: null` as well.
    state: InvoiceState
    updated_at: str
    waiting_for: tuple[OutstandingStep, ...]
    content_sha256: str
    pdf_sha256: str | None


class RecomputeAnswer(Struct, frozen=True):
    """What a fresh computation out of the entries arrived at; no hash where it comes to no bill."""

    content_sha256: str | None
    pdf_sha256: str | None
    identical: bool
    differences: tuple[Difference, ...]
    """What differs and in which part, where it is not identical."""


class Invoices(Resource):
    """`/v1/invoices`: finalised documents, as tenants, finance and auditors read them."""

    def __init__(self, kit: Kit, pool: RecomputePool) -> None:
        """Serve from this kit; recompute in fresh processes of this pool."""
        self._kit = kit
        self._pool = pool

    @get(
        "/v1/invoices",
        roles=INVOICE_READERS,
        others={Role.TENANT: "not-found"},
        answer=InvoiceAnswer,
        paged=True,
        query=("period", "tenant_id", "state", "updated_since"),
    )
    async def invoices(self, request: Request) -> Response:
        """Invoices in order of month, seller and tenant."""
        principal = await self._kit.access.authorise(request)
        tenant_id = request.query_params.get("tenant_id")
        if tenant_id is not None:
            require_own_tenant(principal, tenant_id)
        page = page_of(request, tuple[str, str, str])
        wanted = _filter(request, page.after)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await documents.invoices(connection, wanted, page.limit + 1)
        return page_response(
            [_invoice(stored) for stored in found],
            page,
            lambda answer: (answer.period, answer.legal_entity, answer.tenant_id),
        )

    @get(
        "/v1/invoices/{invoice_id}",
        roles=INVOICE_READERS,
        others={Role.TENANT: "not-found"},
        answer=InvoiceAnswer,
    )
    async def invoice(self, request: Request, invoice_id: str) -> Response:
        """One invoice."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees) as connection:
            found = await documents.invoice(connection, invoice_id)
        if found is None:
            raise Problem("not-found", "no such invoice")
        return json_response(_invoice(found))

    @get(
        "/v1/invoices/{invoice_id}/pdf",
        roles=INVOICE_READERS,
        others={Role.TENANT: "not-found"},
        problems=("unavailable",),
    )
    async def pdf(self, request: Request, invoice_id: str) -> Response:
        """One invoice as PDF."""
        principal = await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=principal.sees, snapshot=True) as connection:
            found = await documents.invoice(connection, invoice_id)
            content = await documents.pdf_of(connection, invoice_id)
        if found is None:
            raise Problem("not-found", "no such invoice")
        if content is None:
            raise Problem("unavailable", "the PDF is not rendered yet")
        headers = {
            "content-disposition": f'inline; filename="{found.content.number}.pdf"',
            "etag": f'"{found.pdf_sha256}"',
        }
        return Response(content, media_type="application/pdf", headers=headers)

    @post(
        "/v1/invoices/{invoice_id}/recompute",
        roles=(Role.AUDITOR,),
        answer=RecomputeAnswer,
        problems=("unavailable",),
    )
    async def recompute(self, request: Request, invoice_id: str) -> Response:
        """Compute an invoice again in a fresh process, from the entries; changes nothing."""
        await self._kit.access.authorise(request)
        async with self._kit.api.transaction(tenant=ALL_TENANTS, snapshot=True) as connection:
            basis = await documents.invoice_basis(connection, invoice_id)
            rows = await tax_rates.tax_rows(connection)
        if basis is None:
            raise Problem("not-found", "no such invoice")
        given = RecomputeInput(
            facts=basis.facts,
            first_seq=basis.first_seq,
            tax_rows=rows,
            position=basis.position,
        )
        try:
            again = await self._pool.run(given, self._charges(basis.facts))
        except (RecomputeBusy, RenderFailed) as error:
            raise Problem("unavailable", str(error)) from error
        found = differences(basis.issued, again.document())
        sha256 = None if again.content is None else content_sha256(again.content)
        return json_response(RecomputeAnswer(sha256, again.pdf_sha256, not found, found))

    async def _charges(self, facts: InvoiceFacts) -> AsyncIterator[list[RatedUsage]]:
        """Read the charges of an invoice, some thousands at a time.

        A transaction each: none stays open while the fresh process is slow to take them.
        """
        after_seq = 0
        while True:
            async with self._kit.api.transaction(tenant=ALL_TENANTS) as connection:
                some, after_seq = await entries.charges(connection, facts, after_seq)
            if not some:
                return
            yield some


def _filter(request: Request, after: tuple[str, str, str] | None) -> InvoiceFilter:
    query = request.query_params
    state = query.get("state")
    if state not in (None, *get_args(InvoiceState)):
        raise Problem("malformed", "state is finalising or finalised")
    period = query.get("period")
    if period is not None:
        require_month(period)
    since = query.get("updated_since")
    try:
        updated_from = None if since is None else moment_of(instant_ms(since))
    except ValueError as error:
        raise Problem("malformed", f"updated_since: {error}") from error
    return InvoiceFilter(
        period=period,
        tenant_id=query.get("tenant_id"),
        state=msgspec.convert(state, InvoiceState | None),
        updated_from=updated_from,
        after=after,
    )


def _invoice(stored: StoredInvoice) -> InvoiceAnswer:
    content = {name: getattr(stored.content, name) for name in stored.content.__struct_fields__}
    return InvoiceAnswer(
        **content,
        state=stored.state,
        updated_at=instant_text(ms_of(stored.updated_at)),
        waiting_for=stored.waiting_for,
        content_sha256=stored.content_sha256,
        pdf_sha256=stored.pdf_sha256,
    )
