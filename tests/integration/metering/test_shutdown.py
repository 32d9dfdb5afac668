"""A real service is told to stop while records flow: it ends well, and goes on where it was."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import le

import pytest

from infrastructure import Infrastructure
from integration.metering.service import Hub, Metering, charges, eventually
from unit.metering.hub_events import NOON_MS, interval

STEP_MS = 1_000
WITHIN_THE_HOUR = 3_600


@contextmanager
def flowing(hub: Hub) -> Iterator[Counter[str]]:
    """Say one second of usage after the other, in a thread, as long as this lasts."""
    said: Counter[str] = Counter()
    enough = threading.Event()

    def say() -> None:
        while not enough.wait(0.002) and said["seconds"] < WITHIN_THE_HOUR:
            start_ms = NOON_MS + said["seconds"] * STEP_MS
            hub.say(interval(start_ms, start_ms + STEP_MS))
            said["seconds"] += 1

    thread = threading.Thread(target=say)
    thread.start()
    try:
        yield said
    finally:
        enough.set()
        thread.join()
        hub.flush()


def read(hub: Hub) -> int:
    """How many records of a hub were taken."""
    return int(hub.reconcile()["records"]["read"])


@pytest.mark.slow
def test_sigterm_in_mid_stream_ends_well_and_nothing_is_lost_or_doubled(
    apache_kafka: Infrastructure, metering: Metering, hub: Hub
) -> None:
    """Status 0, no part cut off; what is billed and published afterwards is what was said, once."""
    logged = metering.log.stat().st_size
    with flowing(hub) as said:
        for _ in range(2):
            enough = read(hub) + 50
            eventually(lambda: read(hub), partial(le, enough))
            assert 0 == metering.stop()
            metering.start()
    seconds = said["seconds"]
    accounts = hub.accounts(seconds)
    records = accounts["records"]
    assert (seconds, seconds, 0, 0) == tuple(
        records[what] for what in ("read", "accepted", "duplicate", "quarantined")
    )
    assert (seconds * 10**9, "0") == (
        int(accounts["billed_gpu_ns"]),
        accounts["difference_gpu_ns"],
    )
    eventually(lambda: metering.get("/v1/status"), lambda status: status["outbox_depth"] == 0)
    totals = [
        message["total_gpu_ns"]
        for message in charges(apache_kafka, hub.code)
        if message["kind"] == "bucket"
    ]
    assert sorted(set(totals)) == totals
    assert seconds * 10**9 == totals[-1]
    log = metering.log.read_bytes()[logged:].decode()
    assert 2 == log.count('"because": "signal"')
    assert "part did not end in time" not in log
    assert "Traceback" not in log
