"""`python deploy/demo` as a person runs it: the simulated month, recorded traces, refusals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import oracle

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(
    os.environ.get("HISAB_TRACE", ROOT.parent / "shared" / "data" / "openb_pod_list_default.csv")
)
HEADER = "name,num_gpu,gpu_milli,qos,pod_phase,creation_time,deletion_time,scheduled_time"
MIXED = """\
pod-whole,1,1000,LS,Running,0,7200,0
pod-fraction,1,460,BE,Failed,0.25,9000.7519,12.3456
pod-eight,8,1000,Guaranteed,Succeeded,10,100000.001,3600.9999
pod-none,0,0,LS,Running,0,100,0
pod-pending,1,1000,BE,Pending,5,,
pod-no-end,2,1000,LS,Running,5,,7
pod-backwards,1,1000,LS,Failed,0,5,9
pod-unreadable,one,1000,LS,Running,0,100,0
pod-month-edge,4,1000,Burstable,Running,0,2700000.5,2660000.25
"""


def demo(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the demo with its files in a folder of one's own."""
    command = [sys.executable, str(ROOT / "deploy" / "demo"), "--folder", str(folder), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in {"DATA", "CHAOS", "KEEP"}}
    environment |= more
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def summary_of(folder: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Read the summary of a run that went well."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    content = json.loads((folder / "demo-summary.json").read_text())
    assert content["ok"] is True
    assert {"0"} == {row["difference_micro"] for row in content["reconciliation"]}
    assert "0" == content["gpu_ms"]["difference"]
    assert content["rerun"]["identical"] == content["rerun"]["compared"] > 0
    for invoice in content["invoices"]:
        pdf = (ROOT / invoice["pdf"]).read_bytes()
        assert pdf.startswith(b"%PDF")
        assert invoice["pdf_sha256"] == hashlib.sha256(pdf).hexdigest()
    return dict(content)


def trace_file(folder: Path, text: str) -> Path:
    """Write a trace."""
    path = folder / "a trace.csv"
    path.write_text(text)
    return path


def check_against_oracle(content: dict[str, Any], trace: Path) -> None:
    """Compare GPU time, charges, tenants and invoices with the independent calculation."""
    metered = oracle.meter(oracle.trace_usage(trace))
    charges = oracle.rate(metered.buckets)
    assert str(metered.reported_gpu_ns // 1_000_000) == content["gpu_ms"]["billed"]
    assert (len(charges), str(sum(charges.values()))) == (
        content["charges"]["count"],
        content["charges"]["charged_micro"],
    )
    by_tenant = dict.fromkeys((*oracle.COMMERCIAL, *oracle.OTHERS), 0)
    for bucket, micro in charges.items():
        by_tenant[bucket.tenant_id] += micro
    assert by_tenant == {row["tenant_id"]: int(row["charged_micro"]) for row in content["tenants"]}
    assert {name: min(by_tenant[name], 10**12) for name in oracle.OTHERS} == {
        row["tenant_id"]: int(row["funded_micro"])
        for row in content["tenants"]
        if row["kind"] != "commercial"
    }
    assert oracle.bills(charges) == {
        (invoice["tenant_id"], invoice["period"]): (
            int(invoice["net_minor"]),
            int(invoice["tax_minor"]),
        )
        for invoice in content["invoices"]
    }


def test_a_trace_without_needed_columns_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Exit code 2, all missing columns named, no stack."""
    trace = trace_file(tmp_path, "name,num_gpu,qos\np,1,LS\n")
    done = demo(tmp_path / "out", "--data", str(trace))
    assert 2 == done.returncode
    for column in ("gpu_milli", "pod_phase", "creation_time", "deletion_time", "scheduled_time"):
        assert column in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("--data", "no-such-file.csv"), ("--chaos", "wild")])
def test_an_unusable_request_is_refused_before_anything_starts(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """A file that is not there, a seed that is no number."""
    done = demo(tmp_path / "out", *arguments)
    assert 2 == done.returncode
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_disturbed_trace_with_fractions_and_gaps_is_billed_to_the_last_paisa(
    tmp_path: Path,
) -> None:
    """Fractional seconds, rows without times, an unreadable row, CHAOS: the oracle agrees."""
    rows = "".join(
        f"more-{n},1,{n * 10},LS,Running,0,{n * 40000 + 0.999},{n * 30000}\n" for n in range(1, 60)
    )
    trace = trace_file(tmp_path, f"{HEADER}\n{MIXED}{rows}")
    done = demo(tmp_path / "out", "--data", str(trace), "--chaos", "7")
    content = summary_of(tmp_path / "out", done)
    source = content["source"]
    assert (68, 63, 1) == (source["rows"], source["billable"], source["unreadable"])
    assert "line 9 cannot be read" in done.stdout
    assert content["records"]["duplicate"] > 0
    assert content["hold_refused"]["code"] == "insufficient-credit"
    assert "840000000" == content["hold_refused"]["shortfall_micro"]
    check_against_oracle(content, trace)


@pytest.mark.slow
def test_the_recorded_trace_is_billed_as_published(tmp_path: Path) -> None:
    """Its totals stand in the published interface, and the oracle finds the same."""
    if not RECORDED.exists():
        pytest.skip("the recorded trace is not on this machine (HISAB_TRACE)")
    content = summary_of(tmp_path, demo(tmp_path, "--data", str(RECORDED)))
    assert (8152, 6203, 0) == tuple(
        content["source"][name] for name in ("rows", "billable", "unreadable")
    )
    assert {"sent": 59362, "read": 59362, "accepted": 59362, "duplicate": 0, "quarantined": 0} == (
        content["records"]
    )
    assert "185294426970" == content["gpu_ms"]["billed"]
    assert "45511917696131" == content["charges"]["charged_micro"]
    invoices = content["invoices"]
    assert (16, 1_416_651_273, 216_530_446) == (
        len(invoices),
        sum(int(invoice["net_minor"]) for invoice in invoices),
        sum(int(invoice["tax_minor"]) for invoice in invoices),
    )
    media = [
        invoice["total_minor"]
        for invoice in invoices
        if (invoice["tenant_id"], invoice["period"]) == ("khyber-media", "2025-07")
    ]
    assert ["36706831"] == media
    check_against_oracle(content, RECORDED)


@pytest.mark.slow
@pytest.mark.defect("F7")
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C in the middle: it says FAIL, and no process of its stack is left."""
    command = [sys.executable, str(ROOT / "deploy" / "demo"), "--folder", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = ""
        for line in running.stdout:
            said += line
            if "days of" in line:
                running.send_signal(signal.SIGINT)
    assert 1 == running.returncode
    assert "interrupted" in said
    assert "FAIL" in said
    assert [] == processes_under(tmp_path)


def processes_under(folder: Path) -> list[str]:
    """Return the command lines of running processes that name a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            said = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in said:
                found.append(said)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("broker", [{}, {"HISAB_KAFKA_PROVIDER": "memory"}], ids=["best", "memory"])
def test_the_simulated_month_shows_every_scene(tmp_path: Path, broker: dict[str, str]) -> None:
    """Grants, a refusal, quarantine and release, a kill, a closed month, live freshness."""
    done = demo(tmp_path, "--live-seconds", "4", **broker)
    content = summary_of(tmp_path, done)
    records = content["records"]
    assert records["sent"] == records["read"]
    assert records["duplicate"] > 0
    assert 2 == records["quarantined"], "one undecodable record and one disputed run"
    assert 4 == len(content["invoices"])
    assert content["freshness_ms"]["samples"] >= 20
    assert "insufficient-credit" == content["hold_refused"]["code"]
    for said in (
        "approver, another key, approves: approved",
        "refused: insufficient-credit",
        "released by itself",
        "lost 0, doubled 0",
        "2025-07 is closed",
        "all differences are 0",
    ):
        assert said in done.stdout
    assert "\x1b" not in done.stdout, "without a terminal lines are plain"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<svg" in page
    assert "://" not in page
