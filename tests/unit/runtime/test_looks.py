"""Shared looks: one at a time, fresh for whoever asks, and not kept by who goes away."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from runtime.application import create_app
from runtime.looks import SharedLook
from runtime.outages import Outage

CALLERS = 8


class Things:
    """Something to look at, which answers when it is let."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.looks = 0
        self.running = 0
        self.most_running = 0
        self.is_out = False

    async def look(self) -> int:
        """Return how many looks have begun."""
        self.looks += 1
        found = self.looks
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.may_answer.wait()
            await asyncio.sleep(0)
        finally:
            self.running -= 1
        if self.is_out:
            raise Outage("away")
        return found


async def begun(shared: SharedLook[int], callers: int) -> list[asyncio.Task[int]]:
    """Ask so many times, and return once all of them wait."""
    tasks = [asyncio.create_task(shared.take()) for _ in range(callers)]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def test_whoever_asks_while_a_look_runs_shares_the_next() -> None:
    """Two looks for all of them, one behind the other; what ran already may have missed things."""
    things = Things()
    shared = SharedLook(things.look)
    first = await begun(shared, 1)
    rest = await begun(shared, CALLERS)
    assert 1 == things.looks
    things.may_answer.set()
    assert [1] + [2] * CALLERS == await asyncio.gather(*first, *rest)
    assert 3 == await shared.take()
    assert 1 == things.most_running


async def test_a_caller_who_goes_away_takes_the_look_from_nobody() -> None:
    """Also when it was the one who asked first."""
    things = Things()
    shared = SharedLook(things.look)
    first, second = await begun(shared, 1), await begun(shared, 2)
    for gone in (first[0], second[0]):
        gone.cancel()
    things.may_answer.set()
    assert 2 == await second[1]
    assert first[0].cancelled()


async def test_a_look_that_fails_fails_for_those_who_waited_only() -> None:
    """The next one is made as if nothing had happened."""
    things = Things()
    things.may_answer.set()
    things.is_out = True
    shared = SharedLook(things.look)
    found = await asyncio.gather(*(shared.take() for _ in range(3)), return_exceptions=True)
    assert ["away"] * 3 == [str(error) for error in found]
    things.is_out = False
    assert things.looks + 1 == await shared.take()


@pytest.mark.parametrize(("is_out", "status"), [(False, 200), (True, 503)])
async def test_readiness_is_asked_of_the_database_once_at_a_time(is_out: bool, status: int) -> None:
    """It needs no key: however many ask, they take one connection."""
    things = Things()
    things.may_answer.set()
    things.is_out = is_out

    async def ready() -> None:
        await things.look()

    app = create_app("a", "0", [], ready=ready)
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://t") as client:
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(CALLERS)))
    assert [status] * CALLERS == [answer.status_code for answer in answers]
    assert 1 == things.most_running
