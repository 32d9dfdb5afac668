"""Metering's database is put back to an earlier point under traffic, as the README says."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from databases import find_binaries
from demo.api import Json
from e2e.outside import MINUTE, Outside, at, outside_of, unique, until
from stack import Stack

ROOT = Path(__file__).resolve().parents[2]
PKR = 1_000_000
BLOCK = re.compile(r"^\.venv/bin/(python -m metering [a-z-]+.*)$", re.MULTILINE)


def readme_command(name: str) -> str:
    """Return a command of the README's passage, as it is written there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    passage = text[text.index("### After a restore") :]
    commands = [match[1] for match in BLOCK.finditer(passage)]
    (command,) = [command for command in commands if f"metering {name}" in command]
    return command


async def run(stack: Stack, command: str) -> tuple[int, str]:
    """Run a command in a folder whose `.hisab` is this stack's; return its status and output."""
    command = command.replace("python ", f"{sys.executable} ", 1)

    def work() -> tuple[int, str]:
        folder = stack.folder / "console"
        folder.mkdir(exist_ok=True)
        if not (folder / ".hisab").exists():
            (folder / ".hisab").symlink_to(stack.folder)
        done = subprocess.run(
            ["bash", "-c", f"USER=operator; {command}"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return await asyncio.to_thread(work)


def dump(stack: Stack, backup: Path) -> None:
    """Take a backup of metering's database while it runs."""
    _postgres(stack, "pg_dump", "--format=custom", f"--file={backup}")


def restore(stack: Stack, backup: Path) -> None:
    """Put metering's database back to the backup; metering is stopped."""
    _postgres(stack, "pg_restore", "--clean", "--if-exists", "--exit-on-error", str(backup))


def _postgres(stack: Stack, program: str, *arguments: str) -> None:
    content = stack.content()
    server = content["infrastructure"]["postgres"]["admin"]
    binaries = find_binaries(content["provider"]["postgres"])
    dsn = f"{server.rpartition('/')[0]}/metering"
    subprocess.run(
        [binaries.bin / program, f"--dbname={dsn}", *arguments],
        check=True,
        capture_output=True,
        timeout=300,
    )


@asynccontextmanager
async def traffic(outside: Outside, tenant_id: str, job: str) -> AsyncIterator[None]:
    """Say a minute of usage again and again while the block runs, whatever it does."""

    async def say() -> None:
        for minute in range(100_000):
            start_ms = at("00:00") + minute * MINUTE
            usage = outside.usage("khi", job, tenant_id, job, start_ms, start_ms + MINUTE)
            await outside.say(usage)
            await asyncio.sleep(0.05)

    speaking = asyncio.create_task(say())
    try:
        yield
    finally:
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)


async def drained(outside: Outside) -> None:
    """Wait until all that was said has been metered, booked and published."""
    for service in ("metering", "ledger"):
        await until(
            lambda of=service: outside.api.get(of, "/v1/status", "operator"),  # type: ignore[misc]
            lambda x: x["lag_records"] == 0 and x["outbox_depth"] == 0,
        )


async def charged_micro(outside: Outside, *tenants: str) -> list[int]:
    """What each tenant has been charged."""
    return [int((await outside.balance(tenant))["charged_micro"]) for tenant in tenants]


async def add_price(outside: Outside, sku: str, clock: str, micro: int) -> None:
    """Add a price of a SKU from an hour of the day on."""
    listed = {"sku": sku, "price_class": "on_demand", "micro_per_gpu_hour": str(micro)}
    body: Json = {
        "currency": "PKR",
        "valid_from": f"2025-07-31T{clock}:00.000Z",
        "valid_until": None,
        "prices": [listed],
    }
    await outside.api.post("metering", "/v1/price-lists", "operator", body)


async def since_the_backup(outside: Outside, new: str, first: str, second: str) -> tuple[str, str]:
    """What the restored metering will have forgotten; returns a hub and a dismissed SKU."""
    await add_price(outside, "h100-sxm-80", "15:00", 1_000 * PKR)
    hub = await outside.hub()
    await until(
        lambda: outside.api.get("metering", "/v1/status", "operator"),
        lambda x: hub in x["complete_until"],
    )
    # An hour at the new price, on a hub that is new, too.
    await outside.say(outside.usage(hub, "n1", new, "job-new", at("15:00"), at("16:00")))
    await outside.charged(new, 1_000 * PKR)
    # Two claims on one device, in two partitions: n1 is read before n2 now, perhaps not again.
    await outside.say(
        outside.usage("lhr", "n1", first, "job-1", at("10:00"), at("11:00"), device="GPU-1")
    )
    await outside.charged(first, 840 * PKR)
    claim = outside.usage(
        "lhr", "n2", second, "job-2", at("10:00"), at("11:00"), device="GPU-1", node_id="n1"
    )
    await outside.say(claim)
    # And a record whose SKU nobody prices: an operator leaves it where it is.
    sku = unique("sku")
    await outside.say(outside.usage("lhr", "n3", first, "job-3", at("10:00"), at("11:00"), sku=sku))
    waiting = await until(lambda: outside.quarantined("lhr"), lambda items: len(items) == 2)
    [dismissed] = [item for item in waiting if item["reason"] == "unknown-sku"]
    path = f"/v1/quarantine/{dismissed['quarantine_id']}/dismiss"
    await outside.api.post("metering", path, "operator", {"reason": "a test of the hub's"})
    return hub, sku


async def lose_a_bucket(stack: Stack, tenant_id: str) -> None:
    """Damage metering's database: a bucket that the ledger has booked is gone."""
    content = stack.content()["infrastructure"]["postgres"]
    connection = await asyncpg.connect(f"{content['admin'].rpartition('/')[0]}/metering")
    try:
        await connection.execute("delete from buckets where tenant_id = $1", tenant_id)
    finally:
        await connection.close()


@pytest.mark.slow
@pytest.mark.defect("M3", "M9", "F22", "F24")
async def test_metering_restored_under_traffic_ends_with_difference_0(own_stack: Stack) -> None:
    """Prices, a hub and a decision were forgotten, a conflict is read again: each once."""
    backup = own_stack.folder / "metering.backup"
    async with outside_of(own_stack) as outside:
        busy, old, new, first, second = [await outside.tenant() for _ in range(5)]
        await outside.say(outside.usage("lhr", "n1", old, "job-old", at("08:00"), at("09:00")))
        await outside.charged(old, 840 * PKR)
        async with traffic(outside, busy, "busy-1"):
            await until(lambda: charged_micro(outside, busy), lambda charged: charged[0] > 0)
            await asyncio.to_thread(dump, own_stack, backup)
            hub, sku = await since_the_backup(outside, new, first, second)
            await asyncio.to_thread(own_stack.stop, "metering")
            await asyncio.to_thread(restore, own_stack, backup)
            status, said = await run(own_stack, readme_command("accept-restore"))
            assert 0 == status, said
            await asyncio.to_thread(own_stack.start, "metering")
            status, said = await run(own_stack, readme_command("reconcile"))
            assert 0 == status, said
            assert "difference 0" in said
        await drained(outside)
        assert [840 * PKR, 1_000 * PKR] == await charged_micro(outside, old, new)
        # One of the two claims has the device; nobody pays for it twice.
        assert [0, 840 * PKR] == sorted(await charged_micro(outside, first, second))
        for code in ("lhr", "khi", hub):
            assert "0" == (await outside.accounts(code))["difference_gpu_ns"]
        states = {item["reason"]: item["state"] for item in await outside.quarantined("lhr")}
        assert {"conflict": "open", "unknown-sku": "dismissed"} == states
        # A price for it comes too late for what was dismissed.
        await add_price(outside, sku, "00:00", 500 * PKR)
        # Half an hour more, on another device, in a bucket that a repair may have stated as 0: its
        # revision was kept, so the ledger does not take the new total for an old message.
        more = outside.usage("lhr", "n1", first, "job-1", at("10:00"), at("10:30"), device="GPU-2")
        await outside.say(more)
        await until(
            lambda: charged_micro(outside, first, second),
            lambda charged: sum(charged) == 1_260 * PKR,
        )
        await reconciled_while_busy(own_stack, outside, busy)
        await a_lost_bucket_is_found(own_stack, outside, old)


async def reconciled_while_busy(stack: Stack, outside: Outside, busy: str) -> None:
    """What is on its way is no difference."""
    async with traffic(outside, busy, "busy-2"):
        status, said = await run(stack, "python -m metering reconcile")
    assert 0 == status, said
    assert "difference 0" in said
    answer = await outside.api.get("metering", "/v1/status", "operator")
    assert 0 == answer["reconcile"]["differences"]
    assert answer["reconcile"]["at"].endswith("Z")


async def a_lost_bucket_is_found(stack: Stack, outside: Outside, tenant_id: str) -> None:
    """The check can fail: it names the bucket, and a repair takes it back from the ledger."""
    await drained(outside)
    await lose_a_bucket(stack, tenant_id)
    status, said = await run(stack, "python -m metering reconcile")
    assert 1 == status, said
    assert f"{tenant_id} 'main' job-old on lhr/n1" in said
    assert "difference 1" in said
    answer = await outside.api.get("metering", "/v1/status", "operator")
    assert 1 == answer["reconcile"]["differences"]
    status, said = await run(stack, "python -m metering reconcile --since 2025-07-31T09:00:00.000Z")
    assert 0 == status, said
    status, said = await run(stack, "python -m metering reconcile --repair")
    assert 0 == status, said
    assert "difference 0 (found 1, repaired 1)" in said
    await outside.charged(tenant_id, 0)
