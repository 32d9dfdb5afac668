"""Reference facts on compacted topics: tenants, access keys, hubs, price lines.

The key of each record is named beside it. No personal data: names of people, e-mail and tax
numbers never enter a topic. Hashes of secrets do; secrets never.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from msgspec import Struct

from hisab_contracts.ids import (
    HubCode,
    KeyId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    TenantId,
)

TenantKind = Literal["commercial", "startup", "university", "programme"]


class Role(StrEnum):
    """What an API key may be used for."""

    HUB = "hub"
    SCHEDULER = "scheduler"
    TENANT = "tenant"
    OFFICER = "officer"
    APPROVER = "approver"
    FINANCE = "finance"
    AUDITOR = "auditor"
    OPERATOR = "operator"


class TenantRecord(Struct, frozen=True):
    """`ledger.tenants.v1`, key = tenant_id."""

    tenant_id: TenantId
    kind: TenantKind
    currency: str
    credit_limit_micro: int
    projects: list[ProjectId]


class AccessRecord(Struct, frozen=True):
    """`ledger.access.v1`, key = key_id: an API key by the SHA-256 of its secret (hexadecimal)."""

    key_id: KeyId
    sha256: str
    role: Role
    tenant_id: TenantId | None
    hub: HubCode | None
    expires_at_ms: int | None
    revoked: bool


class HubRecord(Struct, frozen=True, omit_defaults=True):
    """`metering.hubs.v1`, key = hub."""

    hub: HubCode
    heartbeat_ms: int
    name: str | None = None
    """What people call the hub; absent in older records."""


class PriceLine(Struct, frozen=True, omit_defaults=True):
    """`metering.prices.v1`, key = rate_line_id: one immutable, effective-dated price.

    The window is [valid_from_ms, valid_until_ms) on whole UTC hours; None is open-ended, and an
    open line ends where the next one of the same currency, SKU and class begins.
    """

    rate_line_id: str
    price_version: PriceVersion
    currency: str
    sku: Sku
    price_class: PriceClass
    micro_per_gpu_hour: int
    valid_from_ms: int
    valid_until_ms: int | None
    added_by: str | None = None
    """The key (its id) that added the list; absent in older records."""
