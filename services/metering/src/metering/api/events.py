"""`/v1/events`: events over HTTP, for hubs without a Kafka client.

A body is one CloudEvent, a JSON array of them, or one per line. Each event is read by the
contract's own reader, so that what it refuses never reaches the topic, and each has its own answer.
Accepted means durable: acknowledged by all brokers that must have it. The record is what the hub
sent, byte for byte, under the key that a Kafka client would have used. `duplicate` is a hint from
the sequence: the record is kept all the same, because coverage decides.

Refusals of a body: 413 beyond 4 MiB, 415 for another media type, 422 for a body that is not JSON at
all or holds more than 1 000 events. Refusals of one event: the reasons of `read_event`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from fastapi import Request, Response

from hisab_contracts.events import HubEvent, Refused, read_event
from hisab_contracts.ids import HubCode, SourcePath
from hisab_contracts.reference import Role
from hisab_contracts.topics import hub_topic
from metering.api.requests import find_hub
from metering.core.sources import SourceProgress
from metering.store import hubs
from runtime.http import Problem, Resource, check_depth, json_response, post, read_bytes
from runtime.kafka import Headers, Message, MessageTooLarge, PublishFailed
from runtime.service import Kit
from runtime.telemetry import trace_headers

MAX_BODY_BYTES: Final = 4_194_304
MAX_EVENTS: Final = 1_000
MAX_EVENT_BYTES: Final = 921_600
"""What surely fits a record of the broker's default size, envelope and headers included."""

LINES: Final = "application/x-ndjson"
MEDIA_TYPES: Final = (
    "application/json",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    LINES,
)

_STRUCTURED: Final = (("content-type", b"application/cloudevents+json"),)

_Outcome = Literal["accepted", "duplicate", "rejected"]

_TITLES: Final = {
    "undecodable": "The event is not JSON",
    "unknown-type": "Nobody reads events of this type",
    "schema": "The event does not have the form of its type",
    "hub-mismatch": "The event belongs to another hub than its key or topic",
}


class EventProblem(msgspec.Struct, frozen=True):
    """Why one event was rejected."""

    type: str
    code: str
    title: str
    detail: str


class EventResult(msgspec.Struct, frozen=True):
    """The outcome of one event."""

    id: str | None
    outcome: str
    problem: EventProblem | None


class EventResults(msgspec.Struct, frozen=True):
    """One outcome per event, in order."""

    results: list[EventResult]


class Events(Resource):
    """`/v1/events`: events of the caller's own hub."""

    def __init__(self, kit: Kit) -> None:
        """Publish with the kit's connection to Kafka."""
        self._kit = kit

    @post(
        "/v1/events",
        roles=(Role.HUB,),
        others={Role.HUB: "own"},
        answer=EventResults,
        problems=("too-large", "malformed"),
    )
    async def take_events(self, request: Request) -> Response:
        """Take events of the caller's own hub: one, a JSON array, or one per line."""
        principal = await self._kit.access.authorise(request)
        own_hub = principal.bound_to or ""
        body = await read_bytes(request, max_bytes=MAX_BODY_BYTES)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in MEDIA_TYPES:
            raise Problem("unsupported-media-type", f"send one of {', '.join(MEDIA_TYPES)}")
        if media_type != LINES:
            # Lines are events of their own: one that is too deep, or has a text without an end, is
            # rejected alone, by their reader, and must not sink the others.
            check_depth(body)
        events = _split_body(body, media_type)
        if not events or len(events) > MAX_EVENTS:
            raise Problem("malformed", f"send 1 to {MAX_EVENTS} events as JSON")
        trace = trace_headers()
        verdicts = [_judge_event(event, HubCode(own_hub), trace) for event in events]
        async with self._kit.api.connection() as connection:
            hub = await find_hub(connection, own_hub)
            paths = sorted({verdict.path for verdict in verdicts if verdict.path is not None})
            sources = await hubs.find_sources(connection, hub, paths)
        # Looked up before publishing: afterwards our own consumer may have seen the events.
        outcomes = _outcomes(verdicts, sources)
        await self._publish(
            [verdict.message for verdict in verdicts if verdict.message is not None]
        )
        results = [
            EventResult(verdict.event_id, outcome, _problem_of(verdict.refused))
            for verdict, outcome in zip(verdicts, outcomes, strict=True)
        ]
        return json_response(EventResults(results))

    async def _publish(self, messages: list[Message]) -> None:
        """Make events durable; without all acknowledgements nothing is promised."""
        if not messages:
            return
        try:
            await self._kit.kafka.publish(messages)
        except MessageTooLarge as error:
            raise Problem("too-large", str(error)) from error
        except PublishFailed as error:
            detail = "Kafka did not acknowledge; send the events again"
            raise Problem("unavailable", detail) from error


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What is answered for one event; `message` is what must become durable first."""

    event_id: str | None
    refused: Refused | None
    message: Message | None
    path: SourcePath | None
    sequence: int


class _Named(msgspec.Struct):
    id: str | None = None


def _split_body(body: bytes, media_type: str) -> list[bytes] | None:
    """Cut a body into events, as they are; None for a body that is not JSON at all."""
    if media_type == LINES:
        return [line for line in body.split(b"\n") if line.strip()]
    try:
        if body.lstrip()[:1] == b"[":
            return [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return [body]


def _judge_event(event: bytes, hub: HubCode, trace: Headers) -> _Verdict:
    """Read one event of a hub and make the record it becomes."""
    read = read_event(event, _STRUCTURED, hub)
    if isinstance(read, HubEvent) and len(event) > MAX_EVENT_BYTES:
        read = Refused("schema", f"an event has at most {MAX_EVENT_BYTES} bytes")
    if isinstance(read, Refused):
        return _Verdict(_id_of(event), refused=read, message=None, path=None, sequence=0)
    key = read.source.node_path.encode()
    message = Message(hub_topic(hub), key, event, (*_STRUCTURED, *trace))
    return _Verdict(
        read.event_id,
        refused=None,
        message=message,
        path=read.source.path,
        sequence=read.sequence,
    )


def _outcomes(
    verdicts: Sequence[_Verdict], sources: Mapping[SourcePath, SourceProgress]
) -> list[_Outcome]:
    """Say what becomes of each event, in order."""
    seen: set[tuple[SourcePath | None, int]] = set()
    outcomes: list[_Outcome] = []
    for verdict in verdicts:
        place = (verdict.path, verdict.sequence)
        source = None if verdict.path is None else sources.get(verdict.path)
        if verdict.refused is not None:
            outcomes.append("rejected")
        elif place in seen or (source is not None and source.has_seen(verdict.sequence)):
            outcomes.append("duplicate")
        else:
            outcomes.append("accepted")
            seen.add(place)
    return outcomes


def _problem_of(refused: Refused | None) -> EventProblem | None:
    """Return why one event was rejected, in the form of a problem."""
    if refused is None:
        return None
    reason = refused.reason
    return EventProblem(
        type=f"/problems/{reason}", code=reason, title=_TITLES[reason], detail=refused.detail
    )


def _id_of(event: bytes) -> str | None:
    try:
        return msgspec.json.decode(event, type=_Named).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
