"""The one canonical encoding: what is hashed, compared and signed goes through here.

JSON with sorted members, no white space, UTF-8, integers as plain decimal digits of any length, and
no other numbers: floats are refused. Strings keep their code points (no normalisation). It is what
`json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` writes. The encoding
is injective on the values it accepts, so two facts with one hash are one fact.
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

    A fact (a Struct of the contracts) is taken at its word: its types admit no float.
    """
    if not isinstance(value, msgspec.Struct):
        _refuse_inexact(value)
    return _ENCODER.encode(value)


def content_sha256(value: Canonical | msgspec.Struct) -> str:
    """Return the SHA-256 of the canonical encoding, in hexadecimal."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def leaf_sha256(leaf: bytes) -> bytes:
    """Return the RFC 6962 leaf hash: 32 bytes."""
    return hashlib.sha256(LEAF_PREFIX + leaf).digest()


def _refuse_inexact(value: object) -> None:
    """Raise TypeError where a float, bytes or another foreign kind hides."""
    match value:
        case str() | int() | None:
            return
        case dict():
            if any(not isinstance(name, str) for name in value):
                raise TypeError(_REFUSAL)
            for member in value.values():
                _refuse_inexact(member)
        case list() | tuple():
            for member in value:
                _refuse_inexact(member)
        case _:
            raise TypeError(f"{_REFUSAL}; got {type(value).__name__}")
