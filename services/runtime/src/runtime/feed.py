"""What one member of a consuming group reads, and the hints it leaves for lag tools.

Theory. A `Feed` is one member of a consuming group that never has committed offsets
(`auto_offset_reset=none`): a partition gives nothing before it was sought. The rebalance listener
only counts; whoever drives the feed looks at `rebalances`. How far we are is committed for lag
tools under a second group (`Hints`), at most every second, by a client of its own.

Refusals: `BrokerLost`, and `OutOfRangeError` for an offset that the broker does not have.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    CorruptRecordException,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from runtime.decoding import Undecodable, bound_decoding, budget
from runtime.kafka import CLOSE_TIMEOUT_S, METADATA_MAX_AGE_MS, BrokerLost, Kafka, broker_errors
from runtime.machine import Partition
from runtime.records import (
    LOOK_DECODED_BYTES,
    RawMessage,
    Record,
    Reread,
    record_of,
    reread,
)

SETTLE_S: Final = 0.02
SESSION_TIMEOUT_MS: Final = 45_000
REBALANCE_TIMEOUT_MS: Final = 60_000
FETCH_WAIT_MS: Final = 100
PARTITION_FETCH_BYTES: Final = 4 * 1024 * 1024
FETCH_BYTES: Final = 16 * 1024 * 1024
HINT_EVERY_S: Final = 1.0
HINT_TIMEOUT_S: Final = 5

_log = structlog.get_logger("runtime.feed")


class OutOfRangeError(Exception):
    """The broker does not have the offset that was sought in this partition."""

    def __init__(self, partition: Partition) -> None:
        """Name the partition."""
        super().__init__(partition)
        self.partition = partition


@ConsumerRebalanceListener.register
class _Flag:
    """Counts rebalances; whatever must be done about one is done by who drives the feed."""

    def __init__(self) -> None:
        self.rebalances = 0

    def on_partitions_revoked(self, _revoked: object) -> None:
        self.rebalances += 1

    def on_partitions_assigned(self, _assigned: object) -> None:
        self.rebalances += 1


@dataclass(frozen=True, slots=True)
class Fetch:
    """What one fetch brought of one partition: every record in [begun_offset, until)."""

    partition: Partition
    begun_offset: int
    until: int
    records: Sequence[Record]


class Feed:
    """One member of a consuming group. Nothing comes from a partition before it was sought."""

    def __init__(self, kafka: Kafka, group: str | None) -> None:
        """Describe the member; `open` joins the group. Without one it reads all partitions."""
        bound_decoding()
        self._kafka = kafka
        self._is_alone = group is None
        self._flag = _Flag()
        self._positions: dict[Partition, int] = {}
        self._refused: set[TopicPartition] = set()
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=kafka.bootstrap,
            client_id=kafka.client,
            group_id=group,
            group_instance_id=None if group is None else f"{group}-{kafka.instance}",
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            partition_assignment_strategy=(StickyPartitionAssignor,),
            session_timeout_ms=SESSION_TIMEOUT_MS,
            rebalance_timeout_ms=REBALANCE_TIMEOUT_MS,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=PARTITION_FETCH_BYTES,
            fetch_max_bytes=FETCH_BYTES,
        )

    @property
    def rebalances(self) -> int:
        """Counts up whenever partitions were taken or given: what was fetched before is void."""
        return self._flag.rebalances

    async def open(self, topics: Iterable[str]) -> None:
        """Join the group; returns once partitions are assigned.

        It joins twice: a static member that returns is given what it had before, whatever it asks
        for now; only the second time does the broker look at its topics.
        """
        self._is_alone = self._is_alone or await self._kafka.is_in_memory()
        if not self._is_alone:
            await self.follow(topics)
        with broker_errors():
            await self._consumer.start()
        # aiokafka's fetcher wakes for the first assignment and must find it still standing.
        await asyncio.sleep(SETTLE_S)
        await self.follow(topics)

    async def follow(self, topics: Iterable[str]) -> None:
        """Read exactly these topics (they must exist) from now on."""
        if self._is_alone:
            # In no group; or in one of the in-memory broker, which needs most of a session's length
            # to rebalance a group of one.
            partitions = await self._kafka.partitions(topics)
            self._consumer.assign([TopicPartition(*partition) for partition in partitions])
            self._flag.rebalances += 1
        else:
            self._consumer.subscribe(sorted(topics), listener=self._flag)

    async def close(self) -> None:
        """Leave; bounded, because aiokafka's `stop` can hang."""
        with contextlib.suppress(KafkaError, TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                try:
                    await self._consumer.stop()
                finally:
                    # `stop` does not come to this when its fetcher has died.
                    await self._consumer._client.close()  # noqa: SLF001

    def assigned(self) -> tuple[Partition, ...]:
        """Return the partitions the group has given us."""
        return tuple(sorted(Partition(*where) for where in self._consumer.assignment()))

    def seek(self, partition: Partition, offset: int) -> None:
        """Go on at this offset; whatever was prefetched is thrown away."""
        self._positions[partition] = offset
        # An unassigned partition is not ours any more: `rebalances` says so.
        with contextlib.suppress(IllegalStateError):
            self._consumer.seek(TopicPartition(*partition), offset)

    async def fetch(
        self, partitions: Iterable[Partition], *, wait_ms: int, max_records: int
    ) -> tuple[Fetch, ...]:
        """Return what has arrived in these (sought) partitions; may be cancelled without loss."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        fetched = []
        before = self._flag.rebalances
        if self._consumer._fetcher.error_future.done():  # noqa: SLF001 - it dies without a word
            raise BrokerLost("aiokafka's fetcher has ended")
        with broker_errors():
            try:
                again = await self._reread(wanted, max_records)
                brought = await self._brought(wanted, 0 if again else wait_ms, max_records)
                if self._flag.rebalances != before:
                    return ()
                for where in wanted:
                    partition = Partition(*where)
                    begun_offset = self._positions.get(partition, -1)
                    if where in again:
                        until, records = again[where].until, again[where].records
                        self._consumer.seek(where, until)
                    else:
                        until = await self._consumer.position(where)
                        records = [record_of(message) for message in brought.get(where, ())]
                    if until != begun_offset:
                        self._positions[partition] = until
                        fetched.append(Fetch(partition, begun_offset, until, records))
            except OffsetOutOfRangeError as error:
                raise OutOfRangeError(Partition(*next(iter(error.args[0])))) from error
            except (NoOffsetForPartitionError, IllegalStateError):
                # The group has moved on; `rebalances` says so, or is about to.
                return ()
        return tuple(fetched)

    async def _brought(
        self, wanted: Sequence[TopicPartition], wait_ms: int, max_records: int
    ) -> Mapping[TopicPartition, Sequence[RawMessage]]:
        """Return what aiokafka has fetched; what it cannot read is left for `_reread`.

        That is what it refuses, and what would be too large decoded: its fetcher decodes here, when
        records are taken, not when they arrive.
        """
        plain = [where for where in wanted if where not in self._refused]
        if not plain:
            return {}
        try:
            with budget(LOOK_DECODED_BYTES):
                brought: Mapping[
                    TopicPartition, Sequence[RawMessage]
                ] = await self._consumer.getmany(
                    *plain, timeout_ms=wait_ms, max_records=max_records
                )
        except (UnicodeDecodeError, Undecodable, CorruptRecordException):
            # It does not say in which partition, and has lost what it took from the others.
            for where in plain:
                self._consumer.seek(where, self._positions[Partition(*where)])
            self._refused.update(plain)
            return {}
        return brought

    async def _reread(
        self, wanted: Sequence[TopicPartition], max_records: int
    ) -> dict[TopicPartition, Reread]:
        """Read refused partitions past aiokafka; those that prove readable are refused no more."""
        refused = [where for where in wanted if where in self._refused]
        found: dict[TopicPartition, Reread] = {}
        for where in refused:
            offset, most = self._positions[Partition(*where)], max_records // len(refused) + 1
            found[where] = await reread(self._consumer, where, offset, max_records=most)
            if found[where].is_plain:
                self._refused.discard(where)
        return found


class Hints:
    """Tells lag tools how far we are, under a second group; never waited for."""

    def __init__(self, kafka: Kafka, group: str) -> None:
        """Commit under `group`, which nobody consumes with."""
        self._kafka = kafka
        self._group = group
        self._offsets: dict[TopicPartition, int] = {}

    def note(self, offsets: Mapping[Partition, int]) -> None:
        """Remember how far we are; returns at once."""
        self._offsets.update({TopicPartition(*where): at for where, at in offsets.items()})

    async def run(self) -> None:
        """Commit what is noted, once a second, until cancelled; a failure is tried again."""
        while True:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._kafka.bootstrap,
                client_id=self._kafka.client,
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="none",
            )
            try:
                await consumer.start()
                while True:
                    await asyncio.sleep(HINT_EVERY_S)
                    await _to_its_end(self._commit(consumer))
            except (KafkaError, OSError) as error:
                _log.debug("no hints", group=self._group, error=repr(error))
                await asyncio.sleep(HINT_EVERY_S)
            finally:
                with contextlib.suppress(KafkaError, TimeoutError, OSError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await consumer.stop()

    async def _commit(self, consumer: AIOKafkaConsumer) -> None:
        offsets, self._offsets = self._offsets, {}
        if not offsets:
            return
        assigned = consumer.assignment() | set(offsets)
        if assigned != consumer.assignment():
            consumer.assign(sorted(assigned))
            consumer.pause(*assigned)
        try:
            async with asyncio.timeout(HINT_TIMEOUT_S):
                await consumer.commit(offsets)
        except (KafkaError, TimeoutError, OSError) as error:
            self._offsets = offsets | self._offsets
            _log.debug("hint not committed", group=self._group, error=repr(error))


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Wait for bounded work even when cancelled, and be cancelled then.

    aiokafka commits in a task of its own. Were the consumer stopped below it, that task would fail
    with nobody to hear, and asyncio would log it as an error of ours in the middle of a good stop.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
