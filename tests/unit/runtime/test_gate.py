"""The gate before a restored service: what it tells those who are turned away."""

from __future__ import annotations

import asyncio

from runtime.gate import Gate
from runtime.kafka import BrokerLost


async def test_a_closed_gate_names_no_host() -> None:
    """It is read without a key: that the broker is away, and not where it should be."""
    stop = asyncio.Event()

    async def ask() -> str | None:
        stop.set()
        raise BrokerLost("broker-1.internal:9092 refused the connection")

    async def start() -> None:
        raise AssertionError("nothing runs behind a closed gate")

    gate = Gate(ask)
    await gate.open(stop, start)
    assert gate.problem is not None
    assert "unavailable" == gate.problem.kind.code
    assert "does not answer" in str(gate.problem.detail)
    assert "9092" not in str(gate.problem.detail)
