"""What a fresh stack knows: hubs, tenants, prices, one programme, taxes and keys.

All of it goes through the services' public APIs with an operator's key, as an installation would do
it; no grants, no usage. Every command carries an idempotency key made of what it says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import httpx2

from children import StackError

HUBS: Final = {"lhr": "Lahore", "khi": "Karachi", "isb": "Islamabad"}
TENANTS: Final = {
    "indus-foundry": ("Indus Foundry", "commercial"),
    "chenab-robotics": ("Chenab Robotics", "commercial"),
    "makran-logistics": ("Makran Logistics", "commercial"),
    "khyber-media": ("Khyber Media", "commercial"),
    "ravi-health": ("Ravi Health", "startup"),
    "sutlej-agri": ("Sutlej Agri", "startup"),
    "mehran-speech": ("Mehran Speech", "startup"),
    "soan-fintech": ("Soan Fintech", "startup"),
    "uni-karakoram": ("University of Karakoram", "university"),
    "uni-hingol": ("University of Hingol", "university"),
    "flood-watch": ("Flood Watch", "programme"),
    "crop-watch": ("Crop Watch", "programme"),
}
COMMERCIAL_CREDIT_LIMIT_MICRO: Final = 10**15
PROGRAMME_BUDGET_MICRO: Final = 10**14
PKR_PER_GPU_HOUR: Final = {
    "h100-sxm-80": 840,
    "h200-sxm-141": 1100,
    "a100-sxm-80": 420,
    "l40s-48": 260,
    "b200-sxm-180": 1450,
}
PERCENT_OF_LIST: Final = {"on_demand": 100, "reserved": 80, "spot": 50}
TAXES: Final = (
    (
        "lhr",
        "PRA",
        1600,
        "Punjab Sales Tax on Services Act 2012 (demonstration value, unconfirmed)",
    ),
    ("khi", "SRB", 1500, "Sindh Sales Tax on Services Act 2011 (demonstration value, unconfirmed)"),
    ("isb", "FBR", 1500, "ICT (Tax on Services) Ordinance 2001 (demonstration value, unconfirmed)"),
)
STAFF: Final = ("officer", "approver", "finance", "auditor", "scheduler")
_PATIENCE_S: Final = 300
_MICRO_PER_PKR: Final = 1_000_000


def prices() -> list[dict[str, str]]:
    """Return the lines of the seeded price list."""
    return [
        {
            "sku": sku,
            "price_class": price_class,
            "micro_per_gpu_hour": str(pkr * _MICRO_PER_PKR * percent // 100),
        }
        for sku, pkr in PKR_PER_GPU_HOUR.items()
        for price_class, percent in PERCENT_OF_LIST.items()
    ]


class Planter:
    """Speaks to the three services as the operator."""

    def __init__(self, client: httpx2.AsyncClient, urls: Mapping[str, str], operator: str) -> None:
        self._client = client
        self._urls = urls
        self._operator = operator

    @staticmethod
    def at(urls: Mapping[str, str], operator: str) -> AbstractAsyncContextManager[Planter]:
        """Open a connection to the services for as long as the block runs."""
        return _planter(urls, operator)

    async def make_key(self, whose: Mapping[str, str], purpose: str) -> str:
        """Have the ledger make an API key; return its secret, which is shown once."""
        answer = await self._post("ledger", "/v1/keys", whose, f"key:{purpose}")
        secret = answer["secret"]
        if not isinstance(secret, str):
            raise StackError(f"the ledger made a key for {purpose} but did not show its secret")
        return secret

    async def plant_reference(self) -> dict[str, Any]:
        """Plant what metering and the ledger must know; return the keys that were made."""
        tenants = asyncio.create_task(self._plant_tenants())
        await asyncio.gather(
            tenants,
            self._post(
                "ledger",
                "/v1/programmes",
                {
                    "programme_id": "ignite",
                    "name": "Ignite",
                    "budget_micro": str(PROGRAMME_BUDGET_MICRO),
                },
                "programme:ignite",
            ),
            self._post(
                "metering",
                "/v1/price-lists",
                {
                    "currency": "PKR",
                    "valid_from": "2025-01-01T00:00:00.000Z",
                    "valid_until": None,
                    "prices": prices(),
                },
                "price-list:2025",
            ),
            *(
                self._post(
                    "metering",
                    "/v1/hubs",
                    {"hub": hub, "name": name, "heartbeat_ms": 60_000},
                    f"hub:{hub}",
                )
                for hub, name in HUBS.items()
            ),
        )
        staff, hubs, secrets = await asyncio.gather(
            self._keys_for({role: {"role": role} for role in STAFF}),
            self._keys_for({hub: {"role": "hub", "hub": hub} for hub in HUBS}),
            self._keys_for({t: {"role": "tenant", "tenant_id": t} for t in TENANTS}),
        )
        return {"operator": self._operator, **staff, "hub": hubs, "tenant": secrets}

    async def _plant_tenants(self) -> None:
        await asyncio.gather(
            *(
                self._post(
                    "ledger",
                    "/v1/tenants",
                    {
                        "tenant_id": tenant,
                        "name": name,
                        "kind": kind,
                        "currency": "PKR",
                        "credit_limit_micro": str(
                            COMMERCIAL_CREDIT_LIMIT_MICRO if kind == "commercial" else 0
                        ),
                    },
                    f"tenant:{tenant}",
                )
                for tenant, (name, kind) in TENANTS.items()
            )
        )

    async def _keys_for(self, wanted: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        made = await asyncio.gather(*(self.make_key(body, name) for name, body in wanted.items()))
        return dict(zip(wanted, made, strict=True))

    async def plant_invoicing(self) -> None:
        """Plant the legal entity that sells and the tax rows of the three authorities."""
        entity = {"legal_entity_id": "ignite-haas", "name": "Ignite HaaS"}
        await self._post("invoicing", "/v1/legal-entities", entity, "legal-entity:ignite-haas")
        await asyncio.gather(
            *(
                self._post(
                    "invoicing",
                    "/v1/tax-rates",
                    {
                        "hub": hub,
                        "authority": authority,
                        "tax_bps": tax_bps,
                        "valid_from": "2024-07-01",
                        "citation": citation,
                    },
                    f"tax:{hub}",
                )
                for hub, authority, tax_bps, citation in TAXES
            )
        )

    async def wait_usable(self, keys: Mapping[str, Any]) -> None:
        """Wait until the services know the keys just made: they hear of them through Kafka."""
        ours = [key for name in ("hub", "tenant") for key in keys[name].values()]
        ours += [keys[role] for role in STAFF]
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        for service in self._urls:
            for key in ours:
                while await self._status(service, key) != httpx2.codes.OK:
                    if asyncio.get_running_loop().time() > deadline:
                        raise StackError(f"{service} does not know the keys after {_PATIENCE_S} s")
                    await asyncio.sleep(0.05)

    async def _status(self, service: str, key: str) -> int:
        answer = await self._client.get(
            f"{self._urls[service]}/v1/status", headers={"Authorization": f"Bearer {key}"}
        )
        return answer.status_code

    async def _post(
        self, service: str, path: str, body: Mapping[str, object], purpose: str
    ) -> dict[str, Any]:
        """Send one command; while the service does not know the operator's key yet, again."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while True:
            answer = await self._client.post(
                f"{self._urls[service]}{path}",
                json=dict(body),
                headers={
                    "Authorization": f"Bearer {self._operator}",
                    "Idempotency-Key": f"seed:{purpose}",
                },
            )
            if answer.is_success:
                said = answer.json() if answer.content else {}
                return said if isinstance(said, dict) else {}
            late = asyncio.get_running_loop().time() > deadline
            if answer.status_code not in {401, 429, 503} or late:
                raise StackError(
                    f"{service} refused POST {path} with {answer.status_code}: {answer.text[:500]}"
                )
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _planter(urls: Mapping[str, str], operator: str) -> AsyncIterator[Planter]:
    async with httpx2.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
        yield Planter(client, urls, operator)
