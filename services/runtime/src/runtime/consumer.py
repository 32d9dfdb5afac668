"""The consumer: the loop between Kafka and PostgreSQL, driven by what `machine` decides.

Theory. `Consumer` drives `machine` over a `Feed`. A batch is one PostgreSQL transaction whose
first statement advances the progress rows; then the handler does the work. Whatever fails, the
machine says whether to seek back, to claim again or to halt. A watchdog thread ends the process
with status 70 when records wait and nothing has moved for 30 s, whatever the event loop does.

Refusals: `Halted`, after which the process must end (see `machine`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar, assert_never, cast

import structlog

from hisab_contracts.ids import TopicId
from runtime import progress, telemetry
from runtime.clock import pause, ticks_ms
from runtime.database import CommitUnknown, Database, watched_by
from runtime.feed import REBALANCE_TIMEOUT_MS, Feed, Hints, OutOfRangeError
from runtime.kafka import BrokerLost, Kafka
from runtime.lag import HiddenRecords, Lag
from runtime.machine import (
    STUCK_AFTER_MS,
    Action,
    Assigned,
    Claimed,
    ClaimPartitions,
    Committed,
    Event,
    Failed,
    Fenced,
    Fetched,
    Halt,
    Hint,
    Machine,
    OffsetLost,
    Partition,
    Pause,
    Process,
    Revoked,
    Seek,
    Slice,
    Watch,
)
from runtime.outages import is_outage
from runtime.placement import Placement
from runtime.records import Record

if TYPE_CHECKING:
    from runtime.database import Connection

EXIT_STUCK: Final = 70
POLL_MS: Final = 200
OBSERVE_EVERY_S: Final = 2.0
DISCOVER_EVERY_MS: Final = 500
RECONNECT_S: Final = 0.5
IDLE_S: Final = 0.02

T = TypeVar("T")

_log = structlog.get_logger("runtime.consumer")


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction takes: records grouped by partition, in offset order within each."""

    records: Sequence[Record]
    positions: Mapping[Partition, int]
    """Per partition, the next offset once this batch is committed."""
    topic_ids: Mapping[str, TopicId] = field(default_factory=dict)
    """The logs its topics were when we claimed them; "" where the broker does not say."""


Handler = Callable[[Batch, "Connection"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one consumer reads and who handles it."""

    group: str
    """The consuming group; it never commits. Hints go to `<group>.hint`."""
    topics: tuple[str, ...]
    handle: Handler
    """Runs inside the batch's transaction; raising rolls all of it back and tries again."""
    on_unread: Handler | None = None
    """Stores a record that killed the process, alone in its batch, without decoding it. Without one
    it is tried again, one by one, for ever: loud, and nothing is lost."""
    compacted: bool = False
    """Reference data: begin at the first offset there is, whatever it is."""
    placed_by_key: bool = False
    """Every record with a key must stand in its key's partition, or the consumer halts: what is
    stated per partition about keys would be stated about others."""
    max_records: int = 2_000


class Halted(Exception):
    """The consumer must not go on; the message says why."""


class Consumer:
    """Reads one subscription until it is stopped."""

    def __init__(
        self,
        kafka: Kafka,
        database: Database,
        subscription: Subscription,
        *,
        stuck_after_ms: int = STUCK_AFTER_MS,
    ) -> None:
        """Describe the consumer; nothing is read before `run`."""
        self._kafka = kafka
        self._database = database
        self._subscription = subscription
        self._wanted = tuple(sorted(set(subscription.topics)))
        self._machine = Machine(max_records=subscription.max_records)
        self._seen_rebalances = 0
        self._hints = Hints(kafka, f"{subscription.group}.hint")
        self._watch = Watch(ticks_ms(), stuck_after_ms)
        self._lag = Lag(kafka, self._stored)
        self._placement = Placement(kafka)
        self._topic_ids: Mapping[str, TopicId] = {}
        self._stop = asyncio.Event()

    @property
    def group(self) -> str:
        """The consuming group's name."""
        return self._subscription.group

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics it follows now."""
        return self._wanted

    def extend(self, topics: Iterable[str]) -> None:
        """Follow more topics from now on, each from its first record."""
        self._wanted = tuple(sorted({*self._wanted, *topics}))

    async def _stored(self, topics: tuple[str, ...]) -> Mapping[Partition, progress.StoredProgress]:
        async with self._database.connection() as connection:
            return await progress.stored_progress(connection, topics)

    async def lag_records(self) -> int:
        """Return how many records wait, over all partitions; end offsets at most 0.25 s old.

        Records that an open transaction hides wait as well: they are acknowledged.
        """
        return await self._lag.total(self._wanted)

    def partition_count(self, topic: str) -> int | None:
        """Return how many partitions a topic it follows had when we last looked, every 2 s."""
        return self._lag.counts.get(topic)

    def hidden(self) -> Mapping[Partition, HiddenRecords]:
        """Return where an open transaction has held us up for two looks in a row."""
        return self._lag.held_up

    async def run(self, stop: asyncio.Event) -> None:
        """Read and process until `stop`; finishes the transaction in flight, then returns.

        Raises `Halted` when going on would skip or repeat records, and whatever else went wrong
        that is no outage.
        """
        self._stop = stop
        self._watch.moved()
        watchdog = _Watchdog(self.group, self._watch)
        watchdog.start()
        tasks = [
            asyncio.create_task(work)
            for work in (self._sessions(), self._hints.run(), self._observe())
        ]
        try:
            # The last two end by failing only; unheard, that looks like a consumer that is stuck.
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            watchdog.end()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sessions(self) -> None:
        """Read until we are stopped, with a new session whenever the broker was lost."""
        while not self._stop.is_set():
            try:
                await self._session()
            except BrokerLost as error:
                _log.warning("broker lost", group=self.group, error=str(error))
                await pause(self._stop, RECONNECT_S)

    async def _session(self) -> None:
        """Read as one member of the group until the broker is lost or we are stopped."""
        topics = await self._existing_topics()
        while not topics and not self._stop.is_set():
            self._watch.moved()
            await pause(self._stop, DISCOVER_EVERY_MS / 1000)
            topics = await self._existing_topics()
        if self._stop.is_set():
            return
        feed = Feed(self._kafka, self.group)
        # Joining may take as long as a rebalance does.
        self._watch.moved(granted_ms=REBALANCE_TIMEOUT_MS)
        try:
            await _unless(self._stop, feed.open(topics))
            if not self._stop.is_set():
                await self._read(feed, topics)
        finally:
            self._machine.handle(Revoked())
            await feed.close()

    async def _existing_topics(self) -> tuple[str, ...]:
        known = await self._kafka.topics(self._wanted)
        return tuple(topic for topic in self._wanted if topic in known)

    async def _read(self, feed: Feed, topics: tuple[str, ...]) -> None:
        # Nothing the broker counts: so the first look sees a rebalance, and claims.
        self._seen_rebalances = -1
        discover_ms = ticks_ms()
        while not self._stop.is_set():
            if topics != self._wanted and ticks_ms() >= discover_ms:
                discover_ms = ticks_ms() + DISCOVER_EVERY_MS
                found = await self._existing_topics()
                if found != topics:
                    topics = found
                    await feed.follow(topics)
            if feed.rebalances != self._seen_rebalances:
                self._seen_rebalances = feed.rebalances
                assigned = feed.assigned()
                _log.info("assigned", group=self.group, partitions=len(assigned))
                self._watch.assigned()
                await self._do(feed, Assigned(assigned))
            elif self._machine.ready:
                event = await self._fetch(feed)
                if event is not None:
                    await self._do(feed, event)
            else:
                await pause(self._stop, IDLE_S)

    async def _fetch(self, feed: Feed) -> Event | None:
        fetching = feed.fetch(
            self._machine.ready, wait_ms=POLL_MS, max_records=self._subscription.max_records
        )
        try:
            fetched = await _unless(self._stop, fetching)
        except OutOfRangeError as error:
            return OffsetLost(error.partition)
        if not fetched:
            return None
        return Fetched(
            tuple(
                Slice(piece.partition, piece.begun_offset, piece.until, piece.records)
                for piece in fetched
            )
        )

    async def _do(self, feed: Feed, event: Event) -> None:
        """Feed the machine and carry out what it says, until it has nothing more to say.

        A rebalance makes all of it void: the main loop then starts again from `Assigned`.
        """
        # What was fetched under an older assignment is void, whatever it says.
        if feed.rebalances != self._seen_rebalances:
            return
        actions: deque[Action] = deque(self._machine.handle(event))
        while actions and feed.rebalances == self._seen_rebalances and not self._stop.is_set():
            action = actions.popleft()
            outcome: Event | None = None
            match action:
                case ClaimPartitions(partitions):
                    outcome = await self._claim(partitions)
                case Seek(partition, offset):
                    feed.seek(partition, offset)
                case Process():
                    outcome = await self._process(action)
                case Hint(offsets):
                    self._hints.note(offsets)
                case Pause(pause_ms):
                    await pause(self._stop, pause_ms / 1000)
                case Halt(reason):
                    _log.critical("halted", group=self.group, reason=reason)
                    raise Halted(reason)
                case _:
                    assert_never(action)
            if outcome is not None:
                actions.extend(self._machine.handle(outcome))

    async def _claim(self, partitions: tuple[Partition, ...]) -> Event:
        """Ask the broker for the bounds of these partitions, then raise their epochs."""
        try:
            ranges = await self._partition_ranges(partitions)
            async with self._database.transaction() as connection:
                claims = await progress.claim(
                    connection, ranges, compacted=self._subscription.compacted
                )
        except Exception as error:
            if not is_outage(error):
                raise
            _log.warning("claim failed", group=self.group, error=repr(error))
            self._watch.moved()
            return Failed()
        self._topic_ids = {part.topic: found.topic_id for part, found in ranges.items()}
        return Claimed(claims)

    async def _partition_ranges(
        self, partitions: tuple[Partition, ...]
    ) -> dict[Partition, progress.PartitionRange]:
        first = await self._kafka.offsets_at("beginning", partitions)
        end = await self._kafka.offsets_at("end", partitions)
        hints = await self._kafka.group_offsets(f"{self.group}.hint", partitions)
        # After the offsets: were they of a log that is no more, the id says so.
        known = await self._kafka.topics(part.topic for part in partitions)
        gone = {part.topic for part in partitions} - set(known)
        if gone:
            raise BrokerLost(f"deleted while it was read: {sorted(gone)}")
        return {
            part: progress.PartitionRange(
                first[part], end[part], hints.get(part), known[part.topic].topic_id
            )
            for part in partitions
        }

    async def _process(self, action: Process) -> Event:
        """One transaction: progress first, then the handler's work."""
        await self._require_readable(_records(action.slices))
        marked = [piece for piece in action.slices if piece.attempt]
        positions = {piece.partition: piece.until for piece in action.slices}
        records = _records(action.slices)
        batch = Batch(records, positions, self._topic_ids)
        try:
            if marked:
                # In a transaction of its own: should the work kill the process, the mark stays.
                async with self._database.transaction() as connection:
                    await progress.mark_attempt(connection, marked)
            with telemetry.batch_span(self.group, batch.records, unread=action.unread):
                async with self._database.transaction() as connection:
                    # First, because it takes the row locks that fence: an owner that has lost the
                    # partition finds out before it has done any work.
                    await progress.advance(connection, action.slices)
                    if batch.records:
                        # A batch may be the work of minutes: what it writes on the way shows the
                        # watchdog that it is not stuck.
                        with watched_by(self._watch.moved):
                            await self._hand_over(batch, connection, unread=action.unread)
        except progress.FencedError as error:
            _log.warning("fenced", group=self.group, error=str(error))
            return Fenced()
        except Exception as error:  # noqa: BLE001 - every failure is sorted by the machine
            return self._failure(error, batch)
        self._watch.moved()
        return Committed()

    async def _require_readable(self, records: Sequence[Record]) -> None:
        """Halt before records that nobody may handle: undecodable ones, ones in a wrong place."""
        reason = None
        if self._subscription.on_unread is None:
            reason = next((_undecodable(r) for r in records if r.undecodable), None)
        if reason is None and self._subscription.placed_by_key:
            reason = await self._placement.refusal(records)
        if reason is not None:
            _log.critical("halted", group=self.group, reason=reason)
            raise Halted(reason)

    async def _hand_over(self, batch: Batch, connection: Connection, *, unread: bool) -> None:
        on_unread = self._subscription.on_unread
        if not unread or on_unread is None:
            await self._subscription.handle(batch, connection)
            return
        _log.error("record put aside unread", group=self.group, **_where(batch))
        await on_unread(batch, connection)

    def _failure(self, error: Exception, batch: Batch) -> Failed:
        blame = not is_outage(error)
        _log.error("batch failed", group=self.group, blame=blame, **_where(batch), exc_info=error)
        if not blame:
            # The cause is known and outside: ending the process would not help.
            self._watch.moved()
        return Failed(unknown=isinstance(error, CommitUnknown), blame=blame)

    async def _observe(self) -> None:
        """Note, for the watchdog, when nothing waits for us, or others of the group move."""
        total_before = -1
        while True:
            await asyncio.sleep(OBSERVE_EVERY_S)
            try:
                await self._lag.observe(self._wanted)
            except Exception as error:
                if not is_outage(error):
                    raise
                self._watch.moved()
                continue
            moved = self._lag.stored_total != total_before
            total_before = self._lag.stored_total
            if self._lag.is_of_other_logs:
                # A topic was made anew: claiming again compares what is stored, and halts.
                self._seen_rebalances = -1
            # What a transaction hides cannot be read by anybody: waiting for it is not being stuck.
            is_idle = self._lag.readable(self._machine.ready) == 0
            if is_idle and (moved or self._lag.readable() == 0):
                self._watch.moved()
            telemetry.set_lag(self.group, self._lag.waiting)


class _Watchdog(threading.Thread):
    """Ends the process when its consumer is silently stuck; a thread, because loops get stuck."""

    def __init__(self, group: str, watch: Watch) -> None:
        super().__init__(name=f"watchdog-{group}", daemon=True)
        self._group = group
        self._watch = watch
        self._ended = threading.Event()

    def end(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(1):
            if self._watch.is_stuck(ticks_ms()):
                _log.critical("no progress although records wait", group=self._group)
                # Hard: what is stuck may be the very loop that an orderly end would need.
                os._exit(EXIT_STUCK)


async def _unless(stop: asyncio.Event, work: Awaitable[T]) -> T | None:
    """Wait for `work`; cancel it and return None when we are stopped first."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        stopping.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _records(slices: Sequence[Slice]) -> Sequence[Record]:
    if len(slices) == 1:
        return cast("Sequence[Record]", slices[0].records)
    return cast("Sequence[Record]", [record for piece in slices for record in piece.records])


def _undecodable(record: Record) -> str:
    place = f"{record.topic} {record.partition} {record.offset + 1}"
    return (
        f"{record.topic}[{record.partition}]: {record.undecodable}. To read on behind it, on the"
        f" record: override-progress {place} --accepted-by … --reason …"
    )


def _where(batch: Batch) -> dict[str, object]:
    return {
        "records": len(batch.records),
        "until": {f"{where.topic}[{where.number}]": at for where, at in batch.positions.items()},
    }
