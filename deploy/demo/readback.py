"""Reads every figure back from the services, as an auditor would, once they have drained.

Nothing here is computed from what was sent, but for the one question "has all of it been read?".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from demo.api import Api, Json
from hisab_contracts.entries import GENESIS_HASH

_DRAIN_PATIENCE_S: Final = 1800
_LOOK_S: Final = 0.2
_APART_S: Final = 0.6
"""`lag_records` may be half a second old: two looks this far apart cannot see the same answer."""
_AT_ONCE: Final = 4
"""How many books are read at the same time."""
IDENTITY_SIDES: Final = ("reported", "billed", "duplicate", "quarantined")
"""Metering's identity: reported = billed + duplicate + quarantined."""


class NotDrainedError(Exception):
    """The services did not come to rest; the text says which and how far they were."""


@dataclass(frozen=True, slots=True)
class ServiceFigures:
    """Every figure that the services answer at the end."""

    hubs: dict[str, Json]
    balances: dict[str, Json]
    entries: dict[str, list[Json]]
    trial_balance: Json
    invoices: list[Json]
    recomputed: list[Json]
    periods: dict[str, Json]


def sum_records(hubs: Mapping[str, Json]) -> dict[str, int]:
    """Sum the records of the identity over hubs."""
    names = ("read", "accepted", "duplicate", "quarantined")
    return {name: sum(int(hub["records"][name]) for hub in hubs.values()) for name in names}


async def count_read(api: Api) -> int:
    """Return how many records metering has read so far."""
    return sum_records(await read_reconciliations(api))["read"]


async def read_reconciliations(api: Api) -> dict[str, Json]:
    """Return metering's reconciliation of each hub, over all time."""
    answers = await asyncio.gather(
        *(api.get("metering", "/v1/reconciliation", "auditor", hub=hub) for hub in api.hubs)
    )
    return dict(zip(api.hubs, answers, strict=True))


async def wait_until_drained(
    api: Api, sent: int, progress: Callable[[int], None] | None = None
) -> None:
    """Return once all of `sent` was read and nothing waits anywhere, seen twice in a row."""
    deadline = time.monotonic() + _DRAIN_PATIENCE_S
    quiet_since: float | None = None
    while True:
        read = await count_read(api)
        if progress is not None:
            progress(read)
        status = await asyncio.gather(
            *(api.get(service, "/v1/status", "auditor") for service in api.services)
        )
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


async def read_balance(api: Api, tenant: str, key: str = "auditor") -> Json:
    """Return a tenant's balance."""
    return await api.get("ledger", f"/v1/tenants/{tenant}/balance", key)


async def read_balances(api: Api, tenants: Iterable[str]) -> dict[str, Json]:
    """Return each tenant's balance."""
    names = list(tenants)
    answers = await asyncio.gather(*(read_balance(api, name) for name in names))
    return dict(zip(names, answers, strict=True))


async def read_all(api: Api, months: Sequence[str]) -> ServiceFigures:
    """Read every figure of the summary and of the report."""
    tenants = list(api.stack["keys"]["tenant"])
    found = [invoice for month in months for invoice in await read_invoices(api, month)]
    invoices = [invoice for invoice in found if invoice["state"] == "finalised"]
    return ServiceFigures(
        hubs=await read_reconciliations(api),
        balances=await read_balances(api, tenants),
        entries=await read_entries(api, tenants),
        trial_balance=await api.get("ledger", "/v1/trial-balance", "auditor"),
        invoices=invoices,
        recomputed=[await recompute(api, invoice) for invoice in invoices],
        periods={
            month: await api.get("invoicing", f"/v1/periods/{month}/reconciliation", "finance")
            for month in months
        },
    )


async def read_entries(api: Api, tenants: Sequence[str]) -> dict[str, list[Json]]:
    """Return each tenant's whole book, in order."""
    turn = asyncio.Semaphore(_AT_ONCE)

    async def book(tenant: str) -> list[Json]:
        async with turn:
            return await api.items("ledger", f"/v1/tenants/{tenant}/entries", "auditor")

    books = await asyncio.gather(*(book(tenant) for tenant in tenants))
    return dict(zip(tenants, books, strict=True))


async def read_invoices(api: Api, month: str) -> list[Json]:
    """Return the invoices of a month."""
    return await api.items("invoicing", "/v1/invoices", "finance", period=month)


async def recompute(api: Api, invoice: Json) -> Json:
    """Have invoicing compute an invoice again from the entries; return how it compares."""
    path = f"/v1/invoices/{invoice['invoice_id']}/recompute"
    return await api.post("invoicing", path, "auditor", {})


async def download_pdf(api: Api, invoice: Json, folder: Path) -> Path:
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


def find_broken_link(book: Sequence[Json]) -> str | None:
    """Return where a book is no unbroken chain of balanced entries 1, 2, 3 ..., or None."""
    before = GENESIS_HASH
    for place, entry in enumerate(book, 1):
        if int(entry["seq"]) != place:
            return f"entry {place} has seq {entry['seq']}"
        if entry["prev_hash"] != before:
            return f"entry {place} does not follow the hash of entry {place - 1}"
        if sum(int(posting["posting_micro"]) for posting in entry["postings"]) != 0:
            return f"the postings of entry {place} do not sum to zero"
        before = entry["hash"]
    return None


def find_number_gaps(invoices: Sequence[Json]) -> list[str]:
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
