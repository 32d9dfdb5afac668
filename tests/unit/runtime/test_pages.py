"""Cursors: a list takes back only what it gave, with the same filter, to the same caller."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
from starlette.requests import Request

from runtime import http
from runtime.http import Position, Problem, page_of, page_response

PATH = "/v1/hubs/lhr/sources"
FILTER = {"state": "open", "hub": "lhr"}


def asking(
    cursor: str | None = None, *, path: str = PATH, caller: str = "*", **query: str
) -> Request:
    """A request for the page after a cursor."""
    asked = {"limit": "2", **query} | ({} if cursor is None else {"cursor": cursor})
    request = Request({"type": "http", "path": path, "query_string": urlencode(asked).encode()})
    request.state.caller = caller
    return request


def next_of(request: Request, position: tuple[str | int, ...], kind: Any) -> str:
    """The cursor that a list gives behind an item at a position."""
    page = page_of(request, kind)
    answer = page_response([position], page, lambda item: item, more=True)
    cursor: str = msgspec.json.decode(answer.body)["next"]
    return cursor


def altered(cursor: str, position: bytes) -> str:
    """The same cursor with another position, written as JSON."""
    binding, _ = msgspec.json.decode(base64.urlsafe_b64decode(cursor + "=="))
    packed = b'["' + binding.encode() + b'",' + position + b"]"
    return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def test_a_position_of_the_list_is_taken() -> None:
    """Numbers and texts, as many as the list's order has; the limit may change on the way."""
    number = next_of(asking(), (7,), tuple[Position])
    assert (7,) == page_of(asking(number, limit="9"), tuple[Position]).after
    texts = next_of(asking(**FILTER), ("a", "b"), tuple[str, str])
    assert ("a", "b") == page_of(asking(texts, **FILTER), tuple[str, str]).after


@pytest.mark.parametrize(
    "other",
    [
        {"path": "/v1/hubs/khi/sources", **FILTER},
        {"path": "/v1/quarantine", **FILTER},
        {"caller": "ravi-health", **FILTER},
        {"state": "released", "hub": "lhr"},
        {"state": "open"},
        {**FILTER, "reason": "schema"},
        {},
    ],
)
def test_a_cursor_of_another_list_filter_or_caller_is_malformed(other: dict[str, str]) -> None:
    """The same kind of position, and still 422: the answer would be a wrong part of a list."""
    cursor = next_of(asking(**FILTER), (7,), tuple[Position])
    with pytest.raises(Problem) as refused:
        page_of(asking(cursor, **other), tuple[Position])
    assert "malformed" == refused.value.kind.code


@pytest.mark.parametrize("position", [b"[]", b"[1,2]", b'["a"]', b"[-1]", b"[9223372036854775808]"])
def test_a_position_of_another_list_is_malformed(position: bytes) -> None:
    """Too few, too many, of another kind, or beyond what the database can hold: 422, never 500."""
    cursor = altered(next_of(asking(), (7,), tuple[Position]), position)
    with pytest.raises(Problem) as refused:
        page_of(asking(cursor), tuple[Position])
    assert 422 == refused.value.kind.status


@pytest.mark.parametrize("position", [b"[]", b"[1]", b'["a","b"]', b'["\\u0000"]'])
def test_a_text_position_that_no_list_gave_is_malformed(position: bytes) -> None:
    """Control characters stand in no name of ours."""
    cursor = altered(next_of(asking(), ("a",), tuple[str]), position)
    with pytest.raises(Problem) as refused:
        page_of(asking(cursor), tuple[str])
    assert 422 == refused.value.kind.status


@pytest.mark.parametrize("cursor", ["!!", "", "AAAA", "W10", "W1tdLFtdXQ", "A" * 5_000])
def test_a_cursor_that_is_none_is_malformed(cursor: str) -> None:
    """What is no base64, no JSON, no pair, or longer than any cursor."""
    with pytest.raises(Problem) as refused:
        page_of(asking(cursor), tuple[Position])
    assert 422 == refused.value.kind.status


def test_a_cursor_that_is_nested_deep_is_malformed() -> None:
    """Within the longest cursor there is room for more brackets than a parser goes down."""
    cursor = base64.urlsafe_b64encode(b'["a",' + b"[" * 3_000).decode()
    assert len(cursor) < http.MAX_CURSOR
    with pytest.raises(Problem) as refused:
        page_of(asking(cursor), tuple[Position])
    assert 422 == refused.value.kind.status


def test_a_page_is_bounded_in_bytes_and_loses_nothing() -> None:
    """Items of a third of the bound: two to a page, and the pages add up to the list."""
    items = [(number, "x" * (http.MAX_PAGE_BYTES // 3)) for number in range(5)]
    found: list[int] = []
    cursor: str | None = None
    while True:
        page = page_of(asking(cursor, limit="1000"), tuple[Position])
        after = -1 if page.after is None else page.after[0]
        answer = page_response(items[after + 1 :], page, lambda item: (item[0],))
        assert len(answer.body) <= http.MAX_PAGE_BYTES + 1_000
        read = msgspec.json.decode(answer.body)
        found += [number for number, _ in read["items"]]
        cursor = read["next"]
        if cursor is None:
            break
    assert list(range(5)) == found


def test_an_item_beyond_the_bound_has_a_page_of_its_own() -> None:
    """A list never stands still before an item that is too large."""
    item = (1, "x" * (http.MAX_PAGE_BYTES + 1))
    page = page_of(asking(), tuple[Position])
    answer = page_response([item, item], page, lambda shown: (shown[0],))
    assert 1 == len(msgspec.json.decode(answer.body)["items"])
