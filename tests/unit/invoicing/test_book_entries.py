"""What bills need of an entry, from the topic and from the ledger's API: the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hisab_contracts.entries import ChargeDetail, Entry, Posting
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    DocumentId,
    EntryId,
    HubCode,
    NodeId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    TenantId,
)
from hisab_contracts.invariants import InvariantBroken
from invoicing.core.billing import (
    BilledCharge,
    BookEntry,
    InvoicedReceivable,
    RatedUsage,
    book_entry_of,
)
from invoicing.ledger_client import entries_of_page
from invoicing.store.entries import contiguous_after

TENANT = TenantId("indus-foundry")
LAST_HOUR_MS = 1_753_984_800_000  # 2025-07-31T18:00:00Z: the last hour of July in Karachi
USAGE = RatedUsage(
    HubCode("khi"), Sku("h100-sxm-80"), PriceClass("on_demand"), 3_600_000_000_000, 300, 500, 40
)
POSTINGS = [
    ("lot:g1", -200),
    ("lot:g2", -100),
    ("receivable", -500),
    ("unfunded", -40),
    ("usage", 840),
]


def entry(kind: str, postings: list[tuple[str, int]], charge: ChargeDetail | None = None) -> Entry:
    return Entry(
        tenant_id=TENANT,
        seq=7,
        entry_id=EntryId("indus-foundry.7"),
        kind=kind,
        effective_ms=1,
        recorded_ms=2,
        postings=[Posting(account, change, 0) for account, change in postings],
        caused_by="",
        actor="metering",
        prev_hash="",
        hash="ab" * 32,
        charge=charge,
    )


def charge_detail(charge_micro: int = 840, hour_ms: int = LAST_HOUR_MS) -> ChargeDetail:
    return ChargeDetail(
        bucket_id=BucketId("00" * 16),
        allocation_id=AllocationId("job-2"),
        project_id=ProjectId("main"),
        hold_id=None,
        hub=HubCode("khi"),
        node_id=NodeId("n2"),
        sku=Sku("h100-sxm-80"),
        price_class=PriceClass("on_demand"),
        price_version=PriceVersion("p1"),
        hour_ms=hour_ms,
        revision=0,
        gpu_ns=3_600_000_000_000,
        charge_micro=charge_micro,
        over_limit=False,
    )


def page_of(*items: dict[str, Any]) -> bytes:
    """A page as the ledger's API answers it: whole numbers and instants are text."""
    common = {
        "seq": "7",
        "entry_id": "indus-foundry.7",
        "effective_at": "1970-01-01T00:00:00.001Z",
        "recorded_at": "1970-01-01T00:00:00.002Z",
        "caused_by": "",
        "actor": "metering",
        "prev_hash": "",
        "hash": "ab" * 32,
    }
    return msgspec.json.encode({"items": [common | item for item in items], "next": None})


def answered(kind: str, postings: list[tuple[str, int]], **details: Any) -> dict[str, Any]:
    written = [
        {"account": account, "posting_micro": str(change), "balance_micro": "0"}
        for account, change in postings
    ]
    return {"kind": kind, "postings": written, **details}


ANSWERED_CHARGE = {
    "allocation_id": "job-2",
    "project_id": "main",
    "hold_id": None,
    "hub": "khi",
    "node_id": "n2",
    "sku": "h100-sxm-80",
    "price_class": "on_demand",
    "hour_at": "2025-07-31T18:00:00.000Z",
    "gpu_ns": "3600000000000",
    "charge_micro": "840",
    "price_version": "p1",
    "bucket_id": "00" * 16,
    "revision": 0,
    "over_limit": False,
}


@pytest.mark.defect("M21", "I20")
def test_a_charge_belongs_to_the_month_of_its_usage_hour() -> None:
    """18:00Z on 31 July is July in Karachi; one hour later is August."""
    expected = BilledCharge("2025-07", LAST_HOUR_MS, USAGE)
    assert BookEntry(TENANT, 7, "charge", b"\xab" * 32, expected) == book_entry_of(
        entry("charge", POSTINGS, charge_detail())
    )
    after = book_entry_of(
        entry("charge", POSTINGS, charge_detail(hour_ms=LAST_HOUR_MS + 3_600_000))
    )
    assert isinstance(after.detail, BilledCharge)
    assert "2025-08" == after.detail.period


def test_the_topic_and_the_ledgers_api_give_the_same_book_entry() -> None:
    """A gap fetched over HTTP is as good as the topic: what is billed of it is the same."""
    invoiced = [("receivable", 980), ("invoiced:inv-1", -980)]
    on_the_topic = [
        entry("charge", POSTINGS, charge_detail()),
        entry("invoiced", invoiced),
        entry("hold_placed", []),
        entry("grant", [("lot:g1", 500)]),
    ]
    page = page_of(
        answered("charge", POSTINGS, charge=ANSWERED_CHARGE),
        answered("invoiced", invoiced),
        answered("hold_placed", [], hold={"hold_id": "h1", "hold_micro": "900"}),
        answered("grant", [("lot:g1", 500)], grant={"grant_id": "g1", "expires_at": None}),
    )
    over_http = entries_of_page(TENANT, page)
    assert [book_entry_of(known) for known in on_the_topic] == [
        book_entry_of(fetched) for fetched in over_http
    ]


def test_what_an_entry_says_beyond_bills_is_passed_over() -> None:
    """A ledger that is newer than we are may say more of an entry, a charge or a hold."""
    later = {"reason": "new", "gpus": ["a"]}
    page = page_of(
        answered("charge", POSTINGS, charge=ANSWERED_CHARGE | later) | later,
        answered("hold_released", [], hold=later, later=later),
    )
    charge, hold = (book_entry_of(fetched) for fetched in entries_of_page(TENANT, page))
    assert book_entry_of(entry("charge", POSTINGS, charge_detail())) == charge
    assert book_entry_of(entry("hold_released", [])) == hold


def test_amounts_of_a_page_are_read_exactly() -> None:
    """The ledger writes whole numbers as text: the largest of 64 bits keeps its last digit."""
    largest_micro = 2**63 - 1
    postings = [("receivable", largest_micro), ("invoiced:inv-1", -largest_micro)]
    (fetched,) = entries_of_page(TENANT, page_of(answered("invoiced", postings)))
    moved = book_entry_of(fetched).detail
    assert InvoicedReceivable(DocumentId("inv-1"), largest_micro) == moved


def test_an_invoiced_entry_says_what_moved_to_which_document() -> None:
    """Shown positive, as on a balance."""
    moved = book_entry_of(entry("invoiced", [("receivable", 980), ("invoiced:inv-1", -980)]))
    assert InvoicedReceivable(DocumentId("inv-1"), 980) == moved.detail


def test_a_charge_whose_payers_do_not_add_up_is_refused() -> None:
    """Never billed by guess."""
    with pytest.raises(InvariantBroken):
        book_entry_of(entry("charge", POSTINGS, charge_detail(charge_micro=841)))


@pytest.mark.parametrize("kind", ["charge", "invoiced"])
def test_an_entry_without_what_its_kind_promises_is_refused(kind: str) -> None:
    """Nobody may bill by guess."""
    with pytest.raises(msgspec.ValidationError):
        book_entry_of(entry(kind, []))


def test_an_entry_of_another_kind_only_counts() -> None:
    """That it is there is all a bill needs of it."""
    assert BookEntry(TENANT, 7, "hold_placed", b"\xab" * 32, None) == book_entry_of(
        entry("hold_placed", [])
    )


@pytest.mark.parametrize(
    ("position", "seqs", "expected"),
    [(0, [], 0), (0, [1, 2, 3], 3), (3, [5, 4, 7], 5), (3, [5], 3), (3, [1, 2], 3)],
)
def test_a_book_is_contiguous_up_to_its_first_gap(
    position: int, seqs: list[int], expected: int
) -> None:
    """Order and repetition do not matter; a gap is never guessed over."""
    assert expected == contiguous_after(position, seqs)
