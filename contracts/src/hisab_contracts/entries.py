"""What the ledger says on `ledger.entries.v1`: its entries, in order, and watermarks among them.

An entry is one immutable row with its postings inside. Its hash is the RFC 6962 leaf hash over the
canonical encoding of the whole entry, the hash of the book's previous entry included; anyone who
holds a book's entries can recompute every hash with nothing but JSON and SHA-256.

Entries are kept for ever and grow only by optional members. So every member that may be absent is
`None` by default and, being `omit_defaults`, is neither published nor hashed while it is: an entry
of an older release, read by newer types, is encoded to the bytes it was hashed from.

Signs are the tenant's view, and an entry's postings sum to zero: a grant is `funding -g, lot +g`, a
charge `lot -d, usage +d` with what no lot covers on `receivable` (or `unfunded`) as `-r`,
finalising an invoice is `receivable +x, invoiced:<document> -x`, and what is left of a lot that has
expired goes `lot -r, breakage +r`.

An entry says all that a fold of it needs: a grant's its terms, a hold's what it reserves where, and
a charge's by how much the reservations of its hold changed.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from hisab_contracts.canonical import canonical_bytes, leaf_sha256
from hisab_contracts.charges import OpenQuarantine, ReconcileResult, SourceBehind
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
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

GENESIS_HASH = "0" * 64
"""What stands in `prev_hash` of the first entry of a book."""


class Posting(Struct, frozen=True, omit_defaults=True):
    """One account's change by an entry, and what the account holds after it."""

    account: str
    posting_micro: int
    balance_micro: int


class ChargeDetail(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which bucket a charge belongs to; `gpu_ns` and `charge_micro` are the entry's difference."""

    bucket_id: BucketId
    allocation_id: AllocationId
    project_id: ProjectId
    hold_id: HoldId | None = None
    hub: HubCode
    node_id: NodeId
    sku: Sku
    price_class: PriceClass
    price_version: PriceVersion
    hour_ms: int
    revision: int
    gpu_ns: int
    charge_micro: int
    over_limit: bool
    refunded_micro: int | None = None
    """What more of the bucket was refunded: `charge_micro` is less by it. None: nothing."""
    reserved: tuple[tuple[str, int], ...] | None = None
    """By how much the reservations of its open hold changed: (`lot:<grant>` or `limit`, micro).

    None: it has no open hold; or it is an entry of release 1, and it follows from the postings.
    """
    short_micro: int | None = None
    """What more its hold is short: what returned where nothing can be reserved. None: nothing."""


class HoldDetail(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A hold placed, changed or released: how much, and where it was reserved at that moment."""

    hold_id: HoldId
    hold_micro: int
    open_micro: int
    reserved: list[tuple[str, int]]
    """(`lot:<grant>` or `limit`, reserved_micro) in draw order.

    Of an end, what was still reserved and is free again; else what is reserved from now on.
    """
    cause: str
    """`placed`, `extended`, `moved` (off a lot that expired), or why it ended.

    That is `final`, `released` or `expired`.
    """
    allocation_id: AllocationId | None = None
    """The run whose final ends it; None: only a release or its expiry does."""
    expires_ms: int
    short_micro: int | None = None
    """What it lost, in all, with lots that expired under it. None: nothing."""


class GrantScope(Struct, frozen=True, omit_defaults=True):
    """What a grant may be used for: None is everything, and a charge must match every member."""

    hubs: tuple[HubCode, ...] | None = None
    skus: tuple[Sku, ...] | None = None
    projects: tuple[ProjectId, ...] | None = None
    price_classes: tuple[PriceClass, ...] | None = None


class GrantDetail(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The terms of a lot as granted: they never change, so the entry's hash covers them."""

    grant_id: GrantId
    programme_id: ProgrammeId
    grant_micro: int
    priority: int
    effective_ms: int
    expires_ms: int | None = None
    scope: GrantScope | None = None
    """None: it may be used for everything."""
    coverage_bps: int | None = None
    """Which part of each bucket it pays, in 1/100 %; None: all of it."""
    source: str | None = None
    """`prepaid`: a tenant paid for it; None: its programme gave it."""
    tax_effect: str | None = None
    """`reduces_base`, or None: `tender`. What it means for bills; the ledger only says it."""


class LotDetail(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What changed of a lot beside its balance."""

    grant_id: GrantId
    expires_ms: int | None = None
    """Of a grant that was revoked: when its window ends now."""
    reclaimed_micro: int | None = None
    """What of its expired credit went back to its programme: it can no longer be taken back."""


class LimitDetail(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The credit limit that holds from this entry on."""

    credit_limit_micro: int


class Entry(
    Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="message", tag="entry"
):
    """One row of a book. `kind`: grant, charge, hold_placed, hold_released, expiry, ..."""

    tenant_id: TenantId
    seq: int
    entry_id: EntryId
    kind: str
    effective_ms: int
    recorded_ms: int
    postings: list[Posting]
    caused_by: str
    actor: str
    """The key that asked (`key:<id>`), or the service that booked (`metering`, `ledger`)."""
    prev_hash: str
    hash: str
    charge: ChargeDetail | None = None
    hold: HoldDetail | None = None
    grant: GrantDetail | None = None
    lot: LotDetail | None = None
    limit: LimitDetail | None = None
    reverses: EntryId | None = None
    """The entry that this one negates."""
    reason: str | None = None
    """Why, where a person had to say it."""


class EntryWatermark(Struct, frozen=True, tag_field="message", tag="watermark", omit_defaults=True):
    """A hub's watermark, published after every entry booked before it in this partition."""

    hub: HubCode
    revision: int
    watermark_ms: int | None
    silent: bool
    quarantined: list[OpenQuarantine]
    behind: list[SourceBehind]
    reconciled: ReconcileResult | None = None


EntryMessage = Entry | EntryWatermark
"""The closed union of this topic."""

_DECODER: msgspec.json.Decoder[EntryMessage] = msgspec.json.Decoder(EntryMessage)


def read_entry_message(value: bytes) -> EntryMessage:
    """Read one message; msgspec.DecodeError when it is not one (then the reader must halt)."""
    return _DECODER.decode(value)


def entry_hash(entry: Entry) -> str:
    """Compute an entry's hash from all of it, with `hash` itself empty: 64 hexadecimal digits."""
    return leaf_sha256(canonical_bytes(msgspec.structs.replace(entry, hash=""))).hex()
