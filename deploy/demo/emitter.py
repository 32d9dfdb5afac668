"""The Kafka side: one producer for all hubs, records in the order in which they are emitted.

Every record is acknowledged by all replicas before `flush` returns; what the broker refuses is
raised there, never dropped. `sent` counts as `records.sent` does: intervals and what nobody can
decode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Self

from aiokafka import AIOKafkaProducer

from demo.stream import HEADERS, Record
from hisab_contracts.ids import HubCode
from hisab_contracts.topics import hub_topic, partition_of

_STRIDE: Final = 500
"""Records between two looks at progress."""
_MOST_UNACKNOWLEDGED: Final = 20_000


class Emitter:
    """Writes to the hubs' topics as their agents would."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._producer = AIOKafkaProducer(
            bootstrap_servers=bootstrap_servers,
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            max_batch_size=256 * 1024,
            # How long a record may wait for its broker: a busy machine takes its time.
            request_timeout_ms=600_000,
        )
        self._partition_of: dict[bytes, int] = {}
        self._unacknowledged: list[asyncio.Future[object]] = []
        self._sent = 0

    @property
    def sent(self) -> int:
        """Intervals and undecodable records sent so far, resends included."""
        return self._sent

    async def __aenter__(self) -> Self:
        await self._producer.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._producer.stop()

    async def emit(
        self, records: Iterable[Record], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Send records in order; `progress(records, order_ms)` is called now and then."""
        since = 0
        for number, record in enumerate(records, 1):
            await self._send(record)
            if number % _STRIDE == 0:
                if progress is not None:
                    progress(number - since, record.order_ms)
                since = number
                # `send` need not wait for anything, and then no other task would ever have a turn.
                await asyncio.sleep(0)
        await self.flush()

    async def emit_bytes(self, hub: HubCode, value: bytes) -> None:
        """Send what is no event at all: no key, no sequence."""
        await self._producer.send_and_wait(hub_topic(hub), value)
        self._sent += 1

    async def flush(self) -> None:
        """Wait until the broker has acknowledged everything; raise its first refusal."""
        unacknowledged, self._unacknowledged = self._unacknowledged, []
        await asyncio.gather(*unacknowledged)

    async def _send(self, record: Record) -> None:
        topic = hub_topic(record.hub)
        # aiokafka would hash the key in Python for every record; a node keeps its partition.
        partition = self._partition_of.get(record.key)
        if partition is None:
            partitions = await self._producer.partitions_for(topic)
            partition = self._partition_of[record.key] = partition_of(record.key, len(partitions))
        sending = await self._producer.send(
            topic, record.value, key=record.key, partition=partition, headers=list(HEADERS)
        )
        self._unacknowledged.append(sending)
        self._sent += record.counts
        if len(self._unacknowledged) >= _MOST_UNACKNOWLEDGED:
            await self.flush()
