"""The scenes: what is done to the running system, and what it answers, one after another.

Each scene is an outsider's act with one role's key. Figures that are shown were read from a
service, never taken from what was sent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import seed
from demo import readback
from demo.api import Api, Json, RefusedError
from demo.emitter import Emitter
from demo.screen import Screen, gpu_hours, pkr, pkr_of_minor
from demo.stream import Record, count_intervals
from hisab_contracts.ids import HubCode, Sku
from hisab_contracts.units import instant_text

HELD_TENANT: Final = seed.RAVI_HEALTH
HELD_HUB: Final = seed.LAHORE
HELD_SKU: Final = seed.H100
ONE_GPU_HOUR_MICRO: Final = seed.rate_micro(seed.PKR_PER_GPU_HOUR[HELD_SKU], seed.ON_DEMAND)
HOLD_EXPIRES_AT: Final = "2099-01-01T00:00:00.000Z"
GRANT_EXPIRES_AT: Final = "2030-01-01T00:00:00.000Z"
_PATIENCE_S: Final = 600
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

    async def wait_until_drained(self, progress: Callable[[int], None] | None = None) -> None:
        """Wait until the services have taken all that was emitted so far."""
        await readback.wait_until_drained(self.api, self.emitter.sent, progress)


async def report_usage(stage: Stage, label: str, records: Sequence[Record]) -> None:
    """Emit what hubs report, and follow metering until it has read all that was sent so far."""
    last = await readback.count_read(stage.api)
    began = time.monotonic()
    count = count_intervals(records)
    with stage.screen.progress(f"{label}: emitted", len(records)) as advance:
        for part in _portions(stage, records):
            await stage.emitter.emit(part, lambda done, at_ms: advance(done, _day(at_ms)))
            if len(part) < len(records):
                await stage.wait_until_drained()
        advance(len(records), _day(records[-1].order_ms) if records else "")
    with stage.screen.progress(f"{label}: metered", count) as advance:

        def show(read: int) -> None:
            nonlocal last
            advance(read - last, "")
            last = read

        await stage.wait_until_drained(show)
    seconds = time.monotonic() - began
    stage.screen.say(f"{count} intervals from {len(stage.api.hubs)} hubs in {seconds:.1f} s")


def _portions(stage: Stage, records: Sequence[Record]) -> list[Sequence[Record]]:
    """Cut a long stream for the in-memory broker, which keeps 5 MiB of a partition and no more."""
    at_once = len(records) or 1
    if stage.api.stack["provider"]["kafka"] == "memory":
        at_once = _IN_MEMORY_AT_ONCE
    return [records[at : at + at_once] for at in range(0, len(records), at_once)]


async def show_identity(stage: Stage) -> None:
    """Show reported = billed + duplicate + quarantined as metering answers it now."""
    show_identity_table(stage.screen, await readback.read_reconciliations(stage.api))


def show_identity_table(screen: Screen, hubs: dict[str, Json]) -> None:
    """Show the identity hub by hub, in GPU-hours; its difference in GPU-nanoseconds."""
    rows = []
    for hub, answer in hubs.items():
        hours = [gpu_hours(answer[f"{side}_gpu_ns"]) for side in readback.IDENTITY_SIDES]
        rows.append([hub, *hours, f"{answer['difference_gpu_ns']} GPU-ns"])
    screen.table(("GPU-hours", *readback.IDENTITY_SIDES, "difference"), rows)


async def make_grants(
    stage: Stage, tenants: Sequence[str], grant_micro: int, effective_ms: int
) -> None:
    """An officer proposes a grant per tenant; another key, an approver's, approves it."""
    for tenant in tenants:
        proposed = await stage.api.post(
            "ledger",
            "/v1/grants",
            "officer",
            {
                "tenant_id": tenant,
                "programme_id": seed.PROGRAMME,
                "grant_micro": str(grant_micro),
                "priority": 100,
                "effective_at": instant_text(effective_ms),
                "expires_at": GRANT_EXPIRES_AT,
                "scope": {},
                "coverage_bps": 10000,
                "tax_effect": "tender",
            },
        )
        path = f"/v1/grants/{proposed['grant_id']}/approve"
        approved = await stage.api.post("ledger", path, "approver", {})
        if tenant == tenants[0]:
            stage.screen.say(
                f"officer proposes {pkr(grant_micro)} PKR for {tenant}: {proposed['state']}"
            )
            stage.screen.good(f"approver, another key, approves: {approved['state']}")
    stage.screen.say(f"{len(tenants)} tenants now hold {pkr(grant_micro)} PKR of credit each")


async def refuse_hold(stage: Stage) -> Json:
    """Ask for one GPU-hour more than there is; return the refusal as it was given."""
    balance = await readback.read_balance(stage.api, HELD_TENANT, "scheduler")
    wanted = int(balance["available_micro"]) + ONE_GPU_HOUR_MICRO
    stage.screen.say(f"scheduler asks for a hold of {pkr(wanted)} PKR for {HELD_TENANT}")
    try:
        placed = await _ask_for_hold(stage, wanted, "too-large", None)
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


async def place_hold(stage: Stage, allocation_id: str, hold_micro: int) -> str:
    """Reserve credit of the held tenant for one allocation; return the hold."""
    placed = await _ask_for_hold(stage, hold_micro, allocation_id, allocation_id)
    stage.screen.good(f"a hold of {pkr(hold_micro)} PKR for {HELD_TENANT} is {placed['state']}")
    return str(placed["hold_id"])


async def _ask_for_hold(
    stage: Stage, hold_micro: int, job_ref: str, allocation_id: str | None
) -> Json:
    body = {
        "tenant_id": HELD_TENANT,
        "project_id": seed.PROJECT,
        "job_ref": job_ref,
        "allocation_id": allocation_id,
        "hub": HELD_HUB,
        "sku": HELD_SKU,
        "hold_micro": str(hold_micro),
        "expires_at": HOLD_EXPIRES_AT,
    }
    return await stage.api.post("ledger", "/v1/holds", "scheduler", body)


async def release_unknown_sku(stage: Stage, hub: HubCode, sku: Sku, pkr_per_hour: int) -> None:
    """Show what waits because no price list names its SKU, then publish one that does."""
    waiting = (await readback.read_reconciliations(stage.api))[hub]
    where = {"hub": hub, "reason": "unknown-sku"}
    page = await stage.api.get("metering", "/v1/quarantine", "operator", limit=1, **where)
    if not page["items"]:
        raise SceneError(f"nothing waits for SKU {sku}")
    stage.screen.say(
        f"{waiting['records']['quarantined']} records of {hub} wait in quarantine,"
        f" {gpu_hours(waiting['quarantined_gpu_ns'])} GPU-hours; the first says:"
    )
    stage.screen.say(f"{page['items'][0]['reason']}: {page['items'][0]['detail']}")
    body = seed.price_list({sku: pkr_per_hour})
    listed = await stage.api.post("metering", "/v1/price-lists", "operator", body)
    stage.screen.say(f"operator names {sku} in price list {listed['price_version'][:12]}...")
    deadline = time.monotonic() + _PATIENCE_S
    while await _open_items(stage, hub, "unknown-sku"):
        if time.monotonic() > deadline:
            raise SceneError(f"records with SKU {sku} were not released")
        await asyncio.sleep(_LOOK_S)
    await stage.wait_until_drained()
    after = (await readback.read_reconciliations(stage.api))[hub]
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
    # The number goes away first and comes back with another process: neither look is the end of it.
    while (found := api.reload()["services"]["ledger"]["pid"]) in {pid, None}:
        if time.monotonic() - killed > _PATIENCE_S:
            raise SceneError("the ledger did not come back")
        await asyncio.sleep(0.02)
    await api.get("ledger", "/v1/status", "auditor")
    screen.say(f"the supervisor has it back as {found} after {time.monotonic() - killed:.1f} s")
    await stage.wait_until_drained()
    metered, booked = await read_charged_totals(stage)
    lost, doubled = max(0, metered - booked), max(0, booked - metered)
    text = f"metered {pkr(metered)}, booked {pkr(booked)} PKR: lost {lost}, doubled {doubled}"
    if lost or doubled:
        raise SceneError(text)
    screen.good(text)


async def read_charged_totals(stage: Stage) -> tuple[int, int]:
    """Return what metering has rated and what the ledger has booked, in micro-units."""
    hubs = await readback.read_reconciliations(stage.api)
    books = await readback.read_balances(stage.api, stage.api.stack["keys"]["tenant"])
    return (
        sum(int(answer["charge_micro"]) for answer in hubs.values()),
        sum(int(answer["charged_micro"]) for answer in books.values()),
    )


async def show_open_month(stage: Stage, month: str) -> None:
    """Show why a month cannot be closed yet."""
    period = await _read_period(stage, month)
    reasons = period["blocked_by"]
    first = f"{reasons[0]['kind']}: {reasons[0]['detail']}" if reasons else "nothing blocks it"
    stage.screen.say(f"{month} is {period['state']}; {len(reasons)} reasons, first {first}")


async def close_month(stage: Stage, month: str) -> None:
    """Wait until the watermarks make a month closable, close it, wait until it is closed."""
    # `closing`: the command was accepted, and this client lost the answer; it needs no second one.
    period = await _wait_for_period(stage, month, ("closable", "closing", "closed"))
    if period["state"] == "closable":
        command = {"issued_on": None, "override": None}
        path = f"/v1/periods/{month}/close"
        await stage.api.post("invoicing", path, "finance", command)
    await _wait_for_period(stage, month, ("closed",))


async def _wait_for_period(stage: Stage, month: str, states: Sequence[str]) -> Json:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        period = await _read_period(stage, month)
        if period["state"] in states:
            return period
        if time.monotonic() > deadline:
            raise SceneError(f"{month} stays {period['state']}: {period['blocked_by']}")
        await asyncio.sleep(_LOOK_S)


async def _read_period(stage: Stage, month: str) -> Json:
    return await stage.api.get("invoicing", f"/v1/periods/{month}", "finance")


async def show_invoices(stage: Stage, months: Sequence[str], folder: Path) -> dict[str, Path]:
    """List the finalised invoices, save their PDFs, recompute each; return PDFs by invoice."""
    api = stage.api
    pdfs, rows, identical = {}, [], 0
    for month in months:
        for invoice in await readback.read_invoices(api, month):
            pdfs[invoice["invoice_id"]] = await readback.download_pdf(api, invoice, folder)
            identical += (await readback.recompute(api, invoice))["identical"] is True
            money = [pkr_of_minor(invoice[f"{part}_minor"]) for part in ("net", "tax", "total")]
            rows.append([str(invoice["number"]), invoice["tenant_id"], month, *money])
    stage.screen.table(("invoice", "tenant", "month", "net PKR", "tax PKR", "total PKR"), rows)
    stage.screen.good(f"{len(rows)} PDFs saved; recomputed from the entries: {identical} identical")
    return pdfs


def show_sums(screen: Screen, hubs: dict[str, Json], checks: dict[str, int]) -> None:
    """Show every sum that must come to zero."""
    show_identity_table(screen, hubs)
    rows = [[check, f"{micro} micro"] for check, micro in checks.items()]
    screen.table(("must be zero", "difference"), rows)


def _day(at_ms: int) -> str:
    return instant_text(at_ms)[:10]
