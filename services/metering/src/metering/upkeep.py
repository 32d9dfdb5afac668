"""Upkeep: what one process of the service does again and again, whoever consumes.

Watermarks: a hub's candidate is taken, then the broker is asked how far its topic reaches, and the
candidate counts once all of that has been metered (`completeness`). What downstream must know is
written to every partition of the charges topic, after the charges it covers. Endings: allocations
that have ended are declared final once nothing more can come. Releases: what waited for a tenant or
a price is judged again when it has arrived. Registry: hubs of other processes are read too.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from hisab_contracts.charges import AllocationFinal, HubWatermark
from hisab_contracts.ids import HubCode
from hisab_contracts.topics import CHARGES, hub_topic
from metering import lookup, waiting
from metering.completeness import Barrier, candidate_ms, has_passed, passed_ms, restated
from metering.release import judge_again
from metering.store import Known
from runtime.database import is_infrastructure, pause, transaction_on
from runtime.kafka import Kafka, Message
from runtime.streams import Consumer, Outbox

if TYPE_CHECKING:
    from runtime.database import Connection

_log = structlog.get_logger("metering.upkeep")

ENDINGS_AT_ONCE: Final = 500
RELEASES_AT_ONCE: Final = 500
REGISTRY_PAUSE_S: Final = 1
IDLE_LOOK_MS: Final = 1_000
FOLD_EVERY_MS: Final = 10_000
"""Changes of open time that gathered for so long are put together: looks stay short."""


class Watermarks:
    """Carries hubs' completeness downstream. One per process; the lease says which one works."""

    def __init__(self, kafka: Kafka, outbox: Outbox, partitions: int) -> None:
        """`partitions` is the partition count of the charges topic."""
        self._kafka = kafka
        self._outbox = outbox
        self._partitions = partitions
        self._barriers: dict[HubCode, Barrier] = {}
        self._batches = -1
        self._looked_ms = 0
        self._folded_ms = 0

    async def run(self, connection: Connection) -> None:
        """Look at every hub once; while nothing comes in, only every second."""
        now_ms = _now_ms()
        batches = await lookup.batches(connection)
        idle = batches == self._batches and not self._barriers
        if idle and now_ms - self._looked_ms < IDLE_LOOK_MS:
            return
        self._batches, self._looked_ms = batches, now_ms
        if now_ms - self._folded_ms >= FOLD_EVERY_MS:
            await waiting.fold_open_time(connection)
            self._folded_ms = now_ms
        hubs = await lookup.views(connection)
        await self._raise_barriers(hubs, now_ms)
        for told in hubs:
            hub = told.view.hub
            barrier = self._barriers.get(hub)
            passed = barrier is not None and has_passed(
                barrier, await lookup.progress(connection, hub_topic(hub))
            )
            if passed or restated(told.view, told.statement, told.stated_ms, now_ms) is not None:
                await self._state(connection, hub, barrier if passed else None, now_ms)
            if passed:
                del self._barriers[hub]

    async def _raise_barriers(self, hubs: list[lookup.Told], now_ms: int) -> None:
        """Ask how far topics reach whose candidate is ahead of what has passed."""
        asked: dict[HubCode, int] = {}
        for told in hubs:
            ahead_ms = candidate_ms(told.view, now_ms)
            behind_ms = told.view.watermark_ms
            if ahead_ms is None or told.view.hub in self._barriers:
                continue
            if behind_ms is None or ahead_ms > behind_ms:
                asked[told.view.hub] = ahead_ms
        if not asked:
            return
        ends = await self._kafka.end_offsets([hub_topic(hub) for hub in asked])
        for hub, ahead_ms in asked.items():
            topic = hub_topic(hub)
            reached = {part.number: end for part, end in ends.items() if part.topic == topic}
            if reached:
                self._barriers[hub] = Barrier(ahead_ms, reached)

    async def _state(
        self, connection: Connection, hub: HubCode, barrier: Barrier | None, now_ms: int
    ) -> None:
        """Note what has passed and tell downstream, after every charge that it covers."""
        async with transaction_on(connection):
            [told] = await lookup.views(connection, hub)
            view = told.view
            if barrier is not None:
                reached_ms = passed_ms(view, barrier, now_ms)
                if reached_ms is not None and reached_ms != view.watermark_ms:
                    await lookup.save_watermark(connection, hub, reached_ms)
                    view = replace(view, watermark_ms=reached_ms)
            statement = restated(view, told.statement, told.stated_ms, now_ms)
            if statement is None:
                return
            await lookup.save_statement(connection, statement, now_ms)
            await self._outbox.write(connection, self._messages(statement))

    def _messages(self, statement: HubWatermark) -> list[Message]:
        value = msgspec.json.encode(statement)
        return [Message(CHARGES, None, value, (), place) for place in range(self._partitions)]


class Endings:
    """Declares allocations final."""

    def __init__(self, outbox: Outbox) -> None:
        """Write finals to this outbox."""
        self._outbox = outbox

    async def run(self, connection: Connection) -> None:
        """Take a bounded number of allocations that have ended."""
        async with transaction_on(connection):
            endings = await waiting.take_endings(connection, ENDINGS_AT_ONCE)
            await self._outbox.write(connection, [_final(ending) for ending in endings])


class Releases:
    """Judges records again whose fact has arrived."""

    def __init__(self, outbox: Outbox) -> None:
        """Write what a release states to this outbox."""
        self._outbox = outbox
        self._known = Known()

    async def run(self, connection: Connection) -> None:
        """Release what can be released, in bounded transactions."""
        while True:
            found = await waiting.releasable(connection, RELEASES_AT_ONCE)
            if not found:
                return
            try:
                await self._release(connection, found)
            except Exception as error:
                if is_infrastructure(error):
                    raise
                _log.exception("release failed; records one by one", records=len(found))
                await self._release_singly(connection, found)

    async def _release(self, connection: Connection, quarantine_ids: list[int]) -> None:
        async with transaction_on(connection):
            because = "what it waited for has arrived"
            await judge_again(connection, self._outbox, self._known, quarantine_ids, because)

    async def _release_singly(self, connection: Connection, quarantine_ids: list[int]) -> None:
        """One record that we cannot judge must not keep the others waiting."""
        for quarantine_id in quarantine_ids:
            try:
                await self._release(connection, [quarantine_id])
            except Exception as error:
                if is_infrastructure(error):
                    raise
                await waiting.give_up(connection, quarantine_id, repr(error))


class HubConsumer(Consumer):
    """Reads the topic of every hub, whichever process registered it. Every process has one.

    Following the registry is part of reading: when it fails, this part of the process ends.
    """

    async def look(self) -> None:
        """Read what is registered now, too."""
        async with self._database.connection() as connection:
            self.extend([hub_topic(hub) for hub in await lookup.hubs(connection)])

    async def run(self, stop: asyncio.Event) -> None:
        """Read until `stop`, and look for new hubs all the while."""
        async with asyncio.TaskGroup() as together:
            together.create_task(self._follow(stop), name="registry")
            await super().run(stop)

    async def _follow(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await pause(stop, REGISTRY_PAUSE_S)
            try:
                await self.look()
            except Exception as error:
                if not is_infrastructure(error):
                    raise


def _final(ending: waiting.Ending) -> Message:
    key = ending.key
    final = AllocationFinal(key.tenant_id, key.hub, key.allocation_id, ending.ended_ms)
    return Message(CHARGES, key.tenant_id.encode(), msgspec.json.encode(final))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
