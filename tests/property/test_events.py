"""Whatever bytes a hub sends, reading them answers: a fact or a refusal, never an exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.examples import valid_records
from hisab_contracts.events import HubEvent, Refused, read_event
from hisab_contracts.ids import HubCode

LAHORE = HubCode("lhr")
STRUCTURED = (("content-type", b"application/cloudevents+json"),)
REASONS = {"undecodable", "unknown-type", "schema", "hub-mismatch"}
RECORDS = [(record.value, record.headers) for record in valid_records()]

header = st.tuples(
    st.text(max_size=12)
    | st.sampled_from(["ce_specversion", "ce_type", "ce_source", "ce_id", "ce_sequence"]),
    st.none() | st.binary(max_size=24),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def answers(value: bytes | None, headers: Any) -> HubEvent | Refused:
    """Read, and check what every answer owes."""
    answer = read_event(value, headers, LAHORE)
    if isinstance(answer, Refused):
        assert answer.reason in REASONS
        assert answer.detail
        answer.detail.encode()  # It is stored and published: it must be text, without NUL.
        assert "\x00" not in answer.detail
    else:
        assert isinstance(answer, HubEvent)
        assert answer.source.hub == answer.data.hub == LAHORE
        assert 1 <= answer.sequence < 2**63
    return answer


@given(st.none() | st.binary(max_size=400), st.lists(header, max_size=6))
@pytest.mark.defect("F6", "M17")
def test_arbitrary_bytes_and_headers_get_an_answer(
    value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    """Garbage in value or headers is refused, and nothing else happens."""
    answers(value, headers)


@given(st.sampled_from([r for r in RECORDS if r[1] != STRUCTURED]), st.data())
@pytest.mark.defect("F6", "M17")
def test_null_or_unreadable_attribute_is_refused(
    record: tuple[bytes, tuple[tuple[str, bytes], ...]], data: st.DataObject
) -> None:
    """A `ce_` header without a value, or one that is not UTF-8: the record waits as `schema`."""
    value, headers = record
    spoiled: list[tuple[str, bytes | None]] = [*headers]
    at = data.draw(st.sampled_from([n for n, (name, _) in enumerate(headers) if name[:3] == "ce_"]))
    other = data.draw(st.sampled_from([None, b"\xff", b"\xed\xa0\x80"]))
    spoiled[at] = (headers[at][0], other)
    answer = answers(value, spoiled)
    assert isinstance(answer, Refused)
    assert "schema" == answer.reason


@given(st.sampled_from(RECORDS), st.data())
@pytest.mark.defect("F6", "M17", "F23")
def test_damaged_bytes_get_an_answer(
    record: tuple[bytes, tuple[tuple[str, bytes], ...]], data: st.DataObject
) -> None:
    """A valid record with bytes cut, swapped or put in between is read or refused."""
    value, headers = record
    at = data.draw(st.integers(0, len(value)))
    cut = data.draw(st.integers(0, 20))
    answers(value[:at] + data.draw(st.binary(max_size=8)) + value[at + cut :], headers)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every member of a document."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found += places(inner, (*path, number))
    return found


@given(st.sampled_from([r for r in RECORDS if r[1] == STRUCTURED]), anything, st.data())
@pytest.mark.defect("M16", "M8", "F63")
def test_replaced_member_is_refused_or_ignored_never_zero(
    record: tuple[bytes, tuple[tuple[str, bytes], ...]], other: Any, data: st.DataObject
) -> None:
    """Any member replaced by anything: a quantity that is taken is the one that was sent."""
    value, headers = record
    document = json.loads(value)
    path = data.draw(st.sampled_from(places(document)))
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = other
    try:
        sent = json.dumps(document, allow_nan=True).encode()
    except (ValueError, UnicodeEncodeError):
        return
    answer = answers(sent, headers)
    if isinstance(answer, HubEvent) and path[0] == "data" and path[-1] in {"start_ms", "end_ms"}:
        assert other == getattr(answer.data, path[-1])
        assert not isinstance(other, float | bool)


@given(st.integers(0, 200_000))
@pytest.mark.defect("F6", "F8")
def test_deep_nesting_is_refused(depth: int) -> None:
    """However deep brackets nest, the reader answers."""
    answer = answers(b"[" * depth + b"]" * depth, STRUCTURED)
    assert isinstance(answer, Refused)
