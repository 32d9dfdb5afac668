"""Jobs: what one process of the service does again and again, whoever consumes.

Watermarks: a hub's candidate is taken, then the broker is asked how far its topic reaches, and the
candidate counts once all of that has been metered (`metering.core.watermarks`). What downstream
must know is written to every partition of the charges topic, after the charges it covers. Finals:
allocations that have ended are declared final once nothing more can come. Releases: records that
lacked a tenant or a price are judged again when it has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from hisab_contracts.charges import AllocationFinal, HubWatermark
from hisab_contracts.ids import HubCode
from hisab_contracts.topics import CHARGES, hub_topic
from metering.core.allocations import AllocationCheck, check_allocation
from metering.core.quarantine import failed_release
from metering.core.watermarks import (
    Barrier,
    HubView,
    candidate_ms,
    has_passed,
    passed_ms,
    statement_due,
)
from metering.replay import replay_quarantined
from metering.store import allocations, hubs, quarantine
from metering.store.state import ReferenceCache
from runtime.clock import now_ms, ticks_ms
from runtime.database import checked_now_ms, transaction_on
from runtime.kafka import Kafka, Message
from runtime.machine import Partition
from runtime.outages import is_outage
from runtime.outbox import Outbox
from runtime.progress import stored_progress

if TYPE_CHECKING:
    from runtime.clock import Clock
    from runtime.database import Connection

_log = structlog.get_logger("metering.jobs")

CHECKS_AT_ONCE: Final = 500
RELEASES_AT_ONCE: Final = 500
IDLE_LOOK_MS: Final = 1_000
FOLD_EVERY_MS: Final = 10_000
"""Changes of open time that gathered for so long are put together: looks stay short."""


class Watermarks:
    """Carries hubs' completeness downstream. One per process; the lease says which one works."""

    def __init__(
        self, kafka: Kafka, outbox: Outbox, partitions: int, clock: Clock = now_ms
    ) -> None:
        """`partitions` is the partition count of the charges topic."""
        self._clock = clock
        self._kafka = kafka
        self._outbox = outbox
        self._partitions = partitions
        # Only in memory: after a restart a barrier is raised again, and what passed is stored.
        self._barriers: dict[HubCode, Barrier] = {}
        self._batches = -1
        self._looked_ms = -IDLE_LOOK_MS
        self._folded_ms = -FOLD_EVERY_MS

    async def run(self, connection: Connection) -> None:
        """Look at every hub once; while nothing comes in, only every second."""
        # How long ago something was is measured in ticks: the time of day may be set.
        tick_ms = ticks_ms()
        batches = await hubs.count_batches(connection)
        idle = batches == self._batches and not self._barriers
        if idle and tick_ms - self._looked_ms < IDLE_LOOK_MS:
            return
        # A watermark never falls again, and its revision follows the clock.
        present_ms = await checked_now_ms(connection, self._clock)
        self._batches, self._looked_ms = batches, tick_ms
        if tick_ms - self._folded_ms >= FOLD_EVERY_MS:
            await quarantine.fold_open_time(connection)
            self._folded_ms = tick_ms
        views = await hubs.view_hubs(connection)
        await self._raise_barriers(views, present_ms)
        progress: Mapping[Partition, int] = {}
        if self._barriers:
            # After the barriers were raised: what is read here can only be behind what is metered.
            topics = [hub_topic(hub) for hub in self._barriers]
            progress = await stored_progress(connection, topics)
        for view in views:
            hub = view.hub
            barrier = self._barriers.get(hub)
            passed = barrier is not None and has_passed(barrier, _offsets_of(hub, progress))
            if passed or statement_due(view, present_ms) is not None:
                await self._state(connection, hub, barrier if passed else None, present_ms)
            if passed:
                del self._barriers[hub]

    async def _raise_barriers(self, views: Sequence[HubView], present_ms: int) -> None:
        """Ask how far topics reach whose candidate is ahead of what has passed."""
        ahead: dict[HubCode, int] = {}
        for view in views:
            ahead_ms = candidate_ms(view, present_ms)
            if ahead_ms is None or view.hub in self._barriers:
                continue
            if view.watermark_ms is None or ahead_ms > view.watermark_ms:
                ahead[view.hub] = ahead_ms
        if not ahead:
            return
        # Asked after the candidates were read as committed: whatever was in the topic when the
        # sources stated their watermarks lies below these ends.
        ends = await self._kafka.end_offsets([hub_topic(hub) for hub in ahead])
        for hub, ahead_ms in ahead.items():
            topic = hub_topic(hub)
            reached = {part.number: end for part, end in ends.items() if part.topic == topic}
            if reached:
                self._barriers[hub] = Barrier(ahead_ms, reached)

    async def _state(
        self, connection: Connection, hub: HubCode, barrier: Barrier | None, present_ms: int
    ) -> None:
        """Store what has passed and state it downstream, after every charge that it covers."""
        async with transaction_on(connection):
            # `reconcile` states hubs, too: without the lock both could take one revision.
            await hubs.lock_hub(connection, hub)
            # Read again inside the transaction: sources first seen since then may hold the hub.
            [view] = await hubs.view_hubs(connection, hub)
            if barrier is not None:
                reached_ms = passed_ms(view, barrier, present_ms)
                if reached_ms is not None and reached_ms != view.watermark_ms:
                    await hubs.save_watermark(connection, hub, reached_ms)
                    view = replace(view, watermark_ms=reached_ms)
            statement = statement_due(view, present_ms)
            if statement is None:
                return
            await hubs.save_statement(connection, statement, present_ms)
            await self._outbox.write(connection, self._messages(statement))

    def _messages(self, statement: HubWatermark) -> list[Message]:
        value = msgspec.json.encode(statement)
        return [
            Message(CHARGES, key=None, value=value, partition=partition)
            for partition in range(self._partitions)
        ]


def _offsets_of(hub: HubCode, progress: Mapping[Partition, int]) -> dict[int, int]:
    """Return how far each partition of a hub's topic has been metered."""
    topic = hub_topic(hub)
    return {
        partition.number: next_offset
        for partition, next_offset in progress.items()
        if partition.topic == topic
    }


class Finals:
    """Declares allocations final."""

    def __init__(self, outbox: Outbox) -> None:
        """Write finals to this outbox."""
        self._outbox = outbox

    async def run(self, connection: Connection) -> None:
        """Look at a bounded number of allocations that have ended."""
        async with transaction_on(connection):
            due = await allocations.lock_due_allocations(connection, CHECKS_AT_ONCE)
            if not due:
                return
            checks = [check_allocation(allocation) for allocation in due]
            await allocations.save_checks(connection, checks)
            finals = [_final_message(check) for check in checks if check.is_final]
            await self._outbox.write(connection, finals)


def _final_message(check: AllocationCheck) -> Message:
    key = check.key
    final = AllocationFinal(
        tenant_id=key.tenant_id,
        hub=key.hub,
        allocation_id=key.allocation_id,
        ended_ms=check.ended_ms,
    )
    return Message(CHARGES, key.tenant_id.encode(), msgspec.json.encode(final))


class Releases:
    """Judges records again whose fact has arrived."""

    def __init__(self, outbox: Outbox) -> None:
        """Write what a release states to this outbox."""
        self._outbox = outbox
        self._cache = ReferenceCache()

    async def run(self, connection: Connection) -> None:
        """Release what can be released, in bounded transactions."""
        while True:
            found = await quarantine.releasable(connection, RELEASES_AT_ONCE)
            if not found:
                return
            try:
                await self._release(connection, found)
            except Exception as error:
                # Rolled back as a whole: one record among them may be the reason.
                if is_outage(error):
                    raise
                _log.exception("release failed; records one by one", records=len(found))
                await self._release_singly(connection, found)

    async def _release(self, connection: Connection, quarantine_ids: list[int]) -> None:
        async with transaction_on(connection):
            because = "what it lacked has arrived"
            await replay_quarantined(connection, self._outbox, self._cache, quarantine_ids, because)

    async def _release_singly(self, connection: Connection, quarantine_ids: list[int]) -> None:
        """Release records one by one: one that we fail to judge must not keep the others back."""
        for quarantine_id in quarantine_ids:
            try:
                await self._release(connection, [quarantine_id])
            except Exception as error:
                if is_outage(error):
                    raise
                # Left to an operator: under this cause no tenant or price releases it any more.
                cause = failed_release(repr(error))
                await quarantine.save_cause(connection, quarantine_id, cause)
