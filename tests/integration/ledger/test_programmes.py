"""What programmes report, held against the entries and the trial balance of the same books."""

from __future__ import annotations

from typing import Any

import pytest

from hisab_contracts.units import instant_text
from integration.ledger.real import RealLedger
from integration.ledger.test_api import Api, api, hold_of
from integration.ledger.test_proposals import (
    approve,
    codes,
    fresh,
    programme,
    proposed_budget,
    proposed_grant,
    report,
)
from runtime.clock import now_ms
from unit.ledger.values import total

__all__ = ["api"]

FIGURES = (
    "budget_micro",
    "left_micro",
    "granted_micro",
    "drawn_micro",
    "remaining_micro",
    "reserved_micro",
    "expired_micro",
    "reclaimed_micro",
)


def figures(found: dict[str, Any], names: tuple[str, ...] = FIGURES) -> list[int]:
    """The amounts of a report."""
    return [int(found[name]) for name in names]


async def granted(api: Api, tenant_id: str, micro: int, programme_id: str) -> str:
    """A grant that was approved."""
    grant_id = await proposed_grant(api, tenant_id, str(micro), programme_id=programme_id)
    assert 200 == (await approve(api, grant_id)).status_code
    return grant_id


async def drawn_by_entries(api: Api, tenant_id: str, grant_ids: list[str]) -> int:
    """What the published entries of charges drew on these lots."""
    path = f"/v1/tenants/{tenant_id}/entries?limit=1000"
    entries = (await api.get(path, "auditor")).json()["items"]
    return -sum(
        int(posting["posting_micro"])
        for entry in entries
        if entry["kind"] == "charge"
        for posting in entry["postings"]
        if posting["account"] in {f"lot:{grant_id}" for grant_id in grant_ids}
    )


async def test_a_report_is_what_the_books_come_to(api: Api, ledger: RealLedger) -> None:
    """Drawn is what charges were paid with, to the micro-unit, by tenant and in all."""
    name = await programme(api, "1000", theme="health", ends_at="2030-06-30T19:00:00.000Z")
    first, second = [await ledger.tenant(fresh("lab"), "university") for _ in range(2)]
    lots = {
        first: [await granted(api, first, micro, name) for micro in (100, 50)],
        second: [await granted(api, second, 200, name)],
    }
    # Another programme's lot pays for the same tenant, and is none of this one's business.
    other = await programme(api, "500")
    await granted(api, second, 300, other)
    for tenant_id, charged in ((first, 120), (second, 205)):
        await ledger.book(total(charged, tenant_id=tenant_id, bucket=fresh("b").replace("-", "0")))
    assert 200 == (await approve(api, await proposed_budget(api, name, "70"))).status_code
    await api.post("/v1/holds", hold_of(first, "7"), "scheduler", key=fresh("h"))
    found = await report(api, name)
    drawn = {who: await drawn_by_entries(api, who, lots[who]) for who in lots}
    assert 120 == drawn[first]
    all_drawn = sum(drawn.values())
    assert [1070, 720, 350, all_drawn, 350 - all_drawn, 7, 0, 0] == figures(found)
    assert ("health", "2030-06-30T19:00:00.000Z", "PKR") == tuple(
        found[member] for member in ("theme", "ends_at", "currency")
    )
    assert {who: drawn[who] for who in sorted(lots)} == {
        share["tenant_id"]: int(share["drawn_micro"]) for share in found["by_tenant"]
    }
    for shown in [found, *found["by_tenant"]]:
        granted_micro, drawn_micro, remaining_micro, expired_micro = figures(
            shown, ("granted_micro", "drawn_micro", "remaining_micro", "expired_micro")
        )
        assert granted_micro == drawn_micro + remaining_micro + expired_micro
    assert ("5", None) == (found["as_of"]["seq"], found["by_tenant_next"])


async def test_what_holds_that_are_over_reserve_is_not_reserved(
    api: Api, ledger: RealLedger
) -> None:
    """Over by the clock, whether or not an entry says so yet: as in a balance."""
    name = await programme(api, "1000")
    tenant_id = await ledger.tenant(fresh("lab"), "university")
    await granted(api, tenant_id, 100, name)
    soon = hold_of(tenant_id, "40", expires_at=instant_text(now_ms() + 1_500))
    placed = await api.post("/v1/holds", soon, "scheduler", key=fresh("h"))
    assert 201 == placed.status_code
    await api.post("/v1/holds", hold_of(tenant_id, "5"), "scheduler", key=fresh("h"))
    path = f"/v1/tenants/{tenant_id}/balance"
    while "5" != (await api.get(path, "officer")).json()["held_micro"]:
        pass
    found = await report(api, name)
    assert ["5", "5"] == [found["reserved_micro"], found["by_tenant"][0]["reserved_micro"]]


async def test_all_programmes_together_are_the_trial_balance(api: Api, ledger: RealLedger) -> None:
    """Page by page: budgets are what authorities gave, lots what is left of them."""
    for _ in range(3):
        await programme(api, "10")
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = (await api.get(f"/v1/programmes?limit=2{cursor}", "finance")).json()
        assert len(page["items"]) <= 2
        found += page["items"]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    names = [item["programme_id"] for item in found]
    assert sorted(names) == names
    balance = (await api.get("/v1/trial-balance", "auditor")).json()
    accounts = {row["account"]: int(row["balance_micro"]) for row in balance["accounts"]}
    sums = [sum(column) for column in zip(*(figures(item) for item in found), strict=True)]
    assert [
        -accounts["authority"],
        accounts["budget"],
        accounts["granted"],
        accounts.get("lot", 0),
    ] == [sums[0], sums[1], sums[2] - sums[7], sums[4]]


async def test_tenants_of_a_programme_come_in_parts(api: Api, ledger: RealLedger) -> None:
    """An answer names so many tenants, and from where the next one goes on; totals are of all."""
    name = await programme(api, "100")
    tenants = sorted([await ledger.tenant(fresh("lab"), "university") for _ in range(3)])
    for tenant_id in tenants:
        await granted(api, tenant_id, 10, name)
    first = await report(api, f"{name}?tenants=2")
    rest = await report(api, f"{name}?tenants=2&after_tenant={first['by_tenant_next']}")
    seen = [[share["tenant_id"] for share in found["by_tenant"]] for found in (first, rest)]
    assert ([tenants[:2], tenants[2:]], None) == (seen, rest["by_tenant_next"])
    assert ["30", "30"] == [first["granted_micro"], rest["granted_micro"]]
    listing = (await api.get("/v1/programmes?limit=1000&tenants=1", "officer")).json()["items"]
    (item,) = [item for item in listing if item["programme_id"] == name]
    assert ([tenants[0]], tenants[0]) == (
        [share["tenant_id"] for share in item["by_tenant"]],
        item["by_tenant_next"],
    )
    for path in (f"/v1/programmes/{name}?tenants=1001", "/v1/programmes?tenants=101"):
        assert (422, "malformed") == codes(await api.get(path, "officer"))


async def test_a_grant_shows_its_terms_and_what_is_left_of_it(api: Api, ledger: RealLedger) -> None:
    """Proposed nothing is left of it; approved it has a lot, and usage draws on it."""
    name = await programme(api, "1000")
    tenant_id = await ledger.tenant(fresh("lab"), "university")
    grant_id = await proposed_grant(api, tenant_id, "100", programme_id=name)
    members = ("state", "remaining_micro", "drawn_micro", "proposed_by", "approved_by")
    path = f"/v1/grants/{grant_id}"
    shown = (await api.get(path, "approver")).json()
    assert ["proposed", "0", "0", "k-officer", None] == [shown[member] for member in members]
    await approve(api, grant_id)
    await ledger.book(total(30, tenant_id=tenant_id))
    shown = (await api.get(path, tenant_id if tenant_id in api.keys else "officer")).json()
    assert ["approved", "70", "30", "k-officer", "k-approver"] == [
        shown[member] for member in members
    ]
    terms = ("tenant_id", "programme_id", "grant_micro", "priority", "effective_at", "expires_at")
    assert [tenant_id, name, "100", 1, "2025-07-01T00:00:00.000Z", None] == [
        shown[member] for member in terms
    ]
    assert (404, "not-found") == codes(await api.get("/v1/grants/none", "officer"))


@pytest.mark.defect("L28")
async def test_grants_are_listed_by_tenant_programme_and_state(
    api: Api, ledger: RealLedger
) -> None:
    """In the order in which they were proposed, page by page."""
    name, other = await programme(api, "1000"), await programme(api, "1000")
    tenants = [await ledger.tenant(fresh("lab"), "university") for _ in range(2)]
    made = [
        await proposed_grant(api, tenants[n % 2], "1", programme_id=name if n < 4 else other)
        for n in range(6)
    ]
    await approve(api, made[0])
    await api.post(f"/v1/grants/{made[1]}/reject", {"reason": "x"}, "approver", key=fresh("r"))

    async def ids(query: str) -> list[str]:
        found: list[str] = []
        cursor = ""
        while True:
            page = (await api.get(f"/v1/grants?limit=2{query}{cursor}", "auditor")).json()
            found += [item["grant_id"] for item in page["items"]]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"

    assert made[:4] == await ids(f"&programme_id={name}")
    assert made[::2] == await ids(f"&tenant_id={tenants[0]}")
    assert made[:1] == await ids(f"&programme_id={name}&state=approved")
    assert made[1:2] == await ids(f"&tenant_id={tenants[1]}&state=rejected")
    assert made[2:4] == await ids(f"&programme_id={name}&state=proposed")
    assert (422, "malformed") == codes(await api.get("/v1/grants?state=open", "auditor"))


async def test_a_programme_that_is_unknown_or_malformed_is_refused(api: Api) -> None:
    """Theme and end may be left out; neither may be nonsense."""
    assert (404, "not-found") == codes(await api.get("/v1/programmes/none", "officer"))
    body = {"programme_id": "x", "name": "X", "budget_micro": "1"}
    for more in ({"theme": ""}, {"theme": "x" * 201}, {"ends_at": "2030-06-30"}, {"theme": 5}):
        bad = await api.post("/v1/programmes", body | more, "operator", key=fresh("p"))
        assert (422, "malformed") == codes(bad)
    name = await programme(api)
    found = await report(api, name)
    assert (None, None, []) == (found["theme"], found["ends_at"], found["by_tenant"])
