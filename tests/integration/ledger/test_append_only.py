"""Entries only grow: privileges, triggers, constraints, and an audit that names what was edited."""

from __future__ import annotations

import asyncpg
import pytest

from infrastructure import Infrastructure
from integration.ledger.real import RealLedger, opened
from unit.ledger.values import total

CHANGES = (
    "update entries set gpu_ns = 7",
    "delete from entries",
    "truncate entries",
)


@pytest.mark.defect("L4", "F44")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["api", "writer", "reader"])
async def test_no_role_can_change_remove_or_truncate_an_entry(
    ledger: RealLedger, role: str, change: str
) -> None:
    """They lack the privilege, whatever row-level security lets them see."""
    await ledger.tenant(f"t-{role}-{change[:3]}", limit_micro=9)
    await ledger.book(total(1, tenant_id=f"t-{role}-{change[:3]}"))
    connection = await asyncpg.connect(getattr(ledger.addresses, role))
    try:
        await connection.execute("select set_config('app.tenant', '*', false)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(change)
    finally:
        await connection.close()


@pytest.mark.defect("L4", "F44")
@pytest.mark.parametrize("change", CHANGES)
async def test_the_owner_meets_the_trigger_and_nothing_but_the_trigger(
    infrastructure: Infrastructure, change: str
) -> None:
    """Row-level security, lifted as an owner may lift it, hides nothing here.

    So the same statement goes through once the trigger is dropped: it is what refuses.
    """
    addresses = infrastructure.migrated_database("ledger")
    async with opened(addresses) as scratch:
        await scratch.tenant("t", limit_micro=9)
        await scratch.book(total(1, tenant_id="t"))
    owner = await asyncpg.connect(addresses.owner)
    try:
        # An owner is bound by `force row level security` until it takes that back.
        await owner.execute("alter table entries no force row level security")
        assert 1 == await owner.fetchval("select count(*) from entries")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await owner.execute(change)
        assert [1] == [row["gpu_ns"] for row in await owner.fetch("select gpu_ns from entries")]
        for trigger in ("entries_are_append_only", "entries_are_never_truncated"):
            await owner.execute(f"drop trigger {trigger} on entries")
        await owner.execute(change)
        left = [row["gpu_ns"] for row in await owner.fetch("select gpu_ns from entries")]
        assert ([7] if change.startswith("update") else []) == left
    finally:
        await owner.close()
        infrastructure.drop_database(addresses)


@pytest.mark.defect("L4", "F44")
@pytest.mark.parametrize("change", CHANGES)
async def test_triggers_refuse_even_a_superuser_in_replica_mode(
    ledger: RealLedger, change: str
) -> None:
    """`enable always`: session_replication_role does not help."""
    name = f"super-{change[:3]}"
    await ledger.tenant(name, limit_micro=9)
    await ledger.book(total(1, tenant_id=name))
    async with ledger.admin.connection() as connection:
        await connection.execute("set session_replication_role = replica")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(change)


@pytest.mark.defect("L13")
async def test_the_database_itself_refuses_unbalanced_postings_and_overdrawn_lots(
    ledger: RealLedger,
) -> None:
    """The second of the two guards, alone."""
    await ledger.tenant("checks", "startup")
    await ledger.grant("checks", "gc", 10)
    await ledger.book(total(4, tenant_id="checks"))
    insert = (
        "insert into entries (tenant_id, seq, kind, effective_at, recorded_at, hash, accounts,"
        " amounts, balances, caused_by, actor) select tenant_id, 99, 'adjustment', effective_at,"
        " recorded_at, hash, accounts, $1, balances, 'x', 'y' from entries"
        " where tenant_id = 'checks' and seq = 2"
    )
    for amounts in ([4, -3], [4, -4, 0], [None, 0]):
        async with ledger.writer.connection() as connection:
            with pytest.raises((asyncpg.CheckViolationError, asyncpg.NotNullViolationError)):
                await connection.execute(insert, amounts)
    for column in ("remaining_micro = -1", "remaining_micro = 11", "reserved_micro = 7"):
        async with ledger.writer.connection() as connection:
            with pytest.raises(asyncpg.CheckViolationError):
                await connection.execute(f"update lots set {column} where tenant_id = 'checks'")
    async with ledger.writer.connection() as connection:
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(
                "update books set charged_micro = 5 where tenant_id = 'checks'"
            )


@pytest.mark.defect("F71")
async def test_the_database_itself_refuses_a_maker_who_checks(ledger: RealLedger) -> None:
    """And nobody may rewrite who proposed, or what."""
    await ledger.tenant("maker", "startup")
    await ledger.grant("maker", "gm", 10)
    for change in (
        "update grants set proposed_by = 'approver' where grant_id = 'gm'",
        "update grants set grant_micro = 11 where grant_id = 'gm'",
    ):
        async with ledger.api.transaction(tenant="*") as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(change)
    async with ledger.api.transaction(tenant="*") as connection:
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(
                "update grants set approved_by = 'officer' where grant_id = 'gm'"
            )


@pytest.mark.defect("L2", "L4", "F44")
@pytest.mark.parametrize(
    ("edit", "finding"),
    [
        ("update entries set gpu_ns = gpu_ns + 1 where tenant_id = $1 and seq = 2", ".2:"),
        ("update entries set project_id = 'x' where tenant_id = $1 and seq = 2", ".2:"),
        ("update entries set over_limit = true where tenant_id = $1 and seq = 2", ".2:"),
        (
            "update entries set amounts = array[9,-9]::bigint[] where tenant_id = $1 and seq = 2",
            ".2:",
        ),
        ("update entries set hash = sha256('x') where tenant_id = $1 and seq = 1", ".1:"),
        ("delete from entries where tenant_id = $1 and seq = 2", ".3:"),
        ("delete from entries where tenant_id = $1 and seq = 3", "differ from the entries"),
        ("update lots set remaining_micro = 5 where tenant_id = $1", "differ from the entries"),
        ("update buckets set revision = 7 where tenant_id = $1", "buckets differ"),
        ("delete from buckets where tenant_id = $1", "buckets differ"),
        ("update books set recorded_at = now() where tenant_id = $1", "differ from the entries"),
    ],
)
async def test_an_edit_behind_our_back_is_found_and_named(
    ledger: RealLedger, edit: str, finding: str
) -> None:
    """Triggers off, superuser on: the audit still says which entry or which projection."""
    tenant_id = await ledger.tenant(f"edit-{abs(hash(edit))}", "startup")
    await ledger.grant(tenant_id, f"g-{tenant_id}", 100)
    await ledger.book(total(30, bucket="1", tenant_id=tenant_id))
    await ledger.book(total(30, bucket="2", tenant_id=tenant_id))
    assert [] == [line for line in await ledger.audit() if tenant_id in line]
    async with ledger.admin.transaction() as connection:
        await connection.execute("alter table entries disable trigger all")
        await connection.execute(edit, tenant_id)
        for trigger in ("entries_are_append_only", "entries_are_never_truncated"):
            await connection.execute(f"alter table entries enable always trigger {trigger}")
    found = [line for line in await ledger.audit() if tenant_id in line]
    assert found
    assert finding in found[0]
