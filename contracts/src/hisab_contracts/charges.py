"""What metering says downstream on `metering.charges.v1`: totals, ends and watermarks.

A charge message is never an increment. It states the *new total* of one bucket (tenant, project,
allocation, hub, node, rate line, UTC hour); the ledger books the difference to what it booked
before, so a message sent twice, or again after metering was restored, books nothing.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    HoldId,
    HubCode,
    NodeId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    TenantId,
)

_Total = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class BucketTotal(Struct, frozen=True, tag_field="kind", tag="bucket"):
    """All that is covered in one bucket so far, and what it costs."""

    tenant_id: TenantId
    bucket_id: BucketId
    project_id: ProjectId
    allocation_id: AllocationId
    hold_id: HoldId | None
    hub: HubCode
    node_id: NodeId
    sku: Sku
    price_class: PriceClass
    price_version: PriceVersion
    hour_ms: int
    revision: int
    """Corrections applied so far: 0 until there are any. A higher one wins whatever its total."""
    total_gpu_ns: _Total
    total_micro: _Total
    refunded_micro: _Total = 0


class AllocationFinal(Struct, frozen=True, tag_field="kind", tag="final"):
    """Nothing more will be reported for this allocation: its hold may be released."""

    tenant_id: TenantId
    hub: HubCode
    allocation_id: AllocationId
    ended_ms: int


class OpenQuarantine(Struct, frozen=True):
    """GPU time of a tenant and billing month (`yyyy-mm`) that waits in quarantine."""

    tenant_id: TenantId
    month: str
    quarantined_gpu_ns: int


class SourceBehind(Struct, frozen=True):
    """A source that holds its hub's watermark back, and why."""

    source: str
    watermark_ms: int | None
    reason: str


class ReconcileResult(Struct, frozen=True):
    """What metering found when it last compared its buckets with what the ledger has booked."""

    at_ms: int
    differences: int
    """Buckets that were booked otherwise when it ended."""


class HubWatermark(Struct, frozen=True, tag_field="kind", tag="watermark", omit_defaults=True):
    """All usage of this hub before `watermark_ms` has been stated, but what is listed.

    Sent in-band to every partition after the charges it covers, and again whenever it or the open
    quarantined time changes. None: the hub has emitted, but nothing is complete yet. `revision`
    counts up per hub; a lower one than seen before is ignored.
    """

    hub: HubCode
    revision: int
    watermark_ms: int | None
    silent: bool
    quarantined: list[OpenQuarantine]
    behind: list[SourceBehind]
    """At most 20, the furthest behind first."""
    reconciled: ReconcileResult | None = None
    """Of all hubs; None: never compared."""


ChargeMessage = BucketTotal | AllocationFinal | HubWatermark
"""The closed union of this topic."""

_DECODER: msgspec.json.Decoder[ChargeMessage] = msgspec.json.Decoder(ChargeMessage)


def read_charge(value: bytes) -> ChargeMessage:
    """Read one message; msgspec.DecodeError when it is not one (then the reader must halt)."""
    return _DECODER.decode(value)
