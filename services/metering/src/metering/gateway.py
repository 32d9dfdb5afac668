"""The gateway: events over HTTP, for hubs without a Kafka client.

A body is one CloudEvent, a JSON array of them, or one per line. Each event is read by the
contract's own reader, so that what it refuses never reaches the topic, and each has its own answer.
Accepted means durable: acknowledged by all brokers that must have it. The record is what the hub
sent, byte for byte, under the key that a Kafka client would have used. `duplicate` is a hint from
the sequence: the record is kept all the same, because coverage decides.

Refusals of a body: 413 beyond 4 MiB, 415 for another media type, 422 for a body that is not JSON at
all or holds more than 1 000 events. Refusals of one event: the reasons of `read_event`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from hisab_contracts.events import HubEvent, Refused, read_event
from hisab_contracts.ids import HubCode, SourcePath
from hisab_contracts.topics import hub_topic
from metering.sources import Source
from runtime.kafka import Headers, Message

MAX_BODY_BYTES: Final = 4_194_304
MAX_EVENTS: Final = 1_000
MAX_EVENT_BYTES: Final = 921_600
"""What surely fits a record of the broker's default size, envelope and headers included."""

STRUCTURED: Final = (("content-type", b"application/cloudevents+json"),)

_TITLES: Final = {
    "undecodable": "The event is not JSON",
    "unknown-type": "Nobody reads events of this type",
    "schema": "The event does not have the form of its type",
    "hub-mismatch": "The event belongs to another hub than its key or topic",
}


class _Named(msgspec.Struct):
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is answered for one event; `message` is what must become durable first."""

    event_id: str | None
    refused: Refused | None
    message: Message | None
    path: SourcePath | None
    sequence: int


def split_body(body: bytes, media_type: str) -> list[bytes] | None:
    """Cut a body into events, as they are; None for a body that is not JSON at all."""
    if media_type == "application/x-ndjson":
        return [line for line in body.split(b"\n") if line.strip()]
    try:
        if body.lstrip()[:1] == b"[":
            return [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return [body]


def judge(event: bytes, hub: HubCode, trace: Headers) -> Verdict:
    """Read one event of a hub and make the record it becomes."""
    read = read_event(event, STRUCTURED, hub)
    if isinstance(read, HubEvent) and len(event) > MAX_EVENT_BYTES:
        read = Refused("schema", f"an event has at most {MAX_EVENT_BYTES} bytes")
    if isinstance(read, Refused):
        return Verdict(_id_of(event), read, None, None, 0)
    key = read.source.node_path.encode()
    message = Message(hub_topic(hub), key, event, (*STRUCTURED, *trace))
    return Verdict(read.event_id, None, message, read.source.path, read.sequence)


def outcomes(verdicts: Sequence[Verdict], known: dict[SourcePath, Source]) -> list[str]:
    """Say accepted, duplicate or rejected for each event, in order."""
    seen: set[tuple[SourcePath | None, int]] = set()
    said = []
    for verdict in verdicts:
        place = (verdict.path, verdict.sequence)
        source = None if verdict.path is None else known.get(verdict.path)
        if verdict.refused is not None:
            said.append("rejected")
        elif place in seen or (source is not None and source.has_seen(verdict.sequence)):
            said.append("duplicate")
        else:
            said.append("accepted")
            seen.add(place)
    return said


def problem_of(refused: Refused) -> dict[str, str]:
    """Return why one event was rejected, in the form of a problem."""
    return {
        "type": f"/problems/{refused.reason}",
        "code": refused.reason,
        "title": _TITLES[refused.reason],
        "detail": refused.detail,
    }


def _id_of(event: bytes) -> str | None:
    try:
        return msgspec.json.decode(event, type=_Named).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
