"""The scenes: what is done to the running system, and what it answers, one after another.

Each scene is an outsider's act with one role's key. Figures that are shown were read from a
service, never taken from what was sent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo import readback
from demo.api import Api, Json, RefusedError
from demo.emitter import Emitter
from demo.screen import Screen, gpu_hours, pkr, pkr_of_minor
from demo.stream import Record
from hisab_contracts.units import instant_text

HELD_TENANT: Final = "ravi-health"
HELD_SKU: Final = "h100-sxm-80"
ONE_GPU_HOUR_MICRO: Final = 840_000_000
FAR_AWAY: Final = "2099-01-01T00:00:00.000Z"
GRANT_UNTIL: Final = "2030-01-01T00:00:00.000Z"
_PATIENCE_S: Final = 60
_LOOK_S: Final = 0.1
_IN_MEMORY_AT_ONCE: Final = 8_000


class SceneError(Exception):
    """Something did not happen as promised; the text says what."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What every scene needs."""

    api: Api
    emitter: Emitter
    screen: Screen


async def report_usage(stage: Stage, label: str, records: Sequence[Record]) -> None:
    """Hubs say this, and metering is followed until it has read all that was sent so far."""
    before = (await readback.records(stage.api))["read"]
    began = time.monotonic()
    counted = sum(record.counts for record in records)
    with stage.screen.progress(f"{label}: emitted", len(records)) as advance:
        for part in _portions(stage, records):
            await stage.emitter.emit(part, lambda done, at_ms: advance(done, _day(at_ms)))
            if len(part) < len(records):
                await readback.drained(stage.api, stage.emitter.sent)
        advance(len(records), _day(records[-1].order_ms) if records else "")
    with stage.screen.progress(f"{label}: metered", counted) as advance:
        last = before

        def heard(read: int) -> None:
            nonlocal last
            advance(read - last, "")
            last = read

        await readback.drained(stage.api, stage.emitter.sent, heard)
    seconds = time.monotonic() - began
    stage.screen.say(f"{counted} intervals from {len(stage.api.hubs)} hubs in {seconds:.1f} s")


def _portions(stage: Stage, records: Sequence[Record]) -> list[Sequence[Record]]:
    """Cut a long stream for the in-memory broker, which keeps 5 MiB of a partition and no more."""
    at_once = len(records) or 1
    if stage.api.stack["provider"]["kafka"] == "memory":
        at_once = _IN_MEMORY_AT_ONCE
    return [records[at : at + at_once] for at in range(0, len(records), at_once)]


async def show_identity(stage: Stage) -> None:
    """Show reported = billed + duplicate + quarantined as metering answers it now."""
    identity_table(stage.screen, await readback.reconciliations(stage.api))


def identity_table(screen: Screen, hubs: dict[str, Json]) -> None:
    """Show the identity hub by hub, in GPU-hours; its difference in GPU-nanoseconds."""
    sides = ("reported", "billed", "duplicate", "quarantined")
    rows = []
    for hub, answer in hubs.items():
        hours = [gpu_hours(answer[f"{side}_gpu_ns"]) for side in sides]
        rows.append([hub, *hours, f"{answer['difference_gpu_ns']} GPU-ns"])
    screen.table(("GPU-hours", *sides, "difference"), rows)


async def grant(stage: Stage, tenants: Sequence[str], micro: int, from_ms: int) -> None:
    """An officer proposes a grant per tenant; another key, an approver's, approves it."""
    for tenant in tenants:
        proposed = await stage.api.post(
            "ledger",
            "/v1/grants",
            "officer",
            {
                "tenant_id": tenant,
                "programme_id": "ignite",
                "grant_micro": str(micro),
                "priority": 100,
                "effective_at": instant_text(from_ms),
                "expires_at": GRANT_UNTIL,
                "scope": {},
                "coverage_bps": 10000,
                "tax_effect": "tender",
            },
        )
        path = f"/v1/grants/{proposed['grant_id']}/approve"
        approved = await stage.api.post("ledger", path, "approver", {})
        if tenant == tenants[0]:
            stage.screen.say(f"officer proposes {pkr(micro)} PKR for {tenant}: {proposed['state']}")
            stage.screen.good(f"approver, another key, approves: {approved['state']}")
    stage.screen.say(f"{len(tenants)} tenants now hold {pkr(micro)} PKR of credit each")


async def refuse_hold(stage: Stage) -> Json:
    """Ask for one GPU-hour more than there is; return the refusal as it was given."""
    balance = await stage.api.get("ledger", f"/v1/tenants/{HELD_TENANT}/balance", "scheduler")
    wanted = int(balance["available_micro"]) + ONE_GPU_HOUR_MICRO
    body = {
        "tenant_id": HELD_TENANT,
        "project_id": "main",
        "job_ref": "too-large",
        "allocation_id": None,
        "hub": "lhr",
        "sku": HELD_SKU,
        "hold_micro": str(wanted),
        "expires_at": FAR_AWAY,
    }
    stage.screen.say(f"scheduler asks for a hold of {pkr(wanted)} PKR for {HELD_TENANT}")
    try:
        placed = await stage.api.post("ledger", "/v1/holds", "scheduler", body)
    except RefusedError as refused:
        problem = refused.problem
        answer = {name: problem.get(name) for name in _REFUSAL_MEMBERS}
        stage.screen.good(
            f"refused: {answer['code']}, available {pkr(problem['available_micro'])},"
            f" shortfall {pkr(problem['shortfall_micro'])} PKR"
        )
        return answer
    raise SceneError(f"a hold beyond all credit was placed: {placed}")


_REFUSAL_MEMBERS: Final = ("code", "available_micro", "shortfall_micro")


async def place_hold(stage: Stage, tenant: str, allocation_id: str, micro: int) -> str:
    """Reserve credit for one allocation; return the hold."""
    placed = await stage.api.post(
        "ledger",
        "/v1/holds",
        "scheduler",
        {
            "tenant_id": tenant,
            "project_id": "main",
            "job_ref": allocation_id,
            "allocation_id": allocation_id,
            "hub": "lhr",
            "sku": HELD_SKU,
            "hold_micro": str(micro),
            "expires_at": FAR_AWAY,
        },
    )
    stage.screen.good(f"a hold of {pkr(micro)} PKR for {tenant} is {placed['state']}")
    return str(placed["hold_id"])


async def release_unknown_sku(stage: Stage, hub: str, sku: str, pkr_per_hour: int) -> None:
    """Show what waits because no price list names its SKU, then publish one that does."""
    waiting = (await readback.reconciliations(stage.api))[hub]
    where = {"hub": hub, "reason": "unknown-sku"}
    page = await stage.api.get("metering", "/v1/quarantine", "operator", limit=1, **where)
    if not page["items"]:
        raise SceneError(f"nothing waits for SKU {sku}")
    stage.screen.say(
        f"{waiting['records']['quarantined']} records of {hub} wait in quarantine,"
        f" {gpu_hours(waiting['quarantined_gpu_ns'])} GPU-hours; the first says:"
    )
    stage.screen.say(f"{page['items'][0]['reason']}: {page['items'][0]['detail']}")
    rates = {"on_demand": 100, "reserved": 80, "spot": 50}
    prices = [
        {"sku": sku, "price_class": name, "micro_per_gpu_hour": str(pkr_per_hour * pct * 10_000)}
        for name, pct in rates.items()
    ]
    body = {
        "currency": "PKR",
        "valid_from": "2025-01-01T00:00:00.000Z",
        "valid_until": None,
        "prices": prices,
    }
    listed = await stage.api.post("metering", "/v1/price-lists", "operator", body)
    stage.screen.say(f"operator names {sku} in price list {listed['price_version'][:12]}...")
    began = time.monotonic()
    while await _open_items(stage, hub, "unknown-sku"):
        if time.monotonic() - began > _PATIENCE_S:
            raise SceneError(f"records with SKU {sku} were not released")
        await asyncio.sleep(_LOOK_S)
    await readback.drained(stage.api, stage.emitter.sent)
    after = (await readback.reconciliations(stage.api))[hub]
    released = int(after["billed_gpu_ns"]) - int(waiting["billed_gpu_ns"])
    stage.screen.good(
        f"released by itself: {gpu_hours(released)} GPU-hours more are billed,"
        f" {gpu_hours(after['quarantined_gpu_ns'])} wait"
    )


async def dismiss_conflict(stage: Stage, hub: str) -> None:
    """Show the disputed run with both claims; an operator dismisses it: it blocks no month."""
    items = await _open_items(stage, hub, "conflict")
    if not items:
        raise SceneError(f"{hub} has no conflict in quarantine")
    for item in items:
        stage.screen.say(f"conflict: {item['detail']}")
        path = f"/v1/quarantine/{item['quarantine_id']}/dismiss"
        body = {"reason": "the first claim is right: the second run never had this device"}
        await stage.api.post("metering", path, "operator", body)
    stage.screen.good("an operator dismisses it: it stays in `quarantined` and blocks no month")


async def _open_items(stage: Stage, hub: str, reason: str) -> list[Json]:
    where = {"hub": hub, "reason": reason, "state": "open"}
    return await stage.api.items("metering", "/v1/quarantine", "operator", **where)


async def kill_ledger(stage: Stage, before: Sequence[Record], after: Sequence[Record]) -> None:
    """Kill the ledger with -9 between two halves of a stream; nothing is lost, nothing doubled."""
    api, screen = stage.api, stage.screen
    with screen.progress("emitted", len(before) + len(after)) as advance:
        await stage.emitter.emit(before, lambda done, at_ms: advance(done, _day(at_ms)))
        pid = int(api.reload()["services"]["ledger"]["pid"])
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        screen.say(f"kill -9 {pid}: the ledger is gone, the hubs go on")
        await stage.emitter.emit(after, lambda done, at_ms: advance(done, _day(at_ms)))
    while (found := api.reload()["services"]["ledger"]["pid"]) in {pid, None}:
        if time.monotonic() - killed > _PATIENCE_S:
            raise SceneError("the ledger did not come back")
        await asyncio.sleep(0.02)
    await api.get("ledger", "/v1/status", "auditor")
    screen.say(f"the supervisor has it back as {found} after {time.monotonic() - killed:.1f} s")
    await readback.drained(api, stage.emitter.sent)
    metered, booked = await charged_everywhere(stage)
    lost, doubled = max(0, metered - booked), max(0, booked - metered)
    text = f"metered {pkr(metered)}, booked {pkr(booked)} PKR: lost {lost}, doubled {doubled}"
    if lost or doubled:
        raise SceneError(text)
    screen.good(text)


async def charged_everywhere(stage: Stage) -> tuple[int, int]:
    """Return what metering has rated and what the ledger has booked, in micro-units."""
    hubs = await readback.reconciliations(stage.api)
    books = await readback.balances(stage.api, stage.api.stack["keys"]["tenant"])
    return (
        sum(int(answer["charge_micro"]) for answer in hubs.values()),
        sum(int(answer["charged_micro"]) for answer in books.values()),
    )


async def show_open_month(stage: Stage, month: str) -> None:
    """Show why a month cannot be closed yet."""
    period = await stage.api.get("invoicing", f"/v1/periods/{month}", "finance")
    reasons = period["blocked_by"]
    first = f"{reasons[0]['kind']}: {reasons[0]['detail']}" if reasons else "nothing blocks it"
    stage.screen.say(f"{month} is {period['state']}; {len(reasons)} reasons, first {first}")


async def close_month(stage: Stage, month: str) -> None:
    """Wait until the watermarks make a month closable, close it, wait until it is closed."""
    path = f"/v1/periods/{month}"
    period = await _until(stage, month, ("closable", "closed"))
    if period["state"] == "closable":
        command = {"issued_on": None, "override": None}
        await stage.api.post("invoicing", f"{path}/close", "finance", command)
    await _until(stage, month, ("closed",))


async def _until(stage: Stage, month: str, states: Sequence[str]) -> Json:
    began = time.monotonic()
    while True:
        period = await stage.api.get("invoicing", f"/v1/periods/{month}", "finance")
        if period["state"] in states:
            return period
        if time.monotonic() - began > _PATIENCE_S:
            raise SceneError(f"{month} stays {period['state']}: {period['blocked_by']}")
        await asyncio.sleep(_LOOK_S)


async def show_invoices(stage: Stage, months: Sequence[str], folder: Path) -> dict[str, Path]:
    """List the finalised invoices, save their PDFs, recompute each; return PDFs by invoice."""
    api = stage.api
    pdfs, rows, identical = {}, [], 0
    for month in months:
        for invoice in await api.items("invoicing", "/v1/invoices", "finance", period=month):
            pdfs[invoice["invoice_id"]] = await readback.download(api, invoice, folder)
            path = f"/v1/invoices/{invoice['invoice_id']}/recompute"
            identical += (await api.post("invoicing", path, "auditor", {}))["identical"] is True
            money = [pkr_of_minor(invoice[f"{n}_minor"]) for n in ("net", "tax", "total")]
            rows.append([str(invoice["number"]), invoice["tenant_id"], month, *money])
    stage.screen.table(("invoice", "tenant", "month", "net PKR", "tax PKR", "total PKR"), rows)
    stage.screen.good(f"{len(rows)} PDFs saved; recomputed from the entries: {identical} identical")
    return pdfs


def show_sums(screen: Screen, hubs: dict[str, Json], checks: dict[str, int]) -> None:
    """Show every sum that must come to zero."""
    identity_table(screen, hubs)
    rows = [[check, f"{micro} micro"] for check, micro in checks.items()]
    screen.table(("must be zero", "difference"), rows)


def _day(at_ms: int) -> str:
    return instant_text(at_ms)[:10]
