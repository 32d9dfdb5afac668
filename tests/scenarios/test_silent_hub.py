"""A hub that falls silent keeps its month open, and says so, through all three services."""

from __future__ import annotations

import pytest

from demo.api import Json, RefusedError
from e2e.outside import Outside, at, outside_of, unique, until
from stack import Stack

JULY = "/v1/periods/2025-07"
NOON = "2025-07-31T12:00:00.000Z"


async def short_tempered_hub(outside: Outside) -> str:
    """Register a hub that counts as silent after two seconds."""
    body = {"hub": unique("gone"), "name": "gone", "heartbeat_ms": 1_000}
    return str((await outside.api.post("metering", "/v1/hubs", "operator", body))["hub"])


async def july(outside: Outside) -> Json:
    """How far the month is."""
    return await outside.api.get("invoicing", JULY, "finance")


@pytest.mark.slow
async def test_a_silent_hub_keeps_the_month_open_until_it_speaks_again(own_stack: Stack) -> None:
    """Metering finds it, the ledger carries it, invoicing refuses to close and names the source."""
    async with outside_of(own_stack) as outside:
        hub = await short_tempered_hub(outside)
        tenant_id = await outside.tenant("startup", 0)
        source = f"/hubs/{hub}/nodes/n1/epochs/e1"
        await outside.say(
            outside.usage(hub, "n1", tenant_id, "job-1", at("10:00"), at("10:30")),
            outside.watermark(hub, "n1", at("12:00")),
        )
        said = await until(
            lambda: outside.api.get("metering", f"/v1/hubs/{hub}", "operator"),
            lambda x: x["silent"] and x["complete_until"] == NOON,
        )
        assert hub == said["hub"]
        await until(
            lambda: outside.api.get("ledger", "/v1/status", "operator"),
            lambda x: x["complete_until"].get(hub) == NOON,
        )
        month = await until(
            lambda: july(outside),
            lambda x: [blocker["kind"] for blocker in x["blocked_by"]] == ["silent-hub"],
        )
        (blocker,) = month["blocked_by"]
        assert ("open", hub, source) == (month["state"], blocker["hub"], blocker["source"])
        assert NOON in blocker["detail"]
        body: Json = {"issued_on": None, "override": None}
        with pytest.raises(RefusedError) as refused:
            await outside.api.post("invoicing", f"{JULY}/close", "finance", body)
        assert "period-incomplete" == refused.value.problem["code"]
        assert month["blocked_by"] == refused.value.problem["blocked_by"]

        await outside.say(outside.watermark(hub, "n1", at("19:00")))
        await until(lambda: july(outside), lambda x: x["state"] == "closable")
