"""Sums of usage on a real database: every grouping is exact, whoever writes meanwhile."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from hisab_contracts.ids import HubCode
from hisab_contracts.units import KARACHI, moment_of
from infrastructure import Database as Addresses
from infrastructure import Infrastructure
from integration.metering.stored import LHR, StoredMetering, opened
from metering.core.usage_reports import (
    INTERVALS,
    KEYS,
    UsageInterval,
    UsageKey,
    UsageLine,
    UsageReport,
)
from metering.jobs import fold_usage
from metering.store import hubs, usage_reports
from runtime.database import ALL_TENANTS
from runtime.migrations import migrate
from unit.metering.hub_events import HOUR_MS, NOON_MS, device, interval

KHI = HubCode("khi")
DAY_MS = 24 * HOUR_MS
FIRST_MS, LAST_MS = NOON_MS - 40 * DAY_MS, NOON_MS + 40 * DAY_MS
"""June to September 2025, on whole days of UTC but not of Karachi."""
BUCKETS = """
select tenant_id, hub, project_id, sku, price_class, hour_ms, gpu_ns, charge_micro,
       refunded_micro, voided_gpu_ns
  from buckets
"""


@pytest.fixture
def addresses(infrastructure: Infrastructure) -> Iterator[Addresses]:
    """A database of the test's own."""
    found = infrastructure.migrated_database("metering")
    yield found
    infrastructure.drop_database(found)


async def use(metering: StoredMetering) -> None:
    """Two tenants at two hubs, over ends of hours, days and months of Karachi."""
    await metering.facts(("ravi-health", "indus-foundry"))
    async with metering.writer.transaction() as connection:
        await hubs.add_hub(connection, KHI, "Karachi", 60_000)
    hours_ms = (0, 8 * HOUR_MS, 9 * HOUR_MS, 33 * HOUR_MS, -31 * DAY_MS, 30 * DAY_MS)
    for number, (start_ms, tenant_id) in enumerate(
        itertools.product(hours_ms, ("ravi-health", "indus-foundry"))
    ):
        for hub in (LHR, KHI):
            start = NOON_MS + start_ms + number * 1_000
            said = interval(
                start,
                start + 2 * HOUR_MS,
                hub=hub,
                node_id=f"{hub}-n1",
                tenant_id=tenant_id,
                allocation_id=f"job-{number}",
                project_id=("main", "second")[number % 2],
                sku=("h100-sxm-80", "l40s-48")[number % 3 == 0],
                devices=[device(f"GPU-{number}", share_ppm=123_457)],
            )
            await metering.take([said], hub=hub)


async def lines_of(
    metering: StoredMetering,
    keys: Sequence[UsageKey],
    every: UsageInterval | None = None,
    *,
    from_ms: int = FIRST_MS,
    until_ms: int = LAST_MS,
    most: int = 10_000,
    **wanted: str,
) -> list[UsageLine]:
    """List a report, in pages of so many lines."""
    names = {"tenant_id": None, "hub": None, "project_id": None, "sku": None, "price_class": None}
    report = UsageReport(
        **(names | wanted),  # type: ignore[arg-type]
        from_ms=from_ms,
        until_ms=until_ms,
        keys=frozenset(keys),
        interval=every,
    )
    found: list[UsageLine] = []
    async with metering.api.transaction(tenant=wanted.get("seen_by", ALL_TENANTS)) as connection:
        page = await usage_reports.list_usage(connection, report, None, most)
        found += page
        while len(page) == most:
            page = await usage_reports.list_usage(connection, report, page[-1].place, most)
            found += page
    return found


def start_of(every: UsageInterval | None, hour_ms: int, from_ms: int) -> int:
    """Where an hour's interval begins, by the calendar of Karachi."""
    at = moment_of(hour_ms).astimezone(KARACHI)
    if every is None:
        return from_ms
    if every != "hour":
        at = at.replace(hour=0)
    if every == "month":
        at = at.replace(day=1)
    return int(at.timestamp()) * 1_000


async def expected_lines(
    metering: StoredMetering,
    keys: Sequence[UsageKey],
    every: UsageInterval | None,
    from_ms: int,
    until_ms: int,
) -> dict[tuple[object, ...], tuple[int, ...]]:
    """Add the buckets up one by one."""
    sums: dict[tuple[object, ...], Counter[str]] = {}
    for row in await metering.rows(BUCKETS):
        if from_ms <= row["hour_ms"] < until_ms:
            start_ms = start_of(every, row["hour_ms"], from_ms)
            place = (start_ms, *(row[key] if key in keys else "" for key in KEYS))
            sums.setdefault(place, Counter()).update(
                {name: row[name] for name in list(row.keys())[6:]}
            )
    return {place: tuple(summed.values()) for place, summed in sums.items()}


def shown(lines: Sequence[UsageLine]) -> dict[tuple[object, ...], tuple[int, ...]]:
    """The same of a report."""
    assert len({line.place for line in lines}) == len(lines)
    return {tuple(line.place): tuple(line[1:]) for line in lines}


async def check_groupings(metering: StoredMetering, windows: Sequence[tuple[int, int]]) -> None:
    """Hold every grouping against the buckets, in pages of different sizes."""
    groupings = [
        keys for size in range(len(KEYS) + 1) for keys in itertools.combinations(KEYS, size)
    ]
    for number, (keys, every) in enumerate(itertools.product(groupings, (None, *INTERVALS))):
        from_ms, until_ms = windows[number % len(windows)]
        lines = await lines_of(
            metering, keys, every, from_ms=from_ms, until_ms=until_ms, most=(10_000, 3)[number % 2]
        )
        expected = await expected_lines(metering, keys, every, from_ms, until_ms)
        assert expected == shown(lines), (keys, every)
        assert sorted(lines) == lines


WINDOWS = (
    (FIRST_MS, LAST_MS),
    (NOON_MS, NOON_MS + 10 * HOUR_MS),
    (NOON_MS + 9 * HOUR_MS, NOON_MS + 33 * HOUR_MS),
    (NOON_MS - 31 * DAY_MS + HOUR_MS, NOON_MS + 33 * HOUR_MS),
    (NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS),
)


@pytest.mark.defect("M12", "M14", "M21")
async def test_every_grouping_is_exact_before_and_after_changes_are_folded(
    addresses: Addresses,
) -> None:
    """32 sets of keys by hour, day, month and none, over windows that cut days and months."""
    async with opened(addresses) as metering:
        await use(metering)
        assert [] == await metering.rows("select from usage_hours")
        await check_groupings(metering, WINDOWS)
        async with metering.writer.connection() as connection:
            await fold_usage(connection)
        assert [] == await metering.rows("select from usage_changes")
        await check_groupings(metering, WINDOWS)
        await metering.take([interval(allocation_id="job-late", devices=[device("GPU-late")])])
        await check_groupings(metering, WINDOWS[:2])
        assert 0 == await wrong_sums(metering)


async def test_what_falls_is_voided_and_is_refunded_is_in_the_sums(addresses: Addresses) -> None:
    """A correction takes half of every bucket, a repair all of some, a deletion the rest of one."""
    async with opened(addresses) as metering:
        await use(metering)
        async with metering.writer.connection() as connection:
            await fold_usage(connection)
        await metering.rows(
            "update buckets set gpu_ns = gpu_ns - gpu_ns / 2, voided_gpu_ns = gpu_ns / 2, "
            "charge_micro = charge_micro / 2, refunded_micro = charge_micro / 3 returning 1"
        )
        await metering.rows(
            "update buckets set gpu_ns = 0, charge_micro = 0, refunded_micro = 0, "
            "voided_gpu_ns = 0 where hub = 'khi' and tenant_id = 'ravi-health' returning 1"
        )
        await check_groupings_without_nothing(metering)
        async with metering.writer.connection() as connection:
            await fold_usage(connection)
        await metering.rows("delete from buckets where project_id = 'second' returning 1")
        await check_groupings_without_nothing(metering)
        async with metering.writer.connection() as connection:
            await fold_usage(connection)
        await check_groupings_without_nothing(metering)
        assert 0 == await wrong_sums(metering)


async def check_groupings_without_nothing(metering: StoredMetering) -> None:
    """A line of which nothing is left is not shown."""
    for keys, every in itertools.product((KEYS, ("hub",), ()), (None, *INTERVALS)):
        lines = await lines_of(metering, keys, every)
        expected = await expected_lines(metering, keys, every, FIRST_MS, LAST_MS)
        assert {place: sums for place, sums in expected.items() if any(sums)} == shown(lines)


async def test_a_filter_leaves_what_it_names(addresses: Addresses) -> None:
    """By each key; and row-level security shows a tenant its own, whatever the report says."""
    async with opened(addresses) as metering:
        await use(metering)
        async with metering.writer.connection() as connection:
            await fold_usage(connection)
        all_lines = await lines_of(metering, KEYS)
        for key in KEYS:
            for value in {getattr(line.place, key) for line in all_lines}:
                expected = [line for line in all_lines if getattr(line.place, key) == value]
                assert expected == await lines_of(metering, KEYS, **{key: value})
        report = UsageReport(
            tenant_id=None,
            hub=None,
            project_id=None,
            sku=None,
            price_class=None,
            from_ms=FIRST_MS,
            until_ms=LAST_MS,
            keys=frozenset(KEYS),
            interval=None,
        )
        async with metering.api.transaction(tenant="ravi-health") as connection:
            own = await usage_reports.list_usage(connection, report, None, 100)
        assert [line for line in all_lines if line.place.tenant_id == "ravi-health"] == own


async def wrong_sums(metering: StoredMetering) -> int:
    """How many sums are not what buckets come to."""
    wrong = 0
    async with metering.writer.connection() as connection:
        for hub in (LHR, KHI):
            wrong += await usage_reports.count_wrong_sums(connection, hub, FIRST_MS, LAST_MS)
    return wrong


async def test_wrong_sums_are_found_and_mended(addresses: Addresses) -> None:
    """An hour that lacks, a day that has too much, a row that is gone: each is counted."""
    async with opened(addresses) as metering:
        await use(metering)
        async with metering.writer.connection() as connection:
            await fold_usage(connection)
        await metering.take([interval(allocation_id="job-late", devices=[device("GPU-late")])])
        assert 0 == await wrong_sums(metering)
        await metering.rows("update usage_hours set gpu_ns = 1 where hub = 'khi' returning 1")
        assert 0 < await wrong_sums(metering)
        await metering.rows("update usage_days set charge_micro = charge_micro + 1 returning 1")
        await metering.rows("delete from usage_days where tenant_id = 'ravi-health' returning 1")
        before = await wrong_sums(metering)
        async with metering.writer.connection() as connection:
            for hub in (LHR, KHI):
                await usage_reports.mend_sums(connection, hub, FIRST_MS, LAST_MS)
        assert (True, 0) == (before > 10, await wrong_sums(metering))
        await check_groupings(metering, WINDOWS[:1])


async def test_the_command_counts_and_mends_wrong_sums(
    infrastructure: Infrastructure, addresses: Addresses
) -> None:
    """Nothing is wrong, then a day is, then it was mended: statuses 0, 1, 0 and 0."""
    async with opened(addresses) as metering:
        await use(metering)
        async with metering.writer.connection() as connection:
            await fold_usage(connection)
        assert (0, "wrong 0\n") == check_sums(infrastructure, addresses)
        changed = await metering.rows(
            "update usage_days set gpu_ns = gpu_ns + 1 where hub = 'khi' returning 1"
        )
        assert (1, f"wrong {len(changed)}\n") == check_sums(infrastructure, addresses)
        mended = check_sums(infrastructure, addresses, "--mend")
        assert (0, f"mended {len(changed)}\n") == mended
        assert (0, "wrong 0\n") == check_sums(infrastructure, addresses)
        await check_groupings(metering, WINDOWS[:1])


def check_sums(
    infrastructure: Infrastructure, addresses: Addresses, *options: str
) -> tuple[int, str]:
    """Run the command as an operator does."""
    environ = dict(os.environ) | {
        "HISAB_KAFKA": infrastructure.bootstrap_servers,
        "HISAB_DB_WRITER": addresses.writer,
    }
    done = subprocess.run(
        [sys.executable, "-m", "metering", "usage-sums", *options],
        env=environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


FOLDER = files("metering") / "migrations"


async def test_buckets_of_before_are_added_up_while_old_code_writes(
    infrastructure: Infrastructure, tmp_path: Path
) -> None:
    """What old code wrote before the trigger, between the two files, and after: all is in."""
    addresses = infrastructure.blank_database("metering")
    try:
        for file in sorted(FOLDER.iterdir(), key=lambda entry: entry.name):
            if file.name < "0030" and file.name.endswith(".sql"):
                shutil.copy(str(file), tmp_path / file.name)
        await migrate("metering", tmp_path, addresses.owner)
        await write_bucket(addresses, 1, NOON_MS)
        await write_bucket(addresses, 2, NOON_MS)
        shutil.copy(str(FOLDER / "0030_usage_sums.pre.sql"), tmp_path)
        await migrate("metering", tmp_path, addresses.owner, phase="pre")
        await write_bucket(addresses, 2, NOON_MS, gpu_ns=7)
        await write_bucket(addresses, 3, NOON_MS + DAY_MS)
        await migrate("metering", FOLDER, addresses.owner, phase="pre")
        await write_bucket(addresses, 3, NOON_MS + DAY_MS, gpu_ns=20)
        async with opened(addresses) as metering:
            assert 0 == await wrong_sums(metering)
            [line] = await lines_of(metering, ())
            assert (5 + 7 + 20, 3 * 11) == (line.gpu_ns, line.charge_micro)
            async with metering.writer.connection() as connection:
                await fold_usage(connection)
            assert 0 == await wrong_sums(metering)
            assert [line] == await lines_of(metering, ())
    finally:
        infrastructure.drop_database(addresses)


async def write_bucket(addresses: Addresses, number: int, hour_ms: int, *, gpu_ns: int = 5) -> None:
    """Write a bucket as the writer of an older release does."""
    connection: Any = await asyncpg.connect(addresses.writer)
    try:
        await connection.execute(
            "insert into buckets (bucket_id, tenant_id, project_id, allocation_id, hub, node_id, "
            "rate_line_id, price_version, sku, price_class, hour_ms, gpu_ns, charge_micro) "
            "values ($1, 't', 'main', 'job', 'lhr', 'n1', 'r', 'v', 's', 'c', $2, $3, 11) "
            "on conflict (bucket_id) do update set gpu_ns = excluded.gpu_ns",
            f"{number:032x}",
            hour_ms,
            gpu_ns,
        )
    finally:
        await connection.close()
