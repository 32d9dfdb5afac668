"""The directory: which tenants, programmes and keys may be registered, and the books they open.

A tenant and a programme are registered together with their book, which begins without entries. A
key belongs to at most one tenant or one hub, and its role says to which.

Refusals: `fault_of_tenant`, `fault_of_key` and `fault_of_limit` say what makes no sense, before
anything is looked up. Whether an id is taken the store finds out when it registers.
"""

from __future__ import annotations

from typing import Final

from hisab_contracts.ids import ProgrammeId, TenantId
from hisab_contracts.reference import Role, TenantRecord
from ledger.core.book import PROGRAMME_BOOK, Book
from ledger.core.prepayments import PREPAID

PROGRAMME_CURRENCY: Final = "PKR"
"""Programmes grant rupees only: their budgets come from one public fund."""


def fault_of_tenant(record: TenantRecord) -> str | None:
    """Say why a tenant cannot be registered so, or None."""
    # The limit counts what is receivable, and only a commercial tenant ever owes anything.
    if record.credit_limit_micro and record.kind != "commercial":
        return "only a commercial tenant has a credit limit"
    return None


def fault_of_programme(programme_id: ProgrammeId) -> str | None:
    """Say why a programme cannot be called so, or None."""
    if programme_id == PREPAID:
        return f"{PREPAID} stands for what tenants pay beforehand; choose another programme_id"
    return None


def fault_of_key(role: Role, *, tenant_id: str | None, hub: str | None) -> str | None:
    """Say why a key cannot be bound so, or None: a tenant's to its tenant, a hub's to its hub."""
    if (role is Role.TENANT) != (tenant_id is not None):
        return "tenant_id goes with role tenant, and with no other"
    if (role is Role.HUB) != (hub is not None):
        return "hub goes with role hub, and with no other"
    return None


def fault_of_limit(role: Role) -> str | None:
    """Say why a key cannot be given a limit of what it approves, or None."""
    return None if role is Role.APPROVER else "only a key of role approver approves anything"


def book_of_tenant(record: TenantRecord) -> Book:
    """Open a tenant's book: no entries yet."""
    return Book(
        tenant_id=record.tenant_id,
        kind=record.kind,
        currency=record.currency,
        credit_limit_micro=record.credit_limit_micro,
    )


def book_of_programme(programme_id: ProgrammeId) -> Book:
    """Open a programme's book: no entries yet, and never any credit."""
    return Book(
        tenant_id=TenantId(PROGRAMME_BOOK + programme_id),
        kind="fund",
        currency=PROGRAMME_CURRENCY,
        credit_limit_micro=0,
    )
