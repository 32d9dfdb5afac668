"""The HTTP shell on a real database: order of checks, strict bodies, idempotent commands."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx2
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import Response

from integration.runtime.bare import Bare
from runtime import auth
from runtime.http import (
    ANY_KEY,
    IntegerText,
    Model,
    Position,
    Problem,
    Resource,
    cached_response,
    get,
    page_of,
    page_response,
    post,
)
from runtime.idempotency import Answer, read_command, run_command
from runtime.service import Kit, Parts, make_app

if TYPE_CHECKING:
    from runtime.database import Connection


OUTAGES = {
    "connection lost": ("select pg_terminate_backend(pg_backend_pid())",),
    "statement cancelled": ("set local statement_timeout = 20", "select pg_sleep(5)"),
    "locked": ("select pg_advisory_xact_lock(77)",),
    "idle": ("set local idle_in_transaction_session_timeout = 20", "select 1"),
}


LOCK_ROW = "select pg_advisory_xact_lock($1)"


class Order(Model, frozen=True):
    """A body with one of everything."""

    item: str
    count: int = 1
    notes: tuple[str, ...] = ()
    price_micro: IntegerText = "0"


class Placed(msgspec.Struct):
    """An answer."""

    number: int
    secret: str | None


class Shop(Resource):
    """A resource that counts what it did."""

    model: type[Order] = Order

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.placed = 0
        self.open = False
        self.at_work, self.may_end = asyncio.Event(), asyncio.Event()

    @post(
        "/v1/shops/{shop}/orders",
        roles=("operator", "tenant"),
        body=Order,
        answer=Placed,
        status=201,
        idempotent=True,
    )
    async def order(self, request: Request, shop: str) -> Response:
        """Place an order."""
        principal = await self.kit.access.authorise(request)
        auth.require_own_tenant(principal, shop)
        command = await read_command(request, self.model)
        body = command.body

        async def run(connection: Connection) -> Answer:
            if body.item.startswith("both "):
                # Two rows, in the order that the client gives: two clients make a deadlock of it.
                for number in body.item.removeprefix("both "):
                    await connection.execute(LOCK_ROW, int(number))
                    await asyncio.sleep(0.2)
            if body.item == "slow":
                self.at_work.set()
                await self.may_end.wait()
            if body.item == "refused" and not self.open:
                raise Problem("insufficient-credit", "no", available_micro="0")
            if body.item == "not yet" and not self.open:
                raise Problem("period-incomplete", "wait")
            self.placed += 1
            return Answer(201, Placed(self.placed, "s"), stored=Placed(self.placed, None))

        return await run_command(self.kit.api, command, run, scope=shop, tenant=principal.sees)

    @get("/v1/numbers", roles=ANY_KEY, answer=Placed, paged=True)
    async def numbers(self, request: Request) -> Response:
        """List numbers."""
        await self.kit.access.authorise(request)
        page = page_of(request, tuple[Position])
        first = 0 if page.after is None else page.after[0] + 1
        rows = list(range(first, min(7, first + page.limit + 1)))
        return page_response(rows, page, lambda row: (row,))

    @get("/v1/tagged", roles=ANY_KEY, answer=Placed)
    async def tagged(self, request: Request) -> Response:
        """Answer with a tag."""
        return cached_response(request, {"a": 1}, etag="v1")

    @get("/v1/broken", roles=ANY_KEY)
    async def broken(self, request: Request) -> Response:
        """Fail."""
        raise ZeroDivisionError

    @get("/v1/outages/{outage}", roles=ANY_KEY)
    async def outage(self, request: Request, outage: str) -> Response:
        """Meet an outage in mid-statement."""
        async with self.kit.api.transaction(lock_timeout_ms=50) as connection:
            ended = asyncio.Event()
            connection.add_termination_listener(lambda _: ended.set())
            for statement in OUTAGES[outage]:
                if statement == "select 1":  # It stands idle until the server has ended it.
                    await ended.wait()
                await connection.execute(statement)
        return Response()


@contextlib.asynccontextmanager
async def _open(
    bare: Bare, kind: type[Shop] = Shop, keys: dict[str, str] | None = None
) -> AsyncIterator[tuple[Shop, httpx2.AsyncClient, dict[str, str]]]:
    async with bare.open_kit() as kit:
        shop = kind(kit)
        if keys is None:
            keys = await _make_keys(kit)
        app = make_app(bare.service, kit, Parts(resources=(shop,)))
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://t") as client:
            yield shop, client, keys


async def _make_keys(kit: Kit) -> dict[str, str]:
    keys = {}
    async with kit.writer.transaction() as connection:
        for role, tenant in (("operator", None), ("auditor", None), ("tenant", "a")):
            minted = auth.mint(role, role, tenant_id=tenant)
            keys[role] = minted.secret
            await auth.store_keys(connection, [minted.access_key])
    return keys


def _headers(secret: str, key: str | None = "k") -> dict[str, str]:
    named = {} if key is None else {"idempotency-key": key}
    return {"authorization": f"Bearer {secret}", **named}


@pytest.mark.defect("L7", "F66")
async def test_checks_run_in_their_order(bare: Bare) -> None:
    """401, 403, 404, 413, 415, 422, 409: the first that applies, each a problem document."""
    big = b'{"item":"' + b"x" * 1_100_000 + b'"}'
    good = {"item": "x"}
    async with _open(bare) as (_shop, client, keys):
        operator, tenant = keys["operator"], keys["tenant"]
        cases: list[tuple[str, dict[str, Any], str]] = [
            ("unauthenticated", {"headers": _headers("nonsense"), "content": big}, "a"),
            ("unauthenticated", {"headers": {}, "json": good}, "a"),
            ("forbidden", {"headers": _headers(keys["auditor"]), "content": big}, "a"),
            ("not-found", {"headers": _headers(tenant), "content": big}, "b"),
            ("too-large", {"headers": _headers(operator), "content": big}, "a"),
            ("unsupported-media-type", {"headers": _headers(operator), "content": b"{}"}, "a"),
            ("malformed", {"headers": _headers(operator, None), "json": {"item": 3}}, "a"),
            ("idempotency-key-missing", {"headers": _headers(operator, None), "json": good}, "a"),
            (
                "insufficient-credit",
                {"headers": _headers(operator), "json": {"item": "refused"}},
                "a",
            ),
        ]
        for code, sent, shop in cases:
            answer = await client.post(f"/v1/shops/{shop}/orders", **sent)
            document = answer.json()
            assert code == document["code"]
            assert "application/problem+json" == answer.headers["content-type"]
            assert answer.status_code == document["status"]
            assert {"type", "title", "detail", "retryable", "trace_id"} <= set(document)
        assert "not-found" == (await client.get("/nowhere")).json()["code"]
        assert "method-not-allowed" == (await client.put("/v1/numbers")).json()["code"]
        broken = await client.get("/v1/broken")
        assert (500, "internal") == (broken.status_code, broken.json()["code"])


@pytest.mark.parametrize("outage", OUTAGES)
async def test_an_outage_in_mid_statement_is_unavailable(bare: Bare, outage: str) -> None:
    """503 and `retryable`, whether the server, a lock or a deadline ended the statement."""
    holder = await bare.admin()
    await holder.execute("select pg_advisory_lock(77)")
    async with _open(bare) as (_shop, client, _keys):
        answer = await client.get(f"/v1/outages/{outage}")
        assert (503, "unavailable", True) == (
            answer.status_code,
            answer.json()["code"],
            answer.json()["retryable"],
        )
    await holder.close()


@pytest.mark.defect("F63")
async def test_control_characters_are_refused_wherever_they_come(bare: Bare) -> None:
    """A path with one names nothing; a query or a body with one is malformed, and says where."""
    async with _open(bare) as (shop, client, keys):
        headers = _headers(keys["operator"])
        good = {"item": "x"}
        for path in ("/v1/shops/%00/orders", "/v1/shops/a%0Ab/orders"):
            answer = await client.post(path, headers=headers, json=good)
            assert (404, "not-found") == (answer.status_code, answer.json()["code"])
        for query in ("?reason=%00", "?%7F=1"):
            answer = await client.get(f"/v1/numbers{query}", headers=headers)
            assert (422, "malformed") == (answer.status_code, answer.json()["code"])
        for text in ("\x00", "a\nb", "\x7f"):
            bad = {"item": "x", "notes": ["fine: ü\\n", text]}
            answer = await client.post("/v1/shops/a/orders", headers=headers, json=bad)
            assert (422, "malformed") == (answer.status_code, answer.json()["code"])
            assert "`$.notes[1]`" in answer.json()["detail"]
        fine = {"item": "ü\\n", "notes": ["\u0627"]}
        answer = await client.post("/v1/shops/a/orders", headers=headers, json=fine)
        assert (201, 1) == (answer.status_code, shop.placed)


@pytest.mark.defect("L15", "F63")
@pytest.mark.parametrize(
    "body",
    [
        b'{"item":"x","count":1.0}',
        b'{"item":"x","count":"1"}',
        b'{"item":"x","count":true}',
        b'{"item":"x","count":1e3}',
        b'{"item":"x","count":NaN}',
        b'{"item":"x","count":Infinity}',
        b'{"item":"x","more":1}',
        b'{"item":"x","price_micro":"1.0"}',
        b'{"item":"x","price_micro":1}',
        b'{"item":"x","price_micro":"-0"}',
        b'{"item":"\xff"}',
        b"[" * 40 + b"]" * 40,
        b"",
    ],
)
async def test_a_body_is_taken_strictly(bare: Bare, body: bytes) -> None:
    """No float for an integer, no text for a number, no unknown member, no deep nesting."""
    async with _open(bare) as (shop, client, keys):
        headers = _headers(keys["operator"]) | {"content-type": "application/json"}
        answer = await client.post("/v1/shops/a/orders", headers=headers, content=body)
        assert (422, "malformed") == (answer.status_code, answer.json()["code"])
        assert 0 == shop.placed


@pytest.mark.defect("L9")
async def test_64_equal_requests_run_once_and_get_one_answer(bare: Bare) -> None:
    """Every retry gets the stored answer, byte for byte; the secret is in the first one only."""
    async with _open(bare) as (shop, client, keys):

        async def order() -> httpx2.Response:
            while True:
                answer = await client.post(
                    "/v1/shops/a/orders", headers=_headers(keys["operator"]), json={"item": "x"}
                )
                if answer.status_code == 201 or not answer.json()["retryable"]:
                    return answer

        answers = await asyncio.gather(*(order() for _ in range(64)))
        assert {201} == {answer.status_code for answer in answers}
        assert 1 == shop.placed
        bodies = [answer.content for answer in answers]
        assert 63 == bodies.count(b'{"number":1,"secret":null}')
        assert 1 == bodies.count(b'{"number":1,"secret":"s"}')


@pytest.mark.defect("L7", "L8", "F66")
async def test_a_key_is_bound_to_its_content_and_its_scope(bare: Bare) -> None:
    """Other content: refused, naming the members; another tenant's equal key: independent.

    What was sent counts, not how it was written: neither the order of members nor white space.
    """
    async with _open(bare) as (shop, client, keys):
        post = client.post
        headers = _headers(keys["operator"])
        written = headers | {"content-type": "application/json"}
        first = await post("/v1/shops/a/orders", headers=headers, json={"item": "x", "count": 1})
        same = await post(
            "/v1/shops/a/orders", headers=written, content=b'{ "count":1, "item": "x" }'
        )
        other = await post("/v1/shops/a/orders", headers=headers, json={"item": "y", "count": 2})
        elsewhere = await post("/v1/shops/b/orders", headers=headers, json={"item": "x"})
        assert [201, 201, 409, 201] == [
            answer.status_code for answer in (first, same, other, elsewhere)
        ]
        assert "idempotency-key-reused" == other.json()["code"]
        assert ["count", "item"] == other.json()["differing"]
        assert 2 == shop.placed


class LaterOrder(Order, frozen=True):
    """The same body a release later: with an optional member more."""

    gift: bool = False
    comment: str | None = None


class LaterShop(Shop):
    """The shop after an upgrade."""

    model = LaterOrder


@pytest.mark.defect("L7", "L8")
async def test_a_retry_across_an_upgrade_gets_the_first_answer(bare: Bare) -> None:
    """A fingerprint stored before an optional member was added still answers after it.

    Nothing is filled in: the new member's default, said aloud, is another command, and so is a
    null where there was nothing.
    """
    async with _open(bare) as (_shop, client, keys):
        first = await client.post(
            "/v1/shops/a/orders", headers=_headers(keys["operator"]), json={"item": "x"}
        )
        secret = keys["operator"]
    async with _open(bare, LaterShop, keys={"operator": secret}) as (shop, client, _keys):
        path, headers = "/v1/shops/a/orders", _headers(secret)
        retry = await client.post(path, headers=headers, json={"item": "x"})
        assert (201, 0) == (retry.status_code, shop.placed)
        assert first.json() | {"secret": None} == retry.json()
        for said in ({"gift": False}, {"comment": None}):
            other = await client.post(path, headers=headers, json={"item": "x"} | said)
            assert (409, list(said)) == (other.status_code, other.json()["differing"])


@pytest.mark.defect("L8")
async def test_a_refusal_is_remembered_and_one_that_may_pass_is_not(bare: Bare) -> None:
    """The same key gets the same refusal although the reason is gone; a retryable one is tried."""
    async with _open(bare) as (shop, client, keys):
        refused = await client.post(
            "/v1/shops/a/orders",
            headers=_headers(keys["operator"], "refused"),
            json={"item": "refused"},
        )
        waiting = await client.post(
            "/v1/shops/a/orders", headers=_headers(keys["operator"], "w"), json={"item": "not yet"}
        )
        shop.open = True
        again = await client.post(
            "/v1/shops/a/orders",
            headers=_headers(keys["operator"], "refused"),
            json={"item": "refused"},
        )
        later = await client.post(
            "/v1/shops/a/orders", headers=_headers(keys["operator"], "w"), json={"item": "not yet"}
        )
        assert (409, refused.content) == (again.status_code, again.content)
        assert [409, 201] == [waiting.status_code, later.status_code]


@pytest.mark.defect("F31", "L10")
async def test_a_deadlock_is_tried_again(bare: Bare) -> None:
    """Two commands lock in opposite order: both get through, each once."""
    async with _open(bare) as (shop, client, keys):

        async def order(key: str, item: str) -> httpx2.Response:
            headers = _headers(keys["operator"], key)
            return await client.post("/v1/shops/a/orders", headers=headers, json={"item": item})

        answers = await asyncio.gather(order("k1", "both 12"), order("k2", "both 21"))
        assert [201, 201] == [answer.status_code for answer in answers]
        assert 2 == shop.placed


@pytest.mark.slow
async def test_a_request_in_flight_is_said_to_be_in_flight(bare: Bare) -> None:
    """The second of two equal requests does not wait for ever: 409 with Retry-After."""
    async with _open(bare) as (shop, client, keys):

        async def order() -> httpx2.Response:
            return await client.post(
                "/v1/shops/a/orders", headers=_headers(keys["operator"]), json={"item": "slow"}
            )

        first = asyncio.create_task(order())
        await shop.at_work.wait()
        second = await order()
        shop.may_end.set()
        assert "idempotency-key-in-flight" == second.json()["code"]
        assert "1" == second.headers["retry-after"]
        assert 201 == (await first).status_code


async def test_pages_concatenate_to_the_whole_list(bare: Bare) -> None:
    """An opaque cursor, `next` null at the end; a foreign cursor and a high limit are refused."""
    async with _open(bare) as (_shop, client, keys):
        headers = _headers(keys["operator"], None)
        found: list[int] = []
        cursor: str | None = None
        for _ in range(4):
            query = {"limit": "2"} | ({} if cursor is None else {"cursor": cursor})
            page = (await client.get("/v1/numbers", headers=headers, params=query)).json()
            found += page["items"]
            cursor = page["next"]
        assert list(range(7)) == found
        assert cursor is None
        nul = base64.urlsafe_b64encode(b'["\\u0000"]').decode()
        bad_cursors = ({"cursor": "!!"}, {"cursor": nul})
        for bad in ({"limit": "1001"}, {"limit": "0"}, {"limit": "x"}, *bad_cursors):
            answer = await client.get("/v1/numbers", headers=headers, params=bad)
            assert 422 == answer.status_code


async def test_a_known_etag_is_not_sent_again(bare: Bare) -> None:
    """304 without a body when If-None-Match names the current tag."""
    async with _open(bare) as (_shop, client, _keys):
        first = await client.get("/v1/tagged")
        again = await client.get("/v1/tagged", headers={"if-none-match": first.headers["etag"]})
        assert (200, 304, b"") == (first.status_code, again.status_code, again.content)


async def test_an_unknown_key_is_looked_up_once_a_second_at_most(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs no statement meanwhile; when it becomes known it works within a second."""
    # A second of our own: on a busy machine the real one is over before the second look.
    now_s = [time.monotonic()]
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    minted = auth.mint("late", "auditor")
    headers = _headers(minted.secret, None)
    admin = await bare.admin()
    async with _open(bare) as (shop, client, _keys):
        await admin.execute("alter table access_keys rename to hidden")
        assert 500 == (await client.get("/v1/numbers", headers=headers)).status_code
        await admin.execute("alter table hidden rename to access_keys")
        assert 401 == (await client.get("/v1/numbers", headers=headers)).status_code
        await admin.execute("alter table access_keys rename to hidden")
        assert 401 == (await client.get("/v1/numbers", headers=headers)).status_code
        await admin.execute("alter table hidden rename to access_keys")
        async with shop.kit.writer.transaction() as connection:
            await auth.store_keys(connection, [minted.access_key])
        now_s[0] += auth.CACHE_S
        assert 200 == (await client.get("/v1/numbers", headers=headers)).status_code
    await admin.close()


async def test_a_revoked_key_is_refused_within_five_seconds(bare: Bare) -> None:
    """The cache holds a key for a second at most; revocation is never undone by an old message."""
    async with _open(bare) as (shop, client, keys):
        headers = _headers(keys["auditor"], None)
        assert 200 == (await client.get("/v1/numbers", headers=headers)).status_code
        async with shop.kit.writer.transaction() as connection:
            await connection.execute("update access_keys set revoked = true where role = 'auditor'")
            old = auth.key_of(keys["auditor"], "auditor", "auditor")
            await auth.store_keys(connection, [old])
        await asyncio.sleep(2)
        assert 401 == (await client.get("/v1/numbers", headers=headers)).status_code
