"""The summary adds up what services said, and fails on any difference that is not zero."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest

from demo import report, summary
from demo.api import Json
from demo.live import Probe, freshness_of
from demo.readback import ServiceFigures, find_broken_link, find_number_gaps
from demo.screen import gpu_hours, pkr, pkr_of_minor

CHARGE = {
    "seq": "1",
    "kind": "charge",
    "effective_at": "2025-07-03T10:00:00.000Z",
    "prev_hash": "0" * 64,
    "hash": "aa",
    "postings": [
        {"account": "usage", "posting_micro": "840000000"},
        {"account": "receivable", "posting_micro": "-840000000"},
    ],
    "charge": {"hub": "lhr", "gpu_ns": "3600000000000", "charge_micro": "840000000"},
}
INVOICED = {
    "seq": "2",
    "kind": "invoiced",
    "effective_at": "2025-08-01T00:00:00.000Z",
    "prev_hash": "aa",
    "hash": "bb",
    "postings": [
        {"account": "receivable", "posting_micro": "840000000"},
        {"account": "invoiced:d1", "posting_micro": "-840000000"},
    ],
}
INVOICE = {
    "invoice_id": "d1",
    "number": "IH/2025-26/000001",
    "tenant_id": "khyber-media",
    "legal_entity": "ignite-haas",
    "period": "2025-07",
    "state": "finalised",
    "net_minor": "84000",
    "tax_minor": "13440",
    "total_minor": "97440",
    "pdf_sha256": "ff",
}


def figures() -> ServiceFigures:
    """One GPU-hour of one commercial tenant, billed."""
    return ServiceFigures(
        hubs={
            "lhr": {
                "reported_gpu_ns": "3600000000000",
                "billed_gpu_ns": "3600000000000",
                "duplicate_gpu_ns": "0",
                "quarantined_gpu_ns": "0",
                "voided_gpu_ns": "0",
                "difference_gpu_ns": "0",
                "records": {"read": 2, "accepted": 1, "duplicate": 0, "quarantined": 1},
                "buckets": 1,
                "charge_micro": "840000000",
            }
        },
        balances={
            "khyber-media": {
                "charged_micro": "840000000",
                "funded_micro": "0",
                "receivable_micro": "0",
                "invoiced_micro": "840000000",
                "settled_micro": "0",
                "unfunded_micro": "0",
                "available_micro": "999999160000000",
                "as_of": {"seq": "2"},
            }
        },
        entries={"khyber-media": [CHARGE, INVOICED]},
        trial_balance={"sum_micro": "0"},
        invoices=[INVOICE],
        recomputed=[{"identical": True}],
        periods={"2025-07": {"difference_micro": "0", "steps": [{"step": "x", "micro": "0"}]}},
    )


def content_of(service_figures: ServiceFigures, sent: int = 2) -> Json:
    """Summarise a run that sent two records."""
    run = summary.Run(
        source={"kind": "simulator", "period": "2025-07"},
        provider={"kafka": "kraft", "postgres": "wheel-18"},
        seconds={"total": 1.0},
        sent=sent,
        hold_refused={},
        pdfs={"d1": ".hisab/demo/invoices/a.pdf"},
        freshness_ms={"samples": 1, "p50": 1, "p99": 1},
        report="r",
    )
    return summary.summary_of(run, service_figures)


def test_a_run_without_differences_is_ok() -> None:
    """All of it, from the figures to the report."""
    content = content_of(figures())
    assert content["ok"] is True
    assert content["gpu_ms"]["reported"] == "3600000"
    assert content["entries"] == 2
    assert {"0"} == {row["difference_micro"] for row in content["reconciliation"]}
    page = report.render_page(content, figures(), Path(".hisab/demo"))
    assert 'href="invoices/a.pdf"' in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.hubs["lhr"].update(charge_micro="840000001"),
        lambda r: r.hubs["lhr"].update(difference_gpu_ns="1"),
        lambda r: r.hubs["lhr"]["records"].update(read=3),
        lambda r: r.balances["khyber-media"].update(invoiced_micro="1"),
        lambda r: r.trial_balance.update(sum_micro="-1"),
        lambda r: r.recomputed[0].update(identical=False),
        lambda r: r.periods["2025-07"].update(difference_micro="5"),
        lambda r: r.invoices[0].update(number="IH/2025-26/000002"),
        lambda r: r.entries["khyber-media"][1].update(prev_hash="ab"),
    ],
)
def test_any_difference_fails(spoil: object) -> None:
    """Each of the promises is looked at."""
    spoiled = deepcopy(figures())
    spoil(spoiled)  # type: ignore[operator]
    assert content_of(spoiled)["ok"] is False


def test_a_lost_record_fails() -> None:
    """Three were sent, two were read."""
    assert content_of(figures(), sent=3)["ok"] is False


def test_a_gap_in_a_book_is_named() -> None:
    """So are a broken hash and postings that do not sum to zero."""
    assert find_broken_link([CHARGE, INVOICED]) is None
    assert find_broken_link([INVOICED]) == "entry 1 has seq 2"
    unbalanced = {**CHARGE, "postings": CHARGE["postings"][:1]}  # type: ignore[index]
    assert find_broken_link([unbalanced]) == "the postings of entry 1 do not sum to zero"


def test_a_missing_invoice_number_is_named() -> None:
    """Per series: a gap in one is not filled by another."""
    found = find_number_gaps([{"number": "A/1"}, {"number": "A/3"}, {"number": "B/1"}])
    assert ["A/2", "A/3"] == found


def test_a_probe_is_seen_when_the_balance_has_reached_it() -> None:
    """One GPU-second of eight devices at 840 PKR an hour is 1 866 666 micro."""
    probe = Probe(100)
    probe.expect(1_000, 2_000, 8_000_000, 10.0)
    probe.observe(1_866_765, 10.5)
    assert [] == probe.delays_ms
    probe.observe(1_866_766, 10.75)
    assert [750] == probe.delays_ms
    assert {"samples": 1, "p50": 750, "p99": 750} == freshness_of(probe.delays_ms)


def test_amounts_are_written_for_eyes_without_floats() -> None:
    """Cut, never rounded up; negative amounts keep their sign."""
    assert ("1,234.56", "-0.01") == (pkr(1_234_567_890), pkr("-10000"))
    assert "366,708.31" == pkr_of_minor("36670831")
    assert "1.50" == gpu_hours(5_400_000_000_000)
