"""Every example means to a reader of ours, and to a JSON Schema, what it says it means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import msgspec
import pytest

from contract.examples import (
    CONTRACTS,
    EXAMPLES,
    TOPIC_HUB,
    Record,
    invalid_records,
    load,
    messages,
    valid_records,
)
from hisab_contracts import charges, entries, events, quarantine, reference, topics
from hisab_contracts.events import HubEvent, Refused, read_event
from hisab_contracts.ids import HubCode

VALID = tuple(valid_records())
INVALID = tuple(invalid_records())
READERS: Mapping[str, Any] = {
    topics.CHARGES: charges.read_charge,
    topics.ENTRIES: entries.read_entry_message,
    topics.TENANTS: msgspec.json.Decoder(reference.TenantRecord).decode,
    topics.ACCESS: msgspec.json.Decoder(reference.AccessRecord).decode,
    topics.HUBS: msgspec.json.Decoder(reference.HubRecord).decode,
    topics.PRICES: msgspec.json.Decoder(reference.PriceLine).decode,
    topics.QUARANTINE: msgspec.json.Decoder(quarantine.QuarantineNotice).decode,
    topics.DECISIONS: quarantine.read_decision,
}


def validator(name: str) -> jsonschema.Draft202012Validator:
    """Return the validator of one committed schema."""
    return jsonschema.Draft202012Validator(load(CONTRACTS / "schemas" / f"{name}.json"))


def message_id(part: object) -> str:
    """Name a case by its example."""
    return part if isinstance(part, str) and "/" in part else ""


def _refuse(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def schema_accepts(record: Record) -> bool:
    """Say whether the committed schema of the record's type takes it."""
    try:
        value = json.loads(record.value, parse_constant=_refuse)
    except (ValueError, UnicodeDecodeError):
        return False
    if record.binary:
        value = {
            name[3:]: text.decode() for name, text in record.headers if name.startswith("ce_")
        } | {"data": value}
    kind = value.get("type") if isinstance(value, dict) else None
    path = CONTRACTS / "schemas" / f"{kind}.json"
    name = str(kind) if path.exists() else "pk.hisab.envelope.v1"
    known = name != "pk.hisab.envelope.v1" or kind is None
    return known and validator(name).is_valid(value)


@pytest.mark.parametrize("record", VALID, ids=lambda record: record.name)
def test_valid_example_is_read(record: Record) -> None:
    """A valid event is read, and its JSON Schema takes it."""
    event = read_event(record.value, record.headers, HubCode(TOPIC_HUB))
    assert isinstance(event, HubEvent), event
    assert schema_accepts(record)


@pytest.mark.parametrize("record", INVALID, ids=lambda record: record.name)
@pytest.mark.defect("M16", "M17", "F6", "F7", "L15", "F63")
def test_invalid_example_is_refused_with_its_reason(record: Record) -> None:
    """An invalid record is refused under its stated reason; its schema refuses it where it can."""
    event = read_event(record.value, record.headers, HubCode(TOPIC_HUB))
    assert isinstance(event, Refused), event
    assert record.reason == event.reason
    assert event.detail != ""
    assert (record.schema_accepts is not None) == schema_accepts(record)


def test_both_modes_say_the_same() -> None:
    """What is sent in binary mode and in structured mode is one event."""
    for path in sorted((EXAMPLES / "valid/binary").glob("*.json")):
        twin = EXAMPLES / "valid/structured" / path.name
        both = [r for r in VALID if r.name.endswith(f"/{path.stem}")]
        read = [read_event(r.value, r.headers, HubCode(TOPIC_HUB)) for r in both]
        assert twin.exists()
        assert len(both) == 2
        assert read[0] == read[1]


def test_every_type_has_examples_of_both_kinds() -> None:
    """No event type is without a valid example in each mode; every reason of contracts is shown."""
    kinds = {events.STARTED, events.INTERVAL, events.ENDED, events.WATERMARK, events.RETIRED}
    kinds |= {events.CORRECTION}
    for mode in ("structured", "binary"):
        shown = set()
        for path in (EXAMPLES / "valid" / mode).glob("*.json"):
            example = load(path)
            shown.add(example["type"] if mode == "structured" else example["headers"]["ce_type"])
        assert kinds == shown
    assert {"undecodable", "unknown-type", "schema", "hub-mismatch"} == {r.reason for r in INVALID}


@pytest.mark.parametrize(("topic", "name", "value"), list(messages("valid")), ids=message_id)
def test_valid_message_is_read_and_written_back(topic: str, name: str, value: Any) -> None:
    """A valid message is read by ours, taken by its schema, and written back as it was."""
    read = READERS[topic](json.dumps(value).encode())
    assert validator(topic).is_valid(value)
    assert value == json.loads(msgspec.json.encode(read))


@pytest.mark.parametrize(("topic", "name", "value"), list(messages("invalid")), ids=message_id)
def test_invalid_message_is_refused(topic: str, name: str, value: Any) -> None:
    """An invalid message stops its reader and its schema alike."""
    with pytest.raises(msgspec.DecodeError):
        READERS[topic](json.dumps(value).encode())
    assert not validator(topic).is_valid(value)


def test_every_topic_has_examples_of_both_kinds() -> None:
    """No downstream topic is without a valid and an invalid example."""
    assert set(READERS) == {topic for topic, _, _ in messages("valid")}
    assert set(READERS) == {topic for topic, _, _ in messages("invalid")}
