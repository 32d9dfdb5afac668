"""What a restored invoicing lacks: announced documents against those that are here.

Invoicing restored from a backup lacks the documents it finalised after it, and would give their
numbers to others: two documents of one number, one of them with a tenant and gone here. Every
document is announced with its number and its hash, so an older copy is found by what it does not
know. Numbers of a series are taken one after another under a lock, so whoever lacks any document
lacks the last announced of its series too: the newest announcements are enough.

Nothing takes a document back: what is announced is its hash, never its content. A backup has to.

Refusals, in order of precedence: `DocumentLacking`, `DocumentDiffers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from hisab_contracts.ids import DocumentId, LegalEntityId
from invoicing.core.document import DocumentEvent


class KeptDocument(Struct, frozen=True):
    """What the database has of a document: enough to tell it from another one."""

    number: str
    content_sha256: str


class DocumentLacking(Struct, frozen=True):
    """An announced document is not here: its number would be given out again."""

    invoice_id: DocumentId
    number: str


class DocumentDiffers(Struct, frozen=True):
    """The document here has another number or another content than was announced."""

    invoice_id: DocumentId
    number: str


SeriesYear = tuple[LegalEntityId, str, str]
"""(legal entity, series, fiscal year): what is numbered from 1 without gaps."""


def compare_announced(
    announced: DocumentEvent, kept: KeptDocument | None
) -> DocumentLacking | DocumentDiffers | None:
    """Compare an announcement with the document of that id here; None: it is the same."""
    if kept is None:
        return DocumentLacking(announced.invoice_id, announced.number)
    if kept != KeptDocument(announced.number, announced.content_sha256):
        return DocumentDiffers(announced.invoice_id, announced.number)
    return None


def highest_positions(announced: Iterable[DocumentEvent]) -> dict[SeriesYear, int]:
    """Return the highest place announced in each series and fiscal year."""
    highest: dict[SeriesYear, int] = {}
    for event in announced:
        key = event.legal_entity, event.series, event.fiscal_year
        highest[key] = max(highest.get(key, 0), event.position)
    return highest


def series_behind(
    announced: Mapping[SeriesYear, int], kept: Mapping[SeriesYear, int]
) -> list[SeriesYear]:
    """List the series in which a higher place was announced than the database has."""
    return sorted(key for key, position in announced.items() if position > kept.get(key, 0))
