"""Metering compares itself with the ledger, by itself: what it finds is told to all who ask."""

from __future__ import annotations

from typing import Any

import asyncpg
import httpx2
import pytest

from demo.api import Json
from e2e.outside import HOUR, Outside, at, outside_of, until
from scenarios.test_restored_metering import PKR, drained, lose_a_bucket, run
from stack import Stack

DAY = 24 * HOUR


async def reconciled(outside: Outside, differences: int, later_than: str = "") -> str:
    """When metering was last compared, once that was later and left so many differences."""
    answer = await until(
        lambda: outside.api.get("metering", "/v1/status", "operator"),
        lambda x: x["reconcile"] is not None and x["reconcile"]["at"] > later_than,
    )
    assert differences == answer["reconcile"]["differences"]
    return str(answer["reconcile"]["at"])


async def on_the_board(outside: Outside, month: str, at: str) -> Json:
    """What the board of a month shows of the comparison, once it knows of this one."""
    board = await until(
        lambda: outside.api.get("invoicing", f"/v1/periods/{month}", "finance"),
        lambda x: x["reconcile"] is not None and x["reconcile"]["at"] >= at,
    )
    found: Json = board["reconcile"]
    return found


async def metric(outside: Outside, name: str) -> str:
    """The value of a metric of metering."""
    async with httpx2.AsyncClient(timeout=60) as client:
        text = (await client.get(outside.api.url("metering", "/metrics"))).text
    [value] = [
        line.rpartition(" ")[2]
        for line in text.splitlines()
        if line.startswith(f'{name}{{comparison="ledger"}}')
    ]
    return value


async def changed_hours(stack: Stack) -> list[tuple[Any, ...]]:
    """The hours that are still to be compared."""
    connection = await asyncpg.connect(stack.database("metering", "reader"))
    try:
        rows = await connection.fetch("select hub, hour_ms, differences from changed_hours")
    finally:
        await connection.close()
    return [tuple(row) for row in rows]


@pytest.mark.slow
@pytest.mark.defect("M3", "F22", "F24")
async def test_metering_is_compared_when_a_month_is_complete_and_all_hear_of_it(
    own_stack: Stack,
) -> None:
    """July agrees; a bucket lost in August is found, stands until it is repaired, and is gone."""
    async with outside_of(own_stack) as outside:
        tenant, other = await outside.tenant(), await outside.tenant()
        july, august = at("10:00"), at("10:00") + 5 * DAY
        await outside.say(
            outside.usage("lhr", "n1", tenant, "job-1", july, july + HOUR),
            outside.watermark("lhr", "n1", at("19:00")),
        )
        await outside.charged(tenant, 840 * PKR)
        first_at = await reconciled(outside, 0)
        assert {"at": first_at, "differences": 0} == await on_the_board(
            outside, "2025-07", first_at
        )
        assert "0.0" == await metric(outside, "comparison_differences")
        await until(lambda: changed_hours(own_stack), lambda hours: hours == [])

        await outside.say(
            outside.usage("lhr", "n1", tenant, "job-2", august, august + HOUR),
            outside.usage("lhr", "n1", other, "job-3", august, august + 2 * HOUR),
        )
        await outside.charged(other, 2 * 840 * PKR)
        await drained(outside)
        await lose_a_bucket(own_stack, other)
        await outside.say(outside.watermark("lhr", "n1", at("19:00") + 31 * DAY))
        second_at = await reconciled(outside, 2, first_at)
        board = await on_the_board(outside, "2025-08", second_at)
        assert {"at": second_at, "differences": 2} == board
        assert "2.0" == await metric(outside, "comparison_differences")
        standing = [
            (hub, hour_ms) for hub, hour_ms, wrong in await changed_hours(own_stack) if wrong
        ]
        assert [("lhr", august), ("lhr", august + HOUR)] == sorted(standing)

        status, said = await run(own_stack, "python -m metering reconcile --repair")
        assert 0 == status, said
        await outside.charged(other, 0)
        repaired_at = await reconciled(outside, 0, second_at)
        await outside.say(outside.watermark("lhr", "n1", at("19:00") + 61 * DAY))
        await reconciled(outside, 0, repaired_at)
        await until(lambda: changed_hours(own_stack), lambda hours: hours == [])
