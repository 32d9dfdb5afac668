"""The one canonical encoding: what is hashed, compared and signed goes through here.

JSON with sorted members, no white space, UTF-8, integers as plain decimal digits of any length, and
no other numbers: floats are refused. Strings keep their code points (no normalisation). Members
that are null are left out, at every depth: so an optional member that is added to a fact later does
not change the bytes of the facts that lack it (decision 0009). What is left is what
`json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` writes. The encoding
is injective but for null members, so two facts with one hash are one fact.

Refuses (`TypeError`) what is not exact: floats, bytes, members whose names are no text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

_REFUSAL = "canonical encoding takes str, int, bool, None, lists, tuples, string-keyed dicts, facts"
_ENCODER = msgspec.json.Encoder(order="sorted")

Canonical = str | int | bool | None | Sequence["Canonical"] | Mapping[str, "Canonical"]
"""What can be encoded: integers of any size, but never a float."""

LEAF_PREFIX = b"\x00"
"""RFC 6962: a leaf hash is SHA-256 over this byte and the leaf."""


def canonical_bytes(value: Canonical | msgspec.Struct) -> bytes:
    """Encode a value canonically; TypeError for anything that is not exact.

    A fact (a Struct) is taken at its word, because hashing is on the hot path of the ledger: its
    types admit no float, and it leaves out its null members by `omit_defaults`. A test holds every
    fact that is hashed to both (`tests/unit/contracts/test_canonical.py`).
    """
    return _ENCODER.encode(value if isinstance(value, msgspec.Struct) else _exact(value))


def content_sha256(value: Canonical | msgspec.Struct) -> str:
    """Return the SHA-256 of the canonical encoding, in hexadecimal."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def leaf_sha256(leaf: bytes) -> bytes:
    """Return the RFC 6962 leaf hash: 32 bytes."""
    return hashlib.sha256(LEAF_PREFIX + leaf).digest()


def _exact(value: object) -> object:
    """Return a value without its null members; TypeError where a float or a foreign kind hides."""
    match value:
        case str() | int() | None:
            return value
        case dict():
            if any(not isinstance(name, str) for name in value):
                raise TypeError(_REFUSAL)
            return {name: _exact(member) for name, member in value.items() if member is not None}
        case list() | tuple():
            # The place of an element has a meaning: a null in a list stays.
            return [_exact(member) for member in value]
        case _:
            raise TypeError(f"{_REFUSAL}; got {type(value).__name__}")
