"""API keys: made, hashed, looked up; who may do what.

Theory. A secret is 32 random bytes behind a prefix, shown once; its SHA-256 is stored (256 bits of
entropy need no slow hash). Every service keeps `access_keys` from the compacted access topic; the
service that makes keys also writes its own table at once. Look-ups are cached for a second at most,
so a revocation works everywhere within five.

Refusals: no key, an unknown, expired or revoked one: 401. A role the endpoint does not name: 403.
Another tenant's thing: 404, so that nothing is told about what exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from starlette.requests import Request

from runtime.database import ALL_TENANTS, Database
from runtime.kafka import Batch

if TYPE_CHECKING:
    from runtime.database import Connection


class Role(StrEnum):
    """What a key may be used for."""

    HUB = "hub"
    SCHEDULER = "scheduler"
    TENANT = "tenant"
    OFFICER = "officer"
    APPROVER = "approver"
    FINANCE = "finance"
    AUDITOR = "auditor"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, as the key says."""

    key_id: str
    role: Role
    tenant_id: str | None
    """Set for a tenant's key, and only there."""
    hub: str | None
    """Set for a hub's key, and only there."""

    @property
    def sees(self) -> str:
        """What row-level security is told: the key's tenant, or every tenant."""
        return ALL_TENANTS if self.tenant_id is None else self.tenant_id


@dataclass(frozen=True, slots=True)
class AccessKey:
    """One row of `access_keys`, and the message on the access topic (JSON, key = key_id)."""

    key_id: str
    sha256: str
    role: str
    tenant_id: str | None
    hub: str | None
    expires_at_ms: int | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class MintedKey:
    """A new key: the secret for its owner, the row for the table."""

    secret: str
    access_key: AccessKey


def mint(
    key_id: str, role: Role, *, tenant_id: str | None = None, hub: str | None = None
) -> MintedKey:
    """Make a key. The secret exists nowhere else."""
    raise NotImplementedError


async def store_key(connection: Connection, access_key: AccessKey) -> None:
    """Write or replace one key."""


async def keep_access_keys(batch: Batch, connection: Connection) -> None:
    """Handle the access topic: the newest message of each key wins. A ready-made handler."""


class Access:
    """Who a request comes from. One per process."""

    def __init__(self, database: Database) -> None:
        """Look keys up through this pool (the `api` role)."""

    async def authorise(self, request: Request, *roles: Role) -> Principal:
        """Return who calls; raises `Problem` 401 without a valid key, 403 unless of these roles.

        Without roles any valid key will do.
        """
        raise NotImplementedError


def own_tenant(principal: Principal, tenant_id: str) -> None:
    """Raise `Problem` 404 when a tenant's key asks for another tenant."""


def own_hub(principal: Principal, hub: str) -> None:
    """Raise `Problem` 404 when a hub's key asks for another hub."""
