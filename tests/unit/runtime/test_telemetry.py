"""What a record's headers say of a trace, whatever they hold."""

from __future__ import annotations

from typing import Any

import pytest

from runtime import telemetry
from runtime.records import Record

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def record(headers: Any) -> Record:
    return Record("in", 0, 0, 0, None, b"1", headers)


@pytest.mark.defect("F6", "M17")
@pytest.mark.parametrize(
    ("value", "trace"),
    [(TRACE.encode(), TRACE), (None, None), (b"", None), (b"\xff\xfe", None), (b"00-0-0-0", None)],
)
def test_a_trace_is_well_formed_or_absent(value: bytes | None, trace: str | None) -> None:
    """Null, empty and unreadable headers carry no trace, and hurt no batch."""
    one = record((("other", None), ("traceparent", value)))
    assert trace == telemetry.trace_of(one)
    with telemetry.batch_span("group", [one]):
        pass


@pytest.mark.defect("F23")
def test_the_headers_of_a_record_put_aside_unread_are_not_looked_at() -> None:
    """Whatever in them killed the process does not do so again."""
    with telemetry.batch_span("group", [record(77)], unread=True):
        pass
