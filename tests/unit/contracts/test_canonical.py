"""The canonical encoding is injective, and an entry's hash covers all of the entry."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.examples import EXAMPLES
from hisab_contracts.canonical import canonical_bytes, content_sha256, leaf_sha256
from hisab_contracts.entries import Entry, entry_hash, read_entry_message

leaves = st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"))
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def shape(value: Any) -> Any:
    """Make values comparable with their kinds, since True == 1 in Python."""
    match value:
        case dict():
            return ("object", frozenset((name, shape(inner)) for name, inner in value.items()))
        case list() | tuple():
            return ("list", tuple(shape(inner) for inner in value))
        case _:
            return (type(value).__name__, value)


def present(value: Any) -> Any:
    """Return a value without its null members."""
    match value:
        case dict():
            return {name: present(inner) for name, inner in value.items() if inner is not None}
        case list():
            return [present(inner) for inner in value]
        case _:
            return value


@given(values)
def test_encoding_is_sorted_json_without_white_space(value: Any) -> None:
    """What anybody's JSON library writes of what is not null, sorted and tight, is the encoding."""
    expected = json.dumps(present(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert expected.encode() == canonical_bytes(value)


@given(values, values)
@pytest.mark.defect("L2")
def test_two_values_never_share_an_encoding(one: Any, other: Any) -> None:
    """Injective but for null members; kinds included (1 is not true, 1 is not "1")."""
    equal = shape(present(one)) == shape(present(other))
    assert equal == (canonical_bytes(one) == canonical_bytes(other))


@given(values)
@pytest.mark.defect("L2")
def test_encoding_reads_back(value: Any) -> None:
    """Nothing but null members is lost on the way, at any size of an integer."""
    assert shape(present(value)) == shape(json.loads(canonical_bytes(value)))


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), values, max_size=4))
def test_null_member_is_as_if_it_were_not_there(value: dict[str, Any]) -> None:
    """An optional member that a fact lacks does not change its bytes; in a list a null stays."""
    assert canonical_bytes(value) == canonical_bytes({**value, "a later member": None})
    assert canonical_bytes([value]) != canonical_bytes([value, None])


@pytest.mark.parametrize(
    "value", [0.5, float("nan"), b"x", {1: "a"}, [[1.0]], {"a": {"b": 0.0}}, {1}]
)
@pytest.mark.defect("M15", "L15")
def test_what_is_not_exact_is_refused(value: Any) -> None:
    """Floats, bytes, other keys than text: refused, however deep."""
    with pytest.raises(TypeError):
        canonical_bytes(value)


@pytest.mark.defect("L2")
def test_urdu_and_combining_characters_are_kept_apart() -> None:
    """Code points are hashed as they are: no normalisation joins two spellings."""
    one, other = "حساب ۱۲۳ é", "حساب ۱۲۳ e\u0301"
    assert content_sha256(one) != content_sha256(other)
    assert hashlib.sha256(f'"{one}"'.encode()).hexdigest() == content_sha256(one)


def test_leaf_hash_is_that_of_rfc_6962() -> None:
    """RFC 6962: the hash of the empty leaf, as its test vectors have it."""
    assert (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d" == leaf_sha256(b"").hex()
    )


def entry_examples() -> list[dict[str, Any]]:
    """Return the entries of the example book, in order."""
    paths = sorted((EXAMPLES / "valid/ledger.entries.v1").glob("[0-9]*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("example", entry_examples(), ids=lambda example: example["entry_id"])
def test_entry_hash_is_recomputed_with_json_and_sha256_alone(example: dict[str, Any]) -> None:
    """Anyone can check a book: sorted JSON with an empty hash, a zero byte before, SHA-256."""
    text = json.dumps(
        {**example, "hash": ""}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    entry = read_entry_message(json.dumps(example).encode())
    assert isinstance(entry, Entry)
    assert example["hash"] == hashlib.sha256(b"\x00" + text.encode()).hexdigest()
    assert example["hash"] == entry_hash(entry)


def test_example_book_is_a_chain_in_balance() -> None:
    """Each entry names its predecessor's hash; postings sum to zero; balances are running sums."""
    previous, balances = "0" * 64, dict[str, int]()
    for number, example in enumerate(entry_examples(), start=1):
        assert (number, previous) == (example["seq"], example["prev_hash"])
        assert 0 == sum(posting["posting_micro"] for posting in example["postings"])
        for posting in example["postings"]:
            balances[posting["account"]] = (
                balances.get(posting["account"], 0) + posting["posting_micro"]
            )
            assert balances[posting["account"]] == posting["balance_micro"]
        previous = example["hash"]


def changed(value: Any) -> Any:
    """Return another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return value + "x"
        case None:
            return "x"
        case list():
            return [*value, value[0]] if value else value
        case _:
            return value


def mutations(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Return every member of a document, with another value for it."""
    found: list[tuple[tuple[Any, ...], Any]] = []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += mutations(inner, (*path, name))
    elif isinstance(value, list) and value:
        found.append((path, changed(value)))
        for number, inner in enumerate(value):
            found += mutations(inner, (*path, number))
    elif value != []:
        found.append((path, changed(value)))
    return found


@pytest.mark.parametrize("example", entry_examples(), ids=lambda example: example["entry_id"])
@pytest.mark.defect("L2")
def test_every_member_of_an_entry_is_under_its_hash(example: dict[str, Any]) -> None:
    """Change any single member, and the hash no longer fits."""
    seen = 0
    for path, value in mutations(example):
        if path in {("hash",), ("message",)}:
            continue
        copy = json.loads(json.dumps(example))
        holder = copy
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = value
        try:
            entry = read_entry_message(json.dumps(copy).encode())
        except msgspec.DecodeError:
            continue  # A detail cannot be replaced by a text: refused before it is hashed.
        assert isinstance(entry, Entry)
        assert example["hash"] != entry_hash(entry), path
        seen += 1
    assert seen >= 10
