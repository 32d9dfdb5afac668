"""The outbox: what leaves is written with the facts, and relayed to Kafka afterwards.

Theory. `Outbox.write` inserts rows in the caller's transaction. The relay of a topic holds a lease,
reads the lowest rows first, publishes them in id order per partition, stops at the first failure,
and deletes after the broker's acknowledgement: a crash in between publishes twice, never zero
times. There is no cursor, so a row of a transaction that commits late is still found. Polls start
at a floor below which no row can appear any more: a row's transaction has its id before it draws
its number, so once every transaction older than a poll has ended, the numbers that poll saw have
all been seen or will never be.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from runtime import telemetry
from runtime.clock import pause
from runtime.database import Database, after_commit, note_progress, transaction_on
from runtime.kafka import Kafka, Message
from runtime.outages import is_outage

if TYPE_CHECKING:
    from runtime.database import Connection

RELAY_ROWS: Final = 2_000
RELAY_BYTES: Final = 16 * 1024 * 1024
"""What one poll reads and publishes at most, after one row at least: a row may have a megabyte."""

RELAY_POLL_S: Final = 0.25
RELAY_FLUSH_S: Final = 5
RETRY_S: Final = 0.5
MESSAGES_COUNTED: Final = 100_000
"""Where counting what waits ends: more is "at least so many"."""

_log = structlog.get_logger("runtime.outbox")


class Outbox:
    """What the service publishes with its facts. One per process."""

    def __init__(self, topics: Iterable[str]) -> None:
        """Name every topic that may be written; each needs a relay."""
        self.topics = tuple(topics)
        self._written = {topic: asyncio.Event() for topic in self.topics}

    async def write(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Insert messages in the caller's transaction, in order; the relays wake after COMMIT."""
        if not messages:
            return
        await _insert_messages(connection, messages)
        note_progress()
        for topic in {message.topic for message in messages}:
            after_commit(self._written[topic].set)

    def written(self, topic: str) -> asyncio.Event:
        """Return the signal that rows of a topic were committed by this process."""
        return self._written[topic]

    async def depth(self, connection: Connection) -> int:
        """Count the messages committed and not yet acknowledged; at 100 000 counting ends."""
        return await _count_messages(connection)


class Relay:
    """Publishes one topic's rows, in one process of the service at a time."""

    def __init__(self, outbox: Outbox, topic: str, database: Database, kafka: Kafka) -> None:
        """Describe the relay; nothing is read before `run`."""
        self.topic = topic
        self._written = outbox.written(topic)
        self._database = database
        self._kafka = kafka

    async def run(self, stop: asyncio.Event) -> None:
        """Relay until `stop`, then flush what is left, within 5 s."""
        while not stop.is_set():
            try:
                await self._relay(stop)
            except Exception as error:
                if not is_outage(error):
                    raise
                _log.warning("relay interrupted", topic=self.topic, error=repr(error))
                await pause(stop, RETRY_S)

    async def _relay(self, stop: asyncio.Event) -> None:
        """Hold the lease and publish until the connection, the broker or we end."""
        while self.topic not in await self._kafka.topics([self.topic]):
            await pause(stop, RETRY_S)
            if stop.is_set():
                return
        async with self._database.lease(f"relay:{self.topic}", stop) as connection:
            if connection is None:
                return
            floor = _Floor()
            while not stop.is_set():
                # Cleared before looking: what is committed while we look wakes us again.
                self._written.clear()
                if await self._publish(connection, floor):
                    await self._wait(stop)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELAY_FLUSH_S):
                    while not await self._publish(connection, floor):
                        pass

    async def _publish(self, connection: Connection, floor: _Floor) -> bool:
        """Publish and delete the lowest rows; returns whether these were all there were."""
        rows = await _lowest_messages(connection, self.topic, floor.lowest_id)
        floor.polled(rows)
        if rows.messages:
            await self._kafka.publish(rows.messages)
            # Published and not deleted is published twice, which readers bear; the other way round
            # would lose it.
            async with transaction_on(connection):
                await _delete_messages(connection, self.topic, rows.ids)
            telemetry.count_relayed(self.topic, len(rows.messages))
        floor.raise_to_ended()
        return rows.are_all

    async def _wait(self, stop: asyncio.Event) -> None:
        """Wait for a commit of this process, or for the next poll (others write too)."""
        waiting = {
            asyncio.ensure_future(self._written.wait()),
            asyncio.ensure_future(stop.wait()),
        }
        await asyncio.wait(waiting, timeout=RELAY_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()


class _Floor:
    """The lowest id that may still appear: whoever drew a lower one has ended."""

    def __init__(self) -> None:
        self.lowest_id = 0
        self._seen_id = 0
        self._candidate: tuple[int, int] | None = None
        self._next_lowest = 0

    def polled(self, rows: _Rows) -> None:
        """Take a poll: its snapshot, and then the ids it saw.

        All transactions below xmin have ended; none from xmax on had begun.
        """
        if self._candidate is not None:
            xid, last_id = self._candidate
            if rows.xmin >= xid and (rows.are_all or rows.ids[-1] >= last_id):
                # Whoever could draw a number up to last_id had ended, and this poll has seen it.
                self._next_lowest = last_id + 1
                self._candidate = None
        if self._candidate is None and self._seen_id >= self.lowest_id:
            # Ids seen in earlier polls were drawn before this snapshot: a transaction from xmax
            # on draws higher ones.
            self._candidate = (rows.xmax, self._seen_id)
        if rows.ids:
            self._seen_id = max(self._seen_id, rows.ids[-1])

    def raise_to_ended(self) -> None:
        """The rows of the last poll are published and deleted."""
        self.lowest_id = max(self.lowest_id, self._next_lowest)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The lowest rows of a topic, and the snapshot taken just before they were read."""

    ids: list[int]
    messages: list[Message]
    xmin: int
    xmax: int
    are_all: bool
    """No row of the topic was left out for the sake of a bound."""


_INSERT_MESSAGES = """
insert into outbox (topic, partition, message_key, message_value, message_headers)
select m.topic, m.partition, m.message_key, m.message_value, m.message_headers
  from unnest($1::text[], $2::int[], $3::bytea[], $4::bytea[], $5::bytea[]) with ordinality
       as m (topic, partition, message_key, message_value, message_headers, place)
 order by m.place
"""


async def _insert_messages(connection: Connection, messages: Sequence[Message]) -> None:
    """Write outbox rows, numbered in the order given."""
    await connection.execute(
        _INSERT_MESSAGES,
        [message.topic for message in messages],
        [message.partition for message in messages],
        [message.key for message in messages],
        [message.value for message in messages],
        [
            msgspec.msgpack.encode(message.headers) if message.headers else None
            for message in messages
        ],
    )


_SNAPSHOT = """
select pg_snapshot_xmin(s)::text::bigint as xmin, pg_snapshot_xmax(s)::text::bigint as xmax
  from pg_current_snapshot() as s
"""
_LOWEST_MESSAGES = """
select outbox_id, partition, message_key, message_value, message_headers, found
  from (select outbox_id, partition, message_key, message_value, message_headers,
               count(*) over () as found,
               sum(value_bytes) over (order by outbox_id rows unbounded preceding) - value_bytes
                 as bytes_before
          from (select outbox_id, partition, message_key, message_value, message_headers,
                       coalesce(octet_length(message_value), 0) as value_bytes
                  from outbox
                 where topic = $1 and outbox_id >= $2
                 order by outbox_id
                 limit $3) lowest) measured
 where bytes_before < $4
 order by outbox_id
"""


async def _lowest_messages(connection: Connection, topic: str, lowest_id: int) -> _Rows:
    """Read the lowest rows of a topic from `lowest_id` on, as many as the bounds allow."""
    # Before the rows: what commits between the two is seen and only counted later.
    snapshot = await connection.fetchrow(_SNAPSHOT)
    rows = await connection.fetch(_LOWEST_MESSAGES, topic, lowest_id, RELAY_ROWS, RELAY_BYTES)
    if snapshot is None:
        raise RuntimeError("PostgreSQL always has a snapshot")
    messages = [
        Message(
            topic,
            row["message_key"],
            row["message_value"],
            _HEADERS.decode(row["message_headers"]) if row["message_headers"] else (),
            row["partition"],
        )
        for row in rows
    ]
    ids = [row["outbox_id"] for row in rows]
    found = rows[0]["found"] if rows else 0
    are_all = found < RELAY_ROWS and found == len(rows)
    return _Rows(ids, messages, snapshot["xmin"], snapshot["xmax"], are_all)


_HEADERS: Final = msgspec.msgpack.Decoder(tuple[tuple[str, bytes | None], ...])

_DELETE_MESSAGES = "delete from outbox where topic = $1 and outbox_id = any($2::bigint[])"


async def _delete_messages(connection: Connection, topic: str, ids: Sequence[int]) -> None:
    """Delete rows that the broker has acknowledged."""
    await connection.execute(_DELETE_MESSAGES, topic, ids)


# As far as rows are counted: a backlog of millions is read by its relay, not by who asks how long.
_COUNT_MESSAGES = "select count(*) from (select from outbox limit $1) waiting"


async def _count_messages(connection: Connection) -> int:
    """Count the rows that the broker has not acknowledged."""
    return int(await connection.fetchval(_COUNT_MESSAGES, MESSAGES_COUNTED))
