"""The HTTP edge: who sells and what tax, closing months, invoices and their PDFs, reruns.

Order of checks, as everywhere: who calls (401, 403), what the path names (404), the body (413,
422), then the act (409). Tenants' keys see their own invoices and nothing else: row-level security
is told the key's tenant in every transaction.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request, Response

from hisab_contracts.ids import HubCode, LegalEntityId
from hisab_contracts.units import instant_ms, instant_text, month_bounds_ms
from invoicing import closing_store, invoice_store, store
from invoicing.billing import (
    RatedUsage,
    Step,
    difference_micro,
    receivable_waterfall,
    waterfall,
)
from invoicing.closing_store import CloseRequest, Closing
from invoicing.document import State, default_issued_on
from invoicing.forms import (
    BlockedBy,
    CloseBody,
    ClosingAnswer,
    InvoiceAnswer,
    LegalEntity,
    LegalEntityAnswer,
    PeriodAnswer,
    RecomputeAnswer,
    ReconciliationAnswer,
    StepAnswer,
    TaxRate,
    TaxRateAnswer,
)
from invoicing.invoice_store import StoredInvoice, Wanted
from invoicing.periods import LASTING, Blocker, blockers
from invoicing.rendering import RenderFailed
from invoicing.rerun import Ground, RerunBusy, Reruns
from invoicing.tax import TaxRow, tax_point_on
from runtime.auth import Principal, Role, own_tenant
from runtime.database import ALL_TENANTS
from runtime.http import (
    Answer,
    Place,
    Problem,
    command_of,
    idempotent,
    json_response,
    operation,
    page_of,
    page_response,
    read_body,
)
from runtime.service import Kit

if TYPE_CHECKING:
    from runtime.database import Connection

_MONEY = (Role.FINANCE, Role.AUDITOR, Role.OPERATOR)
_READERS = (Role.TENANT, *_MONEY)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def routes(kit: Kit) -> APIRouter:
    """Return the service's routes."""
    router = APIRouter()
    _reference_routes(kit, router)
    _period_routes(kit, router)
    _invoice_routes(kit, router)
    return router


# Who sells, and what tax.


def _reference_routes(kit: Kit, router: APIRouter) -> None:
    @router.post(
        "/v1/legal-entities",
        **operation(
            body=LegalEntity,
            answer=LegalEntityAnswer,
            status=201,
            problems=("unsupported", "already-exists"),
            idempotent=True,
        ),
    )
    async def add_legal_entity(request: Request) -> Response:
        """Register who sells; one legal entity in this version."""
        principal = await kit.access.authorise(request, Role.OPERATOR)
        body = await read_body(request, LegalEntity)
        command = command_of(request, body, scope=principal.role)

        async def run(connection: Connection) -> Answer:
            return await _add_seller(connection, body, principal)

        return await idempotent(kit.api, command, run, tenant=ALL_TENANTS)

    @router.get("/v1/legal-entities", **operation(answer=LegalEntityAnswer, paged=True))
    async def legal_entities(request: Request) -> Response:
        """Who sells."""
        await kit.access.authorise(request, *_MONEY)
        page = page_of(request, tuple[str])
        async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
            found = await store.sellers(connection)
        (after,) = page.after or ("",)
        shown = [
            LegalEntityAnswer(seller.legal_entity_id, seller.name, seller.series)
            for seller in found
            if seller.legal_entity_id > after
        ]
        return page_response(
            shown[: page.limit + 1], page, lambda answer: (answer.legal_entity_id,)
        )

    @router.post(
        "/v1/tax-rates",
        **operation(
            body=TaxRate,
            answer=TaxRateAnswer,
            status=201,
            problems=("already-exists",),
            idempotent=True,
        ),
    )
    async def add_tax_rate(request: Request) -> Response:
        """Record a dated tax row; rows are never changed."""
        principal = await kit.access.authorise(request, Role.OPERATOR)
        body = await read_body(request, TaxRate)
        command = command_of(request, body, scope=principal.role)

        async def run(connection: Connection) -> Answer:
            return await _add_tax_row(connection, body, principal)

        return await idempotent(kit.api, command, run, tenant=ALL_TENANTS)

    @router.get("/v1/tax-rates", **operation(answer=TaxRateAnswer, paged=True))
    async def tax_rates(request: Request) -> Response:
        """The tax table, in the order it was recorded."""
        await kit.access.authorise(request, *_MONEY)
        page = page_of(request, tuple[Place])
        async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
            rows = await store.tax_rows(connection)
        (after_version,) = page.after or (0,)
        shown = [_tax_answer(row) for row in rows if row.tax_version > after_version]
        return page_response(shown[: page.limit + 1], page, lambda answer: (answer.tax_version,))


async def _add_seller(connection: Connection, body: LegalEntity, principal: Principal) -> Answer:
    await store.serialise_register(connection, "legal_entities")
    for seller in await store.sellers(connection):
        if seller.legal_entity_id != body.legal_entity_id:
            raise Problem("unsupported", "one legal entity sells in this version")
        if seller.name != body.name:
            raise Problem("already-exists", "this legal entity has another name")
    seller_id = LegalEntityId(body.legal_entity_id)
    await store.add_seller(connection, seller_id, body.name, actor=_actor(principal))
    added = next(s for s in await store.sellers(connection) if s.legal_entity_id == seller_id)
    return Answer(201, LegalEntityAnswer(added.legal_entity_id, added.name, added.series))


async def _add_tax_row(connection: Connection, body: TaxRate, principal: Principal) -> Answer:
    await store.serialise_register(connection, "tax_rates")
    rows = await store.tax_rows(connection)
    row = TaxRow(
        tax_version=len(rows) + 1,
        hub=HubCode(body.hub),
        authority=body.authority,
        tax_bps=body.tax_bps,
        valid_from=body.valid_from,
        citation=body.citation,
    )
    for known in rows:
        if (known.hub, known.valid_from) == (row.hub, row.valid_from):
            if replace(known, tax_version=row.tax_version) != row:
                raise Problem("already-exists", "this hub has another row from this date on")
            return Answer(201, _tax_answer(known))
    await store.add_tax_row(connection, row, actor=_actor(principal))
    return Answer(201, _tax_answer(row))


def _tax_answer(row: TaxRow) -> TaxRateAnswer:
    return TaxRateAnswer(
        row.tax_version, row.hub, row.authority, row.tax_bps, row.valid_from, row.citation
    )


def _actor(principal: Principal) -> str:
    return f"key:{principal.key_id}"


# Months.


def _period_routes(kit: Kit, router: APIRouter) -> None:
    partitions = kit.settings.partitions

    @router.get("/v1/periods/{month}", **operation(answer=PeriodAnswer))
    async def period(request: Request, month: str) -> Response:
        """How far a billing month is, and what stands in its way."""
        await kit.access.authorise(request, *_MONEY)
        _check_month(month)
        async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
            answer = await _period(connection, month, partitions)
        return json_response(answer)

    @router.post(
        "/v1/periods/{month}/close",
        **operation(
            body=CloseBody,
            answer=PeriodAnswer,
            status=202,
            problems=("period-incomplete", "period-closed", "tax-missing"),
            idempotent=True,
        ),
    )
    async def close(request: Request, month: str) -> Response:
        """Close a month; its invoices are then computed, numbered and rendered."""
        principal = await kit.access.authorise(request, Role.FINANCE)
        _check_month(month)
        body = await read_body(request, CloseBody)
        command = command_of(request, body, scope=principal.role)
        issued_on = body.issued_on or default_issued_on(month)
        if issued_on < tax_point_on(month):
            raise Problem("malformed", "issued_on lies before the month's last day")

        async def run(connection: Connection) -> Answer:
            await _close(connection, month, partitions, body, issued_on, _actor(principal))
            return Answer(202, await _period(connection, month, partitions))

        return await idempotent(kit.api, command, run, tenant=ALL_TENANTS)

    @router.get("/v1/periods/{month}/reconciliation", **operation(answer=ReconciliationAnswer))
    async def reconciliation(request: Request, month: str) -> Response:
        """From what the ledger charged for a month to what its invoices say."""
        await kit.access.authorise(request, *_MONEY)
        _check_month(month)
        async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
            answer = await _reconciliation(connection, month)
        return json_response(answer)


def _check_month(month: str) -> None:
    try:
        month_bounds_ms(month)
    except ValueError as error:
        raise Problem("malformed", str(error)) from error


async def _close(
    connection: Connection,
    month: str,
    partitions: int,
    body: CloseBody,
    issued_on: dt.date,
    actor: str,
) -> None:
    """Put the closing and its bills on the record, or refuse."""
    await store.serialise_register(connection, f"closing:{month}")
    if await closing_store.closing_of(connection, month) is not None:
        raise Problem("period-closed", f"{month} is closed, or being closed, already")
    found = blockers(await store.month_state(connection, month, partitions))
    lasting = [blocker for blocker in found if blocker.kind in LASTING]
    blocked_by = [_blocked_by(blocker) for blocker in found]
    if found and body.override is None:
        detail = "; ".join(_told(blocker) for blocker in found[:5])
        raise Problem("period-incomplete", detail, blocked_by=blocked_by)
    if lasting:
        code = "tax-missing" if lasting[-1].kind == "tax-missing" else "period-incomplete"
        detail = "; ".join(_told(blocker) for blocker in lasting[:5])
        raise Problem(code, f"no override helps: {detail}", blocked_by=blocked_by)
    (seller,) = await store.sellers(connection)
    request = CloseRequest(
        period=month,
        legal_entity_id=seller.legal_entity_id,
        issued_on=issued_on,
        override_reason=None if body.override is None else body.override.reason,
        overridden=found,
        actor=actor,
    )
    await closing_store.request_closing(connection, request)
    await closing_store.add_bills(connection, month)


def _told(blocker: Blocker) -> str:
    about = blocker.source or blocker.tenant_id or blocker.hub
    return f"{blocker.kind} ({about}): {blocker.detail}" if about else blocker.detail


async def _period(connection: Connection, month: str, partitions: int) -> PeriodAnswer:
    closing = await closing_store.closing_of(connection, month)
    found = blockers(await store.month_state(connection, month, partitions))
    if closing is None:
        state, shown = ("open" if found else "closable"), list(found)
    elif closing.closed_at is None:
        state = "open" if found else "closable"
        shown = await closing_store.waiting(connection, month)
    else:
        state, shown = "closed", []
    return PeriodAnswer(
        period=month,
        state=state,
        blocked_by=[_blocked_by(blocker) for blocker in shown],
        late_micro=str(await invoice_store.late_micro(connection, month)),
        closing=None if closing is None else _closing_answer(closing),
    )


def _closing_answer(closing: Closing) -> ClosingAnswer:
    closed_at = None if closing.closed_at is None else _instant(closing.closed_at)
    return ClosingAnswer(
        _instant(closing.requested_at), closing.issued_on, closing.override_reason, closed_at
    )


def _blocked_by(blocker: Blocker) -> BlockedBy:
    return BlockedBy(blocker.kind, blocker.hub, blocker.source, blocker.tenant_id, blocker.detail)


async def _reconciliation(connection: Connection, month: str) -> ReconciliationAnswer:
    steps = waterfall(await invoice_store.month_facts(connection, month))
    receivable = receivable_waterfall(await invoice_store.receivable_facts(connection, month))
    totals = await invoice_store.month_totals(connection, month)
    return ReconciliationAnswer(
        period=month,
        steps=[_step(step) for step in steps],
        difference_micro=str(difference_micro(steps)),
        receivable_steps=[_step(step) for step in receivable],
        receivable_difference_micro=str(difference_micro(receivable)),
        invoices_count=totals.invoices_count,
        net_minor=str(totals.net_minor),
        tax_minor=str(totals.tax_minor),
        total_minor=str(totals.total_minor),
        tender_minor=str(totals.tender_minor),
        due_minor=str(totals.due_minor),
        number_gaps=await invoice_store.number_gaps(connection),
    )


def _step(step: Step) -> StepAnswer:
    return StepAnswer(step.step, str(step.change_micro))


# Invoices.


def _invoice_routes(kit: Kit, router: APIRouter) -> None:
    reruns = Reruns()

    @router.get(
        "/v1/invoices",
        **operation(
            answer=InvoiceAnswer,
            paged=True,
            query=("period", "tenant_id", "state", "updated_since"),
        ),
    )
    async def invoices(request: Request) -> Response:
        """Invoices in order of month, seller and tenant."""
        principal = await kit.access.authorise(request, *_READERS)
        tenant_id = request.query_params.get("tenant_id")
        if tenant_id is not None:
            own_tenant(principal, tenant_id)
        page = page_of(request, tuple[str, str, str])
        wanted = _wanted(request, page.limit + 1, page.after)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            found = await invoice_store.invoices(connection, wanted)
        return page_response(
            [_invoice(one) for one in found],
            page,
            lambda answer: (answer.period, answer.legal_entity, answer.tenant_id),
        )

    @router.get("/v1/invoices/{invoice_id}", **operation(answer=InvoiceAnswer))
    async def invoice(request: Request, invoice_id: str) -> Response:
        """One invoice."""
        principal = await kit.access.authorise(request, *_READERS)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            found = await invoice_store.invoice(connection, invoice_id)
        if found is None:
            raise Problem("not-found", "no such invoice")
        return json_response(_invoice(found))

    @router.get("/v1/invoices/{invoice_id}/pdf", **operation(problems=("unavailable",)))
    async def pdf(request: Request, invoice_id: str) -> Response:
        """One invoice as PDF."""
        principal = await kit.access.authorise(request, *_READERS)
        async with kit.api.transaction(tenant=principal.sees) as connection:
            found = await invoice_store.invoice(connection, invoice_id)
            content = await invoice_store.pdf_of(connection, invoice_id)
        if found is None:
            raise Problem("not-found", "no such invoice")
        if content is None:
            raise Problem("unavailable", "the PDF is not rendered yet")
        name = f"{found.content.number}.pdf"
        headers = {
            "content-disposition": f'inline; filename="{name}"',
            "etag": f'"{found.pdf_sha256}"',
        }
        return Response(content, media_type="application/pdf", headers=headers)

    @router.post(
        "/v1/invoices/{invoice_id}/recompute",
        **operation(answer=RecomputeAnswer, problems=("unavailable",)),
    )
    async def recompute(request: Request, invoice_id: str) -> Response:
        """Compute an invoice again in a fresh process, from the entries; changes nothing."""
        await kit.access.authorise(request, Role.AUDITOR)
        return json_response(await _recompute(kit, reruns, invoice_id))


def _wanted(request: Request, limit: int, after: tuple[str, str, str] | None) -> Wanted:
    query = request.query_params
    state = query.get("state")
    if state not in (None, "finalising", "finalised"):
        raise Problem("malformed", "state is finalising or finalised")
    period = query.get("period")
    if period is not None:
        _check_month(period)
    since = query.get("updated_since")
    try:
        updated_from = None if since is None else _moment(since)
    except ValueError as error:
        raise Problem("malformed", f"updated_since: {error}") from error
    return Wanted(
        period=period,
        tenant_id=query.get("tenant_id"),
        state=msgspec.convert(state, State | None),
        updated_from=updated_from,
        invoice_id=None,
        after=after,
        limit=limit,
    )


def _invoice(stored: StoredInvoice) -> InvoiceAnswer:
    content = {name: getattr(stored.content, name) for name in stored.content.__struct_fields__}
    return InvoiceAnswer(
        **content,
        state=stored.state,
        updated_at=_instant(stored.updated_at),
        waiting_for=stored.waiting_for,
        content_sha256=stored.content_sha256,
        pdf_sha256=stored.pdf_sha256,
    )


async def _recompute(kit: Kit, reruns: Reruns, invoice_id: str) -> RecomputeAnswer:
    async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
        stored = await invoice_store.rerun_facts(connection, invoice_id)
        tax_rows = await store.tax_rows(connection)
    if stored is None:
        raise Problem("not-found", "no such invoice")

    async def charges() -> AsyncIterator[list[RatedUsage]]:
        after_seq = 0
        while True:
            async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
                some, after_seq = await invoice_store.charges(connection, stored.facts, after_seq)
            if not some:
                return
            yield some

    try:
        again = await reruns.run(Ground(stored.facts, tax_rows, stored.position), charges())
    except (RerunBusy, RenderFailed) as error:
        raise Problem("unavailable", str(error)) from error
    identical = again.content_sha256 == stored.content_sha256 and stored.pdf_sha256 in (
        None,
        again.pdf_sha256,
    )
    return RecomputeAnswer(again.content_sha256, again.pdf_sha256, identical)


def _moment(text: str) -> dt.datetime:
    return _EPOCH + dt.timedelta(milliseconds=instant_ms(text))


def _instant(moment: dt.datetime) -> str:
    return instant_text((moment - _EPOCH) // dt.timedelta(milliseconds=1))
