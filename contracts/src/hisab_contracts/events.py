"""What hubs say: CloudEvents 1.0 on `hub.<code>.usage.v1`, read into frozen facts or refused.

Start here. A hub agent reports *intervals* (these device slices were reserved for this allocation
in `[start_ms, end_ms)`), the life of allocations, and *watermarks* (no usage at any instant before
W is still unreported by this source). `read_event` takes a Kafka record's value and headers, in
structured mode (`content-type: application/cloudevents+json`) or binary mode (`ce_` headers), and
returns either a `HubEvent` or a `Refused` with the reason under which it goes to quarantine. It
never raises for bad input and never looks at a clock, a database or an earlier event.

Refusals, in order of precedence: `undecodable` (no value, not JSON), `unknown-type`, `schema`
(a member missing, of the wrong type or out of bounds), `hub-mismatch` (`data.hub`, the hub in
`source` and the topic's hub differ). Metering judges the other reasons of `QuarantineReason`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, assert_never

import msgspec
from msgspec import Meta, Struct

from hisab_contracts.ids import (
    DEVICE_ID_PATTERN,
    ID_PATTERN,
    AllocationId,
    DeviceId,
    HoldId,
    HubCode,
    NodeId,
    PriceClass,
    ProjectId,
    Sku,
    SliceId,
    Source,
    SourceRefused,
    TenantId,
    parse_source,
)

STARTED: Final = "pk.hisab.allocation.started.v1"
INTERVAL: Final = "pk.hisab.usage.interval.v1"
ENDED: Final = "pk.hisab.allocation.ended.v1"
WATERMARK: Final = "pk.hisab.hub.watermark.v1"
RETIRED: Final = "pk.hisab.source.retired.v1"
CORRECTION: Final = "pk.hisab.usage.correction.v1"

EARLIEST_MS: Final = 1_577_836_800_000
"""2020-01-01T00:00:00Z: no usage lies before it."""
LONGEST_INTERVAL_MS: Final = 31 * 24 * 3_600_000
LATEST_MS: Final = 4_102_444_800_000
"""2100-01-01T00:00:00Z: an instant at or after it is a mistake."""

QuarantineReason = Literal[
    "undecodable",
    "unknown-type",
    "schema",
    "hub-mismatch",
    "unknown-tenant",
    "unknown-sku",
    "no-price",
    "clock-skew",
    "conflict",
    "watermark",
    "too-late",
    "killed-process",
    "needs-approval",
]
"""Why a record waits in quarantine, in order of precedence."""

_Instant = Annotated[int, Meta(ge=EARLIEST_MS, lt=LATEST_MS)]
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Reason = Annotated[str, Meta(max_length=1000)]
_Approver = Annotated[str, Meta(max_length=200)]
_SliceText = Annotated[
    SliceId, Meta(min_length=1, max_length=128, pattern=f"^{DEVICE_ID_PATTERN}$")
]

MAX_HUB_REVISION: Final = 1_000_000_000
"""Of a hub's correction: so that there is always a higher one for an operator's."""


class Device(Struct, frozen=True):
    """A share of one device, or of one of its slices (`slice_uuid = device_uuid`: the whole)."""

    device_uuid: Annotated[DeviceId, Meta(min_length=1, max_length=128)]
    slice_uuid: Annotated[SliceId, Meta(min_length=1, max_length=128)]
    share_ppm: Annotated[int, Meta(ge=1, le=1_000_000)]


_Devices = Annotated[list[Device], Meta(min_length=1, max_length=64)]


class Interval(Struct, frozen=True):
    """These device slices were reserved for this allocation in `[start_ms, end_ms)`."""

    hub: HubCode
    node_id: NodeId
    tenant_id: TenantId
    allocation_id: AllocationId
    sku: Sku
    price_class: PriceClass
    state: Annotated[str, Meta(min_length=1, max_length=64)]
    devices: _Devices
    start_ms: _Instant
    end_ms: _Instant
    project_id: Annotated[ProjectId, Meta(min_length=1, max_length=128)] = ProjectId("main")
    hold_id: HoldId | None = None
    energy_start_mj: _Count | None = None
    energy_end_mj: _Count | None = None


class Started(Struct, frozen=True):
    """An allocation of a tenant's project began on these devices, under this hold if any."""

    hub: HubCode
    node_id: NodeId
    tenant_id: TenantId
    allocation_id: AllocationId
    sku: Sku
    price_class: PriceClass
    devices: _Devices
    started_ms: _Instant
    project_id: Annotated[ProjectId, Meta(min_length=1, max_length=128)] = ProjectId("main")
    hold_id: HoldId | None = None


class Ended(Struct, frozen=True):
    """An allocation ended: why, and the totals to reconcile against."""

    hub: HubCode
    node_id: NodeId
    tenant_id: TenantId
    allocation_id: AllocationId
    ended_ms: _Instant
    cause: Literal["user", "limit", "preemption", "infrastructure"]
    reserved_gpu_ms: _Count
    project_id: Annotated[ProjectId, Meta(min_length=1, max_length=128)] = ProjectId("main")
    last_checkpoint_ms: _Instant | None = None


class Watermark(Struct, frozen=True):
    """No usage at any instant before `watermark_ms` is still unreported by this source."""

    hub: HubCode
    node_id: NodeId
    watermark_ms: _Instant


class Retired(Struct, frozen=True):
    """This source ends: it no longer counts for completeness."""

    hub: HubCode
    node_id: NodeId
    reason: _Reason


class Replacement(Struct, frozen=True, omit_defaults=True):
    """The terms that usage has instead of those reported; None: as reported."""

    tenant_id: TenantId | None = None
    project_id: Annotated[ProjectId, Meta(min_length=1, max_length=128)] | None = None
    sku: Sku | None = None
    price_class: PriceClass | None = None


class Correction(Struct, frozen=True, omit_defaults=True):
    """What was reported of an allocation in `[start_ms, end_ms)` was wrong: void it, or replace.

    It acts on what is covered by the allocation now, and on what arrives for it later: for each
    millisecond of a slice the highest revision counts, whatever the order of arrival.
    """

    hub: HubCode
    allocation_id: AllocationId
    start_ms: _Instant
    end_ms: _Instant
    revision: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    action: Literal["void", "replace"]
    reason: _Reason
    node_id: NodeId | None = None
    """None: all nodes of the allocation."""
    slice_uuids: Annotated[list[_SliceText], Meta(min_length=1, max_length=1024)] | None = None
    """None: all slices of the allocation on these nodes."""
    release: bool = False
    """Of a void: the device was really free, so another allocation may have this time."""
    replacement: Replacement | None = None
    """Of a replacement: at least one of its members."""
    approved_by: _Approver | None = None
    """Who approved it at the hub; for the record."""


HubFact = Interval | Started | Ended | Watermark | Retired | Correction
"""The closed union of what a hub can say."""


class HubEvent(Struct, frozen=True):
    """A well-formed event: who says it, at which place of its own sequence, and what."""

    source: Source
    sequence: int
    event_id: str
    data: HubFact


class Refused(Struct, frozen=True):
    """A record that cannot be taken as it is. What could be read of it is kept."""

    reason: QuarantineReason
    detail: str
    source: Source | None = None
    sequence: int | None = None
    data: HubFact | None = None


class _Envelope(Struct):
    """Structured mode; also what `_binary_envelope` fills from headers."""

    specversion: str
    type: str
    source: str
    id: Annotated[str, Meta(max_length=128)]
    sequence: str | int
    data: msgspec.Raw = msgspec.Raw(b"null")


class _FastInterval(Struct):
    """Structured mode of an interval in one pass: the hot path."""

    specversion: str
    type: Literal["pk.hisab.usage.interval.v1"]
    source: str
    id: Annotated[str, Meta(max_length=128)]
    sequence: str | int
    data: Interval


_FAST: Final = msgspec.json.Decoder(_FastInterval)
_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)
_DATA: Final[Mapping[str, msgspec.json.Decoder[HubFact]]] = {
    INTERVAL: msgspec.json.Decoder(Interval),
    STARTED: msgspec.json.Decoder(Started),
    ENDED: msgspec.json.Decoder(Ended),
    WATERMARK: msgspec.json.Decoder(Watermark),
    RETIRED: msgspec.json.Decoder(Retired),
    CORRECTION: msgspec.json.Decoder(Correction),
}
_SEQUENCE: Final = re.compile(r"[0-9]{1,20}")
_IDS: Final = re.compile(rf"{ID_PATTERN}(?:\n{ID_PATTERN})*")
_DEVICE_IDS: Final = re.compile(rf"{DEVICE_ID_PATTERN}(?:\n{DEVICE_ID_PATTERN})*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def read_event(
    value: bytes | None, headers: Sequence[tuple[str, bytes | None]], topic_hub: HubCode
) -> HubEvent | Refused:
    """Read one record of a hub's topic.

    `headers` are the record's, in order (Kafka lets a value be null); `topic_hub` is the hub whose
    topic it came in. Binary mode is recognised by a `ce_specversion` header, anything else is read
    as structured mode.
    """
    if value is None:
        return Refused("undecodable", "the record has no value")
    binary = next((True for name, _ in headers if name == "ce_specversion"), False)
    if not binary:
        try:
            fast = _FAST.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # Find out below what is wrong, or that it is another type.
        else:
            return _judge(
                fast.specversion, fast.source, fast.sequence, fast.id, fast.data, topic_hub
            )
    return _read_slowly(value, headers if binary else None, topic_hub)


def _read_slowly(
    value: bytes, binary_headers: Sequence[tuple[str, bytes | None]] | None, topic_hub: HubCode
) -> HubEvent | Refused:
    """Read in two passes, so that a refusal keeps source and sequence."""
    try:
        msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Refused("undecodable", f"not JSON: {error}")
    try:
        if binary_headers is None:
            envelope = _ENVELOPE.decode(value)
        else:
            envelope = _binary_envelope(value, binary_headers)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        return Refused("schema", f"envelope: {error}")
    decoder = _DATA.get(envelope.type)
    source = parse_source(envelope.source)
    sequence = _sequence_of(envelope.sequence)
    known = source if isinstance(source, Source) and source.hub == topic_hub else None
    place = sequence if isinstance(sequence, int) else None
    if decoder is None:
        detail = f"no reader for type {envelope.type[:128]!r}"
        return Refused("unknown-type", detail, known, place)
    try:
        data = decoder.decode(envelope.data)
    except msgspec.ValidationError as error:
        return Refused("schema", f"data: {error}", known, place)
    return _judge(
        envelope.specversion, envelope.source, envelope.sequence, envelope.id, data, topic_hub
    )


def _judge(
    specversion: str,
    source_text: str,
    sequence_text: str | int,
    event_id: str,
    data: HubFact,
    topic_hub: HubCode,
) -> HubEvent | Refused:
    """Check what types cannot say: grammar of ids, order of instants, agreement of the hubs."""
    source = parse_source(source_text)
    sequence = _sequence_of(sequence_text)
    known = source if isinstance(source, Source) and source.hub == topic_hub else None
    place = sequence if isinstance(sequence, int) else None
    if specversion != "1.0":
        return Refused("schema", f"specversion must be 1.0, got {specversion[:32]!r}", known, place)
    if isinstance(source, SourceRefused):
        return Refused("schema", source.detail, known, place)
    if isinstance(sequence, str):
        return Refused("schema", sequence, known, place)
    fault = _fault_of(data)
    if fault is not None:
        return Refused("schema", fault, known, place)
    if not source.hub == data.hub == topic_hub:
        detail = f"topic of {topic_hub}, source of {source.hub}, data.hub {data.hub}"
        return Refused("hub-mismatch", detail, known, place, data)
    return HubEvent(source, sequence, event_id, data)


def _fault_of(data: HubFact) -> str | None:
    """Return what breaks the bounds of the schema, or None."""
    match data:
        case Interval() | Started():
            ids = [data.hub, data.node_id, data.tenant_id, data.allocation_id, data.sku]
            ids.append(data.price_class)
            if data.hold_id is not None:
                ids.append(HubCode(data.hold_id))
            devices = [text for d in data.devices for text in (d.device_uuid, d.slice_uuid)]
            if not _each_is(_DEVICE_IDS, devices):
                return f"device and slice ids must match {DEVICE_ID_PATTERN}"
        case Ended():
            ids = [data.hub, data.node_id, data.tenant_id, data.allocation_id]
        case Watermark() | Retired():
            ids = [data.hub, data.node_id]
        case Correction():
            if data.revision > MAX_HUB_REVISION:
                return f"a hub's revisions are at most {MAX_HUB_REVISION}"
            return correction_fault(data)
        case _:
            assert_never(data)
    if not _each_is(_IDS, ids):
        return f"ids must match {ID_PATTERN}"
    if isinstance(data, Interval | Started | Ended) and _CONTROL.search(data.project_id):
        return "project_id must not contain control characters"
    if isinstance(data, Interval):
        if data.end_ms <= data.start_ms:
            return f"end_ms {data.end_ms} must be after start_ms {data.start_ms}"
        if data.end_ms - data.start_ms > LONGEST_INTERVAL_MS:
            return "an interval must not be longer than 31 days: send it in parts"
    return None


def correction_fault(data: Correction) -> str | None:
    """Return what makes no sense in a correction, whoever asks for it, or None."""
    terms = data.replacement or Replacement()
    named = [terms.tenant_id, terms.sku, terms.price_class, data.node_id]
    ids = [data.hub, data.allocation_id, *(text for text in named if text is not None)]
    if not _each_is(_IDS, ids):
        return f"ids must match {ID_PATTERN}"
    if not _each_is(_DEVICE_IDS, data.slice_uuids or ["any"]):
        return f"slice ids must match {DEVICE_ID_PATTERN}"
    if _CONTROL.search(terms.project_id or ""):
        return "project_id must not contain control characters"
    if "\0" in data.reason or "\0" in (data.approved_by or ""):
        return "reason and approved_by must not contain a NUL: no database keeps one"
    if data.end_ms <= data.start_ms:
        return f"end_ms {data.end_ms} must be after start_ms {data.start_ms}"
    if data.end_ms - data.start_ms > LONGEST_INTERVAL_MS:
        return "a correction must not be longer than 31 days: send it in parts"
    if data.action == "replace" and terms == Replacement():
        return "a replacement must name a tenant_id, project_id, sku or price_class"
    if data.action == "void" and terms != Replacement():
        return "a void has no replacement"
    if data.action == "replace" and data.release:
        return "only a void can release a device"
    return None


def _each_is(grammar: re.Pattern[str], texts: Sequence[str]) -> bool:
    """Say whether every text keeps a grammar without line breaks; in one pass, as it is hot."""
    lines = "\n".join(texts)
    return lines.count("\n") == len(texts) - 1 and grammar.fullmatch(lines) is not None


def _sequence_of(text: str | int) -> int | str:
    """Return the sequence number, or what is wrong with it."""
    number = -1
    if isinstance(text, int):
        number = text
    elif _SEQUENCE.fullmatch(text):
        number = int(text)
    if not 1 <= number < 2**63:
        return "sequence must be a whole number from 1, written in digits"
    return number


def _binary_envelope(value: bytes, headers: Sequence[tuple[str, bytes | None]]) -> _Envelope:
    """Build the envelope from `ce_` headers; ValidationError when one is missing or null."""
    attributes: dict[str, object] = {}
    for name, text in headers:
        if name.startswith("ce_"):
            if text is None:
                raise msgspec.ValidationError(f"header {name[:32]!r} has no value")
            attributes[name[3:]] = text.decode()
    envelope = msgspec.convert(attributes, _Envelope)
    envelope.data = msgspec.Raw(value)
    return envelope
