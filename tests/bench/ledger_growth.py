"""What waits to be published, and a book of years that is audited: each in two sizes.

While the ledger is down, charges are booked by its own consumer into one book: 100 000, and later a
million more. Then it starts and publishes all that waits; and the audit is run as an operator runs
it. `growth` is the time per entry at the larger size over that at the smaller one (1.0 is linear);
the peak of memory is that of the process, at both sizes.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import Any

import asyncpg
import msgspec
from ledger_charges import charge_of, on_database, open_tenants
from metering_events import peak_rss_mib

from hisab_contracts.topics import CHARGES
from ledger.consumer import ChargeConsumer
from runtime.consumer import Batch
from runtime.database import Database
from runtime.records import Record
from stack import Stack

SMALL, LARGE = 100_000, 1_000_000
TENANT = "bench-long"
ROWS_AT_ONCE = 1_000
PUBLISHED = """
select coalesce(sum(entries), 0)::bigint from sequence_windows where published_at is not null
"""


async def measure(stack: Stack, *, small: int = SMALL, large: int = LARGE) -> list[dict[str, Any]]:
    """Return both figures; needs a running, seeded stack of its own."""
    for other in ("metering", "invoicing"):
        stack.stop(other)
    await open_tenants(stack, [TENANT])
    catchups, audits, booked = [], [], 0
    for count in (small, large):
        stack.stop("ledger")
        await _book(stack, booked, count)
        booked += count
        catchups.append(await _catch_up(stack, count))
        audits.append(_audit(stack, booked))
    return [
        _figure("ledger.sequencer_catchup", *catchups),
        _figure("ledger.audit", *audits),
    ]


def _figure(name: str, small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """Put both sizes into one row."""
    return {
        "name": name,
        **large,
        "baseline": {"name": f"{name} at {small['work']}", **small},
        "ratio": round(large["value"] / small["value"], 3),
        "growth": round(small["value"] / large["value"], 3),
    }


def _measured(work: int, seconds: float, rss_mib: int) -> dict[str, Any]:
    return {
        "value": round(work / seconds),
        "unit": "1/s",
        "work": work,
        "seconds": round(seconds, 2),
        "peak_rss_mib": rss_mib,
    }


async def _book(stack: Stack, begin: int, count: int) -> None:
    """Book charges as the consumer does; nothing publishes them."""
    admin = stack.content()["infrastructure"]["postgres"]["admin"]
    dsn = on_database(admin, stack.database("ledger", "reader"))
    database = Database(dsn, name="bench-long")
    await database.open()
    try:
        consumer = ChargeConsumer(lambda: None)
        for first in range(begin, begin + count, ROWS_AT_ONCE):
            records = [
                Record(CHARGES, 0, n, 0, None, msgspec.json.encode(charge_of(TENANT, n)), ())
                for n in range(first, first + ROWS_AT_ONCE)
            ]
            async with database.transaction() as connection:
                await consumer.book_charges(Batch(records, {}), connection)
    finally:
        await database.close()


async def _catch_up(stack: Stack, waiting: int) -> dict[str, Any]:
    """Start the ledger, and time from the first published window until nothing waits."""
    database = await asyncpg.connect(stack.database("ledger", "reader"))
    try:
        before = first = int(await database.fetchval(PUBLISHED))
        stack.start("ledger")
        while first == before:
            await asyncio.sleep(0.01)
            first = int(await database.fetchval(PUBLISHED))
        started_s, done = time.perf_counter(), first
        while done < before + waiting:
            await asyncio.sleep(0.05)
            done = int(await database.fetchval(PUBLISHED))
        seconds = time.perf_counter() - started_s
    finally:
        await database.close()
    return _measured(done - first, seconds, peak_rss_mib(stack.pid("ledger")))


def _audit(stack: Stack, entries: int) -> dict[str, Any]:
    """Run the audit as an operator does; it must find the books sound."""
    started_s = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "ledger", "audit"],
        env=os.environ | {"HISAB_DB_READER": stack.database("ledger", "reader")},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        said = "" if child.stdout is None else child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started_s
    if child.returncode != 0:
        raise RuntimeError(f"the audit found: {said}")
    return _measured(entries, seconds, usage.ru_maxrss // 1024)
