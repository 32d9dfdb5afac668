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
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest_v5
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

_METADATA: Final = 3
_ID_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class ExistingTopic:
    """A topic that the broker has."""

    partitions: int
    topic_id: str
    """As `kafka-topics.sh --describe` prints it; "" where the broker gives no ids."""


class PartitionMismatch(Exception):
    """Topics, or a message and its topic, disagree about partitions; the message says what to do.

    Whoever raises it ends before anything is stated downstream: a month might close without what
    is in the partitions that nobody counted.
    """


def require_equal_counts(topics: Mapping[str, ExistingTopic]) -> int | None:
    """Return the partition count that all these topics have; None when there is none of them.

    Raises `PartitionMismatch` when they differ.
    """
    counts = {name: topic.partitions for name, topic in sorted(topics.items())}
    if len(set(counts.values())) > 1:
        listed = " and ".join(f"{name} has {count} partitions" for name, count in counts.items())
        raise PartitionMismatch(
            f"{listed}: a tenant must have the same partition in each. Add partitions to the"
            f" smaller one until each has {max(counts.values())} (kafka-topics.sh --alter"
            " --partitions), while the services are stopped and no records wait, then start again"
        )
    return next(iter(counts.values()), None)


async def describe_topics(
    admin: AIOKafkaAdminClient, names: list[str] | None
) -> dict[str, ExistingTopic]:
    """Return those of these topics that exist, or all there are; none is created by asking."""
    # aiokafka has no door for a request that it does not know itself.
    answer = await admin._send_request(_TopicsRequest(names))  # noqa: SLF001
    found = {}
    for row in answer.to_object()["topics"]:
        name = row["topic"]
        if row["error_code"] == 0 and row["partitions"]:
            found[name] = ExistingTopic(len(row["partitions"]), row.get("topic_id", ""))
    return found


class _TopicId(AbstractType[str]):
    """16 bytes, as text; zeros stand for no id."""

    @classmethod
    def encode(cls, value: str) -> bytes:
        return base64.urlsafe_b64decode(value + "==") if value else bytes(_ID_BYTES)

    @classmethod
    def decode(cls, data: BytesIO) -> str:
        raw = data.read(_ID_BYTES)
        return base64.urlsafe_b64encode(raw).decode().rstrip("=") if any(raw) else ""


class _Metadata(Response):
    """`MetadataResponse`, version 12."""

    API_KEY = _METADATA
    API_VERSION = 12
    SCHEMA = Schema(
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


class _MetadataRequest(RequestStruct):
    """`MetadataRequest`, version 12."""

    API_KEY = _METADATA
    API_VERSION = 12
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _Metadata
    SCHEMA = Schema(
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


class _TopicsRequest(Request[MetadataRequest_v5 | _MetadataRequest]):
    """Asks for topics in the newest version that both sides know."""

    API_KEY = _METADATA

    def __init__(self, names: list[str] | None) -> None:
        self._names = names

    def build(
        self, request_struct_class: type[MetadataRequest_v5 | _MetadataRequest]
    ) -> MetadataRequest_v5 | _MetadataRequest:
        if request_struct_class is _MetadataRequest:
            topics = None if self._names is None else [("", name, {}) for name in self._names]
            return _MetadataRequest(topics, False, False, {})
        return MetadataRequest_v5(self._names, False)
