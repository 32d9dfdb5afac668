"""A recomputation that is not identical says what differs, and where to look."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import msgspec
import pytest

from hisab_contracts.canonical import content_sha256
from invoicing.core.billing import BillRefused, CurrencyUnknown, ZeroBill
from invoicing.core.differences import (
    Difference,
    IssuedDocument,
    RecomputedDocument,
    differences,
)
from invoicing.core.tax import TaxMissing
from unit.invoicing.documents import KHI, granted_example, worked_example

CONTENT = worked_example()
SHA256, PDF, OTHER = content_sha256(CONTENT), "aa" * 32, "bb" * 32
ISSUED = IssuedDocument(CONTENT, SHA256, PDF, PDF)
AGAIN = RecomputedDocument(CONTENT, PDF)


def with_line(**members: object) -> RecomputedDocument:
    """The same document with another first line, as other entries or rates would give it."""
    line = msgspec.structs.replace(CONTENT.lines[0], **members)
    content = msgspec.structs.replace(CONTENT, lines=(line, *CONTENT.lines[1:]), net_minor="1")
    return RecomputedDocument(content, OTHER)


def test_the_same_document_has_no_differences() -> None:
    """With its PDF, or while that is still to be rendered."""
    assert () == differences(ISSUED, AGAIN)
    unrendered = replace(ISSUED, pdf_sha256=None, stored_pdf_sha256=None)
    assert () == differences(unrendered, AGAIN)


def test_another_amount_of_a_line_points_to_the_entries() -> None:
    """Totals and the PDF follow from it, and are not named."""
    recomputed = with_line(net_micro="840000001", net_minor="84001", residue_micro="9")
    assert (Difference("entries", "lines[0].net_micro", "840000000", "840000001"),) == differences(
        ISSUED, recomputed
    )


def test_where_other_lines_are_billed_their_taxes_are_no_difference_of_their_own() -> None:
    """A charge gone takes its line, its rate and its authority along: the entries are to blame."""
    fewer = msgspec.structs.replace(CONTENT, lines=CONTENT.lines[1:], taxes=CONTENT.taxes[:1])
    found = differences(ISSUED, RecomputedDocument(fewer, OTHER))
    assert {"entries"} == {difference.part for difference in found}


def test_another_rate_points_to_the_tax_table() -> None:
    """So does another authority or citation."""
    recomputed = with_line(tax_bps=1700, tax_minor="14280")
    assert (Difference("tax", "lines[0].tax_bps", "1500", "1700"),) == differences(
        ISSUED, recomputed
    )


def test_another_name_of_the_seller_points_to_how_it_was_issued() -> None:
    """Neither usage nor tax."""
    content = msgspec.structs.replace(CONTENT, legal_entity_name="Another")
    (found,) = differences(ISSUED, RecomputedDocument(content, OTHER))
    assert ("issue", "legal_entity_name") == (found.part, found.member)


def test_another_total_alone_is_named_as_it_is() -> None:
    """Where no line differs, a total is the difference."""
    content = msgspec.structs.replace(CONTENT, total_minor="1")
    (found,) = differences(ISSUED, RecomputedDocument(content, OTHER))
    assert ("issue", "total_minor", "112840", "1") == (
        found.part,
        found.member,
        found.issued,
        found.recomputed,
    )


def test_a_stored_document_that_was_edited_is_named_with_the_members() -> None:
    """What was hashed is what the entries come to: only the stored document can be wrong."""
    edited = msgspec.structs.replace(CONTENT, due_minor="0", tenant_id="somebody-else")
    found = differences(replace(ISSUED, content=edited), AGAIN)
    assert [("content", "content_sha256"), ("content", "tenant_id")] == [
        (difference.part, difference.member) for difference in found
    ]


def test_document_and_entries_changed_alike_still_miss_the_recorded_hash() -> None:
    """Whoever edits both has to forge the hash as well, and the PDF, and the published event."""
    forged = granted_example()
    found = differences(replace(ISSUED, content=forged), RecomputedDocument(forged, OTHER))
    assert [("content", "content_sha256"), ("entries", "content_sha256")] == [
        (difference.part, difference.member) for difference in found
    ]


@pytest.mark.parametrize(
    ("issued", "recorded", "stored"),
    [
        (replace(ISSUED, stored_pdf_sha256=OTHER), PDF, OTHER),
        (replace(ISSUED, stored_pdf_sha256=None), PDF, None),
        (replace(ISSUED, pdf_sha256=OTHER, stored_pdf_sha256=OTHER), OTHER, PDF),
    ],
)
def test_a_pdf_that_is_not_what_was_recorded_or_computed_is_named(
    issued: IssuedDocument, recorded: str, stored: str | None
) -> None:
    """Bytes edited, gone, or edited together with their record."""
    assert (Difference("pdf", "pdf_sha256", recorded, stored),) == differences(issued, AGAIN)


@pytest.mark.parametrize(
    ("refused", "part", "member"),
    [
        (TaxMissing(KHI, dt.date(2025, 7, 31)), "tax", "taxes"),
        (CurrencyUnknown("XTS"), "issue", "currency"),
        (ZeroBill(), "entries", "lines"),
    ],
)
def test_an_invoice_that_could_not_be_made_any_more_says_why(
    refused: BillRefused, part: str, member: str
) -> None:
    """A row or the charges are gone: it is an answer, not a failure."""
    (found,) = differences(ISSUED, refused)
    assert (part, member, None) == (found.part, found.member, found.issued)
