"""Bodies before they are decoded: how deep they are, whatever stands in their texts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.http import MAX_DEPTH, Problem, check_depth

TRICKY = st.text(alphabet='"\\[]{}a,:\n\u00e9', max_size=12)


def is_too_deep(body: bytes) -> bool:
    """Say whether a body is refused for its depth."""
    try:
        check_depth(body)
    except Problem as refused:
        assert "malformed" == refused.kind.code  # noqa: PT017 - the one reason there is.
        return True
    return False


@given(st.lists(TRICKY, max_size=40), st.integers(0, MAX_DEPTH + 8), st.booleans())
def test_only_brackets_outside_of_texts_count(
    texts: list[str], depth: int, as_objects: bool
) -> None:
    """Quotes, backslashes and brackets in texts and names change nothing."""
    value: object = texts
    for number in range(depth):
        value = {texts[number] if number < len(texts) else "": value} if as_objects else [value]
    for ensure_ascii in (True, False):
        body = json.dumps(value, ensure_ascii=ensure_ascii).encode()
        assert (depth + 1 > MAX_DEPTH) == is_too_deep(body)


@pytest.mark.parametrize("inner", ['"', "\\", '\\"', '"\\', "[", '["', "\\\\", '\\\\"['])
def test_a_text_full_of_escapes_hides_nothing_behind_it(inner: str) -> None:
    """What follows the text is seen as what it is."""
    text = json.dumps(inner * 50).encode()
    assert not is_too_deep(b"[" + text + b"," + b"[],[]," * 40 + text + b"]")
    assert is_too_deep(b"[" + text + b"," + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"]")


@given(st.binary(max_size=200))
def test_any_bytes_are_looked_at_without_a_failure(body: bytes) -> None:
    """What is no JSON is refused by its reader, afterwards."""
    is_too_deep(body * 40)
