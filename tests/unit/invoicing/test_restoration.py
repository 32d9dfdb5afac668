"""What a restored invoicing is told by what it has announced."""

from __future__ import annotations

from dataclasses import replace as with_fields

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from hisab_contracts.ids import TenantId
from invoicing.core.document import DocumentEvent, document_event, finalise, issued_invoice
from invoicing.core.restoration import (
    DocumentDiffers,
    DocumentLacking,
    KeptDocument,
    compare_announced,
    highest_positions,
    series_behind,
)
from unit.invoicing.documents import FACTS, at, drafted


def announced(position: int) -> DocumentEvent:
    """The announcement of a document at a place of its series."""
    facts = with_fields(FACTS, tenant_id=TenantId(f"t{position}"))
    return document_event(
        issued_invoice(finalise(drafted(facts), at(position, facts), facts.issued_on))
    )


def kept_of(event: DocumentEvent) -> KeptDocument:
    """What the database has of an announced document."""
    return KeptDocument(event.number, event.content_sha256)


def test_an_announced_document_is_here_lacking_or_another() -> None:
    """By its number and the hash of its content."""
    event = announced(1)
    kept = kept_of(event)
    differs = DocumentDiffers(event.invoice_id, event.number)
    assert None is compare_announced(event, kept)
    assert DocumentLacking(event.invoice_id, event.number) == compare_announced(event, None)
    assert differs == compare_announced(event, replace(kept, number="INV-2025-26-000009"))
    assert differs == compare_announced(event, replace(kept, content_sha256="0" * 64))


@given(st.permutations(range(1, 8)), st.integers(0, 7))
def test_an_older_copy_is_behind_its_series_exactly_when_it_lacks_a_number(
    order: list[int], kept: int
) -> None:
    """In whatever order they were announced, and with a second series beside it."""
    events = [announced(position) for position in order]
    other = replace(events[0], series="CN", position=1)
    highest = highest_positions([*events, other])
    key = (FACTS.legal_entity_id, "INV", "2025-26")
    second = (FACTS.legal_entity_id, "CN", "2025-26")
    assert {key: 7, second: 1} == highest
    assert ([key] if kept < 7 else []) == series_behind(highest, {key: kept, second: 1})
    assert second in series_behind(highest, {key: 7})
