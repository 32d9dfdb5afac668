"""Sends the seed values to the services of a fresh stack, and makes the keys of `stack.json`.

All of it goes through the services' public APIs with an operator's key, as an installation would do
it. Every command carries an idempotency key that names what it is for, so that one sent again
after a lost answer changes nothing.

Refusals: `SeedingFailed` names the service that refused, or that nobody answered for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import httpx2

import retries
import seed
from hisab_contracts.ids import HubCode, TenantId
from hisab_contracts.reference import Role

_NOT_YET: Final = retries.LATER | {401}
"""Answers after which the same is sent again. 401 too: a service learns of a key through Kafka, a
moment after the ledger has stored it."""
_MOST_KEYS: Final = 5


class SeedingFailed(Exception):
    """A service did not take what it was seeded with."""

    def __init__(self, service: str, why: str) -> None:
        super().__init__(why)
        self.service = service


class Seeder:
    """Speaks to the three services as the operator."""

    def __init__(self, client: httpx2.AsyncClient, urls: Mapping[str, str], operator: str) -> None:
        self._client = client
        self._urls = urls
        self._operator = operator

    @staticmethod
    def at(urls: Mapping[str, str], operator: str) -> AbstractAsyncContextManager[Seeder]:
        """Open a connection to the services for as long as the block runs."""
        return _connect(urls, operator)

    async def make_key(self, holder: Mapping[str, str], purpose: str) -> str:
        """Have the ledger make an API key; return its secret, which is shown once."""
        for attempt in range(1, _MOST_KEYS + 1):
            named = f"key:{purpose}:{attempt}"
            answer = await self._post("ledger", "/v1/keys", holder, named)
            secret = answer["secret"]
            if isinstance(secret, str):
                return secret
            # The first answer was lost, and the secret with it: nobody will ever have that key.
            path = f"/v1/keys/{answer['key_id']}/revoke"
            await self._post("ledger", path, {}, f"revoke:{named}")
        raise SeedingFailed("ledger", f"the answer to POST /v1/keys was lost {_MOST_KEYS} times")

    async def seed_metering_and_ledger(self) -> dict[str, Any]:
        """Seed what metering and the ledger must know; return the keys that were made."""
        programme = {
            "programme_id": seed.PROGRAMME,
            "name": seed.PROGRAMME_NAME,
            "budget_micro": str(seed.PROGRAMME_BUDGET_MICRO),
        }
        await asyncio.gather(
            *(self._open_tenant(tenant_id) for tenant_id in seed.TENANTS),
            self._post("ledger", "/v1/programmes", programme, f"programme:{seed.PROGRAMME}"),
            self._post("metering", "/v1/price-lists", seed.price_list(), "price-list:2025"),
            *(self._register_hub(hub) for hub in seed.HUBS),
        )
        # Only now: the ledger refuses a key for a tenant it does not know yet.
        staff, hubs, tenants = await asyncio.gather(
            self._make_keys({role: {"role": role} for role in seed.STAFF}),
            self._make_keys({hub: {"role": Role.HUB, "hub": hub} for hub in seed.HUBS}),
            self._make_keys({t: {"role": Role.TENANT, "tenant_id": t} for t in seed.TENANTS}),
        )
        return {"operator": self._operator, **staff, "hub": hubs, "tenant": tenants}

    async def seed_invoicing(self) -> None:
        """Seed the legal entity that sells and the tax rates of the three authorities."""
        entity = {"legal_entity_id": seed.LEGAL_ENTITY, "name": seed.LEGAL_ENTITY_NAME}
        purpose = f"legal-entity:{seed.LEGAL_ENTITY}"
        await self._post("invoicing", "/v1/legal-entities", entity, purpose)
        await asyncio.gather(*(self._set_tax_rate(rate) for rate in seed.TAX_RATES))

    async def wait_until_keys_work(self, keys: Mapping[str, Any]) -> None:
        """Wait until every service accepts the keys just made: it learns of them through Kafka."""
        secrets = [secret for group in ("hub", "tenant") for secret in keys[group].values()]
        secrets += [keys[role] for role in seed.STAFF]
        for service in self._urls:
            for secret in secrets:
                answer = await self._call(service, "GET", "/v1/status", secret)
                if answer.status_code != httpx2.codes.OK:
                    raise SeedingFailed(service, f"it does not know a key: {_said(answer)}")

    async def _open_tenant(self, tenant_id: TenantId) -> None:
        tenant = seed.TENANTS[tenant_id]
        body = {
            "tenant_id": tenant_id,
            "name": tenant.name,
            "kind": tenant.kind,
            "currency": seed.CURRENCY,
            "credit_limit_micro": str(tenant.credit_limit_micro),
        }
        await self._post("ledger", "/v1/tenants", body, f"tenant:{tenant_id}")

    async def _register_hub(self, hub: HubCode) -> None:
        body = {"hub": hub, "name": seed.HUBS[hub], "heartbeat_ms": seed.HEARTBEAT_MS}
        await self._post("metering", "/v1/hubs", body, f"hub:{hub}")

    async def _set_tax_rate(self, rate: seed.SeedTaxRate) -> None:
        body = {
            "hub": rate.hub,
            "authority": rate.authority,
            "tax_bps": rate.tax_bps,
            "valid_from": seed.TAX_VALID_FROM,
            "citation": rate.citation,
        }
        await self._post("invoicing", "/v1/tax-rates", body, f"tax:{rate.hub}")

    async def _make_keys(self, holders: Mapping[Any, Mapping[str, str]]) -> dict[str, str]:
        """Make a key per holder, all at once; return their secrets by the holder's name."""
        secrets = await asyncio.gather(
            *(self.make_key(holder, name) for name, holder in holders.items())
        )
        return {str(name): secret for name, secret in zip(holders, secrets, strict=True)}

    async def _post(
        self, service: str, path: str, body: Mapping[str, object], purpose: str
    ) -> dict[str, Any]:
        """Send one command, again while the service is not ready for it."""
        answer = await self._call(
            service,
            "POST",
            path,
            self._operator,
            json=dict(body),
            headers={"Idempotency-Key": f"seed:{purpose}"},
        )
        if not answer.is_success:
            raise SeedingFailed(service, f"it refused POST {path}: {_said(answer)}")
        content = answer.json() if answer.content else {}
        return content if isinstance(content, dict) else {}

    async def _call(
        self, service: str, method: str, path: str, secret: str, **more: Any
    ) -> httpx2.Response:
        """Read, or command with an idempotency key, until the service answers for good."""
        headers = {"Authorization": f"Bearer {secret}"} | more.pop("headers", {})
        request = self._client.build_request(
            method, f"{self._urls[service]}{path}", headers=headers, **more
        )
        try:
            return await retries.call(lambda: self._client.send(request), later=_NOT_YET)
        except retries.Unanswered as unanswered:
            raise SeedingFailed(service, f"{method} {path}: {unanswered}") from unanswered


def _said(answer: httpx2.Response) -> str:
    return f"{answer.status_code} {answer.text[:500]}"


@asynccontextmanager
async def _connect(urls: Mapping[str, str], operator: str) -> AsyncIterator[Seeder]:
    # Without the environment's proxies: the services listen on the loopback.
    async with httpx2.AsyncClient(timeout=retries.ANSWER_PATIENCE_S, trust_env=False) as client:
        yield Seeder(client, urls, operator)
