"""What an invoice says, its number and its hash, recomputed the way an outsider would."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from dataclasses import replace
from typing import get_args

import msgspec
import pytest

from hisab_contracts.canonical import content_sha256
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.units import fiscal_year
from invoicing.core.billing import ZeroBill
from invoicing.core.document import (
    Content,
    DocumentEvent,
    InvoiceState,
    InvoiceStep,
    content_bytes,
    default_issued_on,
    document_event,
    document_id,
    draft_of,
    finalise,
    gpu_hours,
    grouped_minor,
    invoice_state,
    issue_date_on,
    issued_invoice,
    long_date,
    number_draft,
    percent,
    printed,
    read_content,
    steps_of,
)
from invoicing.core.tax import TaxMissing
from unit.invoicing.documents import (
    FACTS,
    KHI,
    TAX_ROWS,
    WORKED_EXAMPLE_USAGE,
    at,
    drafted,
    golden_documents,
    worked_example,
)


def test_the_content_states_the_bill_in_strings() -> None:
    """Integers that are amounts or seqs are strings; rates are numbers."""
    content = json.loads(content_bytes(worked_example()))
    assert {
        "hub": "khi",
        "sku": "h100-sxm-80",
        "price_class": "on_demand",
        "gpu_ms": "3600000",
        "net_micro": "840000000",
        "net_minor": "84000",
        "residue_micro": "0",
        "authority": "SRB",
        "tax_bps": 1500,
        "tax_minor": "12600",
    } == content["lines"][0]
    assert ("98000", "14840", "112840", "0", "112840") == tuple(
        content[name]
        for name in ("net_minor", "tax_minor", "total_minor", "tender_minor", "due_minor")
    )
    assert {"first_seq": "1", "last_seq": "3", "last_hash": "ab" * 32} == content["entries"]
    assert {"pipeline_version": 1, "tax_version": 2} == content["versions"]


@pytest.mark.defect("I13")
def test_a_draft_has_no_number_and_numbering_changes_nothing_else() -> None:
    """The number is taken when the invoice is finalised, and only then."""
    draft = drafted()
    assert "" == draft.content.number
    content = number_draft(draft, at(12), FACTS.issued_on)
    assert "INV-2025-26-000012" == content.number
    assert draft.content == msgspec.structs.replace(content, number="")
    assert (0, 980_000_000) == (draft.funded_micro, draft.receivable_micro)


def test_a_draft_is_refused_where_there_is_nothing_to_bill_or_nothing_to_tax_by() -> None:
    """The refusals of the bill, unchanged."""
    assert ZeroBill() == draft_of(FACTS, 1, (), TAX_ROWS)
    untaxed = replace(FACTS, tax_version=1)
    assert TaxMissing(KHI, dt.date(2025, 7, 31)) == draft_of(
        untaxed, 1, WORKED_EXAMPLE_USAGE, TAX_ROWS
    )


def test_a_finalised_invoice_is_numbered_hashed_and_announced() -> None:
    """The event names what was hashed; the PDF is still to come, and the ledger's answer."""
    invoice = finalise(drafted(), at(12), FACTS.issued_on)
    assert number_draft(drafted(), at(12), FACTS.issued_on) == invoice.content
    assert content_sha256(invoice.content) == invoice.content_sha256
    assert (0, 980_000_000) == (invoice.funded_micro, invoice.receivable_micro)
    announced = DocumentEvent(
        invoice_id=invoice.content.invoice_id,
        tenant_id=FACTS.tenant_id,
        legal_entity=FACTS.legal_entity_id,
        series="INV",
        fiscal_year="2025-26",
        position=12,
        number="INV-2025-26-000012",
        period="2025-07",
        state="finalising",
        content_sha256=invoice.content_sha256,
        pdf_sha256=None,
    )
    numbered = issued_invoice(invoice)
    assert announced == document_event(numbered)
    rendered = replace(numbered, pdf_sha256="cd" * 32, outstanding=("ledger",))
    assert msgspec.structs.replace(announced, pdf_sha256="cd" * 32) == document_event(rendered)
    done = document_event(replace(rendered, outstanding=()))
    assert ("finalised", "cd" * 32) == (done.state, done.pdf_sha256)


@pytest.mark.parametrize(
    ("outstanding", "expected"),
    [(("pdf", "ledger"), "finalising"), (("ledger",), "finalising"), ((), "finalised")],
)
def test_an_invoice_is_finalised_once_no_step_is_outstanding(
    outstanding: tuple[InvoiceStep, ...], expected: InvoiceState
) -> None:
    """Whichever step it is; the state is stored nowhere."""
    assert expected == invoice_state(outstanding)


def test_a_draft_keeps_amounts_beyond_64_bits_through_json() -> None:
    """Drafts are stored between computing and numbering; no amount of theirs may be cut."""
    draft = msgspec.structs.replace(drafted(), funded_micro=2**70, receivable_micro=2**64)
    assert draft == msgspec.json.decode(msgspec.json.encode(draft), type=type(draft))


def test_the_ledger_is_asked_only_where_it_has_something_to_move() -> None:
    """A month that grants paid in full has a PDF to render and nothing else."""
    granted = (replace(WORKED_EXAMPLE_USAGE[0], funded_micro=840_000_000, receivable_micro=0),)
    assert ("pdf", "ledger") == steps_of(finalise(drafted(), at(1), FACTS.issued_on))
    assert ("pdf",) == steps_of(finalise(drafted(usage=granted), at(1), FACTS.issued_on))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "invoice-worked-example",
            "77dd8dac3d68826bd7324513eb5b1eb62856b49b54be546521f8fc472ef6c25b",
        ),
        ("invoice-granted", "5bf84add3e3a23ad7dd28e5a1047f5bf9f5190e6b8c7206cd6b3671871cffdd5"),
        ("invoice-jpy", "10d6dde4b0ee4d1956eafee00f1074311f79e20dd5b546266cc73523aeebf32e"),
        ("invoice-kwd", "32d502d915ab0b6ac8537cfe55d591a1fee2ff74265b33fb43a80c0dd63cbe5c"),
        ("invoice-pkr", "f93b1787fecb64af948fa3d0c6ba5106d06ad9390a4976132125a6b246b7e8e6"),
    ],
)
@pytest.mark.defect("I24")
def test_a_document_keeps_the_hash_it_was_first_issued_with(name: str, expected: str) -> None:
    """Whatever members documents gain later: these have none of them."""
    content = golden_documents()[name]
    assert expected == content_sha256(content)
    assert content == read_content(content_bytes(content))


def test_no_part_of_a_document_has_a_default_but_none() -> None:
    """Decision 0009: a default of another value would be left out where it is the truth."""
    seen: list[type[msgspec.Struct]] = []
    ahead: list[type[msgspec.Struct]] = [Content]
    while ahead:
        part = ahead.pop()
        seen.append(part)
        assert part.__struct_config__.omit_defaults
        for member in msgspec.structs.fields(part):
            assert member.default in (msgspec.NODEFAULT, None), (part, member.name)
            assert msgspec.NODEFAULT is member.default_factory, (part, member.name)
            inner = (member.type, *get_args(member.type))
            ahead += [
                kind
                for kind in inner
                if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
            ]
    assert {"Content", "InvoiceLine", "TaxBreakdown", "EntryRange", "Versions"} == {
        part.__name__ for part in seen
    }


def test_a_member_that_is_added_later_leaves_older_documents_as_they_are() -> None:
    """Optional, `None` by default: the encoding leaves it out."""

    class Later(Content, frozen=True, kw_only=True):
        due_on: str | None = None

    stored = content_bytes(worked_example())
    assert stored == content_bytes(msgspec.json.decode(stored, type=Later))


@pytest.mark.defect("I24")
def test_an_outsider_recomputes_the_hash_with_plain_json() -> None:
    """Sorted members, no white space, no escapes: the docstring's recipe."""
    content = msgspec.structs.replace(worked_example(), legal_entity_name="اگنائٹ “HaaS”")
    encoded = content_bytes(content)
    as_outsider = json.dumps(
        json.loads(encoded), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    assert hashlib.sha256(encoded).hexdigest() == hashlib.sha256(as_outsider).hexdigest()
    assert content == read_content(as_outsider)


@pytest.mark.parametrize(
    ("issued_on", "position", "expected"),
    [
        (dt.date(2025, 8, 1), 1, "INV-2025-26-000001"),
        (dt.date(2026, 6, 30), 42, "INV-2025-26-000042"),
        (dt.date(2026, 7, 1), 1, "INV-2026-27-000001"),
        (dt.date(2026, 7, 1), 1_234_567, "INV-2026-27-1234567"),
    ],
)
@pytest.mark.defect("I12")
def test_the_number_carries_the_fiscal_year_of_the_issue_date(
    issued_on: dt.date, position: int, expected: str
) -> None:
    """June's invoice, issued on 1 July, is the new year's; never the year of today."""
    assert expected == at(position, replace(FACTS, issued_on=issued_on)).number


def test_a_document_has_one_id_however_often_it_is_computed() -> None:
    """The id comes from seller, tenant and month, and from nothing else."""
    again = drafted(replace(FACTS, last_seq=9)).content
    assert worked_example().invoice_id == again.invoice_id
    other = document_id(FACTS.legal_entity_id, FACTS.tenant_id, "2025-08")
    assert other != again.invoice_id
    assert (
        "inv-" + hashlib.sha256(b"ignite-haas\0indus-foundry\x002025-08").hexdigest()[:32] == other
    )


@pytest.mark.parametrize(
    ("wanted", "last", "expected"),
    [
        ("2025-08-01", None, "2025-08-01"),
        ("2025-08-01", "2025-07-31", "2025-08-01"),
        ("2025-08-01", "2025-08-01", "2025-08-01"),
        ("2025-08-01", "2026-07-02", "2026-07-02"),
    ],
)
def test_a_number_brings_the_later_of_its_closings_date_and_the_series_last(
    wanted: str, last: str | None, expected: str
) -> None:
    """Over all fiscal years; and the number then carries the year of that date."""
    last_on = None if last is None else dt.date.fromisoformat(last)
    issued_on = issue_date_on(dt.date.fromisoformat(wanted), last_on)
    assert expected == issued_on.isoformat()
    content = finalise(drafted(), at(1, replace(FACTS, issued_on=issued_on)), issued_on).content
    assert (expected, f"INV-{fiscal_year(issued_on)}-000001") == (content.issued_on, content.number)


def test_a_number_of_another_year_than_its_date_is_a_defect() -> None:
    """The series that numbers are taken from is that of the date."""
    with pytest.raises(InvariantBroken):
        number_draft(drafted(), at(1), dt.date(2026, 7, 1))


def test_a_bill_says_that_it_rests_on_a_row_taken_up_later_only_where_it_does() -> None:
    """The other bills of the month keep the bytes that they would have had."""
    facts = replace(FACTS, tax_version=1, taken_up_versions=(2,))
    content = drafted(facts).content
    assert 2 == content.versions.taken_up_tax_version
    assert "pipeline 1, tax table 1, later rows taken up from 2" == shown(content)["versions"]
    lahore = drafted(facts, WORKED_EXAMPLE_USAGE[1:]).content
    assert lahore.versions.taken_up_tax_version is None
    assert b"taken_up" not in content_bytes(lahore)


def shown(content: Content) -> dict[str, object]:
    """What is printed."""
    strings = printed(content)
    assert isinstance(strings, dict)
    return dict(strings)


def test_an_invoice_is_dated_the_first_day_of_the_next_month_by_default() -> None:
    """The turn of the year included."""
    assert dt.date(2026, 1, 1) == default_issued_on("2025-12")


@pytest.mark.parametrize(
    ("shown_minor", "expected"),
    [
        (0, "0.00"),
        (5, "0.05"),
        (99_999, "999.99"),
        (100_000, "1,000.00"),
        (9_999_999, "99,999.99"),
        (10_000_000, "1,00,000.00"),
        (36_706_831, "3,67,068.31"),
        (1_234_567_890_123, "12,34,56,78,901.23"),
        (-36_706_831, "-3,67,068.31"),
    ],
)
def test_amounts_are_grouped_in_lakh_and_crore(shown_minor: int, expected: str) -> None:
    """Three digits, then groups of two."""
    assert expected == grouped_minor(shown_minor, 2)


@pytest.mark.parametrize(
    ("shown_minor", "decimals", "expected"),
    [(1_935, 0, "1,935"), (0, 0, "0"), (-5, 0, "-5"), (1_935_480, 3, "1,935.480"), (7, 3, "0.007")],
)
def test_an_amount_is_shown_with_the_decimals_of_its_currency(
    shown_minor: int, decimals: int, expected: str
) -> None:
    """None for yen, three for dinars; the grouping is the seller's."""
    assert expected == grouped_minor(shown_minor, decimals)


@pytest.mark.parametrize(
    ("used_gpu_ms", "expected"),
    [
        (0, "0.0000"),
        (3_600_000, "1.0000"),
        (359, "0.0000"),
        (360, "0.0001"),
        (3_599_999, "0.9999"),
        (36_000_000_000_000, "1,00,00,000.0000"),
    ],
)
def test_gpu_hours_are_shown_with_four_decimals_floored(used_gpu_ms: int, expected: str) -> None:
    """A quantity for display: the value is authoritative."""
    assert expected == gpu_hours(used_gpu_ms)


def test_negative_gpu_time_of_a_line_is_a_defect() -> None:
    """Corrections are for credit notes."""
    with pytest.raises(InvariantBroken):
        gpu_hours(-1)


@pytest.mark.parametrize(
    ("rate_bps", "expected"),
    [(0, "0 %"), (1600, "16 %"), (1950, "19.5 %"), (1525, "15.25 %"), (105, "1.05 %")],
)
def test_rates_are_shown_without_needless_zeros(rate_bps: int, expected: str) -> None:
    """Basis points as per cent."""
    assert expected == percent(rate_bps)


@pytest.mark.defect("I27")
def test_the_printed_invoice_shows_karachi_dates_and_the_hash() -> None:
    """Every string that the template sets comes from the content."""
    page = printed(worked_example())
    assert isinstance(page, dict)
    assert ("1 August 2025", "July 2025", "1 July 2025", "31 July 2025") == (
        page["issued"],
        page["period"],
        page["from"],
        page["until"],
    )
    assert ("980.00", "148.40", "1,128.40", "", "1,128.40") == tuple(
        page[name] for name in ("net", "tax", "total", "tender", "due")
    )
    assert hashlib.sha256(content_bytes(worked_example())).hexdigest() == page["content_sha256"]
    assert "1 August 2025" == long_date(dt.date(2025, 8, 1))


def test_the_printed_invoice_shows_what_grants_tender() -> None:
    """As an amount taken from the total; not at all when there is none."""
    page = printed(msgspec.structs.replace(worked_example(), tender_minor="50000"))
    assert isinstance(page, dict)
    assert "-500.00" == page["tender"]
