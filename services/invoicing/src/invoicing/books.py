"""What invoicing keeps of the ledger's books: each entry, as far as bills need it.

An entry comes twice at most: in order on the entries topic, and, when a gap shows there, from the
ledger's feed over HTTP. Both ways give the same `KeptEntry`. An entry is named by (tenant, seq), so
one that comes again is recognised; one that comes again with *another hash* means that the ledger
has told two histories, and everything must stop (`ForkedError`).

A charge's postings say who pays: `lot:*` accounts fund it, the rest is `receivable` or `unfunded`
(the tenant's view: what pays is negative). The three add up to the charge, or the entry is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from hisab_contracts.entries import Entry
from hisab_contracts.ids import DocumentId, HubCode, PriceClass, Sku, TenantId
from hisab_contracts.units import instant_ms, month_of
from invoicing.billing import RatedUsage, invariant


class ForkedError(Exception):
    """An entry came again with another content: the ledger's history was changed behind us."""


@dataclass(frozen=True, slots=True)
class KeptCharge:
    """A charge: which month and line it belongs to, and who pays what of it."""

    period: str
    hour_ms: int
    usage: RatedUsage


@dataclass(frozen=True, slots=True)
class KeptMove:
    """What the ledger moved from receivable to one document."""

    document_id: DocumentId
    moved_micro: int


@dataclass(frozen=True, slots=True)
class KeptEntry:
    """One entry of a book; of other kinds than charge and invoiced only that it is there."""

    tenant_id: TenantId
    seq: int
    kind: str
    entry_hash: bytes
    detail: KeptCharge | KeptMove | None


class FeedPosting(Struct, frozen=True):
    """A posting in the ledger's feed."""

    account: str
    posting_micro: str


class FeedCharge(Struct, frozen=True):
    """A charge in the ledger's feed."""

    hub: HubCode
    sku: Sku
    price_class: PriceClass
    hour_at: str
    gpu_ns: str
    charge_micro: str


class FeedEntry(Struct, frozen=True):
    """An entry in the ledger's feed (`GET /v1/tenants/{id}/entries`)."""

    seq: str
    kind: str
    postings: list[FeedPosting]
    hash: str
    charge: FeedCharge | None = None


class FeedPage(Struct, frozen=True):
    """A page of that feed."""

    items: list[FeedEntry]
    next: str | None


def kept(entry: Entry) -> KeptEntry:
    """Keep what bills need of an entry as the topic states it."""
    postings = [(posting.account, posting.posting_micro) for posting in entry.postings]
    detail: KeptCharge | KeptMove | None = None
    if entry.kind == "charge":
        charge = entry.charge
        if charge is None:
            raise msgspec.ValidationError(f"{entry.entry_id}: a charge without its detail")
        usage = _usage(
            charge.hub, charge.sku, charge.price_class, charge.gpu_ns, charge.charge_micro, postings
        )
        detail = KeptCharge(month_of(charge.hour_ms), charge.hour_ms, usage)
    elif entry.kind == "invoiced":
        detail = _move(postings)
    return KeptEntry(entry.tenant_id, entry.seq, entry.kind, bytes.fromhex(entry.hash), detail)


def kept_from_feed(tenant_id: TenantId, entry: FeedEntry) -> KeptEntry:
    """Keep the same of an entry as the ledger's feed states it."""
    postings = [(posting.account, int(posting.posting_micro)) for posting in entry.postings]
    detail: KeptCharge | KeptMove | None = None
    if entry.kind == "charge":
        charge = entry.charge
        if charge is None:
            raise msgspec.ValidationError(f"{tenant_id}.{entry.seq}: a charge without its detail")
        hour_ms = instant_ms(charge.hour_at)
        usage = _usage(
            charge.hub,
            charge.sku,
            charge.price_class,
            int(charge.gpu_ns),
            int(charge.charge_micro),
            postings,
        )
        detail = KeptCharge(month_of(hour_ms), hour_ms, usage)
    elif entry.kind == "invoiced":
        detail = _move(postings)
    return KeptEntry(tenant_id, int(entry.seq), entry.kind, bytes.fromhex(entry.hash), detail)


def contiguous_after(position: int, seqs: Collection[int]) -> int:
    """Return the last seq up to which a book has no gap: `position`, moved on by what is there."""
    present = frozenset(seqs)
    while position + 1 in present:
        position += 1
    return position


def _usage(
    hub: HubCode,
    sku: Sku,
    price_class: PriceClass,
    used_gpu_ns: int,
    charge_micro: int,
    postings: Iterable[tuple[str, int]],
) -> RatedUsage:
    funded_micro = receivable_micro = unfunded_micro = 0
    for account, posting_micro in postings:
        if account.startswith("lot:"):
            funded_micro -= posting_micro
        elif account == "receivable":
            receivable_micro -= posting_micro
        elif account == "unfunded":
            unfunded_micro -= posting_micro
    usage = RatedUsage(
        hub, sku, price_class, used_gpu_ns, funded_micro, receivable_micro, unfunded_micro
    )
    invariant(usage.charge_micro == charge_micro, "funded + receivable + unfunded = charge")
    return usage


def _move(postings: Iterable[tuple[str, int]]) -> KeptMove:
    """`invoiced:<document>` takes what leaves `receivable`."""
    for account, posting_micro in postings:
        name, _, document_id = account.partition(":")
        if name == "invoiced":
            return KeptMove(DocumentId(document_id), -posting_micro)
    raise msgspec.ValidationError("an invoiced entry that names no document")
