"""What metering says of quarantined records, and what operators decided on them and on corrections.

The bytes of a record never leave metering's database. A record is named by where it lies in Kafka,
by the SHA-256 of its value, and by the log it was read from: a number that metering gives it does
not survive a restore of its database, and in a topic that is made anew the same bytes may come to
the same place again.

A correction that an operator proposed is named by its content, who proposed it and when.

Decisions are on a compacted topic of one partition, so that metering restored from a backup finds
every one of them again. A message states all that was decided on its record, or on its correction,
so far, so the last one is enough.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from hisab_contracts.events import Correction, QuarantineReason
from hisab_contracts.ids import CorrectionId, HubCode, QuarantineId, TopicId

_Count = Annotated[int, Meta(ge=0)]


class QuarantineNotice(Struct, frozen=True):
    """`metering.quarantine.v1`, key = hub: a record was quarantined, and why."""

    quarantine_id: QuarantineId
    reason: str
    hub: HubCode
    topic: str
    partition: _Count
    offset: _Count
    value_sha256: str


class QuarantineDecision(
    Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="quarantine"
):
    """`metering.decisions.v1`: what operators decided on one quarantined record, all of it.

    A record may be replayed and then dismissed: what the replay could not bill is dismissed.
    """

    hub: HubCode
    topic: str
    partition: _Count
    offset: _Count
    value_sha256: str
    replayed_ms: int | None
    """When an operator last had it judged again: up to then it may speak of the future."""
    replayed_because: str | None
    dismissed_ms: int | None
    dismissed_because: str | None
    dismissed_reason: QuarantineReason | None
    """Why it was in quarantine; None: only parts of it were dismissed, the rest had been taken."""
    topic_id: TopicId | None = None
    """The log that the topic was when the record was read; None: not known, so any."""


class CorrectionDecision(
    Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="correction"
):
    """`metering.decisions.v1`: a correction that operators proposed and decided, all of it.

    It is decided once; so this is all that will ever be said of it.
    """

    correction_id: CorrectionId
    hub: HubCode
    state: Literal["approved", "rejected"]
    correction: Correction
    """As it counts since it was approved; of one that was rejected the revision means nothing."""
    proposed_by: str
    proposed_ms: _Count
    decided_by: str
    decided_ms: _Count


OperatorDecision = QuarantineDecision | CorrectionDecision
"""The closed union of this topic."""

_DECODER: msgspec.json.Decoder[OperatorDecision] = msgspec.json.Decoder(OperatorDecision)


def read_decision(value: bytes) -> OperatorDecision:
    """Read one message; msgspec.DecodeError when it is not one (then the reader must halt)."""
    return _DECODER.decode(value)


def decision_key(decision: OperatorDecision) -> bytes:
    """Return the key of a decision's message: `<hub>/<kind>/<id>`."""
    if isinstance(decision, CorrectionDecision):
        return f"{decision.hub}/correction/{decision.correction_id}".encode()
    name = f"{decision.topic}/{decision.partition}/{decision.offset}/{decision.value_sha256}"
    if decision.topic_id is not None:
        name += f"/{decision.topic_id}"
    return f"{decision.hub}/quarantine/{name}".encode()
