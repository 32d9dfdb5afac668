"""One afternoon, worked by hand, on the real stack: Kafka in, HTTP out, three real services.

The steps that need the real clock to stand at 31 July 2025 (the lot's expiry) use a lot that is
still open today; no amount of the afternoon depends on it before step 8.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from demo.api import Json, RefusedError
from e2e.outside import HOUR, Outside, at, outside_of, until
from stack import Stack

PKR = 1_000_000
GPU_HOUR = 3_600_000_000_000


def pkr_of(answer: Json, *names: str) -> tuple[int, ...]:
    """Read amounts of an answer in whole PKR."""
    return tuple(int(answer[f"{name}_micro"]) // PKR for name in names)


async def lot(outside: Outside, tenant_id: str) -> tuple[int, int, int]:
    """Read lot / reserved / available of a tenant with one lot."""
    balance = await outside.balance(tenant_id)
    one = balance["lots"][0]
    remaining, reserved = pkr_of(one, "remaining", "reserved")
    (available,) = pkr_of(balance, "available")
    return remaining, reserved, available


async def owed(outside: Outside, tenant_id: str) -> tuple[int, ...]:
    """Read receivable / invoiced / available."""
    return pkr_of(await outside.balance(tenant_id), "receivable", "invoiced", "available")


def hold(tenant_id: str, job_ref: str, pkr: int) -> Json:
    """Ask for a hold."""
    return {
        "tenant_id": tenant_id,
        "project_id": "main",
        "job_ref": job_ref,
        "allocation_id": None,
        "hub": "lhr",
        "sku": "h100-sxm-80",
        "hold_micro": str(pkr * PKR),
        "expires_at": "2030-01-01T00:00:00.000Z",
    }


async def the_morning(outside: Outside, b: str) -> str:
    """Steps 0 to 2: a grant, a hold, a refusal."""
    await outside.grant(b, 500 * PKR)
    placed = await outside.api.post("ledger", "/v1/holds", "scheduler", hold(b, "job-1", 400))
    assert (500, 400, 100) == await lot(outside, b)
    with pytest.raises(RefusedError) as refused:
        await outside.api.post("ledger", "/v1/holds", "scheduler", hold(b, "job-2", 200))
    assert refused.value.status == 409
    assert refused.value.problem["code"] == "insufficient-credit"
    assert (100, 100) == pkr_of(refused.value.problem, "available", "shortfall")
    return str(placed["hold_id"])


async def usage_is_booked(outside: Outside, a: str, b: str, hold_id: str) -> None:
    """Steps 3 to 7: usage under a hold, a repeat, a conflict that is dismissed."""
    under: dict[str, Any] = {"hold_id": hold_id, "device": "GPU-1"}
    job_1 = outside.usage("lhr", "n1", b, "job-1", at("10:00"), at("10:30"), **under)
    await outside.say(job_1)
    await outside.charged(b, 420 * PKR)
    assert (80, 0, 80) == await lot(outside, b)

    edges = [at("10:00"), at("10:07"), at("10:21"), at("10:30")]
    await outside.say(
        *(
            outside.usage("lhr", "n1", b, "job-1", start, end, **under)
            for start, end in pairwise(edges)
        )
    )
    accounts = await outside.read("lhr", 4)
    assert GPU_HOUR // 2 == int(accounts["duplicate_gpu_ns"])
    assert (80, 0, 80) == await lot(outside, b)

    await outside.say(outside.usage("khi", "n2", a, "job-2", at("10:15"), at("11:15")))
    await outside.charged(a, 840 * PKR)
    assert (840, 0, 160) == await owed(outside, a)

    job_3 = outside.usage("lhr", "n1", a, "job-3", at("10:20"), at("10:40"), device="GPU-1")
    await outside.say(job_3)
    await outside.charged(a, 980 * PKR)
    assert (980, 0, 20) == await owed(outside, a)
    (conflict,) = await outside.quarantined("lhr")
    assert "conflict" == conflict["reason"]
    assert "job-1" in conflict["detail"]
    assert "job-3" in conflict["detail"]
    path = f"/v1/quarantine/{conflict['quarantine_id']}/dismiss"
    await outside.api.post("metering", path, "operator", {"reason": "job-1 has the device"})
    assert 600_000_000_000 == int((await outside.accounts("lhr"))["quarantined_gpu_ns"])


async def july_waits_for_karachi(outside: Outside, b: str, hold_id: str) -> None:
    """Steps 8 to 10: one hub is complete, the other is not; late usage is still booked."""
    period = "/v1/periods/2025-07"
    await outside.say(
        outside.watermark("khi", "n2", at("12:00")), outside.watermark("lhr", "n1", at("19:00"))
    )
    noon = "2025-07-31T12:00:00.000Z"
    await until(lambda: outside.balance(b), lambda x: x["as_of"]["complete_until"] == noon)
    july = await until(
        lambda: outside.api.get("invoicing", period, "finance"),
        lambda x: [blocker["hub"] for blocker in x["blocked_by"]] == ["khi"],
    )
    assert "open" == july["state"]
    assert "/hubs/khi/nodes/n2/epochs/e1" == july["blocked_by"][0]["source"]
    with pytest.raises(RefusedError) as refused:
        await close(outside, attempt=1)
    assert (409, "period-incomplete") == (refused.value.status, refused.value.problem["code"])

    late = {"hold_id": hold_id, "device": "GPU-2"}
    await outside.say(outside.usage("lhr", "n1", b, "job-1", at("10:30"), at("10:40"), **late))
    balance = await outside.charged(b, 560 * PKR)
    assert (500, 60) == pkr_of(balance, "funded", "unfunded")

    await outside.say(outside.watermark("khi", "n2", at("19:00")))
    await until(
        lambda: outside.api.get("invoicing", period, "finance"),
        lambda x: x["state"] == "closable",
    )


async def close(outside: Outside, attempt: int) -> None:
    """Have finance close July."""
    body = {"issued_on": None, "override": None}
    await outside.api.post("invoicing", "/v1/periods/2025-07/close", "finance", body, attempt)


async def the_bill(outside: Outside, a: str) -> None:
    """Steps 11 and 12: one invoice for A, and the ledger is told."""
    (invoice,) = await until(
        lambda: outside.api.items("invoicing", "/v1/invoices", "finance", period="2025-07"),
        lambda found: [invoice["state"] for invoice in found] == ["finalised"],
    )
    assert (a, "ignite-haas") == (invoice["tenant_id"], invoice["legal_entity"])
    assert {("khi", "84000", "12600", "0"), ("lhr", "14000", "2240", "0")} == {
        (line["hub"], line["net_minor"], line["tax_minor"], line["residue_micro"])
        for line in invoice["lines"]
    }
    assert ("98000", "14840", "112840") == tuple(
        invoice[f"{name}_minor"] for name in ("net", "tax", "total")
    )
    assert (0, 980, 20) == await owed(outside, a)
    path = f"/v1/invoices/{invoice['invoice_id']}/recompute"
    assert (await outside.api.post("invoicing", path, "auditor", {}))["identical"] is True


async def the_sums(outside: Outside, a: str, b: str) -> None:
    """After step 12: GPU time by hub, and who pays what."""
    hubs = [await outside.accounts(hub) for hub in ("lhr", "khi")]
    sides = ("reported", "billed", "duplicate", "quarantined", "difference")
    sums = [sum(int(hub[f"{side}_gpu_ns"]) for hub in hubs) for side in sides]
    assert [x * 10**11 for x in (90, 66, 18, 6, 0)] == sums
    assert 1_540 == sum(pkr_of(hub, "charge")[0] for hub in hubs)
    assert (560, 500, 60) == pkr_of(await outside.balance(b), "charged", "funded", "unfunded")
    assert (980, 980) == pkr_of(await outside.balance(a), "charged", "invoiced")
    trial = await outside.api.get("ledger", "/v1/trial-balance", "auditor")
    assert "0" == trial["sum_micro"]
    period = await outside.api.get("invoicing", "/v1/periods/2025-07/reconciliation", "finance")
    assert "0" == period["difference_micro"]


@pytest.mark.slow
async def test_one_afternoon_end_to_end(own_stack: Stack) -> None:
    """Every amount of the worked example, through the doors that outsiders use."""
    assert at("19:00") == 1_753_988_400_000
    assert HOUR == 3_600_000
    async with outside_of(own_stack) as outside:
        a = await outside.tenant("commercial", 1_000 * PKR)
        b = await outside.tenant("startup", 0)
        hold_id = await the_morning(outside, b)
        await usage_is_booked(outside, a, b, hold_id)
        await july_waits_for_karachi(outside, b, hold_id)
        await close(outside, attempt=2)
        await the_bill(outside, a)
        await the_sums(outside, a, b)
