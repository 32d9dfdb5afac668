"""Transactions, leases, migrations and roles on a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
import pytest
from structlog.testing import capture_logs

from integration.runtime.bare import Bare
from runtime import database, progress
from runtime.clock import now_ms
from runtime.database import (
    ALL_TENANTS,
    Database,
    Unavailable,
    after_commit,
    checked_now_ms,
    transaction_on,
)
from runtime.kafka import Message
from runtime.machine import Partition, Slice
from runtime.migrations import EditedHistory, migrate
from runtime.outbox import Outbox
from runtime.service import API_CONNECTIONS, Kit

if TYPE_CHECKING:
    from runtime.database import Connection

P0 = Partition("t", 0)
RANGE = progress.PartitionRange(0, 100, None)


async def test_an_applied_migration_that_was_edited_is_refused(bare: Bare, tmp_path: Path) -> None:
    """History is append-only: the hash of every applied file is kept."""
    file = tmp_path / "0001_first.pre.sql"
    file.write_text("create table first (id int)")
    assert ["metering/0001_first.pre.sql"] == await migrate("metering", tmp_path, bare.dsns.owner)
    assert [] == await migrate("metering", tmp_path, bare.dsns.owner)
    file.write_text("create table first (id bigint)")
    with pytest.raises(EditedHistory):
        await migrate("metering", tmp_path, bare.dsns.owner)


@pytest.mark.defect("F38")
async def test_a_migration_gives_up_on_a_lock_after_four_seconds(
    bare: Bare, tmp_path: Path
) -> None:
    """A migration that waits for a lock makes everybody behind it wait: it must not wait long."""
    (tmp_path / "0001_first.pre.sql").write_text("alter table outbox add column more int")
    admin = await bare.admin()
    async with admin.transaction():
        await admin.execute("lock table outbox in share mode")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await migrate("metering", tmp_path, bare.dsns.owner)
    await admin.close()


async def test_the_roles_own_nothing(bare: Bare) -> None:
    """api, writer and reader own no table and may not change the schema."""
    admin = await bare.admin()
    owners = await admin.fetch(
        "select distinct tableowner from pg_tables where schemaname = 'public'"
    )
    assert ["metering_owner"] == [row["tableowner"] for row in owners]
    await admin.close()
    for dsn in (bare.dsns.api, bare.dsns.writer, bare.dsns.reader):
        connection = await asyncpg.connect(dsn)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("create table mine (id int)")
        await connection.close()


@pytest.mark.defect("L26", "F66")
async def test_a_tenant_sees_only_its_own_idempotency_rows(bare: Bare) -> None:
    """Row-level security by `app.tenant`; without it nothing is visible."""
    insert = "insert into idempotency (scope, idempotency_key, command, document) values "
    async with bare.open_kit() as kit:
        for tenant in ("a", "b"):
            async with kit.api.transaction(tenant=tenant) as connection:
                await connection.execute(insert + "($1, 'k', 'c', '')", tenant)
        seen: dict[str | None, int] = {}
        for sees in ("a", ALL_TENANTS, None):
            async with kit.api.transaction(tenant=sees) as connection:
                seen[sees] = await connection.fetchval("select count(*) from idempotency")
        assert {"a": 1, ALL_TENANTS: 2, None: 0} == seen
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with kit.api.transaction(tenant="a") as connection:
                await connection.execute(insert + "('b', 'other', 'c', '')")


@pytest.mark.defect("F13")
async def test_a_zombie_is_fenced_by_the_owner_epoch(bare: Bare) -> None:
    """Who was claimed over can no longer move the offset; nor can anybody move it backwards."""
    async with bare.open_kit() as kit, kit.writer.connection() as connection:
        (old,) = await progress.claim(connection, {P0: RANGE}, compacted=False)
        (new,) = await progress.claim(connection, {P0: RANGE}, compacted=False)
        assert (1, 2) == (old.epoch, new.epoch)
        with pytest.raises(progress.FencedError):
            await progress.advance(connection, [Slice(P0, 0, 5, [], old.epoch)])
        await progress.advance(connection, [Slice(P0, 0, 5, [], new.epoch)])
        with pytest.raises(progress.FencedError):
            await progress.advance(connection, [Slice(P0, 5, 4, [], new.epoch)])


async def test_an_override_is_used_once_and_stays_on_the_record(bare: Bare) -> None:
    """An operator's answer to a halt: the next claim starts there, later ones do not."""
    hint = progress.PartitionRange(0, 100, 90)
    async with bare.open_kit() as kit:
        admin = await asyncpg.connect(bare.dsns.owner)
        async with kit.writer.connection() as connection:
            await progress.claim(connection, {P0: RANGE}, compacted=False)
            await progress.override_progress(
                connection, progress.ProgressOverride(P0, 7, "op", "restored")
            )
            (claim,) = await progress.claim(connection, {P0: hint}, compacted=False)
            assert (7, None) == (claim.next_offset, claim.hint_offset)
            (claim,) = await progress.claim(connection, {P0: hint}, compacted=False)
            assert (7, 90) == (claim.next_offset, claim.hint_offset)
        used = await admin.fetchval("select used_at is not null from consumer_override")
        assert used
        await admin.close()


@pytest.mark.defect("F37")
async def test_without_a_free_connection_the_answer_is_unavailable_and_nothing_leaks(
    bare: Bare,
) -> None:
    """The acquire deadline; cancelled holders give their connections back."""
    async with bare.open_kit() as kit:
        held = asyncio.Semaphore(0)

        async def hold() -> None:
            async with kit.api.transaction():
                held.release()
                await asyncio.Event().wait()

        holders = []
        for _ in range(API_CONNECTIONS):
            # One after the other: sixteen new connections at once take a busy machine too long.
            holders.append(asyncio.create_task(hold()))
            await held.acquire()
        with pytest.raises(Unavailable):
            async with kit.api.connection():
                pass
        for holder in holders:
            holder.cancel()
        await asyncio.gather(*holders, return_exceptions=True)
        async with kit.api.connection() as connection:
            assert 1 == await connection.fetchval("select 1")


async def test_a_server_that_does_not_answer_at_the_start_is_asked_again(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice it takes a connection and says nothing; a service that starts then is not given up."""
    monkeypatch.setattr(database, "CONNECT_TIMEOUT_S", 1)
    server = urlsplit(bare.dsns.api)
    silent = [True, True]

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            target.write(data)
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if silent:
            silent.pop()
            await reader.read()
            writer.close()
            return
        answers, asked = await asyncio.open_connection(server.hostname, server.port)
        await asyncio.gather(copy(reader, asked), copy(answers, writer))

    late = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = late.sockets[0].getsockname()[1]
    account = server.netloc.rpartition("@")[0]
    pool = Database(server._replace(netloc=f"{account}@127.0.0.1:{port}").geturl(), name="late")
    await pool.open()
    await pool.ping()
    await pool.close()
    late.close()
    assert [] == silent


async def test_after_commit_runs_only_when_durable(bare: Bare) -> None:
    """A rolled back transaction wakes nobody."""
    called: list[str] = []

    async def rolled_back(kit: Kit) -> None:
        async with kit.writer.transaction():
            after_commit(lambda: called.append("rolled back"))
            raise ZeroDivisionError

    async with bare.open_kit() as kit:
        with pytest.raises(ZeroDivisionError):
            await rolled_back(kit)
        async with kit.writer.transaction():
            after_commit(lambda: called.append("committed"))
    assert ["committed"] == called


async def test_one_process_at_a_time_holds_a_lease(bare: Bare) -> None:
    """The second waits, and gets it when the first one's connection ends."""
    stop = asyncio.Event()
    async with bare.open_kit() as first, bare.open_kit() as second:
        async with first.writer.lease("x", stop) as mine:
            waiting = asyncio.create_task(_held(second, stop))
            await asyncio.sleep(1)
            assert not waiting.done()
            assert mine is not None
            mine.terminate()
        async with asyncio.timeout(600):
            assert await waiting


async def _held(kit: Kit, stop: asyncio.Event) -> bool:
    async with kit.writer.lease("x", stop) as connection:
        return connection is not None


async def test_a_leased_task_stops_loudly_at_a_clock_step_and_goes_on_when_it_is_over(
    bare: Bare,
) -> None:
    """One reading a day ahead: nothing is done by it, an error names it, the next reading works."""
    steps_ms = iter([86_400_000])
    stop = asyncio.Event()
    done: list[int] = []

    def clock() -> int:
        return now_ms() + next(steps_ms, 0)

    async def work(connection: Connection) -> None:
        done.append(await checked_now_ms(connection, clock))
        stop.set()

    async with bare.open_kit() as kit:
        with capture_logs() as logs:
            await kit.writer.run_leased("clock", work, interval_ms=1, stop=stop)
    assert 1 == len(done)
    assert abs(done[0] - now_ms()) < 86_400_000 // 2
    assert ["error", "warning"] == [log["log_level"] for log in logs]
    assert "clock step: nothing is decided by this reading" == logs[0]["event"]
    assert "ClockStep" in logs[1]["error"]


@pytest.mark.defect("F28", "F30")
async def test_a_commit_is_never_cancelled(bare: Bare) -> None:
    """Whoever is cancelled while it commits has committed."""
    async with bare.open_kit() as kit:
        for _ in range(20):
            task = asyncio.create_task(_write(kit))
            await asyncio.sleep(0.003)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        async with kit.writer.connection() as connection:
            busy = await connection.fetchval(
                "select count(*) from pg_stat_activity"
                " where datname = current_database() and state like 'idle in%'"
            )
        assert 0 == busy


async def _write(kit: Kit) -> None:
    async with kit.writer.connection() as connection, transaction_on(connection):
        await Outbox(("t",)).write(connection, [Message("t", b"k", b"v")])
