"""Traces, metrics and logs of one service.

Theory. One span per HTTP request and one per consumed batch; never one per record. A batch's span
is linked to the traces that its records carry in their `traceparent` headers, and what a handler
derives from a record carries that record's header on (`trace_of`, `trace_headers`): one trace id
can be followed from a produced event to whatever came of it. Nothing is exported unless an endpoint
is given. Metrics are added once per batch. Logs are JSON lines with the trace id of the current
span; they never carry bodies, headers or secrets.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, TraceFlags
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

    from runtime.kafka import Headers
    from runtime.records import Record

TRACEPARENT: Final = "traceparent"
MAX_LINKS: Final = 32
MAX_SCANNED: Final = 256
METRICS_TYPE: Final = CONTENT_TYPE_LATEST
OTHER: Final = "other"
"""The label of what is in no closed set. A label is never what somebody sent: each new one stays in
memory, and in every answer of /metrics, until the process ends."""
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_TRACER: Final = trace.get_tracer("runtime")

_RECORDS: Final = Counter("consumer_records", "Records committed", ["group"])
_BATCH_SECONDS: Final = Histogram(
    "consumer_batch_seconds", "From the fetched batch to its commit", ["group"]
)
_LAG: Final = Gauge("consumer_lag_records", "Records that wait", ["group"])
_RELAYED: Final = Counter("outbox_relayed", "Messages published and acknowledged", ["topic"])
_DIFFERENCES: Final = Gauge(
    "comparison_differences", "What the last run of a comparison left", ["comparison"]
)
_COMPARED: Final = Gauge(
    "comparison_finished_seconds", "When its last run ended, since 1970", ["comparison"]
)
_REQUESTS: Final = Histogram(
    "http_request_seconds", "Requests by route and status", ["method", "route", "status"]
)


def configure(service: str, version: str, *, otlp_endpoint: str | None) -> None:
    """Set up tracing and logging for this process; call once, at start.

    Without an endpoint a span still has its ids (problems and logs show them), but is not recorded
    and goes nowhere.
    """
    resource = Resource.create({"service.name": service, "service.version": version})
    if otlp_endpoint is None:
        trace.set_tracer_provider(
            TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(0)))
        )
    else:
        trace.set_tracer_provider(_exporting(resource, otlp_endpoint))
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    structlog.configure(
        processors=[
            _add_trace_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


def _exporting(resource: Resource, endpoint: str) -> TracerProvider:
    # Imported here: half a second that only an installation with a collector should pay.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _add_trace_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event


def trace_of(record: Record) -> str | None:
    """Return the `traceparent` a record carries, if it is well-formed."""
    for name, value in record.headers:
        if name == TRACEPARENT:
            text = (value or b"").decode("ascii", "replace")
            return text if _TRACEPARENT.fullmatch(text) else None
    return None


def trace_headers(traceparent: str | None = None) -> Headers:
    """Return the headers that carry a trace on: the given one, else the current span's."""
    if traceparent is None:
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return ()
        flags = int(context.trace_flags)
        traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
    return ((TRACEPARENT, traceparent.encode("ascii")),)


def current_trace_id() -> str:
    """Return the trace id of the current span: 32 hex digits (zeros when there is none)."""
    return f"{trace.get_current_span().get_span_context().trace_id:032x}"


def _context(traceparent: str) -> SpanContext | None:
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    context = SpanContext(
        trace_id=int(match[1], 16),
        span_id=int(match[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(match[3], 16)),
    )
    return context if context.is_valid else None


@contextmanager
def batch_span(group: str, records: Sequence[Record], *, unread: bool = False) -> Iterator[None]:
    """One span around the processing of a batch, linked to at most 32 of its producers' traces.

    With `unread` it is linked to none: no header is looked at.
    """
    started_s = time.perf_counter()
    links = [
        Link(context)
        for traceparent in _traces(() if unread else records)
        if (context := _context(traceparent)) is not None
    ]
    with _TRACER.start_as_current_span(f"process {group}", kind=SpanKind.CONSUMER, links=links):
        yield
    _RECORDS.labels(group).inc(len(records))
    _BATCH_SECONDS.labels(group).observe(time.perf_counter() - started_s)


def _traces(records: Sequence[Record]) -> set[str]:
    found: set[str] = set()
    for record in records[:MAX_SCANNED]:
        if record.headers:
            traceparent = trace_of(record)
            if traceparent is not None:
                found.add(traceparent)
                if len(found) == MAX_LINKS:
                    break
    return found


@contextmanager
def request_span(method: str, headers: Mapping[str, str]) -> Iterator[None]:
    """One span around a request, in the caller's trace when it names one."""
    parent = _context(headers.get(TRACEPARENT, ""))
    within = None if parent is None else trace.set_span_in_context(NonRecordingSpan(parent))
    with _TRACER.start_as_current_span(
        f"{_method(method)} request", context=within, kind=SpanKind.SERVER
    ):
        yield


def observe_request(method: str, route: str, status: int, seconds: float) -> None:
    """Note one answered request under its route's template, never under its path.

    `route` is a template of the application, or `OTHER`; a method that nobody knows is `OTHER` too.
    """
    known = _method(method)
    trace.get_current_span().update_name(f"{known} {route}")
    _REQUESTS.labels(known, route, str(status)).observe(seconds)


def _method(method: str) -> str:
    """Return a method that HTTP has, or `OTHER`: a client may write any word."""
    return method if method in METHODS else OTHER


def set_lag(group: str, records: int) -> None:
    """Note how many records wait for a group."""
    _LAG.labels(group).set(records)


def set_differences(comparison: str, differences: int, finished_ms: int) -> None:
    """Note what the last run of a comparison with another service left, and when it ended."""
    _DIFFERENCES.labels(comparison).set(differences)
    _COMPARED.labels(comparison).set(finished_ms // 1_000)


def count_relayed(topic: str, messages: int) -> None:
    """Note that messages of the outbox were acknowledged by the broker."""
    _RELAYED.labels(topic).inc(messages)


def metrics_text() -> bytes:
    """Return all metrics of this process, as Prometheus reads them."""
    return generate_latest()
