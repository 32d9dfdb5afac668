"""Every door through which bytes of strangers come in, and 1 MiB of each kind that could hurt.

Run as a program, it brings every shape to one door: `python -m faults.hostile.doors <door>`. It is
given 30 seconds of processor time for all of them together, which is a bound that what is quadratic
goes far beyond, and not a measurement. A door takes what it is given or refuses it; anything else
that is raised ends the program with a traceback.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from starlette.requests import Request

from demo.replay import NEEDED_COLUMNS, read_trace
from hisab_contracts.events import read_event
from hisab_contracts.ids import HubCode, parse_source
from hisab_contracts.topics import hub_of_topic
from hisab_contracts.units import instant_ms, month_bounds_ms
from metering.__main__ import SERVICE
from metering.api.events import MEDIA_TYPES, _judge_event, _split_body
from runtime import telemetry
from runtime.http import (
    MAX_CURSOR,
    IntegerText,
    Model,
    Position,
    Problem,
    cached_response,
    page_of,
    query_integer,
    read_body,
)
from runtime.idempotency import _differing, read_command
from runtime.records import Record
from runtime.service import NOWHERE, make_kit

MIB = 1_048_576
CPU_S = 30
HUB = HubCode("lhr")


def shapes() -> Iterator[tuple[str, bytes]]:
    """Yield 1 MiB of every shape that has hurt a parser somewhere."""

    def filled(unit: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
        count = (MIB - len(before) - len(after)) // len(unit)
        return before + unit * count + after

    for unit in (b'"', b'\\"', b"\\", b'"\\', b'\\\\"', b"[", b"{", b"[]", b"[{", b"]", b'{"a":'):
        yield f"only {unit!r}", filled(unit)
        yield f"a text without an end of {unit!r}", filled(unit, b'{"item":"')
        yield f"a text of {unit!r}", filled(unit, b'{"item":"', b'"}')
    for unit in (b"9", b"0", b"a", b" ", b"\n", b"\r\n", b"\x00", b"\xff", b"\xc3", b"=", b"%00"):
        yield f"only {unit!r}", filled(unit)
        yield f"a text of {unit!r}", filled(unit, b'{"item":"', b'"}')
    for unit in (b",", b":", b"-", b".", b"_", b"/", b"../", b"&a=", b"Bearer ", b"\xe2\x80\xa8"):
        yield f"only {unit!r}", filled(unit)
    for unit in (b"\\u0041", b"\\u0000", b"\\ud800", b"\\u", b"\\n", b"\xf0\x9f\x92\xa9"):
        yield f"a text of {unit!r}", filled(unit, b'{"item":"', b'"}')
    yield "a whole number", filled(b"9", b'{"count":', b"}")
    yield "a fraction", filled(b"9", b'{"count":0.', b"}")
    yield "a power", filled(b"9", b'{"count":1e', b"}")
    yield "digits as a text", filled(b"9", b'{"price_micro":"', b'"}')
    yield "a sequence of digits", filled(b"9", b'{"sequence":"', b'"}')
    yield "one member again and again", filled(b'"a":1,', b"{", b'"a":1}')
    names = b",".join(b'"%x":0' % number for number in range(MIB // 10))
    yield "many members", b'{"scope":{' + names + b"}}"
    yield (
        "a long name of many members",
        (
            b'{"scope":{"'
            + b"n" * (MIB // 2)
            + b'":['
            + filled(b"0,")[: MIB // 2 - 64]
            + b'"\\u0007"]}}'
        ),
    )
    yield "a list of numbers", filled(b"1,", b"[", b"1]")
    yield "a list of empty events", filled(b"{},", b"[", b"{}]")
    yield "many empty texts", filled(b'"",', b'{"notes":[', b'""]}')
    yield "deep in a member that nobody reads", filled(b"[", b'{"more":')
    yield "a long id", filled(b"a", b'{"source":"/hubs/lhr/nodes/', b'"}')
    yield "many cells", filled(b'a,"b""c",')
    yield "cells without an end", filled(b'",\n"')


class Anything(Model, frozen=True):
    """A body with one of everything that can be long or deep."""

    item: str = ""
    count: int = 0
    price_micro: IntegerText = "0"
    notes: tuple[str, ...] = ()
    scope: dict[str, object] = msgspec.field(default_factory=dict)


def asking(
    query: bytes = b"", headers: Mapping[bytes, bytes] | None = None, body: bytes = b""
) -> Request:
    """Return a request as the server hands it on."""

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/things",
        "query_string": query,
        "headers": [(b"content-type", b"application/json"), *(headers or {}).items()],
        "server": ("127.0.0.1", 80),
        "scheme": "http",
    }
    return Request(scope, receive)


@contextlib.contextmanager
def refusing(statuses: set[int]) -> Iterator[None]:
    """Let a door refuse what it is given, in these ways only."""
    try:
        yield
    except Problem as refused:
        if refused.kind.status not in statuses:
            raise


def body_of_json(given: bytes) -> None:
    """The body of a request."""
    asyncio.run(read_body(asking(body=given), Anything))


def body_of_command(given: bytes) -> None:
    """The body of a command, its fingerprint, and what differs from the first of its key."""
    request = asking(headers={b"idempotency-key": b"k"}, body=given)
    command = asyncio.run(read_command(request, Anything))
    _differing(command, "POST /", b'{"item":"x"}')


def idempotency_key(given: bytes) -> None:
    """The name a client gives to a command."""
    request = asking(headers={b"idempotency-key": given}, body=b"{}")
    asyncio.run(read_command(request, Anything))


def headers(given: bytes) -> None:
    """Headers that the kit looks into, one after the other."""
    text = given.decode("latin-1")
    for name in (b"content-length", b"content-type", b"content-encoding"):
        with refusing({413, 415, 422}):
            asyncio.run(read_body(asking(headers={name: given}, body=b"{}"), Anything))
    cached_response(asking(headers={b"if-none-match": given}), {}, etag="v1")
    with telemetry.request_span(text, {"traceparent": text}):
        pass


def authorization(given: bytes) -> None:
    """The header that carries a key: none of these is one, so nothing is looked up."""
    access = make_kit(SERVICE, NOWHERE).access
    for scheme in (b"", b"Bearer ", b"Bearer hsb_"):
        request = asking(headers={b"authorization": scheme + given})
        with refusing({401}):
            asyncio.run(access.authorise(request))


def cursor(given: bytes) -> None:
    """The cursor of a page, as it came and as what it would have been made from."""
    within = given[: MAX_CURSOR // 2]  # What is longer is refused before it is taken apart.
    packed = (base64.urlsafe_b64encode(made) for made in (given, within, b'["a",' + within))
    for text in (given, within, *packed):
        with refusing({422}):
            page_of(asking(query=b"cursor=" + text), tuple[str, Position])


def query(given: bytes) -> None:
    """A number in the query, and a query of nothing but parameters."""
    for text in (b"limit=" + given, given):
        with refusing({422}):
            query_integer(asking(query=text), "limit", default=1, most=10)


def event(given: bytes) -> None:
    """A record of a hub's topic: its value in both modes, and each of its headers."""
    read_event(given, (), HUB)
    read_event(given, ((given[:MIB].decode("latin-1"), given),), HUB)
    named = {
        "ce_specversion": b"1.0",
        "ce_type": b"pk.hisab.hub.watermark.v1",
        "ce_source": b"/hubs/lhr/nodes/n/epochs/e",
        "ce_id": b"1",
        "ce_sequence": b"1",
    }
    read_event(given, tuple(named.items()), HUB)
    for name in named:
        read_event(b"{}", tuple((named | {name: given}).items()), HUB)
    record = Record("in", 0, 0, 0, given, given, (("traceparent", given),))
    telemetry.trace_of(record)
    with telemetry.batch_span("group", [record]):
        pass


def gateway(given: bytes) -> None:
    """A body of events over HTTP, in every form, and each event of it."""
    for media_type in MEDIA_TYPES:
        for part in (_split_body(given, media_type) or ())[:1_000]:
            _judge_event(part, HUB, ())


def grammar(given: bytes) -> None:
    """Texts with a grammar of their own: sources, topics, instants, months."""
    text = given.decode("latin-1")
    for written in (text, "/hubs/lhr/nodes/" + text, "hub." + text, "2025-07-01T00:00:00." + text):
        parse_source(written)
        hub_of_topic(written)
        for read in (instant_ms, month_bounds_ms):
            try:
                read(written)
            except ValueError:
                continue


def trace(given: bytes) -> None:
    """The CSV file of a recorded trace: as it is, as its header, and as each of its cells."""
    text = given.decode("latin-1")
    header = ",".join(NEEDED_COLUMNS)
    read_trace(text.splitlines(keepends=True))
    read_trace([text])
    read_trace([header, text])
    cells = ["p", "1", "1000", "LS", "Running", "0", "3600", "0"]
    short = text[:100_000].replace('"', '""')
    for number in range(len(cells)):
        row = [f'"{short}"' if place == number else cell for place, cell in enumerate(cells)]
        read_trace([header, ",".join(row)])


DOORS: Mapping[str, Callable[[bytes], Any]] = {
    door.__name__: door
    for door in (
        body_of_json,
        body_of_command,
        idempotency_key,
        headers,
        authorization,
        cursor,
        query,
        event,
        gateway,
        grammar,
        trace,
    )
}


def main(name: str) -> None:
    """Bring every shape to a door, within the bound."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    for shape, given in shapes():
        assert len(given) <= MIB, shape
        with refusing({413, 415, 422}):
            DOORS[name](given)


if __name__ == "__main__":
    main(sys.argv[1])
