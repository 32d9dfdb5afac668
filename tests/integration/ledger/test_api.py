"""The ledger over HTTP: who may, in which order checks run, first answers, two tenants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import pytest

from hisab_contracts.ids import PriceClass, PriceVersion, Sku
from hisab_contracts.reference import PriceLine, Role
from infrastructure import Database
from integration.ledger.real import RealLedger
from ledger.__main__ import SERVICE
from runtime.auth import key_of, store_keys
from runtime.database import ALL_TENANTS
from runtime.service import Settings, make_app, make_kit
from unit.ledger.values import at, total

STAFF = ("operator", "officer", "approver", "finance", "auditor", "scheduler")
FAR = "2090-01-01T00:00:00.000Z"


class Api:
    """Requests against the real application, without a socket."""

    def __init__(self, client: httpx2.AsyncClient, keys: Mapping[str, str]) -> None:
        self._client = client
        self.keys = dict(keys)

    async def get(self, path: str, who: str, **headers: str) -> httpx2.Response:
        """Read as somebody."""
        authorization = {"authorization": f"Bearer {self.keys.get(who, who)}"}
        return await self._client.get(path, headers=authorization | headers)

    async def post(
        self, path: str, body: object, who: str, *, key: str | None = None
    ) -> httpx2.Response:
        """Command as somebody."""
        headers = {"authorization": f"Bearer {self.keys.get(who, who)}"}
        if key is not None:
            headers["idempotency-key"] = key
        return await self._client.post(path, json=body, headers=headers)

    async def send(self, path: str, body: bytes, headers: dict[str, str]) -> httpx2.Response:
        """Send these bytes under these headers."""
        return await self._client.post(path, content=body, headers=headers)

    async def put(self, path: str, body: object, who: str) -> httpx2.Response:
        """State something as somebody."""
        headers = {"authorization": f"Bearer {self.keys.get(who, who)}"}
        return await self._client.put(path, json=body, headers=headers)

    async def insist(self, path: str, body: object, who: str, *, key: str) -> httpx2.Response:
        """Command as a client should: again, with the same key, while the answer is retryable."""
        while True:
            answer = await self.post(path, body, who, key=key)
            if answer.is_success or not answer.json()["retryable"]:
                return answer
            await asyncio.sleep(0.1)


def secret(name: str) -> str:
    """A secret of a test, of the form that secrets have."""
    return "hsb_" + name.replace("-", "_").rjust(43, "x")


@pytest.fixture(scope="module")
async def api(addresses: Database, ledger: RealLedger) -> AsyncIterator[Api]:
    """The application on the module's database, with a key for each role and two tenants."""
    settings = Settings("", 0, "", 4, 1, "0", addresses.api, addresses.writer, None)
    kit = make_kit(SERVICE, settings)
    await kit.api.open()
    await kit.writer.open()
    parts = SERVICE.build(kit)
    app = make_app(SERVICE, kit, parts)
    rows = [key_of(secret(role), f"k-{role}", Role(role)) for role in STAFF]
    for tenant_id in ("one", "two"):
        await ledger.tenant(tenant_id, "commercial", 1_000)
        rows.append(key_of(secret(tenant_id), f"k-{tenant_id}", Role.TENANT, tenant_id=tenant_id))
    rows.append(key_of(secret("hub"), "k-hub", Role.HUB, bound_to="lhr"))
    async with kit.api.transaction(tenant=ALL_TENANTS) as connection:
        await store_keys(connection, rows)
    keys = {name: secret(name) for name in (*STAFF, "one", "two", "hub")}
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://ledger") as client:
        yield Api(client, keys)
    await kit.api.close()
    await kit.writer.close()


def hold_of(tenant_id: str, micro: object = "100", **more: object) -> dict[str, object]:
    """A hold as a scheduler asks for it."""
    return {
        "tenant_id": tenant_id,
        "project_id": "main",
        "job_ref": "job",
        "allocation_id": None,
        "hub": "lhr",
        "sku": "h100-sxm-80",
        "hold_micro": micro,
        "expires_at": FAR,
    } | more


def grant_of(tenant_id: str, micro: str = "50", **more: object) -> dict[str, object]:
    """A grant as an officer proposes it."""
    return {
        "tenant_id": tenant_id,
        "programme_id": "ignite",
        "grant_micro": micro,
        "priority": 1,
        "effective_at": "2025-07-01T00:00:00.000Z",
        "expires_at": None,
        "scope": {},
        "coverage_bps": 10_000,
        "tax_effect": "tender",
    } | more


async def test_a_grant_is_proposed_by_one_and_approved_by_another(api: Api) -> None:
    """Maker is not checker; a second approval with another key is refused."""
    await api.post(
        "/v1/tenants",
        {
            "tenant_id": "fresh",
            "name": "Fresh",
            "kind": "startup",
            "currency": "PKR",
            "credit_limit_micro": "0",
        },
        "operator",
        key="t-fresh",
    )
    proposed = await api.post("/v1/grants", grant_of("fresh"), "officer", key="g1")
    assert (201, "proposed") == (proposed.status_code, proposed.json()["state"])
    path = f"/v1/grants/{proposed.json()['grant_id']}/approve"
    by_maker = await api.post(path, {}, "officer", key="a0")
    assert (403, "maker-is-checker") == (by_maker.status_code, by_maker.json()["code"])
    approved = await api.post(path, {}, "approver", key="a1")
    again = await api.post(path, {}, "approver", key="a1")
    assert (200, "approved") == (approved.status_code, approved.json()["state"])
    assert approved.content == again.content
    late = await api.post(path, {}, "approver", key="a2")
    assert (409, "already-decided") == (late.status_code, late.json()["code"])
    balance = (await api.get("/v1/tenants/fresh/balance", "operator")).json()
    assert "50" == balance["available_micro"]
    assert ["50"] == [lot["remaining_micro"] for lot in balance["lots"]]
    assert "1" == balance["as_of"]["seq"]


async def test_a_programme_cannot_promise_more_than_its_budget(api: Api) -> None:
    """The refusal says what is left."""
    body = {"programme_id": "small", "name": "Small", "budget_micro": "10"}
    assert 201 == (await api.post("/v1/programmes", body, "operator", key="p")).status_code
    grant = grant_of("one", "11", programme_id="small")
    proposed = (await api.post("/v1/grants", grant, "officer", key="g-big")).json()
    path = f"/v1/grants/{proposed['grant_id']}/approve"
    refused = (await api.post(path, {}, "approver", key="a-big")).json()
    assert ("budget-exceeded", "10", "1") == (
        refused["code"],
        refused["budget_left_micro"],
        refused["shortfall_micro"],
    )


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"scope": {"skus": []}}, "malformed"),
        ({"scope": {"nodes": ["x"]}}, "malformed"),
        ({"scope": {"skus": ["x"] * 101}}, "malformed"),
        ({"coverage_bps": 0}, "malformed"),
        ({"coverage_bps": 10_001}, "malformed"),
        ({"tax_effect": "gift"}, "malformed"),
        ({"effective_at": "2025-07-01T00:30:00.000Z"}, "malformed"),
        ({"expires_at": "2025-07-01T00:00:00.000Z"}, "malformed"),
        ({"effective_at": "2025-07-01"}, "malformed"),
        ({"grant_micro": "0"}, "malformed"),
        ({"grant_micro": str(2**63)}, "malformed"),
        ({"grant_micro": 5}, "malformed"),
        ({"grant_micro": "1e3"}, "malformed"),
        ({"grant_micro": "1.0"}, "malformed"),
        ({"grant_micro": "NaN"}, "malformed"),
        ({"priority": 1.5}, "malformed"),
        ({"surprise": 1}, "malformed"),
    ],
)
@pytest.mark.defect("L15", "F63")
async def test_terms_that_cannot_be_taken_are_named(
    api: Api, more: dict[str, object], code: str
) -> None:
    """422 is for what is malformed or not supported yet; nothing is ignored or rounded."""
    refused = await api.post("/v1/grants", grant_of("one") | more, "officer", key="g-bad")
    assert (422, code) == (refused.status_code, refused.json()["code"])


@pytest.mark.defect("L7", "L8")
async def test_a_retry_gets_the_first_answer_also_of_a_refusal(api: Api) -> None:
    """Other content with the same key is refused, naming what differs."""
    refused = await api.post("/v1/holds", hold_of("one", "5000"), "scheduler", key="h-1")
    assert (409, "insufficient-credit") == (refused.status_code, refused.json()["code"])
    assert ("1000", "4000") == (
        refused.json()["available_micro"],
        refused.json()["shortfall_micro"],
    )
    again = await api.post("/v1/holds", hold_of("one", "5000"), "scheduler", key="h-1")
    assert refused.content == again.content
    other = await api.post("/v1/holds", hold_of("one", "1"), "scheduler", key="h-1")
    assert (409, "idempotency-key-reused") == (other.status_code, other.json()["code"])
    assert ["hold_micro"] == other.json()["differing"]
    missing = await api.post("/v1/holds", hold_of("one", "1"), "scheduler")
    assert (422, "idempotency-key-missing") == (missing.status_code, missing.json()["code"])


@pytest.mark.defect("L9", "L7")
async def test_many_requests_with_one_key_place_one_hold(api: Api) -> None:
    """All get the same answer; two keys with one body are two holds."""
    placed = await asyncio.gather(
        *(api.insist("/v1/holds", hold_of("one", "10"), "scheduler", key="h-64") for _ in range(64))
    )
    assert {201} == {answer.status_code for answer in placed}
    assert 1 == len({answer.content for answer in placed})
    second = await api.post("/v1/holds", hold_of("one", "10"), "scheduler", key="h-65")
    assert second.json()["hold_id"] != placed[0].json()["hold_id"]
    for answer in (placed[0], second):
        hold_id = answer.json()["hold_id"]
        released = await api.post(f"/v1/holds/{hold_id}/release", {}, "scheduler", key=hold_id)
        assert (200, "released") == (released.status_code, released.json()["state"])
        found = (await api.get(f"/v1/holds/{hold_id}", "scheduler")).json()
        assert ("released", "0") == (found["state"], found["open_micro"])


@pytest.mark.defect("L26", "F64")
@pytest.mark.parametrize("path", ["/v1/tenants/two/balance", "/v1/tenants/two/entries"])
async def test_another_tenants_things_do_not_exist(api: Api, path: str) -> None:
    """404 for the neighbour and for nobody alike; its own are there."""
    assert 404 == (await api.get(path, "one")).status_code
    assert 404 == (await api.get(path.replace("two", "nobody"), "one")).status_code
    assert 200 == (await api.get(path, "two")).status_code


async def test_a_hold_that_would_be_over_already_is_malformed(api: Api) -> None:
    """There never was such a hold: nothing is closed, the request has no sense."""
    over = hold_of("one", "1", expires_at="2020-01-01T00:00:00.000Z")
    refused = await api.post("/v1/holds", over, "scheduler", key="h-over")
    assert (422, "malformed") == (refused.status_code, refused.json()["code"])
    assert "expires_at" in refused.json()["detail"]


async def test_a_hold_read_back_says_what_its_placing_said(api: Api) -> None:
    """The same amounts, what its tenant has available included."""
    placed = (await api.post("/v1/holds", hold_of("two", "7"), "scheduler", key="h-7")).json()
    assert placed == (await api.get(f"/v1/holds/{placed['hold_id']}", "scheduler")).json()


async def test_a_hold_asked_for_by_gpus_is_priced_as_metering_would_rate_it(
    api: Api, ledger: RealLedger
) -> None:
    """Two GPUs for half an hour at the line of this hour; without a line there is no price."""
    await ledger.tenant("priced", "commercial", 1_000)
    long_ago, ended = at(0), at(1)
    await ledger.prices(price_line("ended", "spot", 7, long_ago, ended))
    await ledger.prices(
        price_line("open", "on_demand", 90, long_ago, None),
        price_line("after", "on_demand", 100, ended, None),
    )
    by_gpus = {"gpus": 2, "duration_ms": 1_800_000}
    asked = hold_of("priced", None, price_class="on_demand", **by_gpus)
    placed = await api.post("/v1/holds", asked, "scheduler", key="h-priced")
    assert (201, "100", "900") == (
        placed.status_code,
        placed.json()["hold_micro"],
        placed.json()["available_micro"],
    )
    without = hold_of("priced", None, price_class="spot", **by_gpus)
    refused = await api.post("/v1/holds", without, "scheduler", key="h-unpriced")
    assert (409, "no-price", "no price for h100-sxm-80 spot in PKR") == (
        refused.status_code,
        refused.json()["code"],
        refused.json()["detail"],
    )
    both = hold_of("priced", "5", price_class="spot", **by_gpus)
    malformed = await api.post("/v1/holds", both, "scheduler", key="h-both")
    assert (422, "malformed") == (malformed.status_code, malformed.json()["code"])


def price_line(
    name: str, price_class: str, price: int, from_ms: int, until_ms: int | None
) -> PriceLine:
    """A price of the SKU that tests ask for."""
    return PriceLine(
        rate_line_id=name,
        price_version=PriceVersion("v1"),
        currency="PKR",
        sku=Sku("h100-sxm-80"),
        price_class=PriceClass(price_class),
        micro_per_gpu_hour=price,
        valid_from_ms=from_ms,
        valid_until_ms=until_ms,
    )


@pytest.mark.defect("L26", "F64")
async def test_another_tenants_hold_does_not_exist(api: Api) -> None:
    """A hold is found by its id only by who may see it."""
    placed = await api.post("/v1/holds", hold_of("two", "1"), "scheduler", key="h-two")
    path = f"/v1/holds/{placed.json()['hold_id']}"
    assert [404, 200, 403] == [
        (await api.get(path, who)).status_code for who in ("one", "two", "hub")
    ]


@pytest.mark.defect("F43")
async def test_a_hold_whose_key_was_forgotten_is_answered_as_it_stands(
    api: Api, ledger: RealLedger
) -> None:
    """A recovered ledger has the entry and not the answer: the retry finds the hold."""
    await ledger.tenant("forgotten", limit_micro=100)
    first = await api.post("/v1/holds", hold_of("forgotten", "60"), "scheduler", key="again")
    async with ledger.admin.connection() as connection:
        await connection.execute("delete from idempotency where idempotency_key = 'again'")
    again = await api.post("/v1/holds", hold_of("forgotten", "60"), "scheduler", key="again")
    assert (201, first.json()) == (again.status_code, again.json())
    assert "60" == (await api.get("/v1/tenants/forgotten/balance", "operator")).json()["held_micro"]


async def test_a_balance_is_another_once_a_hold_is_over_though_no_entry_says_so(
    api: Api, ledger: RealLedger
) -> None:
    """Its ETag too: a reader that asks for what has changed must not be told that nothing has."""
    await ledger.tenant("etag", limit_micro=100)
    placed = await api.post("/v1/holds", hold_of("etag", "60"), "scheduler", key="etag")
    first = await api.get("/v1/tenants/etag/balance", "operator")
    assert ("40", "60") == (first.json()["available_micro"], first.json()["held_micro"])
    async with ledger.admin.connection() as connection:
        # As if its time had been an hour ago: nobody has to wait for it.
        past = "update holds set expires_at = now() - interval '1 hour' where tenant_id = 'etag'"
        await connection.execute(past)
    etag = {"if-none-match": first.headers["etag"]}
    second = await api.get("/v1/tenants/etag/balance", "operator", **etag)
    assert 200 == second.status_code
    assert ("100", "0") == (second.json()["available_micro"], second.json()["held_micro"])
    assert first.json()["as_of"] == second.json()["as_of"]
    found = (await api.get(f"/v1/holds/{placed.json()['hold_id']}", "scheduler")).json()
    assert ("released", "expired", "0", "100") == (
        found["state"],
        found["ended_by"],
        found["open_micro"],
        found["available_micro"],
    )


async def test_an_invoice_is_entered_once_and_never_beyond_what_is_receivable(
    api: Api, ledger: RealLedger
) -> None:
    """Its key is its document."""
    await ledger.tenant("billed", "commercial", 1_000)
    await ledger.book(total(300, tenant_id="billed"))
    body = {
        "document_id": "d-1",
        "period": "2025-07",
        "invoiced_micro": "300",
        "first_seq": "1",
        "last_seq": "1",
    }
    path = "/v1/tenants/billed/invoiced"
    too_much = body | {"document_id": "d-2", "invoiced_micro": "301"}
    refused = await api.post(path, too_much, "finance", key="invoiced:d-2")
    assert (409, "not-receivable") == (refused.status_code, refused.json()["code"])
    wrong_key = await api.post(path, body, "finance", key="d-1")
    assert (422, "malformed") == (wrong_key.status_code, wrong_key.json()["code"])
    entered = await api.post(path, body, "finance", key="invoiced:d-1")
    again = await api.post(path, body, "finance", key="invoiced:d-1")
    assert (201, {"entry_id": "billed.2", "seq": "2"}) == (entered.status_code, entered.json())
    assert entered.content == again.content


async def test_the_entries_feed_pages_to_the_whole_book(api: Api, ledger: RealLedger) -> None:
    """Pages concatenate to what one page shows; amounts are strings."""
    await ledger.tenant("paged", "commercial", 1_000)
    await ledger.book(*(total(1, bucket=str(n), tenant_id="paged") for n in range(7)))
    path = "/v1/tenants/paged/entries"
    whole: list[dict[str, Any]] = (await api.get(path, "auditor")).json()["items"]
    pages: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        query = f"?limit=3&cursor={cursor}" if cursor else "?limit=3"
        page = (await api.get(path + query, "auditor")).json()
        pages += page["items"]
        cursor = page["next"]
    assert whole == pages
    assert [str(n + 1) for n in range(7)] == [entry["seq"] for entry in whole]
    after = (await api.get(path + "?after_seq=5", "auditor")).json()["items"]
    assert ["6", "7"] == [entry["seq"] for entry in after]
    charge = whole[0]["charge"]
    assert ("1", "1", "2025-07-31T00:00:00.000Z") == (
        charge["gpu_ns"],
        charge["charge_micro"],
        charge["hour_at"],
    )
    assert {"account": "usage", "posting_micro": "1", "balance_micro": "1"} == whole[0]["postings"][
        0
    ]


async def test_a_balance_is_not_sent_again_while_it_stands(api: Api) -> None:
    """ETag; other instants are refused for now, nonsense is malformed."""
    first = await api.get("/v1/tenants/two/balance", "two")
    etag = first.headers["etag"]
    unchanged = await api.get("/v1/tenants/two/balance", "two", **{"if-none-match": etag})
    assert 304 == unchanged.status_code
    for query, code in (
        ("as_of=2025-07-01T00:00:00.000Z", "unsupported"),
        ("as_of=yesterday", "malformed"),
        ("basis=guess", "malformed"),
    ):
        refused = await api.get(f"/v1/tenants/two/balance?{query}", "two")
        assert (422, code) == (refused.status_code, refused.json()["code"])


async def test_the_trial_balance_sums_to_nothing(api: Api) -> None:
    """By account name without its id."""
    answer = (await api.get("/v1/trial-balance", "auditor")).json()
    assert "0" == answer["sum_micro"]
    names = {row["account"] for row in answer["accounts"]}
    assert {"authority", "budget", "usage", "receivable"} <= names
    assert all(":" not in name for name in names)


async def test_a_key_is_shown_once_and_revoked_at_once(api: Api) -> None:
    """A repeat answers with a null secret; a revoked key opens nothing within a second."""
    body = {"role": "auditor"}
    made = await api.post("/v1/keys", body, "operator", key="key-1")
    again = await api.post("/v1/keys", body, "operator", key="key-1")
    assert (201, None) == (again.status_code, again.json()["secret"])
    assert made.json()["key_id"] == again.json()["key_id"]
    found = made.json()["secret"]
    assert 200 == (await api.get("/v1/trial-balance", found)).status_code
    path = f"/v1/keys/{made.json()['key_id']}/revoke"
    assert 200 == (await api.post(path, {}, "operator", key="revoke-1")).status_code
    await asyncio.sleep(1.1)
    assert 401 == (await api.get("/v1/trial-balance", found)).status_code


@pytest.mark.parametrize(
    ("currency", "status"), [("XTS", 422), ("ABC", 422), ("JPY", 201), ("KWD", 201)]
)
async def test_a_tenants_currency_is_one_of_iso_4217(api: Api, currency: str, status: int) -> None:
    """Any three letters would open a book that nobody can bill."""
    body = {
        "tenant_id": f"in-{currency}",
        "name": "x",
        "kind": "commercial",
        "currency": currency,
        "credit_limit_micro": "0",
    }
    answer = await api.post("/v1/tenants", body, "operator", key=f"t-{currency}")
    assert status == answer.status_code


async def test_only_a_commercial_tenant_has_a_credit_limit(api: Api) -> None:
    """Only what is receivable counts against it."""
    body = {
        "tenant_id": "limited",
        "name": "x",
        "kind": "startup",
        "currency": "PKR",
        "credit_limit_micro": "1",
    }
    refused = await api.post("/v1/tenants", body, "operator", key="t-limited")
    assert (422, "malformed") == (refused.status_code, refused.json()["code"])
    taken = body | {"tenant_id": "one", "credit_limit_micro": "0"}
    refused = await api.post("/v1/tenants", taken, "operator", key="t-one")
    assert (409, "already-exists") == (refused.status_code, refused.json()["code"])
