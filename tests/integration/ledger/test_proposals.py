"""Two people for all that moves money or limits by hand, over HTTP and on real PostgreSQL."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any

import asyncpg
import httpx2
import pytest

from hisab_contracts.ids import KeyId
from hisab_contracts.reference import Role
from hisab_contracts.units import MAX_MICRO
from infrastructure import through_outages
from integration.ledger.real import RealLedger, Refused
from integration.ledger.test_api import Api, api, grant_of, hold_of
from ledger.commands import Approved
from ledger.core.grants import BudgetExceeded
from ledger.core.proposals import AboveLimit
from runtime.database import ALL_TENANTS
from unit.ledger.values import total

__all__ = ["api"]

_numbers = itertools.count()


def fresh(prefix: str) -> str:
    """A name that no other test has."""
    return f"{prefix}-{next(_numbers)}"


def codes(answer: httpx2.Response) -> tuple[int, str]:
    """Status and code of a refusal."""
    return answer.status_code, answer.json().get("code", "")


async def approver(api: Api) -> str:
    """Another approver's key; returns its name, under which it is known."""
    name = fresh("approver")
    made = await api.post("/v1/keys", {"role": "approver"}, "operator", key=name)
    api.keys[name] = made.json()["secret"]
    api.keys[f"{name}-id"] = made.json()["key_id"]
    return name


async def programme(api: Api, budget: str = "1000", **more: object) -> str:
    """A programme of its own."""
    name = fresh("fund")
    body = {"programme_id": name, "name": name, "budget_micro": budget} | more
    assert 201 == (await api.post("/v1/programmes", body, "operator", key=name)).status_code
    return name


async def proposed_budget(api: Api, programme_id: str, micro: str = "50") -> str:
    """More budget, proposed by the officer."""
    path = f"/v1/programmes/{programme_id}/budget"
    answer = await api.post(path, {"add_micro": micro}, "officer", key=fresh("b"))
    assert 202 == answer.status_code, answer.text
    return str(answer.json()["proposal_id"])


async def proposed_limit(api: Api, tenant_id: str, micro: str = "2000") -> str:
    """Another credit limit, proposed by finance."""
    body = {"credit_limit_micro": micro, "reason": "grows"}
    path = f"/v1/tenants/{tenant_id}/credit-limit"
    answer = await api.post(path, body, "finance", key=fresh("l"))
    assert 202 == answer.status_code, answer.text
    return str(answer.json()["proposal_id"])


async def proposed_grant(api: Api, tenant_id: str, micro: str = "50", **more: object) -> str:
    """A grant, proposed by the officer."""
    answer = await api.post(
        "/v1/grants", grant_of(tenant_id, micro, **more), "officer", key=fresh("g")
    )
    assert 201 == answer.status_code, answer.text
    assert answer.json()["proposal_id"] == answer.json()["grant_id"]
    return str(answer.json()["proposal_id"])


async def approve(
    api: Api, proposal_id: str, who: str = "approver", body: Mapping[str, str] | None = None
) -> httpx2.Response:
    """Approve at the door of all proposals."""
    path = f"/v1/proposals/{proposal_id}/approve"
    return await api.insist(path, body or {}, who, key=fresh("a"))


async def listed(api: Api, proposal_id: str) -> dict[str, Any]:
    """A proposal as it is listed."""
    found = (await api.get("/v1/proposals?limit=1000", "auditor")).json()["items"]
    (item,) = [item for item in found if item["proposal_id"] == proposal_id]
    return dict(item)


async def report(api: Api, programme_id: str) -> dict[str, Any]:
    """What a programme comes to."""
    answer = await api.get(f"/v1/programmes/{programme_id}", "officer")
    assert 200 == answer.status_code, answer.text
    return dict(answer.json())


async def test_more_budget_is_proposed_by_an_officer_and_approved_by_another_key(api: Api) -> None:
    """Nothing is entered before; then what was added can be promised."""
    name = await programme(api, "1000")
    path = f"/v1/programmes/{name}/budget"
    proposed = await api.post(path, {"add_micro": "50"}, "officer", key="more")
    terms = {"kind": "budget", "programme_id": name, "add_micro": "50"}
    proposal_id = proposed.json()["proposal_id"]
    assert (
        202,
        {"proposal_id": proposal_id, "kind": "budget", "state": "proposed", "terms": terms},
    ) == (
        proposed.status_code,
        proposed.json(),
    )
    assert ("1000", "1") == (
        (await report(api, name))["budget_micro"],
        (await report(api, name))["as_of"]["seq"],
    )
    approved = await approve(api, proposal_id)
    entry_ids = [f"/programmes/{name}.2"]
    assert (200, "approved", entry_ids) == (
        approved.status_code,
        approved.json()["state"],
        approved.json()["entry_ids"],
    )
    after = await report(api, name)
    assert ("1050", "1050") == (after["budget_micro"], after["left_micro"])
    item = await listed(api, proposal_id)
    assert ("approved", "k-officer", "k-approver", entry_ids, None) == tuple(
        item[member] for member in ("state", "proposed_by", "decided_by", "entry_ids", "reason")
    )


async def test_a_credit_limit_is_proposed_by_finance_and_holds_follow_at_once(
    api: Api, ledger: RealLedger
) -> None:
    """The entry has no postings and states the limit; below what is owed is legal."""
    tenant_id = await ledger.tenant(fresh("firm"), limit_micro=100)
    refused = await api.post("/v1/holds", hold_of(tenant_id, "150"), "scheduler", key="h")
    assert (409, "insufficient-credit") == codes(refused)
    approved = await approve(api, await proposed_limit(api, tenant_id, "200"))
    placed = await api.post("/v1/holds", hold_of(tenant_id, "150"), "scheduler", key="h2")
    assert (201, "50") == (placed.status_code, placed.json()["available_micro"])
    entries = (await api.get(f"/v1/tenants/{tenant_id}/entries", "auditor")).json()["items"]
    assert ["limit_changed", "hold_placed"] == [entry["kind"] for entry in entries]
    assert ({"credit_limit_micro": "200"}, []) == (entries[0]["limit"], entries[0]["postings"])
    assert [entries[0]["entry_id"]] == approved.json()["entry_ids"]
    await ledger.book(total(120, tenant_id=tenant_id))
    assert 200 == (await approve(api, await proposed_limit(api, tenant_id, "30"))).status_code
    balance = (await api.get(f"/v1/tenants/{tenant_id}/balance", "finance")).json()
    assert ("30", "120", "0") == tuple(
        balance[name] for name in ("credit_limit_micro", "receivable_micro", "available_micro")
    )
    none = await api.post("/v1/holds", hold_of(tenant_id, "1"), "scheduler", key="h3")
    assert (409, "insufficient-credit") == codes(none)
    assert [] == [line for line in await ledger.audit() if tenant_id in line]


async def test_a_changed_limit_is_told_to_everybody(api: Api, ledger: RealLedger) -> None:
    """The tenant's record is published anew, in the transaction that changes the limit."""
    tenant_id = await ledger.tenant(fresh("firm"), limit_micro=100)
    await approve(api, await proposed_limit(api, tenant_id, "200"))
    async with ledger.writer.connection() as connection:
        rows = await connection.fetch(
            "select message_value from outbox where message_key = $1 order by outbox_id",
            tenant_id.encode(),
        )
    assert [100, 200] == [
        int(row["message_value"].split(b'"credit_limit_micro":')[1].split(b",")[0]) for row in rows
    ]


async def test_a_grant_is_decided_at_either_door(api: Api, ledger: RealLedger) -> None:
    """Its proposal has its id; what is decided at one door is decided at the other."""
    tenant_id = await ledger.tenant(fresh("school"), "university")
    first, second = [await proposed_grant(api, tenant_id) for _ in range(2)]
    at_proposals = await approve(api, first)
    at_grants = await api.post(f"/v1/grants/{second}/approve", {}, "approver", key=fresh("a"))
    for answer, grant_id, seq in ((at_proposals, first, 1), (at_grants, second, 2)):
        assert {
            "proposal_id": grant_id,
            "grant_id": grant_id,
            "kind": "grant",
            "state": "approved",
            "entry_ids": [f"{tenant_id}.{seq}"],
        } == answer.json()
    doors = [f"/v1/proposals/{second}", f"/v1/grants/{first}"]
    for door, verb in itertools.product(doors, ("approve", "reject")):
        body = {} if verb == "approve" else {"reason": "late"}
        late = await api.post(f"{door}/{verb}", body, "approver", key=fresh("a"))
        assert (409, "already-decided") == codes(late), (door, verb)
    proposal_id = await proposed_budget(api, await programme(api))
    for verb in ("approve", "reject"):
        body = {} if verb == "approve" else {"reason": "no grant"}
        other = await api.post(f"/v1/grants/{proposal_id}/{verb}", body, "approver", key=fresh("a"))
        assert (404, "not-found") == codes(other)


@pytest.mark.parametrize("door", ["grants", "proposals"])
async def test_a_proposal_is_rejected_with_a_reason(
    api: Api, ledger: RealLedger, door: str
) -> None:
    """By an approver or by who proposed it, and by nobody else; it is never entered."""
    tenant_id = await ledger.tenant(fresh("school"), "university")
    first, second = [await proposed_grant(api, tenant_id) for _ in range(2)]
    body = {"reason": "twice"}
    stranger = await api.post(f"/v1/{door}/{first}/reject", body, "finance", key=fresh("r"))
    assert (403, "forbidden") == codes(stranger)
    for grant_id, who in ((first, "approver"), (second, "officer")):
        path = f"/v1/{door}/{grant_id}/reject"
        wordless = await api.post(path, {"reason": ""}, who, key=fresh("r"))
        assert (422, "malformed") == codes(wordless)
        key = fresh("r")
        rejected = await api.post(path, body, who, key=key)
        assert (200, "rejected", []) == (
            rejected.status_code,
            rejected.json()["state"],
            rejected.json()["entry_ids"],
        )
        assert rejected.content == (await api.post(path, body, who, key=key)).content
        item = await listed(api, grant_id)
        assert ("rejected", f"k-{who}", "twice") == (
            item["state"],
            item["decided_by"],
            item["reason"],
        )
        shown = (await api.get(f"/v1/grants/{grant_id}", "auditor")).json()
        assert ("rejected", None, f"k-{who}", "0") == tuple(
            shown[name] for name in ("state", "approved_by", "rejected_by", "remaining_micro")
        )
        assert (409, "already-decided") == codes(await approve(api, grant_id))
    assert (
        "0" == (await api.get(f"/v1/tenants/{tenant_id}/balance", "officer")).json()["as_of"]["seq"]
    )


async def test_the_proposer_never_approves_and_other_roles_do_not_either(
    api: Api, ledger: RealLedger
) -> None:
    """The proposer hears it first, also once it is decided, and at a body that is no JSON."""
    tenant_id = await ledger.tenant(fresh("firm"), limit_micro=100)
    budget = await proposed_budget(api, await programme(api))
    limit = await proposed_limit(api, tenant_id)
    for proposal_id, maker, other in (
        (budget, "officer", "finance"),
        (limit, "finance", "officer"),
    ):
        for _ in range(2):
            assert (403, "maker-is-checker") == codes(await approve(api, proposal_id, maker))
            assert (403, "forbidden") == codes(await approve(api, proposal_id, other))
            await approve(api, proposal_id)
    for role in ("operator", "auditor", "scheduler", "one"):
        assert (403, "forbidden") == codes(await approve(api, budget, role))
    assert (403, "forbidden") == codes(await approve(api, "nothing", "officer"))
    assert (404, "not-found") == codes(await approve(api, "nothing"))


async def test_a_declared_conflict_of_interest_refuses_this_approver(api: Api) -> None:
    """Any text but `none`; a refusal decides nothing."""
    proposal_id = await proposed_budget(api, await programme(api))
    declared = {"conflict_of_interest": "my brother runs it"}
    assert (403, "conflict-of-interest") == codes(await approve(api, proposal_id, body=declared))
    other = await approver(api)
    free = await approve(api, proposal_id, other, {"conflict_of_interest": "none"})
    assert 200 == free.status_code
    late = await approve(api, proposal_id, body=declared)
    assert (409, "already-decided") == codes(late)


async def test_an_approver_with_a_limit_is_told_who_may(api: Api) -> None:
    """In force at once, at every door; ids of keys are named, never secrets; null lifts it."""
    small, large = await approver(api), await approver(api)
    small_id, large_id = api.keys[f"{small}-id"], api.keys[f"{large}-id"]
    path = f"/v1/keys/{small_id}/limits"
    stated = await api.put(path, {"approve_up_to_micro": "49"}, "operator")
    assert (200, {"key_id": small_id, "approve_up_to_micro": "49"}) == (
        stated.status_code,
        stated.json(),
    )
    proposal_id = await proposed_budget(api, await programme(api), "50")
    refused = await approve(api, proposal_id, small)
    assert (403, "above-limit") == codes(refused)
    told = refused.json()
    assert ("49", "50") == (told["approve_up_to_micro"], told["needed_micro"])
    assert large_id in told["may_approve"]
    assert small_id not in told["may_approve"]
    assert "hsb_" not in refused.text
    await api.put(path, {"approve_up_to_micro": "50"}, "operator")
    assert 200 == (await approve(api, proposal_id, small)).status_code
    grant_id = await proposed_grant(api, "one", "51")
    refused = await api.post(f"/v1/grants/{grant_id}/approve", {}, small, key=fresh("a"))
    assert (403, "above-limit") == codes(refused)
    await api.put(path, {"approve_up_to_micro": None}, "operator")
    lifted = await api.post(f"/v1/grants/{grant_id}/approve", {}, small, key=fresh("a"))
    assert 200 == lifted.status_code


@pytest.mark.parametrize(
    ("key_id", "body", "who", "expected"),
    [
        ("k-approver", {"approve_up_to_micro": "-1"}, "operator", (422, "malformed")),
        ("k-approver", {"approve_up_to_micro": 5}, "operator", (422, "malformed")),
        ("k-approver", {"approve_up_to_micro": str(2**63)}, "operator", (422, "malformed")),
        ("k-approver", {}, "operator", (422, "malformed")),
        ("k-officer", {"approve_up_to_micro": "5"}, "operator", (422, "malformed")),
        ("nobody", {"approve_up_to_micro": "5"}, "operator", (404, "not-found")),
        ("k-approver", {"approve_up_to_micro": "5"}, "approver", (403, "forbidden")),
    ],
)
async def test_limits_of_keys_that_cannot_be_are_refused(
    api: Api, key_id: str, body: object, who: str, expected: tuple[int, str]
) -> None:
    """An operator says it, of a key that approves, as an amount or null."""
    assert expected == codes(await api.put(f"/v1/keys/{key_id}/limits", body, who))


async def test_what_cannot_be_entered_is_refused_when_it_is_proposed(
    api: Api, ledger: RealLedger
) -> None:
    """And nothing is stored of it."""
    startup = await ledger.tenant(fresh("startup"), "startup")
    limit = {"credit_limit_micro": "5", "reason": "asked"}
    path = f"/v1/tenants/{startup}/credit-limit"
    refused = await api.post(path, limit, "finance", key="refused")
    assert (409, "not-commercial") == codes(refused)
    assert refused.content == (await api.post(path, limit, "finance", key="refused")).content
    nobody = await api.post("/v1/tenants/nobody/credit-limit", limit, "finance", key="n")
    assert (404, "not-found") == codes(nobody)
    name = await programme(api, str(MAX_MICRO - 5))
    full = await api.post(f"/v1/programmes/{name}/budget", {"add_micro": "6"}, "officer", key="f")
    assert (409, "budget-out-of-range") == codes(full)
    none = await api.post("/v1/programmes/none/budget", {"add_micro": "6"}, "officer", key="n")
    assert (404, "not-found") == codes(none)
    for sent in ("0", "-1", str(2**63), "1.0", 5):
        bad = await api.post(
            f"/v1/programmes/{name}/budget", {"add_micro": sent}, "officer", key="x"
        )
        assert (422, "malformed") == codes(bad)
    for more in ({"credit_limit_micro": "-1"}, {"reason": ""}, {"reason": None}, {"more": 1}):
        bad = await api.post("/v1/tenants/one/credit-limit", limit | more, "finance", key="x")
        assert (422, "malformed") == codes(bad)
    without = await api.post("/v1/tenants/one/credit-limit", limit, "finance")
    assert (422, "idempotency-key-missing") == codes(without)
    listing = (await api.get(f"/v1/proposals?tenant_id={startup}", "auditor")).json()["items"]
    assert [] == listing


async def test_a_proposal_is_decided_on_the_books_at_approval(api: Api) -> None:
    """Two that were possible one by one: the second is refused then, and stays open."""
    name = await programme(api, str(MAX_MICRO - 5))
    first, second = [await proposed_budget(api, name, "4") for _ in range(2)]
    assert 200 == (await approve(api, first)).status_code
    assert (409, "budget-out-of-range") == codes(await approve(api, second))
    assert "proposed" == (await listed(api, second))["state"]


async def test_a_proposal_can_be_made_and_approved_again_by_the_same_words(api: Api) -> None:
    """A repeat gets the first answer, byte for byte, and enters nothing."""
    name = await programme(api)
    path, body = f"/v1/programmes/{name}/budget", {"add_micro": "5"}
    made = [await api.post(path, body, "officer", key="same") for _ in range(2)]
    assert made[0].content == made[1].content
    approval = f"/v1/proposals/{made[0].json()['proposal_id']}/approve"
    done = [await api.post(approval, {}, "approver", key="same-a") for _ in range(2)]
    assert done[0].content == done[1].content
    assert "1005" == (await report(api, name))["budget_micro"]


async def test_of_two_approvals_at_once_one_is_refused(api: Api) -> None:
    """Whoever comes second finds it decided; entered once."""
    rivals = [await approver(api) for _ in range(8)]
    name = await programme(api)
    proposal_id = await proposed_budget(api, name, "5")
    answers = await asyncio.gather(*(approve(api, proposal_id, who) for who in rivals))
    refused = [codes(answer) for answer in answers if not answer.is_success]
    assert [(409, "already-decided")] * 7 == refused
    assert "1005" == (await report(api, name))["budget_micro"]


async def test_an_approval_and_a_rejection_at_once_do_not_both_count(api: Api) -> None:
    """Approved and entered, or rejected and not: never both, never neither."""
    name = await programme(api, "1000")
    for _ in range(6):
        before = int((await report(api, name))["budget_micro"])
        proposal_id = await proposed_budget(api, name, "5")
        path = f"/v1/proposals/{proposal_id}/reject"
        approved, rejected = await asyncio.gather(
            approve(api, proposal_id),
            api.insist(path, {"reason": "no"}, "officer", key=fresh("r")),
        )
        lost = rejected if approved.is_success else approved
        assert approved.is_success != rejected.is_success
        assert (409, "already-decided") == codes(lost)
        item = await listed(api, proposal_id)
        assert ("approved" if approved.is_success else "rejected") == item["state"]
        after = int((await report(api, name))["budget_micro"])
        assert after == before + (5 if approved.is_success else 0)


async def granted(api: Api, tenant_id: str, micro: str, **more: object) -> str:
    """A grant that was approved; returns its id."""
    grant_id = await proposed_grant(api, tenant_id, micro, **more)
    assert 200 == (await approve(api, grant_id)).status_code
    return grant_id


async def entries_of(api: Api, tenant_id: str) -> list[dict[str, Any]]:
    """The entries of a tenant's book."""
    path = f"/v1/tenants/{tenant_id}/entries?limit=1000"
    return list((await api.get(path, "auditor")).json()["items"])


async def decide_64(
    ledger: RealLedger, proposal_ids: list[str], key_id: str = "k-approver"
) -> list[object]:
    """Approve all at once, as 64 requests to another process would: what was answered to each."""

    async def one(proposal_id: str) -> object:
        async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
            answer = await ledger.commands.approve(
                connection,
                proposal_id,
                KeyId(key_id),
                Role.APPROVER,
                conflict_of_interest="none",
                actor=f"key:{key_id}",
            )
            if not isinstance(answer, Approved):
                raise Refused(answer)
            return answer

    async def insist(proposal_id: str) -> object:
        try:
            return await through_outages(lambda: one(proposal_id))
        except Refused as refused:
            return refused.refusal

    return list(await asyncio.gather(*map(insist, proposal_ids)))


async def test_a_limit_is_in_force_at_once_in_another_process(api: Api, ledger: RealLedger) -> None:
    """Nothing is remembered of it: each approval reads it."""
    key_id = api.keys[f"{await approver(api)}-id"]
    proposal_id = await proposed_budget(api, await programme(api), "50")
    path = f"/v1/keys/{key_id}/limits"
    await api.put(path, {"approve_up_to_micro": "49"}, "operator")
    (refused,) = await decide_64(ledger, [proposal_id], key_id)
    assert isinstance(refused, AboveLimit)
    await api.put(path, {"approve_up_to_micro": "50"}, "operator")
    (approved,) = await decide_64(ledger, [proposal_id], key_id)
    assert isinstance(approved, Approved)


async def test_64_approvals_at_once_never_promise_more_than_the_budget(
    api: Api, ledger: RealLedger
) -> None:
    """Budget for 20 of 64, and what is approved beside them gives 20 more: never one too many."""
    name = await programme(api, "200")
    tenants = [await ledger.tenant(fresh("school"), "university") for _ in range(8)]
    grants = [
        await proposed_grant(api, tenants[number % 8], "10", programme_id=name)
        for number in range(60)
    ]
    more = [await proposed_budget(api, name, "50") for _ in range(4)]
    answers = await decide_64(ledger, [*grants[:30], *more, *grants[30:]])
    approved = [isinstance(answer, Approved) for answer in answers]
    assert [True] * 4 == approved[30:34]
    refused = [answer for answer in answers if not isinstance(answer, Approved)]
    assert {BudgetExceeded} == {type(answer) for answer in refused}
    granted = 10 * (sum(approved) - 4)
    assert 200 <= granted <= 400
    found = await report(api, name)
    assert ("400", str(400 - granted), str(granted)) == tuple(
        found[member] for member in ("budget_micro", "left_micro", "granted_micro")
    )
    # What came before the budget was refused by what was there then, and is open still.
    left = [
        grant_id
        for grant_id, answer in zip([*grants[:30], *more, *grants[30:]], answers, strict=True)
        if not isinstance(answer, Approved)
    ]
    late = await decide_64(ledger, left)
    assert 40 == sum(approved) - 4 + sum(isinstance(answer, Approved) for answer in late)
    found = await report(api, name)
    assert ("0", "400") == (found["left_micro"], found["granted_micro"])
    path = f"/v1/grants?programme_id={name}&state=approved"
    assert 40 == len((await api.get(path, "officer")).json()["items"])
    assert [] == [line for line in await ledger.audit() if name in line]


@pytest.mark.defect("L28")
async def test_lists_of_proposals_are_filtered_and_paged(api: Api, ledger: RealLedger) -> None:
    """Grants and the others in the order in which they were made, page by page."""
    tenant_id = await ledger.tenant(fresh("firm"), limit_micro=100)
    doors = (proposed_limit, proposed_grant)
    made = [await doors[number % 2](api, tenant_id, str(number + 1)) for number in range(6)]
    await approve(api, made[0])
    await approve(api, made[1])
    await api.post(f"/v1/proposals/{made[2]}/reject", {"reason": "x"}, "approver", key=fresh("r"))

    async def ids(query: str, who: str = "officer") -> list[str]:
        found: list[str] = []
        cursor = ""
        while True:
            path = f"/v1/proposals?tenant_id={tenant_id}&limit=2{query}{cursor}"
            page = (await api.get(path, who)).json()
            found += [item["proposal_id"] for item in page["items"]]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"

    assert made == await ids("")
    assert made[1::2] == await ids("&kind=grant")
    assert made[::2] == await ids("&kind=credit-limit")
    assert made[:2] == await ids("&state=approved")
    assert [made[2]] == await ids("&state=rejected")
    assert [made[4]] == await ids("&state=proposed&kind=credit-limit", "finance")
    assert [] == await ids("&kind=budget")
    for query in ("state=open", "kind=holds"):
        assert (422, "malformed") == codes(await api.get(f"/v1/proposals?{query}", "officer"))


@pytest.mark.defect("L26")
async def test_a_tenant_sees_its_own_proposals_and_grants_and_no_others(api: Api) -> None:
    """Of another tenant or a programme it learns nothing."""
    own, others = await proposed_limit(api, "one"), await proposed_limit(api, "two")
    mine, theirs = await proposed_grant(api, "one"), await proposed_grant(api, "two")
    budget = await proposed_budget(api, await programme(api))
    listing = (await api.get("/v1/proposals?limit=1000", "one")).json()["items"]
    seen = {item["proposal_id"] for item in listing}
    assert ({own, mine}, set()) == (seen & {own, mine}, seen & {others, theirs, budget})
    assert {"one"} == {item["tenant_id"] for item in listing}
    grants = (await api.get("/v1/grants?limit=1000", "one")).json()["items"]
    assert {"one"} == {item["tenant_id"] for item in grants}
    for path in ("/v1/proposals?tenant_id=two", "/v1/grants?tenant_id=two", f"/v1/grants/{theirs}"):
        assert (404, "not-found") == codes(await api.get(path, "one"))
    assert 200 == (await api.get(f"/v1/grants/{mine}", "one")).status_code
    for path in ("/v1/programmes", "/v1/programmes/ignite"):
        assert (403, "forbidden") == codes(await api.get(path, "one"))


async def test_the_database_itself_refuses_that_the_maker_is_the_checker(
    api: Api, ledger: RealLedger
) -> None:
    """Whatever the code does; and a tenant's role sees no other tenant's row."""
    limit, grant_id = await proposed_limit(api, "two"), await proposed_grant(api, "two")
    statements = (
        """
        update proposals set state = 'approved', decided_by = proposed_by, decided_at = now()
         where proposal_id = $1
        """,
        """
        update grants set state = 'approved', approved_by = proposed_by, approved_at = now()
         where grant_id = $1
        """,
    )
    for statement, proposal_id in zip(statements, (limit, grant_id), strict=True):
        with pytest.raises(asyncpg.CheckViolationError):
            async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
                await connection.execute(statement, proposal_id)
        async with ledger.api.transaction(tenant="one") as connection:
            assert "UPDATE 0" == await connection.execute(statement, proposal_id)
    async with ledger.api.transaction(tenant="one") as connection:
        assert 0 == await connection.fetchval(
            "select count(*) from proposals where tenant_id is distinct from 'one'"
        )
