"""SQL of what is asked about invoices: lists, single ones, their PDFs, and what each rests on."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from hisab_contracts.ids import DocumentId, LegalEntityId
from invoicing.core.differences import IssuedDocument
from invoicing.core.document import (
    Content,
    InvoiceFacts,
    InvoiceState,
    OutstandingStep,
    invoice_state,
    read_content,
)
from invoicing.core.restoration import KeptDocument, SeriesYear
from invoicing.store.closings import facts_from_row
from invoicing.store.tax_rates import TAKEN_UP_VERSIONS

if TYPE_CHECKING:
    import asyncpg

    from runtime.database import Connection


@dataclass(frozen=True, slots=True)
class StoredInvoice:
    """An invoice and how far its processing is."""

    content: Content
    content_sha256: str
    state: InvoiceState
    waiting_for: tuple[OutstandingStep, ...]
    pdf_sha256: str | None
    updated_at: dt.datetime


@dataclass(frozen=True, slots=True)
class InvoiceFilter:
    """Which invoices a list asks for; None asks for all."""

    period: str | None = None
    tenant_id: str | None = None
    state: InvoiceState | None = None
    updated_from: dt.datetime | None = None
    invoice_id: str | None = None
    after: tuple[str, str, str] | None = None
    """The (period, legal entity, tenant) of the last one already seen."""


def _invoice_from_row(row: asyncpg.Record) -> StoredInvoice:
    waiting_for = msgspec.json.decode(row["waiting_for"], type=tuple[OutstandingStep, ...])
    return StoredInvoice(
        content=read_content(row["content"]),
        content_sha256=row["content_sha256"],
        state=invoice_state(waiting_for),
        waiting_for=waiting_for,
        pdf_sha256=row["pdf_sha256"],
        updated_at=row["updated_at"],
    )


# Invoices with what each still waits for. The last change is not stored but follows from the steps,
# so it is worked out in the statement that filters by it; so is whether any step is outstanding,
# which decides about the state.
_INVOICES = """
select i.content, i.content_sha256, p.pdf_sha256, s.waiting_for,
       greatest(i.finalised_at, s.done_at) as updated_at
  from invoices i
  left join invoice_pdfs p on p.invoice_id = i.invoice_id
 cross join lateral (
       select max(o.done_at) as done_at,
              coalesce(jsonb_agg(jsonb_build_object('step', o.step, 'attempts', o.attempts,
                                                    'reason', o.reason) order by o.step)
                         filter (where o.done_at is null), '[]') as waiting_for
         from invoice_steps o where o.invoice_id = i.invoice_id) as s
 where ($1::text is null or i.period = $1)
   and ($2::text is null or i.tenant_id = $2)
   and ($3::boolean is null or $3 = (s.waiting_for <> '[]'))
   and ($4::timestamptz is null or greatest(i.finalised_at, s.done_at) >= $4)
   and ($5::text is null or i.invoice_id = $5)
   and ($6::text is null or (i.period, i.legal_entity_id, i.tenant_id) > ($6, $7, $8))
 order by i.period, i.legal_entity_id, i.tenant_id
 limit $9
"""


async def invoices(
    connection: Connection, wanted: InvoiceFilter, limit: int
) -> list[StoredInvoice]:
    """Return invoices in order of (period, legal entity, tenant)."""
    after: Sequence[str | None] = wanted.after or (None, None, None)
    is_outstanding = None if wanted.state is None else wanted.state != invoice_state(())
    rows = await connection.fetch(
        _INVOICES,
        wanted.period,
        wanted.tenant_id,
        is_outstanding,
        wanted.updated_from,
        wanted.invoice_id,
        *after,
        limit,
    )
    return [_invoice_from_row(row) for row in rows]


async def invoice(connection: Connection, invoice_id: str) -> StoredInvoice | None:
    """Return one invoice, if the caller may see it."""
    found = await invoices(connection, InvoiceFilter(invoice_id=invoice_id), 1)
    return found[0] if found else None


_PDF = "select pdf from invoice_pdfs where invoice_id = $1"


async def pdf_of(connection: Connection, invoice_id: str) -> bytes | None:
    """Return an invoice's PDF, once it is rendered."""
    pdf: bytes | None = await connection.fetchval(_PDF, invoice_id)
    return pdf


@dataclass(frozen=True, slots=True)
class InvoiceBasis:
    """What an invoice was computed from, beside its charges, and the document it must come to."""

    facts: InvoiceFacts
    first_seq: int
    position: int
    issued: IssuedDocument


# Nothing that is computed from is taken from the invoice's content: a content that was changed
# behind us must not be compared with itself. What is gone from the entries is read as nothing, so
# that it shows as a difference.
_BASIS = (
    """
select i.legal_entity_id, i.series, i.tenant_id, i.period, i.issued_on, i.position, i.content,
       i.content_sha256, l.name, t.currency, c.tax_version, b.last_seq,
       p.pdf_sha256, encode(sha256(p.pdf), 'hex') as stored_pdf_sha256,
       coalesce((select encode(e.entry_hash, 'hex') from entries e
                  where e.tenant_id = b.tenant_id and e.seq = b.last_seq), '') as last_hash,
       coalesce((select min(e.seq) from entries e
                  where e.tenant_id = b.tenant_id and e.kind = 'charge' and e.period = b.period
                    and e.seq <= b.last_seq), 0) as first_seq,
"""
    + TAKEN_UP_VERSIONS
    + """
  from invoices i
  join legal_entities l on l.legal_entity_id = i.legal_entity_id
  join tenants t on t.tenant_id = i.tenant_id
  join closings c on c.period = i.period
  join bills b on b.period = i.period and b.legal_entity_id = i.legal_entity_id
              and b.tenant_id = i.tenant_id
  left join invoice_pdfs p on p.invoice_id = i.invoice_id
 where i.invoice_id = $1
"""
)


async def invoice_basis(connection: Connection, invoice_id: str) -> InvoiceBasis | None:
    """Read what an invoice rests on, apart from its stored content, and that to compare it with."""
    row = await connection.fetchrow(_BASIS, invoice_id)
    if row is None:
        return None
    return InvoiceBasis(
        facts=facts_from_row(row),
        first_seq=row["first_seq"],
        position=row["position"],
        issued=IssuedDocument(
            content=read_content(row["content"]),
            content_sha256=row["content_sha256"],
            pdf_sha256=row["pdf_sha256"],
            stored_pdf_sha256=row["stored_pdf_sha256"],
        ),
    )


# What the database has of documents that were announced.
_KEPT_DOCUMENTS = """
select invoice_id, number, content_sha256 from invoices where invoice_id = any($1::text[])
"""
_LAST_POSITIONS = """
select legal_entity_id, series, fiscal_year, last_position from invoice_counters
"""


async def kept_documents(
    connection: Connection, invoice_ids: Sequence[str]
) -> dict[DocumentId, KeptDocument]:
    """Return those of these documents that are here."""
    return {
        DocumentId(row["invoice_id"]): KeptDocument(row["number"], row["content_sha256"])
        for row in await connection.fetch(_KEPT_DOCUMENTS, invoice_ids)
    }


async def last_positions(connection: Connection) -> dict[SeriesYear, int]:
    """Return the last place that was taken in each series and fiscal year."""
    return {
        (LegalEntityId(row["legal_entity_id"]), row["series"], row["fiscal_year"]): row[
            "last_position"
        ]
        for row in await connection.fetch(_LAST_POSITIONS)
    }
