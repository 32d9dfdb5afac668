"""What is kept of an entry, from the topic and from the ledger's feed: the same."""

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
from invoicing.billing import RatedUsage, UnbalancedError
from invoicing.books import (
    FeedEntry,
    KeptCharge,
    KeptEntry,
    KeptMove,
    contiguous_after,
    kept,
    kept_from_feed,
)

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


def from_feed(
    kind: str, postings: list[tuple[str, int]], charge: dict[str, Any] | None
) -> KeptEntry:
    item = {
        "seq": "7",
        "kind": kind,
        "postings": [{"account": name, "posting_micro": str(change)} for name, change in postings],
        "hash": "ab" * 32,
        "charge": charge,
        "entry_id": "indus-foundry.7",
    }
    return kept_from_feed(TENANT, msgspec.convert(item, FeedEntry))


FEED_CHARGE = {
    "hub": "khi",
    "sku": "h100-sxm-80",
    "price_class": "on_demand",
    "hour_at": "2025-07-31T18:00:00.000Z",
    "gpu_ns": "3600000000000",
    "charge_micro": "840",
    "allocation_id": "job-2",
}


@pytest.mark.defect("M21", "I20")
def test_a_charge_belongs_to_the_month_of_its_usage_hour() -> None:
    """18:00Z on 31 July is July in Karachi; one hour later is August."""
    expected = KeptCharge("2025-07", LAST_HOUR_MS, USAGE)
    assert KeptEntry(TENANT, 7, "charge", b"\xab" * 32, expected) == kept(
        entry("charge", POSTINGS, charge_detail())
    )
    after = kept(entry("charge", POSTINGS, charge_detail(hour_ms=LAST_HOUR_MS + 3_600_000)))
    assert isinstance(after.detail, KeptCharge)
    assert "2025-08" == after.detail.period


def test_the_topic_and_the_feed_give_the_same_entry() -> None:
    """A gap fetched over HTTP is as good as the topic."""
    for kind, postings, detail, feed in (
        ("charge", POSTINGS, charge_detail(), FEED_CHARGE),
        ("invoiced", [("receivable", 980), ("invoiced:inv-1", -980)], None, None),
        ("hold_placed", [], None, None),
    ):
        assert kept(entry(kind, postings, detail)) == from_feed(kind, postings, feed)


def test_an_invoiced_entry_says_what_moved_to_which_document() -> None:
    """Shown positive, as on a balance."""
    moved = kept(entry("invoiced", [("receivable", 980), ("invoiced:inv-1", -980)]))
    assert KeptMove(DocumentId("inv-1"), 980) == moved.detail


def test_a_charge_whose_payers_do_not_add_up_is_refused() -> None:
    """Never billed by guess."""
    with pytest.raises(UnbalancedError):
        kept(entry("charge", POSTINGS, charge_detail(charge_micro=841)))


@pytest.mark.parametrize("kind", ["charge", "invoiced"])
def test_an_entry_without_what_its_kind_promises_is_refused(kind: str) -> None:
    """From either way in."""
    with pytest.raises(msgspec.ValidationError):
        kept(entry(kind, []))
    with pytest.raises(msgspec.ValidationError):
        from_feed(kind, [], None)


@pytest.mark.parametrize(
    ("position", "seqs", "expected"),
    [(0, [], 0), (0, [1, 2, 3], 3), (3, [5, 4, 7], 5), (3, [5], 3), (3, [1, 2], 3)],
)
def test_a_book_is_contiguous_up_to_its_first_gap(
    position: int, seqs: list[int], expected: int
) -> None:
    """Order and repetition do not matter; a gap is never guessed over."""
    assert expected == contiguous_after(position, seqs)
