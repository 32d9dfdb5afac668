"""Cursors: a list takes back only what it could have given."""

from __future__ import annotations

import base64
from urllib.parse import urlencode

import pytest
from starlette.requests import Request

from runtime.http import Page, Position, Problem, page_of


def asking(position: bytes) -> Request:
    """A request for the page after a position, written as JSON."""
    cursor = base64.urlsafe_b64encode(position).rstrip(b"=").decode()
    return Request({"type": "http", "query_string": urlencode({"cursor": cursor}).encode()})


def test_a_position_of_the_list_is_taken() -> None:
    """Numbers and texts, as many as the list's order has."""
    assert Page(100, (7,)) == page_of(asking(b"[7]"), tuple[Position])
    assert Page(100, ("a", "b")) == page_of(asking(b'["a","b"]'), tuple[str, str])


@pytest.mark.parametrize("position", [b"[]", b"[1,2]", b'["a"]', b"[-1]", b"[9223372036854775808]"])
def test_a_position_of_another_list_is_malformed(position: bytes) -> None:
    """Too few, too many, of another kind, or beyond what the database can hold: 422, never 500."""
    with pytest.raises(Problem) as refused:
        page_of(asking(position), tuple[Position])
    assert 422 == refused.value.kind.status


@pytest.mark.parametrize("position", [b"[]", b"[1]", b'["a","b"]', b'["\\u0000"]'])
def test_a_text_position_that_no_list_gave_is_malformed(position: bytes) -> None:
    """Control characters stand in no name of ours."""
    with pytest.raises(Problem) as refused:
        page_of(asking(position), tuple[str])
    assert 422 == refused.value.kind.status
