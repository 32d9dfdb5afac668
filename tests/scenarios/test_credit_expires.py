"""Credit expires when every hub has passed its end, and a late hour takes its part back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from e2e.outside import Outside, at, outside_of, until
from stack import Stack

PKR = 1_000_000
HOUR_OF_H100 = 840 * PKR


async def subsidy_until_noon(outside: Outside, tenant_id: str, hub: str) -> None:
    """Have 40 % of what runs on a hub until noon paid, up to 10 000 PKR."""
    body = {
        "tenant_id": tenant_id,
        "programme_id": "ignite",
        "grant_micro": str(10_000 * PKR),
        "priority": 0,
        "effective_at": "2025-07-31T00:00:00.000Z",
        "expires_at": "2025-07-31T12:00:00.000Z",
        "scope": {"hubs": [hub]},
        "coverage_bps": 4_000,
        "tax_effect": "tender",
    }
    proposed = await outside.api.post("ledger", "/v1/grants", "officer", body)
    path = f"/v1/grants/{proposed['grant_id']}/approve"
    await outside.api.post("ledger", path, "approver", {})


@pytest.mark.slow
async def test_a_subsidy_expires_by_the_watermarks_and_a_late_hour_takes_its_part_back(
    own_stack: Stack,
) -> None:
    """From the hub's events to the balance that a tenant reads, through metering and ledger."""
    async with outside_of(own_stack) as outside:
        hub, slow_hub = await outside.hub(), await outside.hub()
        tenant_id = await outside.tenant("startup", 0)
        await subsidy_until_noon(outside, tenant_id, hub)
        await outside.say(
            outside.usage(hub, "n1", tenant_id, "job-1", at("10:00"), at("11:00")),
            outside.watermark(hub, "n1", at("13:00")),
            outside.watermark(slow_hub, "n1", at("09:00")),
        )
        balance = await outside.charged(tenant_id, HOUR_OF_H100)
        assert str(HOUR_OF_H100 * 4 // 10) == balance["funded_micro"]
        # One hub has passed noon and the other has not: what it may still report would be paid.
        await until(
            lambda: outside.api.get("ledger", "/v1/status", "operator"),
            lambda x: {hub, slow_hub} <= {name for name, at in x["complete_until"].items() if at},
        )
        assert ["grant", "charge"] == [e["kind"] for e in await outside.entries(tenant_id)]
        await outside.say(outside.watermark(slow_hub, "n1", at("12:00")))
        left_micro = 10_000 * PKR - HOUR_OF_H100 * 4 // 10
        await until(
            lambda: outside.balance(tenant_id),
            lambda x: x["breakage_micro"] == str(left_micro),
        )
        await outside.say(outside.usage(hub, "n1", tenant_id, "job-2", at("11:00"), at("12:00")))
        balance = await outside.charged(tenant_id, 2 * HOUR_OF_H100)
        found = await outside.entries(tenant_id)
        assert ["grant", "charge", "expiry", "expiry_reversed", "charge"] == [
            entry["kind"] for entry in found
        ]
        assert "2025-07-31T12:00:00.000Z" == found[3]["effective_at"]
        assert [str(2 * HOUR_OF_H100 * share // 10) for share in (4, 6)] == [
            balance[f"{name}_micro"] for name in ("funded", "unfunded")
        ]
        trial = await outside.api.get("ledger", "/v1/trial-balance", "auditor")
        assert "0" == trial["sum_micro"]
    assert "all books are sound\n" == audited(own_stack)


def audited(stack: Stack) -> str:
    """What the audit command says."""
    environ = os.environ | {"HISAB_DB_READER": stack.database("ledger", "reader")}
    command = [sys.executable, "-m", "ledger", "audit"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False).stdout
