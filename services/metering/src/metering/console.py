"""Commands of metering's own: `accept-restore`, `reconcile` and `usage-sums`.

All read HISAB_KAFKA and HISAB_DB_WRITER. Where neither is set they take the stack that runs in
this folder, from `.hisab/stack.json`.

`accept-restore`: a database that was restored from a backup is behind what its consumers had read,
and they halt: they cannot know that this was meant. The command takes up what metering had
published since the backup, and accepts, on the record, that every hub is read again from where the
backup ended. `reconcile`: see `metering.reconcile`. `usage-sums` holds the sums that usage reports
read against the buckets, day by day of each hub, beside the running service; with `--mend` it puts
them right. Exit status 1: some are wrong, and were left so.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog

from hisab_contracts.topics import CHARGES, DECISIONS, hub_topic
from hisab_contracts.units import hour_floor_ms, instant_ms
from metering.core.usage_reports import interval_end_ms, interval_start_ms
from metering.facts import Facts
from metering.reconcile import reconcile
from metering.store import hubs, usage_reports
from runtime.database import Database, Limits, transaction_on
from runtime.kafka import Kafka
from runtime.outages import is_outage
from runtime.outbox import Outbox
from runtime.progress import accept_stored_progress

COMMANDS: Final = ("accept-restore", "reconcile", "usage-sums")
STACK: Final = Path(".hisab/stack.json")
ATTEMPTS: Final = 15
RETRY_S: Final = 2

_log = structlog.get_logger("metering.console")

Work = Callable[[Database, Kafka], Awaitable[int]]


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one of `COMMANDS` and return the exit status."""
    parser = argparse.ArgumentParser(prog="metering")
    commands = parser.add_subparsers(dest="command", required=True)
    accepting = commands.add_parser(
        "accept-restore", help="accept, on the record, that the database was restored"
    )
    for name in ("--accepted-by", "--reason"):
        accepting.add_argument(name, required=True)
    comparing = commands.add_parser(
        "reconcile", help="compare every bucket with what the ledger has booked of it"
    )
    comparing.add_argument("--repair", action="store_true", help="state anew what differs")
    comparing.add_argument("--since", help="only hours from this instant on (RFC 3339)")
    summing = commands.add_parser(
        "usage-sums", help="hold the sums that usage reports read against the buckets"
    )
    summing.add_argument("--mend", action="store_true", help="put right what is wrong")
    chosen = parser.parse_args(arguments)

    async def work(database: Database, kafka: Kafka) -> int:
        if chosen.command == "reconcile":
            since_ms = 0 if chosen.since is None else hour_floor_ms(instant_ms(chosen.since))
            return await reconcile(database, kafka, since_ms=since_ms, restate=chosen.repair)
        if chosen.command == "usage-sums":
            return await _check_sums(database, mend=chosen.mend)
        return await _accept_restore(database, kafka, chosen.accepted_by, chosen.reason)

    kafka, writer = _addresses(environ)
    return asyncio.run(_connected(kafka, writer, work))


async def _accept_restore(database: Database, kafka: Kafka, accepted_by: str, reason: str) -> int:
    """Take up forgotten facts, then accept where each partition of a hub is read on from."""
    await _take_up_facts(database, kafka)
    async with database.transaction() as connection:
        topics = [hub_topic(hub) for hub in await hubs.list_hubs(connection)]
        partitions = await kafka.partitions(topics)
        accepted = await accept_stored_progress(connection, partitions, accepted_by, reason)
    _log.info("restore accepted", partitions=accepted)
    return 0


async def _take_up_facts(database: Database, kafka: Kafka) -> None:
    """Take up forgotten facts; tried again, because an operator runs this while all starts up."""
    facts = Facts(Outbox((CHARGES, DECISIONS)))
    for attempt in range(1, ATTEMPTS + 1):
        try:
            await facts.catch_up(kafka, database)
        except Exception as error:
            if not is_outage(error) or attempt == ATTEMPTS:
                raise
            _log.warning("own facts not read yet", attempt=attempt, error=repr(error))
            await asyncio.sleep(RETRY_S)
        else:
            return


async def _check_sums(database: Database, *, mend: bool) -> int:
    """Count, or mend, wrong sums of every hub, a day per transaction; print how many there were."""
    check = usage_reports.mend_sums if mend else usage_reports.count_wrong_sums
    wrong = 0
    async with database.connection() as connection:
        for hub in await hubs.list_hubs(connection):
            used = await usage_reports.hours_used(connection, hub)
            if used is None:
                continue
            from_ms = interval_start_ms("day", used[0])
            while from_ms <= used[1]:
                until_ms = interval_end_ms("day", from_ms, 1)
                async with transaction_on(connection):
                    wrong += await check(connection, hub, from_ms, until_ms)
                from_ms = until_ms
    sys.stdout.write(f"{'mended' if mend else 'wrong'} {wrong}\n")
    return 0 if mend or not wrong else 1


def _addresses(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return where Kafka is, and the database as its writer; SystemExit says what is missing."""
    names = ("HISAB_KAFKA", "HISAB_DB_WRITER")
    kafka, writer = (environ.get(name, "") for name in names)
    if kafka and writer:
        return kafka, writer
    if kafka or writer or not STACK.exists():
        missing = " and ".join(name for name in names if not environ.get(name))
        raise SystemExit(f"{missing} not set, and no stack runs in this folder ({STACK})")
    stack = msgspec.json.decode(STACK.read_bytes(), type=_Stack)
    return stack.kafka.bootstrap_servers, stack.postgres.metering.writer


class _Broker(msgspec.Struct, frozen=True):
    bootstrap_servers: str


class _Roles(msgspec.Struct, frozen=True):
    writer: str


class _Databases(msgspec.Struct, frozen=True):
    metering: _Roles


class _Stack(msgspec.Struct, frozen=True):
    """What these commands read of `stack.json`."""

    kafka: _Broker
    postgres: _Databases


async def _connected(kafka_servers: str, writer: str, work: Work) -> int:
    """Connect, work, disconnect."""
    database = Database(writer, name="metering-console", limits=Limits(max_connections=4))
    kafka = Kafka(kafka_servers, client="metering-console", instance="console")
    await database.open()
    try:
        return await work(database, kafka)
    finally:
        await kafka.close()
        await database.close()
