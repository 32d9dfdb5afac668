"""Identifiers: distinct types, their grammar, and the ids that are derived from content.

An id that one party makes from what it says (a bucket, an entry) is made here, so that every party
makes the same one. Refusals: `SourceRefused` for a source that is not a hub's.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NewType

from msgspec import Meta

TenantId = NewType("TenantId", str)
ProjectId = NewType("ProjectId", str)
ProgrammeId = NewType("ProgrammeId", str)
AllocationId = NewType("AllocationId", str)
HubCode = NewType("HubCode", str)
NodeId = NewType("NodeId", str)
DeviceId = NewType("DeviceId", str)
SliceId = NewType("SliceId", str)
Sku = NewType("Sku", str)
PriceClass = NewType("PriceClass", str)
PriceVersion = NewType("PriceVersion", str)
BucketId = NewType("BucketId", str)
GrantId = NewType("GrantId", str)
HoldId = NewType("HoldId", str)
EntryId = NewType("EntryId", str)
KeyId = NewType("KeyId", str)
ProposalId = NewType("ProposalId", str)
OutcomeId = NewType("OutcomeId", str)
QuarantineId = NewType("QuarantineId", str)
CorrectionId = NewType("CorrectionId", str)
DocumentId = NewType("DocumentId", str)
PaymentId = NewType("PaymentId", str)
LegalEntityId = NewType("LegalEntityId", str)
SourcePath = NewType("SourcePath", str)

TopicId = NewType("TopicId", str)
"""The log that a topic is; another one when it is deleted and made again."""

UNKNOWN_TOPIC = TopicId("")
"""Where the broker gives no ids, or none was stored yet."""

ID_PATTERN = r"[A-Za-z0-9._:@+=-]{1,128}"
"""Grammar of every id of ours, without anchors."""

DEVICE_ID_PATTERN = r"[A-Za-z0-9._:@+=/-]{1,128}"
"""Grammar of device and slice ids: also slashes."""

HUB_PATTERN = r"[a-z][a-z0-9-]{0,30}"
"""Grammar of a hub code: it is part of a topic name."""

MAX_SOURCE_LENGTH = len("/hubs//nodes//epochs/") + 31 + 128 + 128 + 1
"""One character more than the longest source has: what is cut off here was none."""

IdText = Annotated[str, Meta(pattern=f"^{ID_PATTERN}$")]
"""An id as a request states it: checked where it is read."""

HubText = Annotated[str, Meta(pattern=f"^{HUB_PATTERN}$")]
"""A hub code as a request states it."""

MonthText = Annotated[str, Meta(pattern="^[0-9]{4}-(0[1-9]|1[0-2])$")]
"""A billing month as a request states it: yyyy-mm."""

_SOURCE = re.compile(
    rf"(?P<node>/hubs/(?P<hub>{HUB_PATTERN})/nodes/{ID_PATTERN})/epochs/(?P<epoch>{ID_PATTERN})"
)


@dataclass(frozen=True, slots=True)
class Source:
    """Who speaks: one agent of one node, in one epoch (an epoch ends when an agent loses state)."""

    path: SourcePath
    """The whole source, as the event states it."""
    node_path: str
    """The source without its epoch: the Kafka key of all that this node says."""
    hub: HubCode
    epoch: str


@dataclass(frozen=True, slots=True)
class SourceRefused:
    """The text is not a source of a hub."""

    detail: str


def parse_source(text: str) -> Source | SourceRefused:
    """Read `/hubs/<hub>/nodes/<node>/epochs/<epoch>`; refuse anything else.

    Answers are kept, because a source says the same with every event; what is longer than any
    source is not, or a hub could fill our memory with sources that it invents.
    """
    return _parse_source(text[:MAX_SOURCE_LENGTH])


@lru_cache(maxsize=16_384)
def _parse_source(text: str) -> Source | SourceRefused:
    match = _SOURCE.fullmatch(text)
    if match is None:
        return SourceRefused(
            "source must be /hubs/<hub>/nodes/<node>/epochs/<epoch>, "
            f"each of {ID_PATTERN}; got {text[:160]!r}"
        )
    return Source(
        path=SourcePath(text),
        node_path=match["node"],
        hub=HubCode(match["hub"]),
        epoch=match["epoch"],
    )


def bucket_id(
    *,
    tenant_id: TenantId,
    project_id: ProjectId,
    allocation_id: AllocationId,
    hub: HubCode,
    node_id: NodeId,
    rate_line_id: str,
    hour_ms: int,
) -> BucketId:
    """Name the bucket (tenant, project, allocation, hub, node, rate line, UTC hour).

    The first 128 bits of SHA-256 over the parts, each followed by a zero byte. No part may contain
    one (ids cannot), except the free-text project, which therefore goes last: the encoding is
    injective. 32 hexadecimal digits.
    """
    text = "\0".join(
        (tenant_id, allocation_id, hub, node_id, rate_line_id, str(hour_ms), project_id)
    )
    return BucketId(hashlib.sha256(text.encode()).hexdigest()[:32])


def entry_id(tenant_id: TenantId, seq: int) -> EntryId:
    """Name an entry by its place in its book: `<tenant>.<seq>`."""
    return EntryId(f"{tenant_id}.{seq}")
