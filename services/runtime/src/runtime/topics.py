"""Which topics there are: how many partitions each has, and the id of its log.

Theory. A topic that is deleted and made again has the same name and another log; only its id tells
(KIP-516, Kafka 2.8). aiokafka asks in a version of the protocol from before the ids, so the version
that has them is described here. A broker that is older is asked as aiokafka does, and its topics
have the id "": such logs cannot be told apart.

Partition counts are believed from here and nowhere else: a setting says only with how many a topic
is made. Downstream, completeness travels per partition, so two topics of one path must agree.

Refusals: `PartitionMismatch`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Final, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import RequestHeader_v2, ResponseHeader_v1
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from hisab_contracts.ids import UNKNOWN_TOPIC, TopicId

_METADATA: Final = 3
_ID_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class ExistingTopic:
    """A topic that the broker has."""

    partitions: int
    topic_id: TopicId
    """As `kafka-topics.sh --describe` prints it; "" where the broker gives no ids."""


class PartitionMismatch(Exception):
    """Topics, or a message and its topic, disagree about partitions; the message says what to do.

    Whoever raises it ends before anything is stated downstream: a month might close without what
    is in the partitions that nobody counted.
    """


def misplaced(topic: str, partition: int, offset: int, key: bytes, number: int, count: int) -> str:
    """Say that a record does not stand in its key's partition, and what to do about it."""
    return (
        f"{topic}[{partition}] offset {offset}: the key {key!r} belongs to partition {number} of"
        f" {count}. Either partitions were added while records waited, or a producer does not place"
        " keys by murmur2. Once that has ended, pass the record by on the record"
        f" (override-progress {topic} {partition} {offset + 1} --accepted-by … --reason …) and"
        " have whoever wrote it state it again: metering by `reconcile --repair`, the ledger by"
        " itself, when invoicing misses an entry"
    )


def require_equal_counts(topics: Mapping[str, ExistingTopic]) -> None:
    """Raise `PartitionMismatch` unless all these topics have equally many partitions."""
    counts = {name: topic.partitions for name, topic in sorted(topics.items())}
    if len(set(counts.values())) > 1:
        listed = " and ".join(f"{name} has {count} partitions" for name, count in counts.items())
        raise PartitionMismatch(
            f"{listed}: a tenant must have the same partition in each. Add partitions to the"
            f" smaller one until each has {max(counts.values())} (kafka-topics.sh --alter"
            " --partitions), while the services are stopped and no records wait, then start again"
        )


async def describe_topics(
    admin: AIOKafkaAdminClient, names: list[str] | None
) -> dict[str, ExistingTopic]:
    """Return those of these topics that exist, or all there are; none is created by asking."""
    # aiokafka has no door for a request that it does not know itself.
    answer = await admin._send_request(_TopicsRequest(names))  # noqa: SLF001
    if isinstance(answer, _Metadata):
        return {
            row.topic: ExistingTopic(row.partitions, TopicId(row.topic_id)) for row in answer.found
        }
    return {
        row["topic"]: ExistingTopic(len(row["partitions"]), UNKNOWN_TOPIC)
        for row in answer.to_object()["topics"]
        if row["error_code"] == 0 and row["partitions"]
    }


# What aiokafka's connection needs of a request and of its answer: it prepares the one for the
# versions of the broker, and decodes the other from the bytes that came.


class _TopicsRequest:
    """Asks for topics in the newest version that both sides know."""

    def __init__(self, names: list[str] | None) -> None:
        self._names = names

    def prepare(self, versions: Mapping[int, tuple[int, int]]) -> object:
        oldest, newest = versions.get(_METADATA, (0, 0))
        if oldest <= _MetadataRequest.API_VERSION <= newest:
            return _MetadataRequest(self._names)
        # In its oldest version no names would mean none, not all; brokers of today know better.
        return MetadataRequest(self._names, allow_auto_topic_creation=False).prepare(versions)


class _TopicId:
    """16 bytes, shown as Kafka's own tools show them; zeros stand for no id."""

    @staticmethod
    def encode(_none: None) -> bytes:
        return bytes(_ID_BYTES)

    @staticmethod
    def decode(data: BytesIO) -> str:
        raw = data.read(_ID_BYTES)
        return base64.urlsafe_b64encode(raw).decode().rstrip("=") if any(raw) else ""


class _TopicRow(NamedTuple):
    """A topic in the answer."""

    topic: str
    topic_id: str
    partitions: int


class _Metadata:
    """The answer, version 12."""

    SCHEMA: Final = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString("utf-8")),
                ("topic_id", _TopicId),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )

    def __init__(self, found: Sequence[_TopicRow]) -> None:
        self.found = found

    @classmethod
    def decode(cls, data: BytesIO) -> _Metadata:
        *_, rows, _tags = cls.SCHEMA.decode(data)
        return cls(
            [
                _TopicRow(topic, topic_id, len(partitions))
                for error_code, topic, topic_id, _internal, partitions, *_ in rows
                if error_code == 0 and partitions
            ]
        )


class _MetadataRequest:
    """The request, version 12: topics by name, or all of them; none is created."""

    API_KEY: Final = _METADATA
    API_VERSION: Final = 12
    RESPONSE_TYPE: Final = _Metadata
    SCHEMA: Final = Schema(
        (
            "topics",
            CompactArray(
                ("topic_id", _TopicId), ("topic", CompactString("utf-8")), ("tags", TaggedFields)
            ),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )

    def __init__(self, names: list[str] | None) -> None:
        self._names = names

    def build_request_header(self, correlation_id: int, client_id: str) -> object:
        return RequestHeader_v2(self, correlation_id=correlation_id, client_id=client_id)

    def encode(self) -> bytes:
        no_tags: dict[int, bytes] = {}
        topics = None if self._names is None else [(None, name, no_tags) for name in self._names]
        encoded: bytes = self.SCHEMA.encode((topics, False, False, no_tags))
        return encoded

    @staticmethod
    def parse_response_header(data: BytesIO) -> object:
        return ResponseHeader_v1.decode(data)
