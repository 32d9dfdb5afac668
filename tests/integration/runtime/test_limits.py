"""What a flood costs: invented keys, invented names, and the keys that work meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2
import msgspec
import pytest
from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import Response

from integration.runtime.bare import Bare
from runtime import auth, telemetry
from runtime.auth import Access, AccessLimits
from runtime.http import ANY_KEY, Position, Resource, get, json_response, page_of
from runtime.records import Record
from runtime.service import Kit, Parts, Status, make_app
from runtime.throttle import MOST_PARTIES, keep_newest

FLOOD = 3_000


class Door(Resource):
    """An endpoint behind a key."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    @get("/v1/doors/{door}", roles=ANY_KEY)
    async def enter(self, request: Request, door: str) -> Response:
        """Say who came, through which door."""
        principal = await self._kit.access.authorise(request)
        page = page_of(request, tuple[Position])
        return json_response({"key_id": principal.key_id, "door": door, "limit": page.limit})


@contextlib.asynccontextmanager
async def opened(
    bare: Bare, limits: AccessLimits, addresses: int = 1
) -> AsyncIterator[tuple[Kit, list[httpx2.AsyncClient], str]]:
    """A service with these limits, clients at so many addresses, and a key that works."""
    minted = auth.mint("good", "operator")
    async with bare.open_kit() as made:
        kit = replace(made, access=Access(made.api, bare.service.roles, limits))
        async with kit.writer.transaction() as connection:
            await auth.store_keys(connection, [minted.access_key])
        app = make_app(bare.service, kit, Parts(resources=(Door(kit),)))
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for number in range(addresses):
                transport = httpx2.ASGITransport(app=app, client=(f"10.0.0.{number}", 1))
                client = httpx2.AsyncClient(transport=transport, base_url="http://t")
                clients.append(await stack.enter_async_context(client))
            yield kit, clients, minted.secret


async def statuses(client: httpx2.AsyncClient, secrets: list[str]) -> list[int]:
    """Come with one key after the other."""
    return [
        (await client.get("/v1/doors/a", headers={"authorization": f"Bearer {secret}"})).status_code
        for secret in secrets
    ]


def invented(count: int) -> list[str]:
    """Make keys that nobody knows."""
    return [auth.mint("x", "operator").secret for _ in range(count)]


async def test_invented_keys_are_looked_up_so_many_times_only(bare: Bare) -> None:
    """401 for each that was looked up, at first; then 429 with Retry-After, without a look-up.

    Another address has its own count, and what is no key at all costs nothing.
    """
    limits = AccessLimits(unknown_keys_per_s=1, unknown_keys_limit=20)
    async with opened(bare, limits, addresses=2) as (_, (here, elsewhere), _key):
        begun_s = time.monotonic()
        flood = await statuses(here, invented(300))
        passed_s = int(time.monotonic() - begun_s) + 1
        assert [401] * 20 == flood[:20]
        assert {401, 429} == set(flood)
        assert flood.count(401) <= 20 + passed_s
        refused = [
            await here.get("/v1/doors/a", headers={"authorization": f"Bearer {secret}"})
            for secret in invented(50 + passed_s)
        ]
        (said, *_) = [answer for answer in refused if answer.status_code == 429]
        assert "too-many-requests" == said.json()["code"]
        assert "1" == said.headers["retry-after"]
        assert [401] == await statuses(elsewhere, invented(1))
        assert [401] * 50 == await statuses(elsewhere, ["nonsense"] * 50)


async def test_a_good_key_works_behind_an_address_that_floods(bare: Bare) -> None:
    """Also when the cache has forgotten it for a second: it was good before."""
    limits = AccessLimits(unknown_keys_per_s=1, unknown_keys_limit=1)
    async with opened(bare, limits) as (kit, (client,), good):
        assert [200] == await statuses(client, [good])
        await statuses(client, invented(50))
        expire(kit.access)
        assert [200] == await statuses(client, [good])


def expire(access: Access) -> None:
    """Let the time of every key that was found be over."""
    for sha256, (_, principal) in list(access._found.items()):
        access._found[sha256] = (0.0, principal)


async def test_good_keys_that_come_together_are_not_counted(bare: Bare) -> None:
    """More of them than an address may invent, and each forty times at once: 200 for all.

    Also when the time of all of them is over at once, and no invented key has less for it.
    """
    limits = AccessLimits(unknown_keys_per_s=1, unknown_keys_limit=auth.FIRST_LOOK_UPS)
    async with opened(bare, limits) as (kit, (client,), _good):
        minted = [auth.mint(f"k{number}", "operator") for number in range(10)]
        async with kit.writer.transaction() as connection:
            await auth.store_keys(connection, [key.access_key for key in minted])
        for _ in range(3):
            found = await asyncio.gather(
                *(statuses(client, [key.secret]) for key in minted for _ in range(40))
            )
            assert [[200]] * 400 == found
            expire(kit.access)
        assert {} == kit.access._looking
        assert [401] * limits.unknown_keys_limit == await statuses(
            client, invented(limits.unknown_keys_limit)
        )


async def test_a_key_that_was_good_is_known_through_an_outage_of_the_database(bare: Bare) -> None:
    """503 meanwhile, and nothing is counted; afterwards it passes beside a flood. Revoked: 401."""
    limits = AccessLimits(unknown_keys_per_s=1, unknown_keys_limit=1)
    async with opened(bare, limits) as (kit, (client,), good):
        assert [200] == await statuses(client, [good])
        expire(kit.access)
        await kit.api.close()
        assert [503, 503, 503] == await statuses(client, [good, *invented(2)])
        await kit.api.open()
        await statuses(client, invented(50))
        assert [200] == await statuses(client, [good])
        (principal,) = [principal for _, principal in kit.access._found.values()]
        async with kit.writer.transaction() as connection:
            key = await auth.find_access_key(connection, principal.key_id)
            assert key is not None
            await auth.store_keys(connection, [msgspec.structs.replace(key, revoked=True)])
        expire(kit.access)
        assert [401] == await statuses(client, [good])
        assert {} == kit.access._found


async def test_a_flood_of_keys_is_forgotten_in_the_order_it_came(bare: Bare) -> None:
    """The caches have a bound, and the keys that work stay among the known."""
    wide = AccessLimits(unknown_keys_per_s=1_000_000, unknown_keys_limit=1_000_000)
    async with opened(bare, wide) as (kit, (client,), good):
        for number in range(MOST_PARTIES):
            keep_newest(kit.access._unknown, str(number), 0.0)
        assert [401, 200] == await statuses(client, [*invented(1), good])
        assert MOST_PARTIES == len(kit.access._unknown)


async def test_a_key_that_asks_too_often_waits_and_others_do_not(bare: Bare) -> None:
    """429 for this key only, with Retry-After."""
    async with opened(bare, AccessLimits(requests_per_s=1)) as (kit, (client,), good):
        other = auth.mint("other", "auditor")
        async with kit.writer.transaction() as connection:
            await auth.store_keys(connection, [other.access_key])
        begun_s = time.monotonic()
        found = await statuses(client, [good] * 50)
        assert [200, 200] == found[:2]
        assert {200, 429} >= set(found)
        assert found.count(200) <= 2 + int(time.monotonic() - begun_s) + 1
        assert [200] == await statuses(client, [other.secret])


async def test_the_status_is_looked_up_once_at_a_time(bare: Bare) -> None:
    """However many ask, with however good a key: they take one connection from those who work.

    What was done before the call is in the answer, whoever else asks.
    """
    running, most_running, unpublished = 0, 0, 0

    async def look() -> Status:
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        found = Status(unpublished=unpublished)
        async with kit.writer.connection() as connection:
            await connection.fetchval("select 1")
        running -= 1
        return found

    async with bare.open_kit() as kit:
        minted = auth.mint("t", "tenant", tenant_id="ravi")
        async with kit.writer.transaction() as connection:
            await auth.store_keys(connection, [minted.access_key])
        app = make_app(bare.service, kit, Parts(status=look))
        headers = {"authorization": f"Bearer {minted.secret}"}
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://t") as client:

            async def done_and_asked() -> bool:
                nonlocal unpublished
                unpublished += 1
                done = unpublished
                answer = await client.get("/v1/status", headers=headers)
                return bool(answer.json()["outbox_depth"] >= done)

            assert [True] * 100 == await asyncio.gather(*(done_and_asked() for _ in range(100)))
        assert 1 == most_running


def samples() -> int:
    """Count what the process remembers for /metrics."""
    return sum(len(metric.samples) for metric in REGISTRY.collect())


@pytest.mark.defect("F63")
async def test_no_label_of_a_metric_comes_from_outside(bare: Bare) -> None:
    """Methods, paths, queries and records of a flood add next to nothing to what is remembered."""
    async with opened(bare, AccessLimits()) as (_, (client,), good):
        headers = {"authorization": f"Bearer {good}"}
        for method in (*telemetry.METHODS, "FIRST"):
            for path in ("/", "/docs", "/v1/doors/a", "/nowhere"):
                await client.request(method, path, headers=headers)
        await client.get("/v1/doors/a?limit=0", headers=headers)
        with telemetry.batch_span("group", []):
            pass
        before = samples()
        for number in range(FLOOD):
            await client.request(f"METHOD{number}", f"/nowhere/{number}?a{number}=1")
            await client.get(f"/v1/doors/{number}?limit=0", headers=headers)
            record = Record(f"hub.h{number}.usage.v1", 0, number, 0, b"k", b"{}", ())
            with telemetry.batch_span("group", [record]):
                pass
        assert before == samples()
        text = (await client.get("/metrics")).text
        assert "METHOD" not in text
        assert 'method="other"' in text
        assert 'route="other"' in text
