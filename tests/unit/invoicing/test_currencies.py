"""Invoices in yen, dinars and rupees: one amount of 1 935.48, each in its own minor unit."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
from pypdf import PdfReader

from invoicing.core.document import Content, content_bytes
from invoicing.pdf import Typesetter
from unit.invoicing.documents import golden_documents


@pytest.fixture(scope="module")
def typesetter() -> Typesetter:
    return Typesetter()


def text_of(typesetter: Typesetter, content: Content) -> str:
    """The words of an invoice's PDF, in order."""
    reader = PdfReader(io.BytesIO(typesetter.pdf_of(content)))
    return " ".join(" ".join(page.extract_text() for page in reader.pages).split())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("invoice-jpy", ("1935", "290", "2225", "500", "1725", "-480000")),
        ("invoice-kwd", ("1935480", "290322", "2225802", "500705", "1725097", "0")),
        ("invoice-pkr", ("193548", "29032", "222580", "50070", "172510", "0")),
    ],
)
def test_the_document_states_minor_units_of_its_currency(
    name: str, expected: tuple[str, ...]
) -> None:
    """By hand: 15 % of the rounded net; the grant's 500.7055 floored; due = total - tender."""
    content = json.loads(content_bytes(golden_documents()[name]))
    amounts = ("net_minor", "tax_minor", "total_minor", "tender_minor", "due_minor")
    stated = tuple(content[member] for member in amounts)
    assert expected == (*stated, content["lines"][0]["residue_micro"])


@pytest.mark.parametrize(
    ("name", "due", "wrong", "rounded_to"),
    [
        ("invoice-jpy", "Amount due JPY 1,725", "1,93,548", "half up, to whole units"),
        ("invoice-kwd", "Amount due KWD 1,725.097", "19,354.80", "half up, to three decimals"),
        ("invoice-pkr", "Amount due PKR 1,725.10", "1,93,548", "half up, to two decimals"),
    ],
)
def test_the_pdf_shows_the_decimals_of_its_currency(
    typesetter: Typesetter, name: str, due: str, wrong: str, rounded_to: str
) -> None:
    """Never a yen as a hundred sen, nor a dinar as a hundred fils."""
    text = text_of(typesetter, golden_documents()[name])
    assert due in text
    assert rounded_to in text
    assert wrong not in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "invoice-worked-example",
            "99289b61fddf3699c7447b021cef09e5b3624d9e277b3c01ee13c72845fd628c",
        ),
        ("invoice-granted", "a2e7aeafe2e975ea534e763a174796ae4fd6793fe3e38d56316c145b30db2cd3"),
    ],
)
def test_the_pdf_of_an_older_invoice_keeps_its_bytes(
    typesetter: Typesetter, name: str, expected: str
) -> None:
    """As the first release set it: a rerun of its month must still be identical."""
    pdf = typesetter.pdf_of(golden_documents()[name])
    assert expected == hashlib.sha256(pdf).hexdigest()
