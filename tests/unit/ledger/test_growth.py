"""Entries of today, read by types that have grown since: their bytes and hash stay (decision 0009).

The audit and the sequencer read stored rows into today's types and hash or publish them again. So a
member that is added to a detail later must not show in an entry that lacks it.
"""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest
from msgspec.structs import replace

from hisab_contracts.entries import Entry, GrantDetail, HoldDetail, entry_hash
from ledger.sequencer import message_of
from unit.ledger.values import CoreLedger, approve, book, grant, hold, total


class LaterHoldDetail(HoldDetail, frozen=True, kw_only=True, omit_defaults=True):
    """A hold's detail as a later release may have it."""

    reason: str | None = None


class LaterGrantDetail(GrantDetail, frozen=True, kw_only=True, omit_defaults=True):
    """A grant's detail as a later release may have it."""

    coverage_bps: int | None = None


def lived() -> list[Entry]:
    """A grant, a hold, a charge without a hold, and the hold's end."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("g", 100)))
    ledger.do(hold("h", 90))
    ledger.do(total(50))
    ledger.release("h")
    return ledger.entries


@pytest.mark.defect("L21")
def test_an_entry_whose_detail_lacks_a_later_member_keeps_its_hash() -> None:
    """What is stored is the JSON of its detail; read into a grown type, it hashes the same."""
    granted, placed, _, ended = lived()
    assert granted.grant is not None
    stored = msgspec.json.encode(granted.grant)
    later: Entry = replace(granted, grant=msgspec.json.decode(stored, type=LaterGrantDetail))
    assert granted.hash == entry_hash(later)
    for entry in (placed, ended):
        stored = msgspec.json.encode(entry.hold)
        later = replace(entry, hold=msgspec.json.decode(stored, type=LaterHoldDetail))
        assert entry.hash == entry_hash(later)
        assert message_of(entry, None).value == message_of(later, None).value


def test_a_later_member_that_is_given_is_part_of_the_hash() -> None:
    """It is left out only while it is null."""
    _, placed, _, _ = lived()
    stored = json.loads(msgspec.json.encode(placed.hold)) | {"reason": "why"}
    later = replace(placed, hold=msgspec.convert(stored, LaterHoldDetail))
    assert placed.hash != entry_hash(later)


def test_a_published_entry_has_no_null_members_and_can_be_hashed_by_anybody() -> None:
    """The recipe needs nothing but JSON and SHA-256: sort, tighten, empty `hash`, hash."""
    for entry in lived():
        value = message_of(entry, None).value
        assert value is not None
        published = json.loads(value)
        assert None not in [*published.values(), *published.get("charge", {}).values()]
        canonical = json.dumps(
            published | {"hash": ""}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        assert entry.hash == hashlib.sha256(b"\x00" + canonical.encode()).hexdigest()


def test_an_entry_leaves_in_the_trace_it_came_in() -> None:
    """The entry is a span of that trace, named by its hash; it is keyed by its tenant."""
    entry = lived()[-1]
    message = message_of(entry, "a" * 32)
    traceparent = f"00-{'a' * 32}-{entry.hash[:16]}-01".encode()
    assert (b"t", (("traceparent", traceparent),)) == (message.key, tuple(message.headers))
