"""`demo-summary.json`: what the services answered, added up. Pure but for one atomic write.

`compare_sums` lists everything that must be zero; one that is not makes the demo fail.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import seed
from demo.api import Json
from demo.readback import (
    IDENTITY_SIDES,
    ServiceFigures,
    find_broken_link,
    find_number_gaps,
    sum_records,
)
from hisab_contracts.ids import TenantId
from hisab_contracts.units import floor_gpu_ms

_PAID_FROM: Final = ("funded", "receivable", "invoiced", "settled", "unfunded")
"""What a tenant's charges are made of: each is in exactly one of these."""
_BALANCE_MEMBERS: Final = tuple(f"{side}_micro" for side in ("charged", *_PAID_FROM, "available"))
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


def summary_of(run: Run, figures: ServiceFigures) -> Json:
    """Build the summary; `ok` says that nothing differs."""
    hubs = list(figures.hubs.values())

    def over_hubs(name: str) -> int:
        return sum(int(hub[name]) for hub in hubs)

    checks = compare_sums(figures)
    content: Json = {
        "format": 1,
        "ok": False,
        "source": run.source,
        "provider": run.provider,
        "seconds": run.seconds,
        "records": {"sent": run.sent, **sum_records(figures.hubs)},
        "gpu_ms": {
            **{side: str(floor_gpu_ms(over_hubs(f"{side}_gpu_ns"))) for side in IDENTITY_SIDES},
            "difference": str(over_hubs("difference_gpu_ns")),
        },
        "charges": {
            "count": over_hubs("buckets"),
            "charged_micro": str(over_hubs("charge_micro")),
        },
        "entries": sum(int(answer["as_of"]["seq"]) for answer in figures.balances.values()),
        "tenants": [
            {"tenant_id": tenant, "kind": seed.TENANTS[TenantId(tenant)].kind}
            | {member: answer[member] for member in _BALANCE_MEMBERS}
            for tenant, answer in figures.balances.items()
        ],
        "hold_refused": run.hold_refused,
        "invoices": [
            {member: invoice[member] for member in _INVOICE_MEMBERS}
            | {"pdf": run.pdfs[invoice["invoice_id"]], "pdf_sha256": invoice["pdf_sha256"]}
            for invoice in figures.invoices
        ],
        "rerun": {
            "compared": len(figures.recomputed),
            "identical": sum(answer["identical"] is True for answer in figures.recomputed),
        },
        "freshness_ms": run.freshness_ms,
        "reconciliation": [
            {"check": check, "difference_micro": str(micro)} for check, micro in checks.items()
        ],
        "report": run.report,
    }
    content["ok"] = not find_faults(content, figures)
    return content


def compare_sums(figures: ServiceFigures) -> dict[str, int]:
    """Return every comparison of sums, in micro-units."""
    charged = {tenant: int(answer["charged_micro"]) for tenant, answer in figures.balances.items()}
    sides = sum(
        int(answer["charged_micro"]) - sum(int(answer[f"{side}_micro"]) for side in _PAID_FROM)
        for answer in figures.balances.values()
    )
    metered = {hub: int(answer["charge_micro"]) for hub, answer in figures.hubs.items()}
    booked = sum_booked_per_hub(figures.entries)
    per_hub = sum(abs(micro - booked.get(hub, 0)) for hub, micro in metered.items())
    steps = sum(abs(int(period["difference_micro"])) for period in figures.periods.values())
    return {
        "charges = entries": sum(metered.values()) - sum(charged.values()),
        "charges = entries, hub by hub": per_hub,
        "charged = funded + receivable + invoiced + settled + unfunded": sides,
        "trial balance": int(figures.trial_balance["sum_micro"]),
        "ledger + steps + residue = invoices": steps,
    }


def sum_booked_per_hub(entries: Mapping[str, Sequence[Json]]) -> dict[str, int]:
    """Sum the charges that stand in the entries themselves, by hub."""
    booked: dict[str, int] = {}
    for book in entries.values():
        for entry in book:
            charge = entry.get("charge")  # Only the entry of a charge has this member.
            if charge is not None:
                hub = charge["hub"]
                booked[hub] = booked.get(hub, 0) + int(charge["charge_micro"])
    return booked


def find_faults(content: Json, figures: ServiceFigures) -> list[str]:
    """Return everything that is not as promised, in words."""
    found = [
        f"{row['check']}: {row['difference_micro']} micro"
        for row in content["reconciliation"]
        if int(row["difference_micro"]) != 0
    ]
    for hub, answer in figures.hubs.items():
        if int(answer["difference_gpu_ns"]) != 0:
            found.append(f"identity of {hub}: {answer['difference_gpu_ns']} GPU-ns")
    records, rerun = content["records"], content["rerun"]
    if records["read"] != records["sent"]:
        found.append(f"records: {records['sent']} sent, {records['read']} read")
    if records["read"] != records["accepted"] + records["duplicate"] + records["quarantined"]:
        found.append(f"records do not add up: {records}")
    if rerun["identical"] != rerun["compared"]:
        found.append(f"rerun: {rerun['identical']} of {rerun['compared']} identical")
    found.extend(f"invoice numbers: {gap}" for gap in find_number_gaps(figures.invoices))
    for tenant, book in figures.entries.items():
        fault = find_broken_link(book)
        if fault is not None:
            found.append(f"book of {tenant}: {fault}")
    return found


def write_summary(path: Path, content: Json) -> None:
    """Write the summary atomically."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
