"""Traces, metrics and logs of one service.

Theory. One span per HTTP request and one per consumed batch; never one per record. A batch's span
is linked to the traces that its records carry in their `traceparent` headers, and what a handler
derives from a record carries that record's header on (`trace_of`, `trace_headers`): one trace id can
be followed from a produced event to whatever came of it. Nothing is exported unless an endpoint is
given. Metrics are added once per batch. Logs are JSON lines with the trace id of the current span.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from runtime.kafka import Batch, Headers, Record

TRACEPARENT: Final = "traceparent"


def configure(service: str, version: str, *, otlp_endpoint: str | None) -> None:
    """Set up tracing and logging for this process; call once, at start."""


def trace_of(record: Record) -> str | None:
    """Return the `traceparent` a record carries, if it is well-formed."""
    raise NotImplementedError


def trace_headers(traceparent: str | None) -> Headers:
    """Return the headers that carry a trace on: the given one, else the current span's."""
    raise NotImplementedError


def current_trace_id() -> str:
    """Return the trace id of the current span: 32 hex digits (zeros when there is none)."""
    raise NotImplementedError


@contextmanager
def batch_span(group: str, batch: Batch) -> Iterator[None]:
    """One span around the processing of a batch, linked to at most 32 of its producers."""
    yield
