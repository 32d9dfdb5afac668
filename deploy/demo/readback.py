"""Reading everything back from the services, as an auditor would, and waiting until they drained.

Nothing here is computed from what was sent, but for the one question "has all of it been read?".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from demo.api import SERVICES, Api, Json

_DRAIN_PATIENCE_S: Final = 180
_LOOK_S: Final = 0.2
_APART_S: Final = 0.6
"""`lag_records` may be half a second old: two looks this far apart cannot see the same answer."""
_AT_ONCE: Final = 4


class NotDrainedError(Exception):
    """The services did not come to rest; the text says which and how far they were."""


@dataclass(frozen=True, slots=True)
class Readings:
    """All that the services say at the end."""

    hubs: dict[str, Json]
    balances: dict[str, Json]
    entries: dict[str, list[Json]]
    trial_balance: Json
    invoices: list[Json]
    recomputed: list[Json]
    periods: dict[str, Json]


async def records(api: Api) -> dict[str, int]:
    """Return the records of the identity, summed over hubs."""
    per_hub = await reconciliations(api)
    names = ("read", "accepted", "duplicate", "quarantined")
    return {name: sum(int(hub["records"][name]) for hub in per_hub.values()) for name in names}


async def reconciliations(api: Api) -> dict[str, Json]:
    """Return metering's reconciliation of each hub, over all time."""
    answers = await asyncio.gather(
        *(api.get("metering", "/v1/reconciliation", "auditor", hub=hub) for hub in api.hubs)
    )
    return dict(zip(api.hubs, answers, strict=True))


async def drained(api: Api, sent: int, heard: Callable[[int], None] | None = None) -> None:
    """Return once all of `sent` was read and nothing waits anywhere, seen twice in a row."""
    deadline = time.monotonic() + _DRAIN_PATIENCE_S
    quiet_since: float | None = None
    while True:
        read = (await records(api))["read"]
        if heard is not None:
            heard(read)
        status = await asyncio.gather(*(api.get(s, "/v1/status", "auditor") for s in SERVICES))
        waiting = {
            str(answer["service"]): (answer["lag_records"], answer["outbox_depth"])
            for answer in status
            if answer["lag_records"] != 0 or answer["outbox_depth"] != 0
        }
        now = time.monotonic()
        if waiting or read < sent:
            quiet_since = None
            if now > deadline:
                raise NotDrainedError(f"read {read} of {sent} records; (lag, outbox): {waiting}")
        elif quiet_since is None:
            quiet_since = now
        elif now - quiet_since >= _APART_S:
            return
        await asyncio.sleep(_LOOK_S)


async def balances(api: Api, tenants: Iterable[str]) -> dict[str, Json]:
    """Return each tenant's balance."""
    names = list(tenants)
    answers = await asyncio.gather(
        *(api.get("ledger", f"/v1/tenants/{name}/balance", "auditor") for name in names)
    )
    return dict(zip(names, answers, strict=True))


async def read_all(api: Api, months: Sequence[str]) -> Readings:
    """Read every figure of the summary and of the report."""
    tenants = list(api.stack["keys"]["tenant"])
    found = [
        invoice
        for month in months
        for invoice in await api.items("invoicing", "/v1/invoices", "finance", period=month)
    ]
    invoices = [invoice for invoice in found if invoice["state"] == "finalised"]
    return Readings(
        hubs=await reconciliations(api),
        balances=await balances(api, tenants),
        entries=await entries(api, tenants),
        trial_balance=await api.get("ledger", "/v1/trial-balance", "auditor"),
        invoices=invoices,
        recomputed=[
            await api.post(
                "invoicing", f"/v1/invoices/{invoice['invoice_id']}/recompute", "auditor", {}
            )
            for invoice in invoices
        ],
        periods={
            month: await api.get("invoicing", f"/v1/periods/{month}/reconciliation", "finance")
            for month in months
        },
    )


async def entries(api: Api, tenants: Sequence[str]) -> dict[str, list[Json]]:
    """Return each tenant's whole book, in order."""
    turn = asyncio.Semaphore(_AT_ONCE)

    async def book(tenant: str) -> list[Json]:
        async with turn:
            return await api.items("ledger", f"/v1/tenants/{tenant}/entries", "auditor")

    books = await asyncio.gather(*(book(tenant) for tenant in tenants))
    return dict(zip(tenants, books, strict=True))


async def download(api: Api, invoice: Json, folder: Path) -> Path:
    """Save an invoice's PDF under its number; ValueError unless its bytes have the stated hash."""
    content = await api.get_bytes(
        "invoicing", f"/v1/invoices/{invoice['invoice_id']}/pdf", "finance"
    )
    found = sha256(content).hexdigest()
    if found != invoice["pdf_sha256"]:
        raise ValueError(f"PDF of {invoice['number']}: {found} is not {invoice['pdf_sha256']}")
    name = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in invoice["number"])
    path = folder / f"{name}.pdf"
    path.write_bytes(content)
    return path


def broken_chain(book: Sequence[Json]) -> str | None:
    """Return where a book is no unbroken chain of balanced entries 1, 2, 3 ..., or None."""
    before = "0" * 64
    for place, entry in enumerate(book, 1):
        if int(entry["seq"]) != place:
            return f"entry {place} has seq {entry['seq']}"
        if entry["prev_hash"] != before:
            return f"entry {place} does not follow the hash of entry {place - 1}"
        if sum(int(posting["posting_micro"]) for posting in entry["postings"]) != 0:
            return f"the postings of entry {place} do not sum to zero"
        before = entry["hash"]
    return None


def number_gaps(invoices: Sequence[Json]) -> list[str]:
    """Return what is missing in the numbers of each (legal entity, series, fiscal year)."""
    series: dict[str, list[int]] = {}
    for invoice in invoices:
        stem = str(invoice["number"]).rstrip("0123456789")
        series.setdefault(stem, []).append(int(str(invoice["number"])[len(stem) :]))
    return [
        f"{stem}{number}"
        for stem, numbers in series.items()
        for number in sorted(set(range(1, len(numbers) + 1)).symmetric_difference(numbers))
    ]
