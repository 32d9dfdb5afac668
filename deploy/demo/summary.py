"""`demo-summary.json`: what the services said, added up. Pure but for one atomic write.

`differences` lists everything that must be zero; one that is not makes the demo fail.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo.api import Json
from demo.readback import Readings, broken_chain, number_gaps
from demo.replay import KIND_OF
from hisab_contracts.units import floor_gpu_ms

_BALANCE_SIDES: Final = (
    "charged_micro",
    "funded_micro",
    "receivable_micro",
    "invoiced_micro",
    "settled_micro",
    "unfunded_micro",
    "available_micro",
)
_INVOICE_MEMBERS: Final = (
    "invoice_id",
    "number",
    "tenant_id",
    "legal_entity",
    "period",
    "net_minor",
    "tax_minor",
    "total_minor",
)


@dataclass(frozen=True, slots=True)
class Run:
    """What the driver itself knows of a run."""

    source: Json
    provider: Json
    seconds: Mapping[str, float]
    sent: int
    hold_refused: Json
    pdfs: Mapping[str, str]
    freshness_ms: Json | None
    report: str


def summary_of(run: Run, readings: Readings) -> Json:
    """Build the summary; `ok` says that nothing differs."""
    hubs = list(readings.hubs.values())

    def over_hubs(name: str) -> int:
        return sum(int(hub[name]) for hub in hubs)

    checks = differences(readings)
    read = {
        name: sum(int(hub["records"][name]) for hub in hubs)
        for name in ("read", "accepted", "duplicate", "quarantined")
    }
    content: Json = {
        "format": 1,
        "ok": False,
        "source": run.source,
        "provider": run.provider,
        "seconds": run.seconds,
        "records": {"sent": run.sent, **read},
        "gpu_ms": {
            **{
                side: str(floor_gpu_ms(over_hubs(f"{side}_gpu_ns")))
                for side in ("reported", "billed", "duplicate", "quarantined")
            },
            "difference": str(over_hubs("difference_gpu_ns")),
        },
        "charges": {
            "count": over_hubs("buckets"),
            "charged_micro": str(over_hubs("charge_micro")),
        },
        "entries": sum(int(answer["as_of"]["seq"]) for answer in readings.balances.values()),
        "tenants": [
            {"tenant_id": tenant, "kind": KIND_OF[tenant]}
            | {side: answer[side] for side in _BALANCE_SIDES}
            for tenant, answer in readings.balances.items()
        ],
        "hold_refused": run.hold_refused,
        "invoices": [
            {member: invoice[member] for member in _INVOICE_MEMBERS}
            | {"pdf": run.pdfs[invoice["invoice_id"]], "pdf_sha256": invoice["pdf_sha256"]}
            for invoice in readings.invoices
        ],
        "rerun": {
            "compared": len(readings.recomputed),
            "identical": sum(answer["identical"] is True for answer in readings.recomputed),
        },
        "freshness_ms": run.freshness_ms,
        "reconciliation": [
            {"check": check, "difference_micro": str(micro)} for check, micro in checks.items()
        ],
        "report": run.report,
    }
    content["ok"] = not faults(content, readings)
    return content


def differences(readings: Readings) -> dict[str, int]:
    """Return every comparison of sums, in micro-units."""
    charged = {tenant: int(answer["charged_micro"]) for tenant, answer in readings.balances.items()}
    sides = sum(
        int(answer["charged_micro"]) - sum(int(answer[f"{side}_micro"]) for side in _PAID_FROM)
        for answer in readings.balances.values()
    )
    metered = {hub: int(answer["charge_micro"]) for hub, answer in readings.hubs.items()}
    booked = booked_per_hub(readings.entries)
    per_hub = sum(abs(micro - booked.get(hub, 0)) for hub, micro in metered.items())
    steps = sum(abs(int(period["difference_micro"])) for period in readings.periods.values())
    return {
        "charges = entries": sum(metered.values()) - sum(charged.values()),
        "charges = entries, hub by hub": per_hub,
        "charged = funded + receivable + invoiced + settled + unfunded": sides,
        "trial balance": int(readings.trial_balance["sum_micro"]),
        "ledger + steps + residue = invoices": steps,
    }


_PAID_FROM: Final = ("funded", "receivable", "invoiced", "settled", "unfunded")


def booked_per_hub(entries: Mapping[str, Sequence[Json]]) -> dict[str, int]:
    """Sum what the entries themselves say was charged, by hub."""
    booked: dict[str, int] = {}
    for book in entries.values():
        for entry in book:
            charge = entry.get("charge")
            if charge is not None:
                hub = charge["hub"]
                booked[hub] = booked.get(hub, 0) + int(charge["charge_micro"])
    return booked


def faults(content: Json, readings: Readings) -> list[str]:
    """Return everything that is not as promised, in words."""
    found = [
        f"{row['check']}: {row['difference_micro']} micro"
        for row in content["reconciliation"]
        if int(row["difference_micro"]) != 0
    ]
    for hub, answer in readings.hubs.items():
        if int(answer["difference_gpu_ns"]) != 0:
            found.append(f"identity of {hub}: {answer['difference_gpu_ns']} GPU-ns")
    records, rerun = content["records"], content["rerun"]
    if records["read"] != records["sent"]:
        found.append(f"records: {records['sent']} sent, {records['read']} read")
    if records["read"] != records["accepted"] + records["duplicate"] + records["quarantined"]:
        found.append(f"records do not add up: {records}")
    if rerun["identical"] != rerun["compared"]:
        found.append(f"rerun: {rerun['identical']} of {rerun['compared']} identical")
    found.extend(f"invoice numbers: {gap}" for gap in number_gaps(readings.invoices))
    for tenant, book in readings.entries.items():
        fault = broken_chain(book)
        if fault is not None:
            found.append(f"book of {tenant}: {fault}")
    return found


def write(path: Path, content: Json) -> None:
    """Write the summary atomically."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
