"""Records, and how those are read that aiokafka refuses, or that would be too large in memory.

Theory. On the wire a header's name is any bytes; aiokafka decodes it while a batch is iterated, and
raises: no record from there on would ever come. A compressed batch may stand for a gigabyte, or be
nothing that can be decoded. `reread` fetches the same bytes past aiokafka's fetcher and hands them
to the same code, with every such name escaped, in portions that fit in memory. What cannot be taken
apart, or not in time, is put aside: one record stands in its place, at the last offset it takes up,
with the bytes of the whole batch as they were sent. Both kinds are marked, so that nobody takes the
record for what was sent. Transactions and control batches are left to aiokafka's
`PartitionRecords`, as ever.
Slow, and meant for the rare partition that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, SupportsIndex

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.errors import (
    CorruptRecordException,
    LeaderNotAvailableError,
    NoError,
    OffsetOutOfRangeError,
    for_code,
)
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.util import decode_varint

from runtime.decoding import BATCH_DECODED_BYTES, Undecodable, budget

REREAD_BYTES: Final = 4 * 1024 * 1024
LOOK_DECODED_BYTES: Final = 16 * 1024 * 1024
"""What one look may decode, or keep: ordinary ones need a tenth of it."""

LARGEST_RECORD_BYTES: Final = 4 * 1024 * 1024
"""A topic takes 1 MiB by default, compressed or not. Each header of a larger record would cost
fifty times its bytes in memory."""

MOST_RECORDS: Final = 200_000
"""Of one batch. Each look begins at the batch's first record, and the loop stands still until it
has come to its own. A client that fills 1 MiB with empty records makes 120 000 of them."""

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
    undecodable: str = ""
    """Why records cannot be taken out of their batch; the value is that batch as it was sent."""

    @property
    def is_as_sent(self) -> bool:
        """Whether the record is what its producer sent."""
        return not self.is_escaped and not self.undecodable


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
    is_plain: bool
    """aiokafka would have read all of it, within the bounds of one look."""


async def reread(
    consumer: AIOKafkaConsumer, where: TopicPartition, offset: int, *, max_records: int
) -> Reread:
    """Fetch what a partition has from an offset on, without waiting for more to arrive.

    Ends early, after one record at least, when what it holds passes `LOOK_DECODED_BYTES`.
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
    records: list[Record] = []
    kept_bytes = 0
    for message in found:
        record = record_of(message)
        records.append(record)
        kept_bytes += size_of(record)
        if len(records) >= max_records or kept_bytes >= LOOK_DECODED_BYTES:
            break
    odd = [record.offset for record in records if not record.is_as_sent]
    if odd:
        _log.error("records are not readable as they were sent", partition=where, offsets=odd)
    is_plain = not odd and batches.largest_bytes < LOOK_DECODED_BYTES
    return Reread(found.next_fetch_offset, records, is_plain)


def size_of(record: Record) -> int:
    """Return about how much memory a record takes."""
    headers = sum(len(name) + len(value or b"") + 128 for name, value in record.headers)
    return len(record.key or b"") + len(record.value or b"") + headers + 256


def record_of(message: RawMessage) -> Record:
    """Take a record from aiokafka."""
    headers, is_escaped, undecodable = message.headers, False, ""
    value = message.value
    if isinstance(value, _WholeBatch):
        undecodable = value.because
        value = bytes(value)
    if any(type(name) is _Escaped for name, _ in headers):
        headers, is_escaped = tuple((str(name), value) for name, value in headers), True
    return Record(
        message.topic,
        message.partition,
        message.offset,
        message.timestamp,
        message.key,
        value,
        headers,
        is_escaped,
        undecodable,
    )


class _Batches:
    """The batches of a fetch, as `PartitionRecords` asks for them; the last may be cut off."""

    def __init__(self, raw: bytes) -> None:
        self._left = memoryview(raw)
        self._given: list[_Batch] = []

    @property
    def largest_bytes(self) -> int:
        """How many bytes the largest batch that was given has, decoded."""
        return max((batch.decoded_bytes for batch in self._given), default=0)

    def has_next(self) -> bool:
        return len(self._left) >= _BEFORE_LENGTH_ENDS and len(self._left) >= self._end()

    def next_batch(self) -> _Batch:
        end = self._end()
        raw, self._left = self._left[:end], self._left[end:]
        for batch in self._given:
            batch.forget()
        self._given.append(_Batch(raw))
        return self._given[-1]

    def _end(self) -> int:
        return _BEFORE_LENGTH_ENDS + int.from_bytes(self._left[_LENGTH], "big")


class _Batch:
    """A batch of aiokafka's own, whose bytes decode without ever raising, in bounded memory."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._batch = _DefaultRecordBatchPy(raw)
        self._trouble = ""
        self._is_over = False
        self.decoded_bytes = 0

    # `Any` is honest here: we stand in for an untyped object and hand on whatever it has.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def forget(self) -> None:
        """Let go of the decoded bytes: the records that were taken have their own."""
        self._batch._buffer = bytearray()  # noqa: SLF001

    def __iter__(self) -> Iterator[RawMessage]:
        if self._batch._num_records > MOST_RECORDS:  # noqa: SLF001
            self._trouble = f"it has more than {MOST_RECORDS} records"
            return self
        try:
            with budget(BATCH_DECODED_BYTES):
                self._batch._maybe_uncompress()  # noqa: SLF001 - it replaces the bytes we then wrap
        except Undecodable as error:
            self._trouble = str(error)
        else:
            self.decoded_bytes = len(self._batch._buffer)  # noqa: SLF001
            self._batch._buffer = _Bytes(self._batch._buffer)  # noqa: SLF001
        return self

    def __next__(self) -> RawMessage:
        if self._is_over:
            raise StopIteration
        if not self._trouble:
            try:
                return self._passed_over() or next(self._batch)
            except (CorruptRecordException, IndexError, ValueError) as error:
                self._trouble = f"its records cannot be told apart: {error}"
        self._is_over = True
        # At the last offset: so all that the batch takes up is passed, wherever a look ends.
        last = self._batch.next_offset - 1
        first = self._batch.base_offset
        return self._put_aside(last, f"the batch of offsets {first} to {last}: {self._trouble}")

    def _passed_over(self) -> RawMessage | None:
        """Pass the next record when it is too large, and return what stands for it."""
        batch = self._batch
        if batch._next_record_index >= batch._num_records:  # noqa: SLF001
            return None
        length, begun = decode_varint(batch._buffer, batch._pos)  # noqa: SLF001
        if length <= LARGEST_RECORD_BYTES:
            return None
        _attributes, at = decode_varint(batch._buffer, begun)  # noqa: SLF001
        _timestamp, at = decode_varint(batch._buffer, at)  # noqa: SLF001
        offset_delta, _ = decode_varint(batch._buffer, at)  # noqa: SLF001
        batch._pos = begun + length  # noqa: SLF001
        batch._next_record_index += 1  # noqa: SLF001
        offset = batch.base_offset + offset_delta
        return self._put_aside(
            offset, f"the record at offset {offset} of this batch: decoded, it has {length} bytes"
        )

    def _put_aside(self, offset: int, because: str) -> RawMessage:
        value = _WholeBatch(self._raw)
        value.because = f"{because}; the bytes of the batch are kept as they were sent"
        timestamp_ms, kind = self._batch.max_timestamp, self._batch.timestamp_type
        message: RawMessage = _DefaultRecordPy(offset, timestamp_ms, kind, None, value, [])
        return message


class _WholeBatch(bytes):
    """The bytes of a batch, in place of the value of a record that cannot be taken out of it."""

    because = ""


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
