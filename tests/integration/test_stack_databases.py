"""The roles of the local stack's database server."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg
import pytest

from databases import SERVICES, role_names
from infrastructure import Database, Infrastructure

_ROLES = """
select rolname, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication, rolinherit
from pg_roles
where rolname = any($1)
order by rolname
"""

_OWNED = """
select d.classid::regclass::text as kind, d.objid
from pg_shdepend as d
join pg_roles as r on r.oid = d.refobjid
where d.deptype = 'o' and r.rolname = any($1)
"""


async def test_no_role_of_a_service_is_privileged(infrastructure: Infrastructure) -> None:
    """None of the twelve roles is a superuser, passes by row-level security or makes roles."""
    connection = await asyncpg.connect(infrastructure.server.admin)
    try:
        rows = await connection.fetch(_ROLES, role_names())
    finally:
        await connection.close()
    assert sorted(role_names()) == [row["rolname"] for row in rows]
    owners = {f"{service}_owner" for service in SERVICES}
    assert [] == [row["rolname"] for row in rows if any(list(row.values())[1:-1])]
    # An owner of PostgreSQL 15 creates by what it inherits; it is a member of nothing else.
    assert owners == {row["rolname"] for row in rows if row["rolinherit"]}


async def test_only_owners_own_anything(
    infrastructure: Infrastructure, blank: Callable[[str], Database]
) -> None:
    """What api, writer and reader of a service own anywhere on the server: nothing."""
    serving = [name for name in role_names() if not name.endswith("_owner")]
    connection = await asyncpg.connect(blank("ledger").admin)
    try:
        assert [] == await connection.fetch(_OWNED, serving)
    finally:
        await connection.close()


@pytest.mark.parametrize("service", SERVICES)
async def test_every_role_of_a_service_connects(
    service: str, blank: Callable[[str], Database]
) -> None:
    """Each role reaches its service's database with its own password and is who it says."""
    database = blank(service)
    for part in ("owner", "api", "writer", "reader"):
        connection = await asyncpg.connect(getattr(database, part))
        try:
            assert f"{service}_{part}" == await connection.fetchval("select current_user")
        finally:
            await connection.close()


async def test_serving_roles_cannot_create_tables(blank: Callable[[str], Database]) -> None:
    """Api and writer have no way to make anything of their own."""
    database = blank("metering")
    for dsn in (database.api, database.writer, database.reader):
        connection = await asyncpg.connect(dsn)
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("create table own (id int)")
        finally:
            await connection.close()


async def test_the_server_is_durable_and_checked(infrastructure: Infrastructure) -> None:
    """The server flushes what it acknowledges and checks its pages, as in production."""
    connection = await asyncpg.connect(infrastructure.server.admin)
    try:
        shown = {
            name: await connection.fetchval("select current_setting($1)", name)
            for name in ("fsync", "synchronous_commit", "data_checksums", "full_page_writes")
        }
    finally:
        await connection.close()
    assert dict.fromkeys(shown, "on") == shown
