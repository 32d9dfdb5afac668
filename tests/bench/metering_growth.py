"""What a look of metering costs when ten times as much is stored beside what it is about.

Each figure is measured at two sizes, on a database of its own that no service touches; `growth` is
what the same work costs at the larger size over what it costs at the smaller one (of figures per
row: what a row costs). The statements and handlers are those of the service.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

from infrastructure import Infrastructure
from integration.metering.stored import LHR, StoredMetering, opened
from metering.jobs import Finals
from metering.store import hubs
from metering.store.allocations import lock_due_allocations
from metering.store.quarantine import QuarantineFilter, list_quarantined
from runtime.database import watched_by
from stack import Stack
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, interval

LOOKS = 200
ENDINGS = (10_000, 100_000)
RELEASED = (10_000, 100_000)
SOURCES = (1_000, 10_000)
BACKFILLS = (400, 4_032)
"""Records of 31 days each: 3 million buckets in one batch at the larger size."""
HOURS_OF_A_RECORD = 744


async def measure_endings(stack: Stack) -> list[dict[str, Any]]:
    """A look while so many ended allocations rest; and all of them becoming final at once."""
    infrastructure = Infrastructure.of(stack)
    looks, lasts = [], []
    for size in ENDINGS:
        async with _metering(infrastructure) as metering:
            await metering.rows(_RESTING, NOON_MS, size)

            async def look(metering: StoredMetering = metering) -> None:
                async with metering.writer.transaction() as connection:
                    await lock_due_allocations(connection, {LHR: None}, 200)

            looks.append(await _seconds_of(look, LOOKS) / LOOKS)
            async with metering.writer.transaction() as connection:
                await hubs.save_watermark(connection, LHR, NOON_MS)
            job = Finals(metering.outbox)

            async def finish(metering: StoredMetering = metering, job: Finals = job) -> None:
                waiting = "select from allocations where not final limit 1"
                async with metering.writer.connection() as connection:
                    while await metering.rows(waiting):
                        await job.run(connection)

            lasts.append(await _seconds_of(finish) / size)
    return [
        _figure("metering.endings", ENDINGS, looks, "looks/s"),
        _figure("metering.endings_final", ENDINGS, lasts, "1/s"),
    ]


_RESTING = """
insert into allocations (hub, allocation_id, tenant_id, project_id, ended_ms, cause,
                         reserved_gpu_ms, check_at)
select 'lhr', 'job-' || n, 'ravi-health', 'main', $1, 'user', 9, 'infinity'
  from generate_series(1, $2::int) as n
"""


async def measure_quarantine_list(stack: Stack) -> list[dict[str, Any]]:
    """A page of 100 open records behind so many that were released."""
    infrastructure = Infrastructure.of(stack)
    pages = []
    for size in RELEASED:
        async with _metering(infrastructure) as metering:
            await metering.rows(_SET_ASIDE, size, "released")
            await metering.rows(_SET_ASIDE, 150, "open")
            await metering.rows("analyze quarantine")

            async def page(metering: StoredMetering = metering) -> None:
                async with metering.api.transaction(tenant="*") as connection:
                    wanted = QuarantineFilter("lhr", "conflict", "open")
                    found, more = await list_quarantined(connection, wanted, 0, 100)
                if (len(found), more) != (100, True):
                    raise RuntimeError(f"a page of {len(found)}")

            pages.append(await _seconds_of(page, LOOKS) / LOOKS)
    return [_figure("metering.quarantine_list", RELEASED, pages, "pages/s")]


_SET_ASIDE = """
insert into quarantine (hub, topic, partition, record_offset, record_ms, reason, detail, state,
                        counts, hour_ms, had_new, judged_generation, message_value,
                        message_headers, value_sha256, closed_at)
select 'lhr', $2::text, 0, n, 0, 'conflict', 'two claims', $2::text, false, 0, false, 0,
       decode(repeat('00', 700), 'hex'), '\\x90', '', case when $2 = 'open' then null else now() end
  from generate_series(1, $1::int) as n
"""


async def measure_look(stack: Stack) -> list[dict[str, Any]]:
    """The look at hubs, five times a second while records come in: per active source."""
    infrastructure = Infrastructure.of(stack)
    looks = []
    for size in SOURCES:
        async with _metering(infrastructure) as metering:
            await metering.rows(_ACTIVE, size)

            async def look(metering: StoredMetering = metering) -> None:
                async with metering.writer.connection() as connection:
                    await hubs.view_hubs(connection)

            looks.append(await _seconds_of(look, LOOKS) / LOOKS / size)
    return [_figure("metering.look", SOURCES, looks, "sources/s")]


_ACTIVE = """
insert into sources (hub, source, node_path, contiguous, beyond, watermark_ms, standing,
                     last_seen_ms)
select 'lhr', 'source-' || n, 'node-' || n, 1, '[]', n, 'active', n
  from generate_series(1, $1::int) as n
"""


async def measure_backfill(stack: Stack) -> list[dict[str, Any]]:
    """One batch of a month per record; `longest_silence_ms` is what the watchdog sees of it."""
    infrastructure = Infrastructure.of(stack)
    costs, silences = [], []
    for size in BACKFILLS:
        async with _metering(infrastructure) as metering:
            noted = [time.perf_counter()]
            usage = [
                interval(
                    NOON_MS - HOURS_OF_A_RECORD * HOUR_MS,
                    NOON_MS,
                    allocation_id=f"job-{number}",
                    devices=[device(f"GPU-{number}")],
                )
                for number in range(size)
            ]
            began = time.perf_counter()
            with watched_by(partial(_note, noted)):
                await metering.take(usage)
            ended = time.perf_counter()
            noted.append(ended)
            costs.append((ended - began) / size / HOURS_OF_A_RECORD)
            silences.append(max(after - at for at, after in pairwise(noted)))
    buckets = tuple(size * HOURS_OF_A_RECORD for size in BACKFILLS)
    figure = _figure("metering.backfill", buckets, costs, "buckets/s")
    return [figure | {"longest_silence_ms": [round(1000 * silence) for silence in silences]}]


def _note(noted: list[float]) -> None:
    noted.append(time.perf_counter())


@asynccontextmanager
async def _metering(infrastructure: Infrastructure) -> AsyncIterator[StoredMetering]:
    """Metering's tables in a database of their own."""
    addresses = infrastructure.migrated_database("metering")
    try:
        async with opened(addresses) as metering:
            await metering.facts(["ravi-health"])
            yield metering
    finally:
        infrastructure.drop_database(addresses)


async def _seconds_of(work: Callable[[], Awaitable[None]], times: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(times):
        await work()
    return time.perf_counter() - began


def _figure(name: str, sizes: tuple[int, ...], costs: list[float], unit: str) -> dict[str, Any]:
    return {
        "name": name,
        "sizes": list(sizes),
        "values": [round(1 / cost, 1) for cost in costs],
        "unit": unit,
        "growth": round(costs[1] / costs[0], 2),
    }
