"""A clock that steps moves no hub's watermark: those never fall again."""

from __future__ import annotations

import pytest

from integration.metering.service import JULY_END_MS, Hub
from metering.jobs import Watermarks
from metering.reconcile import Reconcile
from runtime.clock import now_ms
from runtime.database import ClockStep, Database
from runtime.kafka import Kafka
from runtime.outbox import Outbox

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
JULY_END = "2025-07-31T19:00:00.000Z"


async def test_a_clock_that_jumps_a_day_ahead_moves_no_watermark(hub: Hub) -> None:
    """A hub whose sources are all retired is complete until now: a jump would say tomorrow."""
    hub.complete(JULY_END_MS)
    hub.flush()
    assert JULY_END == hub.complete_until(JULY_END)
    path = f"/v1/hubs/{hub.code}/sources/retire"
    body = {"source": f"/hubs/{hub.code}/nodes/n1/epochs/e1", "reason": "gone"}
    assert 200 == hub.metering.request("POST", path, json=body).status_code
    # The service itself goes by a clock that is right: it says the hour that is now.
    stated = "select hub, watermark_ms from hubs where watermark_ms > $1"
    kafka = Kafka(
        hub.metering.infrastructure.bootstrap_servers, client="test", instance="0", replication=1
    )
    pool = Database(hub.metering.database.writer, name="test-clock")
    await pool.open()
    try:
        watermarks = Watermarks(
            kafka, Outbox(("metering.charges.v1",)), clock=lambda: now_ms() + DAY_MS
        )
        for _ in range(3):
            async with pool.connection() as connection:
                with pytest.raises(ClockStep):
                    await watermarks.run(connection)
        async with pool.connection() as connection:
            assert [] == list(await connection.fetch(stated, now_ms()))
    finally:
        await pool.close()
        await kafka.close()


async def test_reconcile_states_no_hub_by_a_clock_that_jumped(hub: Hub) -> None:
    """Its revision would stay, and so would the instant from which a hub counts as silent."""
    hub.complete(JULY_END_MS)
    hub.flush()
    assert JULY_END == hub.complete_until(JULY_END)
    kafka = Kafka(
        hub.metering.infrastructure.bootstrap_servers, client="test", instance="0", replication=1
    )
    pool = Database(hub.metering.database.writer, name="test-clock")
    await pool.open()
    try:
        async with pool.connection() as connection:
            run = Reconcile(kafka, connection, print, clock=lambda: now_ms() + DAY_MS)
            with pytest.raises(ClockStep):
                await run.run(since_ms=0, restate=False)
            stated = "select hub from hubs where stated_ms > $1"
            assert [] == list(await connection.fetch(stated, now_ms() + HOUR_MS))
    finally:
        await pool.close()
        await kafka.close()
