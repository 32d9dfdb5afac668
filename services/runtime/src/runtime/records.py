"""Records, and how those are read that aiokafka refuses: a header's name is not UTF-8.

Theory. On the wire a header's name is any bytes; aiokafka decodes it while a batch is iterated, and
raises: no record from there on would ever come. `reread` fetches the same bytes past its fetcher
and hands them to the same code with every such name escaped. What was escaped is marked,
so that nobody takes the record for what was sent. Transactions and control batches are left to
aiokafka's `PartitionRecords`, as ever. Slow, and meant for the rare partition that needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, SupportsIndex

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.errors import LeaderNotAvailableError, NoError, OffsetOutOfRangeError, for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy

REREAD_BYTES: Final = 4 * 1024 * 1024

_LENGTH: Final = slice(8, 12)
_BEFORE_LENGTH_ENDS: Final = 12

_log = structlog.get_logger("runtime.records")


class Record(msgspec.Struct, frozen=True, gc=False):
    """One message as the broker gave it. Bytes are not decoded and not checked."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    """The broker's time on topics with LogAppendTime, else the producer's."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    is_escaped: bool = False
    """A header's name is not UTF-8 and is shown escaped: put the record aside, do not read it."""


class RawMessage(Protocol):
    """What aiokafka, which has no types, gives for a message."""

    @property
    def timestamp(self) -> int:
        """Milliseconds since 1970."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True, slots=True)
class Reread:
    """Every record in [the offset asked for, until)."""

    until: int
    records: Sequence[Record]


async def reread(
    consumer: AIOKafkaConsumer, where: TopicPartition, offset: int, *, max_records: int
) -> Reread:
    """Fetch what a partition has from an offset on, without waiting for more to arrive.

    Raises `KafkaError`, `OffsetOutOfRangeError` among them as aiokafka's own fetcher does.
    """
    client = consumer._client  # noqa: SLF001 - aiokafka has no door for this
    leader = client.cluster.leader_for_partition(where)
    if leader is None or leader < 0:
        raise LeaderNotAvailableError(where)
    wanted = [(where.topic, [(where.partition, offset, REREAD_BYTES)])]
    answer = await client.send(leader, FetchRequest(0, 0, REREAD_BYTES, READ_COMMITTED, wanted))
    ((_, ((_, code, _, *rest),)),) = answer.topics
    error = for_code(code)
    if error is OffsetOutOfRangeError:
        raise error({where: offset})
    if error is not NoError:
        raise error(where)
    aborted = rest[-3] if answer.API_VERSION >= 11 else rest[-2]
    batches = _Batches(rest[-1])
    found = PartitionRecords(where, batches, aborted, offset, None, None, True, READ_COMMITTED)
    records = [record_of(message) for message in itertools.islice(found, max_records)]
    escaped = [record.offset for record in records if record.is_escaped]
    if escaped:
        _log.error("header names are not UTF-8", partition=where, offsets=escaped)
    return Reread(found.next_fetch_offset, records)


def record_of(message: RawMessage) -> Record:
    """Take a record from aiokafka."""
    headers, is_escaped = message.headers, False
    if any(type(name) is _Escaped for name, _ in headers):
        headers, is_escaped = tuple((str(name), value) for name, value in headers), True
    return Record(
        message.topic,
        message.partition,
        message.offset,
        message.timestamp,
        message.key,
        message.value,
        headers,
        is_escaped,
    )


class _Batches:
    """The batches of a fetch, as `PartitionRecords` asks for them; the last may be cut off."""

    def __init__(self, raw: bytes) -> None:
        self._left = memoryview(raw)

    def has_next(self) -> bool:
        return len(self._left) >= _BEFORE_LENGTH_ENDS and len(self._left) >= self._end()

    def next_batch(self) -> _Batch:
        end = self._end()
        raw, self._left = self._left[:end], self._left[end:]
        return _Batch(raw)

    def _end(self) -> int:
        return _BEFORE_LENGTH_ENDS + int.from_bytes(self._left[_LENGTH], "big")


class _Batch:
    """A batch of aiokafka's own, whose bytes decode without ever raising."""

    def __init__(self, raw: memoryview) -> None:
        self._batch = _DefaultRecordBatchPy(raw)

    # `Any` is honest here: we stand in for an untyped object and hand on whatever it has.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[RawMessage]:
        self._batch._maybe_uncompress()  # noqa: SLF001 - it replaces the bytes we then wrap
        self._batch._buffer = _Bytes(self._batch._buffer)  # noqa: SLF001
        return iter(self._batch)

    def __next__(self) -> RawMessage:
        message: RawMessage = next(self._batch)
        return message


class _Bytes(bytearray):
    """The records of a batch: the only text aiokafka decodes in them is a header's name."""

    def __getitem__(self, at: SupportsIndex | slice) -> Any:
        found = super().__getitem__(at)
        return _Bytes(found) if isinstance(found, bytearray) else found

    def decode(self, encoding: str = "utf-8", _errors: str = "strict") -> str:
        try:
            return super().decode(encoding)
        except UnicodeDecodeError:
            return _Escaped(super().decode(encoding, "backslashreplace"))


class _Escaped(str):
    """A name that stands for bytes which are no text."""

    __slots__ = ()
