"""The JSON Schemas (2020-12) of every event and message, made from the types that read them.

Theory. The types in `events`, `charges`, `entries` and `reference` are the only source; a schema is
their shape for those who do not use Python, with the grammar of ids added. One document per name
and major version. Once released a document is frozen: `contracts/schemas/released/` keeps what was
published, and a test compares.

What a schema cannot say, and `read_event` still refuses: an interval that ends before it starts or
lasts longer than 31 days, a correction whose members contradict each other, hubs that disagree, a
sequence beyond 64 bits in digits, and a number written as `1.0`, which JSON Schema takes for an
integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from hisab_contracts import charges, entries, events, quarantine, reference, topics
from hisab_contracts.ids import DEVICE_ID_PATTERN, HUB_PATTERN, ID_PATTERN

JsonSchema = dict[str, object]
"""A schema, or a part of one, as JSON."""

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_SOURCE: Final = f"^/hubs/{HUB_PATTERN}/nodes/{ID_PATTERN}/epochs/{ID_PATTERN}$"
_ID: Final = f"^{ID_PATTERN}$"
_DEVICE_ID: Final = f"^{DEVICE_ID_PATTERN}$"
_HASH: Final = "^[0-9a-f]{64}$"
_GRAMMAR: Final[Mapping[str, str]] = {
    "hub": f"^{HUB_PATTERN}$",
    "node_id": _ID,
    "tenant_id": _ID,
    "allocation_id": _ID,
    "hold_id": _ID,
    "grant_id": _ID,
    "programme_id": _ID,
    "key_id": _ID,
    "sku": _ID,
    "price_class": _ID,
    "project_id": "^[^\\u0000-\\u001f\\u007f]*$",
    "device_uuid": _DEVICE_ID,
    "slice_uuid": _DEVICE_ID,
    "bucket_id": "^[0-9a-f]{32}$",
    "hash": _HASH,
    "prev_hash": _HASH,
    "sha256": _HASH,
    "value_sha256": _HASH,
    "month": "^[0-9]{4}-(0[1-9]|1[0-2])$",
}
"""What the text of a member must look like, by its name: one word, one meaning."""

_EVENTS: Final[Mapping[str, type[msgspec.Struct]]] = {
    events.STARTED: events.Started,
    events.INTERVAL: events.Interval,
    events.ENDED: events.Ended,
    events.WATERMARK: events.Watermark,
    events.RETIRED: events.Retired,
    events.CORRECTION: events.Correction,
}
_MESSAGES: Final[Mapping[str, tuple[str, Sequence[type[msgspec.Struct]]]]] = {
    topics.CHARGES: (
        "One message of this topic. Key: tenant_id; null for a watermark.",
        (charges.BucketTotal, charges.AllocationFinal, charges.HubWatermark),
    ),
    topics.ENTRIES: (
        "One message of this topic. Key: tenant_id; null for a watermark.",
        (entries.Entry, entries.EntryWatermark),
    ),
    topics.TENANTS: ("Compacted. Key: tenant_id.", (reference.TenantRecord,)),
    topics.ACCESS: ("Compacted. Key: key_id.", (reference.AccessRecord,)),
    topics.HUBS: ("Compacted. Key: hub.", (reference.HubRecord,)),
    topics.PRICES: ("Compacted. Key: rate_line_id.", (reference.PriceLine,)),
    topics.QUARANTINE: ("Key: hub.", (quarantine.QuarantineNotice,)),
    topics.DECISIONS: (
        "Compacted. Key: <hub>/<kind>/<id>, <id>: its own, or <topic>/<partition>/<offset>/<hash>.",
        (quarantine.QuarantineDecision, quarantine.CorrectionDecision),
    ),
}

ENVELOPE: Final = "pk.hisab.envelope.v1"
"""Name of the schema that every event of a hub keeps, whatever its type."""


def schemas() -> dict[str, JsonSchema]:
    """Return every schema by its name: event types, the envelope, and topics of messages.

    Event schemas describe structured mode: the whole CloudEvent with its `data`. In binary mode the
    value is described by `#/properties/data` alone.
    """
    found = {ENVELOPE: _document(ENVELOPE, _envelope(None, {}), {})}
    for name, kind in _EVENTS.items():
        ((data,), parts) = _generate((kind,))
        summary = (kind.__doc__ or "").strip()
        found[name] = _document(name, {"description": summary, **_envelope(name, data)}, parts)
    for name, (summary, kinds) in _MESSAGES.items():
        shapes, parts = _generate(kinds)
        shape = shapes[0] if len(shapes) == 1 else {"oneOf": list(shapes)}
        found[name] = _document(name, {"description": summary, **shape}, parts)
    return found


def _document(name: str, shape: JsonSchema, parts: JsonSchema) -> JsonSchema:
    head: JsonSchema = {"$schema": DIALECT, "$id": f"urn:hisab:schema:{name}", "title": name}
    return {**head, **shape, "$defs": parts} if parts else {**head, **shape}


def _envelope(type_name: str | None, data: JsonSchema) -> JsonSchema:
    """Describe a CloudEvent as `read_event` takes it; unknown attributes are ignored."""
    kind: JsonSchema = {"type": "string"} if type_name is None else {"const": type_name}
    return {
        "type": "object",
        "required": ["specversion", "type", "source", "id", "sequence", "data"],
        "properties": {
            "specversion": {"const": "1.0"},
            "type": kind,
            "source": {
                "type": "string",
                "pattern": _SOURCE,
                "description": "Without /epochs/<epoch> it is the Kafka key (partitioner murmur2).",
            },
            "id": {
                "type": "string",
                "maxLength": 128,
                "description": "For tracing; receivers never deduplicate by it.",
            },
            "sequence": {
                "description": "1, 2, 3 ... per source over all its events, watermarks included.",
                "oneOf": [
                    {"type": "string", "pattern": "^[0-9]{1,20}$", "not": {"pattern": "^0+$"}},
                    {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
                ],
            },
            "subject": {"type": "string"},
            "time": {"type": "string", "format": "date-time"},
            "datacontenttype": {"type": "string"},
            "data": data,
        },
    }


def _generate(
    kinds: Sequence[type[msgspec.Struct]],
) -> tuple[tuple[JsonSchema, ...], JsonSchema]:
    """Return the shapes of some types and the parts that they refer to."""
    shapes, parts = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    return tuple(_refined(shape) for shape in shapes), _refined(dict(sorted(parts.items())))


def _refined(shape: Mapping[str, object]) -> JsonSchema:
    """Add the grammar of ids."""
    refined: JsonSchema = {}
    for name, part in shape.items():
        refined[name] = _refined_value(part)
        if name == "properties" and isinstance(part, Mapping):
            refined[name] = {member: _member(member, inner) for member, inner in part.items()}
    return refined


def _refined_value(part: object) -> object:
    match part:
        case dict():
            return _refined(part)
        case list():
            return [_refined_value(inner) for inner in part]
        case _:
            return part


def _member(name: str, part: Mapping[str, object]) -> JsonSchema:
    """Refine one member, with the pattern that belongs to its name."""
    refined = _refined(part)
    pattern = _GRAMMAR.get(name)
    if pattern is None:
        return refined
    if refined.get("type") == "string":
        return {**refined, "pattern": pattern}
    # Text or null: there is no other kind of member by these names.
    choices = msgspec.convert(refined["anyOf"], list[JsonSchema])
    refined["anyOf"] = [
        {**choice, "pattern": pattern} if choice.get("type") == "string" else choice
        for choice in choices
    ]
    return refined
