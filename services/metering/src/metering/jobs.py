"""Jobs: what one process of the service does again and again, whoever consumes.

Watermarks: a hub's candidate is taken, then the broker is asked how far its topic reaches, and the
candidate counts once all of that has been metered (`metering.core.watermarks`). What downstream
must know is written to every partition that the charges topic has, after the charges it covers;
when it has got more of them, everything is stated anew. Finals: allocations that have ended are
declared final once nothing more can come. Releases: records that lacked a tenant or a price are
judged again when it has arrived; so are conflicts where a correction has changed what is covered,
and approved corrections that lacked something. Forgetting: bytes of records that were released 90
days ago. Sums of usage: what has changed of buckets is added to those of hours and days.

Refusals: `PartitionMismatch` before a watermark is stated while charges and entries disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from hisab_contracts.charges import AllocationFinal
from hisab_contracts.ids import HubCode, TopicId
from hisab_contracts.topics import CHARGES, ENTRIES, hub_topic
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
from metering.corrections import count_waiting
from metering.replay import replay_quarantined
from metering.store import allocations, hubs, proposals, quarantine, usage_reports
from metering.store.state import ReferenceCache
from runtime.clock import now_ms, ticks_ms
from runtime.database import checked_now_ms, transaction_on
from runtime.kafka import Kafka, Message
from runtime.machine import Partition
from runtime.outages import is_outage
from runtime.outbox import Outbox
from runtime.progress import StoredProgress, stored_progress
from runtime.topics import require_equal_counts

if TYPE_CHECKING:
    from runtime.clock import Clock
    from runtime.database import Connection

_log = structlog.get_logger("metering.jobs")

CHECKS_OF_A_HUB: Final = 200
"""Ended allocations of each hub that one transaction looks at: none waits for another's."""
ROUNDS_OF_CHECKS: Final = 20
RELEASES_AT_ONCE: Final = 500
FORGOTTEN_AT_ONCE: Final = 1_000
CHANGES_AT_ONCE: Final = 20_000
"""Changes of usage that one transaction adds to the sums."""
FORGET_EVERY_MS: Final = 3_600_000
CORRECTIONS_AT_ONCE: Final = 100
COUNT_EVERY_MS: Final = 5_000
"""How often corrections are tried again that were approved and lack something."""
IDLE_LOOK_MS: Final = 1_000
FOLD_EVERY_MS: Final = 10_000
"""Changes of open time that gathered for so long are put together: looks stay short."""


class Watermarks:
    """Carries hubs' completeness downstream. One per process; the lease says which one works."""

    def __init__(
        self,
        kafka: Kafka,
        outbox: Outbox,
        *,
        charges: str = CHARGES,
        entries: str = ENTRIES,
        clock: Clock = now_ms,
    ) -> None:
        """State in `charges`, through this outbox; the ledger passes it on in `entries`."""
        self._clock = clock
        self._kafka = kafka
        self._outbox = outbox
        self._charges, self._entries = charges, entries
        # Of the charges topic, when statements last went out. Forgotten at a restart: partitions
        # may have been added meanwhile, so everything is stated once more.
        self._partitions = 0
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
        passed = await self._passed_barriers(connection)
        downstream = await self._kafka.topics([self._charges, self._entries])
        require_equal_counts(downstream)
        if self._charges not in downstream:
            return  # It is being made. What has passed stays passed until it can be stated.
        partitions = downstream[self._charges].partitions
        anew = partitions != self._partitions
        for view in views:
            barrier = passed.get(view.hub)
            if barrier is not None or statement_due(view, present_ms, anew=anew) is not None:
                to_state = _ToState(view.hub, barrier, partitions, anew)
                await self._state(connection, to_state, present_ms)
            if barrier is not None:
                del self._barriers[view.hub]
        self._partitions = partitions

    async def _passed_barriers(self, connection: Connection) -> dict[HubCode, Barrier]:
        """Return the barriers that were passed in the log for which they were raised."""
        if not self._barriers:
            return {}
        # After the barriers were raised: what is read here can only be behind what is metered.
        topics = [hub_topic(hub) for hub in self._barriers]
        progress = await stored_progress(connection, topics)
        passed = {
            hub: barrier
            for hub, barrier in self._barriers.items()
            if has_passed(barrier, _offsets_of(hub, barrier.topic_id, progress))
        }
        # Asked after the progress: as long as a topic is the same log now, what was read is of it.
        known = await self._kafka.topics(hub_topic(hub) for hub in passed) if passed else {}
        for hub in list(passed):
            topic = known.get(hub_topic(hub))
            if topic is None or topic.topic_id != passed[hub].topic_id:
                _log.error("topic was made anew", topic=hub_topic(hub))
                del passed[hub], self._barriers[hub]
        return passed

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
        topics = [hub_topic(hub) for hub in ahead]
        ends = await self._kafka.end_offsets(topics)
        # After the ends: those of a log that is no more do not pass for the new one's.
        known = await self._kafka.topics(topics)
        for hub, ahead_ms in ahead.items():
            topic = hub_topic(hub)
            reached = {part.number: end for part, end in ends.items() if part.topic == topic}
            if reached and topic in known:
                self._barriers[hub] = Barrier(ahead_ms, reached, known[topic].topic_id)

    async def _state(self, connection: Connection, to_state: _ToState, present_ms: int) -> None:
        """Store what has passed and state it downstream, after every charge that it covers."""
        async with transaction_on(connection):
            # `reconcile` states hubs, too: without the lock both could take one revision.
            await hubs.lock_hub(connection, to_state.hub)
            # Read again inside the transaction: sources first seen since then may hold the hub.
            [view] = await hubs.view_hubs(connection, to_state.hub)
            if to_state.barrier is not None:
                reached_ms = passed_ms(view, to_state.barrier, present_ms)
                if reached_ms is not None and reached_ms != view.watermark_ms:
                    await hubs.save_watermark(connection, view.hub, reached_ms)
                    view = replace(view, watermark_ms=reached_ms)
            statement = statement_due(view, present_ms, anew=to_state.anew)
            if statement is None:
                return
            await hubs.save_statement(connection, statement, present_ms)
            value = msgspec.json.encode(statement)
            messages = [
                Message(self._charges, key=None, value=value, partition=partition)
                for partition in range(to_state.partitions)
            ]
            await self._outbox.write(connection, messages)


@dataclass(frozen=True, slots=True)
class _ToState:
    """A hub about which something is to be stated, in every partition of charges."""

    hub: HubCode
    barrier: Barrier | None
    """The barrier that was passed, if one was."""
    partitions: int
    anew: bool
    """There are partitions that have been told nothing yet."""


def _offsets_of(
    hub: HubCode, topic_id: TopicId, progress: Mapping[Partition, StoredProgress]
) -> dict[int, int]:
    """Return how far each partition of this log of a hub has been metered."""
    topic = hub_topic(hub)
    return {
        partition.number: stored.offset_in(topic_id)
        for partition, stored in progress.items()
        if partition.topic == topic
    }


class Finals:
    """Declares allocations final."""

    def __init__(self, outbox: Outbox) -> None:
        """Write finals to this outbox."""
        self._outbox = outbox

    async def run(self, connection: Connection) -> None:
        """Look at ended allocations whose turn has come, in bounded transactions."""
        for _ in range(ROUNDS_OF_CHECKS):
            async with transaction_on(connection):
                watermarks = {
                    hub.hub: hub.watermark_ms for hub in await hubs.list_completeness(connection)
                }
                due = await allocations.lock_due_allocations(
                    connection, watermarks, CHECKS_OF_A_HUB
                )
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
    """Judges records again whose fact has arrived, and forgets the bytes of those long released."""

    def __init__(self, outbox: Outbox, *, at_once: int = RELEASES_AT_ONCE) -> None:
        """Write what a release states to this outbox; judge at most so many records at once."""
        self._outbox = outbox
        self._at_once = at_once
        self._cache = ReferenceCache()
        self._forgot_ms = -FORGET_EVERY_MS
        self._counted_ms = -COUNT_EVERY_MS

    async def run(self, connection: Connection) -> None:
        """Release what can be released, in bounded transactions; forget what may be, hourly."""
        if ticks_ms() - self._forgot_ms >= FORGET_EVERY_MS:
            while await quarantine.forget_released(connection, FORGOTTEN_AT_ONCE):
                continue
            self._forgot_ms = ticks_ms()
        if ticks_ms() - self._counted_ms >= COUNT_EVERY_MS:
            await self._count_corrections(connection)
            self._counted_ms = ticks_ms()
        while found := await quarantine.releasable(connection, self._at_once):
            await self._release_all(connection, found, "what it lacked has arrived")
        while page := await quarantine.next_freed(connection, self._at_once):
            if page.quarantine_ids:
                because = "a correction has changed what it was in conflict with"
                await self._release_all(connection, page.quarantine_ids, because)
            # Afterwards: whoever dies in between judges them once more, and changes nothing.
            await quarantine.advance_freed(connection, page, self._at_once)

    async def _count_corrections(self, connection: Connection) -> None:
        """Try again to have approved corrections count that lacked something."""
        for correction_id in await proposals.not_counting(connection, CORRECTIONS_AT_ONCE):
            async with transaction_on(connection):
                await count_waiting(connection, self._outbox, self._cache, correction_id)

    async def _release_all(
        self, connection: Connection, quarantine_ids: list[int], because: str
    ) -> None:
        try:
            await self._release(connection, quarantine_ids, because)
        except Exception as error:
            # Rolled back as a whole: one record among them may be the reason.
            if is_outage(error):
                raise
            _log.exception("release failed; records one by one", records=len(quarantine_ids))
            await self._release_singly(connection, quarantine_ids, because)

    async def _release(
        self, connection: Connection, quarantine_ids: list[int], because: str
    ) -> None:
        async with transaction_on(connection):
            await replay_quarantined(connection, self._outbox, self._cache, quarantine_ids, because)

    async def _release_singly(
        self, connection: Connection, quarantine_ids: list[int], because: str
    ) -> None:
        """Release records one by one: one that we fail to judge must not keep the others back."""
        for quarantine_id in quarantine_ids:
            try:
                await self._release(connection, [quarantine_id], because)
            except Exception as error:
                if is_outage(error):
                    raise
                # Left to an operator: under this cause no tenant or price releases it any more.
                cause = failed_release(repr(error))
                await quarantine.save_cause(connection, quarantine_id, cause)


async def fold_usage(connection: Connection) -> None:
    """Add what has changed of buckets to the sums that usage reports read."""
    changes = CHANGES_AT_ONCE
    while changes >= CHANGES_AT_ONCE:
        async with transaction_on(connection):
            changes = await usage_reports.fold_changes(connection, CHANGES_AT_ONCE)
