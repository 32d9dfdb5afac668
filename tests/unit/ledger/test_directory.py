"""What may be registered, and the books that begin with it."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import ProgrammeId, ProjectId, TenantId
from hisab_contracts.reference import Role, TenantKind, TenantRecord
from ledger.core.directory import (
    book_of_programme,
    book_of_tenant,
    fault_of_key,
    fault_of_limit,
    fault_of_programme,
    fault_of_tenant,
)


def tenant(kind: TenantKind, credit_limit_micro: int) -> TenantRecord:
    return TenantRecord(
        tenant_id=TenantId("t"),
        kind=kind,
        currency="USD",
        credit_limit_micro=credit_limit_micro,
        projects=[ProjectId("main")],
    )


@pytest.mark.parametrize(
    ("kind", "credit_limit_micro", "is_fault"),
    [
        ("commercial", 1, False),
        ("commercial", 0, False),
        ("startup", 0, False),
        ("startup", 1, True),
        ("university", 1, True),
        ("programme", 1, True),
    ],
)
def test_only_a_commercial_tenant_has_a_credit_limit(
    kind: TenantKind, credit_limit_micro: int, is_fault: bool
) -> None:
    """All others never owe anything, so there is nothing to limit."""
    fault = fault_of_tenant(tenant(kind, credit_limit_micro))
    assert is_fault == (fault is not None)


@pytest.mark.parametrize(
    ("role", "tenant_id", "hub", "word"),
    [
        (Role.TENANT, "t", None, None),
        (Role.HUB, None, "lhr", None),
        (Role.OPERATOR, None, None, None),
        (Role.TENANT, None, None, "tenant_id"),
        (Role.OPERATOR, "t", None, "tenant_id"),
        (Role.HUB, None, None, "hub"),
        (Role.AUDITOR, None, "lhr", "hub"),
        (Role.HUB, "t", None, "tenant_id"),
    ],
)
def test_a_key_is_bound_to_what_its_role_says_and_to_nothing_else(
    role: Role, tenant_id: str | None, hub: str | None, word: str | None
) -> None:
    """The tenant is looked at first."""
    fault = fault_of_key(role, tenant_id=tenant_id, hub=hub)
    assert word == (None if fault is None else fault.split()[0])


def test_a_tenant_and_a_programme_begin_with_a_book_without_entries() -> None:
    """A tenant's has its currency and limit; a programme's is in rupees and has no credit."""
    opened = book_of_tenant(tenant("commercial", 7))
    assert ("t", "commercial", "USD", 7, 0) == (
        opened.tenant_id,
        opened.kind,
        opened.currency,
        opened.credit_limit_micro,
        opened.seq,
    )
    fund = book_of_programme(ProgrammeId("p"))
    assert ("/programmes/p", "fund", "PKR", 0, 0) == (
        fund.tenant_id,
        fund.kind,
        fund.currency,
        fund.credit_limit_micro,
        fund.seq,
    )


def test_no_programme_is_called_as_what_tenants_pay_beforehand() -> None:
    """Their lots would be taken for each other's."""
    named = [fault_of_programme(ProgrammeId(name)) for name in ("ignite", "prepaid")]
    assert [False, True] == [fault is not None for fault in named]


def test_only_a_key_that_approves_can_be_limited_in_what_it_approves() -> None:
    """A limit on any other would say that it may approve something."""
    faults = {role: fault_of_limit(role) for role in Role}
    assert [Role.APPROVER] == [role for role, fault in faults.items() if fault is None]
