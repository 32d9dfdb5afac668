"""A producer that writes what no client library lets one write."""

from __future__ import annotations

from collections.abc import Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.record.default_records import DefaultRecordBase, _DefaultRecordBatchBuilderPy


class RawName(str):
    """A header's name that is encoded to bytes which are no UTF-8."""

    __slots__ = ()

    def encode(self, *_: str) -> bytes:
        return b"\xff" + super().encode()


async def send_raw(
    bootstrap_servers: str,
    topic: str,
    values: Sequence[tuple[bytes, Sequence[str]]],
    codec: int = DefaultRecordBase.CODEC_NONE,
) -> None:
    """Write one batch to partition 0: values, and the names of the headers of each."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers)
    await producer.start()
    try:
        batch = producer.create_batch()
        batch._builder = _DefaultRecordBatchBuilderPy(2, codec, 0, -1, -1, 0, 1_000_000)
        for value, names in values:
            headers = [(name, b"1") for name in names]
            batch.append(key=b"k", value=value, timestamp=None, headers=headers)
        await (await producer.send_batch(batch, topic, partition=0))
    finally:
        await producer.stop()
