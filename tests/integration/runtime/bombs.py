"""Batches that are small on the wire and large in memory, as a hostile producer would send them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import cramjam
from aiokafka import AIOKafkaProducer
from aiokafka.record.default_records import DefaultRecordBase, _DefaultRecordBatchBuilderPy
from aiokafka.record.util import encode_varint

MIB = 1024 * 1024


class Bomb(_DefaultRecordBatchBuilderPy):  # type: ignore[misc]
    """A batch whose records were compressed by somebody else."""

    def __init__(self, codec: int, compressed: bytes, records: int = 1) -> None:
        super().__init__(2, codec, 0, -1, -1, 0, 100 * MIB)
        self.append(0, 1_753_956_000_000, None, b"", [])
        self._compressed = compressed
        self._num_records = records
        self._last_offset = records - 1

    def _maybe_compress(self) -> bool:
        self._buffer[self.HEADER_STRUCT.size :] = self._compressed
        return True


def of_value(value_bytes: int) -> Bomb:
    """One record with so many zeros as its value, in zstd."""
    tail = b"\x00"
    head = b"\x00\x00\x00\x01" + varint(value_bytes)
    length = varint(len(head) + value_bytes + len(tail))
    return Bomb(DefaultRecordBase.CODEC_ZSTD, zstd([length, head, *zeros(value_bytes), tail]))


def of_headers(count: int) -> Bomb:
    """One record with so many empty headers, in gzip."""
    head = b"\x00\x00\x00\x01\x01" + varint(count)
    length = varint(len(head) + 2 * count)
    squeezer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [squeezer.compress(part) for part in (length, head, *zeros(2 * count))]
    return Bomb(DefaultRecordBase.CODEC_GZIP, b"".join([*parts, squeezer.flush()]))


def of_records(count: int, value_bytes: int) -> Bomb:
    """So many records with zeros as values, in zstd."""
    return Bomb(
        DefaultRecordBase.CODEC_ZSTD, zstd(plain_records(count, value_bytes)), records=count
    )


def plain_records(count: int, value_bytes: int) -> Iterator[bytes]:
    """The bytes of such records as they stand in a batch."""
    value = varint(value_bytes) + bytes(value_bytes) + b"\x00"
    for delta in range(count):
        body = b"\x00\x00" + varint(delta) + b"\x01" + value
        yield varint(len(body)) + body


def zstd(parts: Iterable[bytes]) -> bytes:
    """Compress parts without ever holding them together."""
    squeezer = cramjam.zstd.Compressor(3)
    for part in parts:
        squeezer.compress(part)
    return bytes(squeezer.finish())


def zeros(count: int) -> Iterator[bytes]:
    """So many zeros, a MiB at a time."""
    for begun in range(0, count, MIB):
        yield bytes(min(MIB, count - begun))


def varint(number: int) -> bytes:
    """Encode a number as records do."""
    encoded = bytearray()
    encode_varint(number, encoded.append)
    return bytes(encoded)


async def send_bombs(bootstrap_servers: str, topic: str, bombs: Iterable[Bomb]) -> None:
    """Write these batches to partition 0, one after another."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers)
    await producer.start()
    try:
        for bomb in bombs:
            batch = producer.create_batch()
            batch._builder, batch._relative_offset = bomb, bomb._num_records
            await (await producer.send_batch(batch, topic, partition=0))
    finally:
        await producer.stop()
