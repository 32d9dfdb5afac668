"""A key is made once, at the ledger, and known at all three services; so is its revocation."""

from __future__ import annotations

import time
from collections.abc import Mapping

import httpx2
import pytest

from e2e.outside import PATIENCE_S, outside_of, until
from stack import Stack

SERVICES = ("metering", "ledger", "invoicing")


@pytest.mark.parametrize("role", ["auditor", "tenant"])
async def test_one_key_works_everywhere_and_once_revoked_nowhere(stack: Stack, role: str) -> None:
    """Known everywhere soon after it is made, unknown soon after it is revoked; then it stays so.

    A service keeps what it found for a second (`runtime.auth.CACHE_S`); the rest of the five
    seconds that are promised is Kafka's, and how many it takes is the machine's.
    """
    async with outside_of(stack) as outside, httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        tenant_id = await outside.tenant() if role == "tenant" else None
        body = {"role": role, "tenant_id": tenant_id}
        # Equal bodies would be the same command: an attempt of its own makes another key.
        made = await outside.api.post("ledger", "/v1/keys", "operator", body, time.time_ns())
        headers = {"authorization": f"Bearer {made['secret']}"}

        async def statuses() -> Mapping[str, int]:
            return {
                service: (
                    await client.get(f"{stack.url(service)}/v1/status", headers=headers)
                ).status_code
                for service in SERVICES
            }

        await until(statuses, lambda x: set(x.values()) == {200})
        await outside.api.post("ledger", f"/v1/keys/{made['key_id']}/revoke", "operator", {})
        await until(statuses, lambda x: set(x.values()) == {401})
        assert {401} == set((await statuses()).values())
