"""The one canonical encoding: what is hashed, compared and signed goes through here.

JSON with sorted members, no white space, UTF-8, and no numbers at all: integers are written as
strings, floats are refused. Strings keep their code points (no normalisation). The encoding is
injective on the values it accepts, so two facts with one hash are one fact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

_REFUSAL = "canonical encoding takes str, int, bool, None, lists, tuples and string-keyed dicts"

Canonical = str | int | bool | None | Sequence["Canonical"] | Mapping[str, "Canonical"]
"""What can be encoded: integers of any size, but never a float."""

_ENCODER = msgspec.json.Encoder(order="sorted")
LEAF_PREFIX = b"\x00"
"""RFC 6962: a leaf hash is SHA-256 over this byte and the leaf."""


def canonical_bytes(value: Canonical) -> bytes:
    """Encode a value canonically; TypeError for anything that is not exact."""
    return _ENCODER.encode(_exact(value))


def content_sha256(value: Canonical) -> str:
    """Return the SHA-256 of the canonical encoding, in hexadecimal."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def leaf_sha256(leaf: bytes) -> bytes:
    """Return the RFC 6962 leaf hash: 32 bytes."""
    return hashlib.sha256(LEAF_PREFIX + leaf).digest()


def _exact(value: object) -> object:
    """Write integers as strings, all the way down. Ordered by how often a kind occurs: it is hot."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return value
    if kind is int:
        return str(value)
    if isinstance(value, dict):
        if any(type(name) is not str for name in value):
            raise TypeError(_REFUSAL)
        return {name: _exact(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(member) for member in value]
    raise TypeError(f"{_REFUSAL}; got {kind.__name__}")
