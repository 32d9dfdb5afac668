"""Outcomes of grants, and tranches that wait for one, over HTTP and on real PostgreSQL."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import httpx2
import pytest

from integration.ledger.real import RealLedger
from integration.ledger.test_api import Api, api, grant_of
from integration.ledger.test_proposals import (
    approve,
    approver,
    codes,
    fresh,
    granted,
    programme,
    proposed_grant,
)
from ledger.core.outcomes import MOST_OUTCOMES
from runtime.database import ALL_TENANTS
from unit.ledger.values import total

__all__ = ["api"]

OUTCOME = {"kind": "pilot", "evidence_sha256": "0a" * 32, "note": "in two districts"}


async def submitted(api: Api, grant_id: str, **more: str) -> str:
    """An outcome, submitted by the officer."""
    path = f"/v1/grants/{grant_id}/outcomes"
    answer = await api.insist(path, OUTCOME | more, "officer", key=fresh("o"))
    assert 201 == answer.status_code, answer.text
    assert {"outcome_id": answer.json()["outcome_id"], "state": "submitted"} == answer.json()
    return str(answer.json()["outcome_id"])


async def accept(
    api: Api, grant_id: str, outcome_id: str, who: str = "approver"
) -> httpx2.Response:
    """Accept an outcome."""
    path = f"/v1/grants/{grant_id}/outcomes/{outcome_id}/accept"
    return await api.insist(path, {}, who, key=fresh("oa"))


async def outcomes_of(api: Api, grant_id: str, who: str = "officer") -> list[dict[str, Any]]:
    """The outcomes of a grant as it shows them."""
    return list((await api.get(f"/v1/grants/{grant_id}", who)).json()["outcomes"])


async def theme(api: Api, name: str) -> dict[str, Any]:
    """What outcomes of a theme cost, found page by page."""
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = (await api.get(f"/v1/outcomes/by-theme?limit=1{cursor}", "auditor")).json()
        found += page["items"]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    keys = [(item["theme"] or "", item["currency"]) for item in found]
    assert sorted(set(keys)) == keys
    (item,) = [item for item in found if item["theme"] == name]
    return item


async def test_an_outcome_is_submitted_by_one_and_accepted_by_another(api: Api) -> None:
    """The grant shows it, with who did what; the digest of its evidence stays as it was sent."""
    grant_id = await granted(api, "one", "5")
    assert [] == await outcomes_of(api, grant_id)
    outcome_id = await submitted(api, grant_id)
    assert (403, "maker-is-checker") == codes(await accept(api, grant_id, outcome_id, "officer"))
    (shown,) = await outcomes_of(api, grant_id)
    assert OUTCOME | {"state": "submitted", "submitted_by": "k-officer"} == {
        name: shown[name] for name in (*OUTCOME, "state", "submitted_by")
    }
    assert [None, None] == [shown["accepted_by"], shown["accepted_at"]]
    answer = await accept(api, grant_id, outcome_id)
    assert (200, {"outcome_id": outcome_id, "state": "accepted"}) == (
        answer.status_code,
        answer.json(),
    )
    again = await accept(api, grant_id, outcome_id)
    assert (409, "already-decided", "accepted") == (*codes(again), again.json()["state"])
    second = await submitted(api, grant_id, kind="paper", note="")
    shown_all = await outcomes_of(api, grant_id, "one")
    assert [(outcome_id, "accepted"), (second, "submitted")] == [
        (shown["outcome_id"], shown["state"]) for shown in shown_all
    ]
    accepted = shown_all[0]
    assert "k-approver" == accepted["accepted_by"]
    assert accepted["submitted_at"] <= accepted["accepted_at"]


async def test_only_who_may_submits_and_accepts(api: Api) -> None:
    """And what the path names is looked for: an outcome of another grant is none of this one."""
    grant_id, other_id = await granted(api, "one", "5"), await granted(api, "one", "5")
    outcome_id = await submitted(api, grant_id)
    path = f"/v1/grants/{grant_id}/outcomes"
    for who in ("approver", "finance", "operator", "auditor", "scheduler", "one", "hub"):
        refused = await api.post(path, OUTCOME, who, key=fresh("o"))
        assert (403, "forbidden") == codes(refused)
    for who in ("finance", "operator", "auditor", "one"):
        refused = await api.post(f"{path}/{outcome_id}/accept", {}, who, key=fresh("o"))
        assert (403, "forbidden") == codes(refused)
    made = await api.post("/v1/keys", {"role": "officer"}, "operator", key=fresh("k"))
    api.keys["another-officer"] = made.json()["secret"]
    assert (403, "forbidden") == codes(await accept(api, grant_id, outcome_id, "another-officer"))
    assert (404, "not-found") == codes(await accept(api, other_id, outcome_id))
    assert (404, "not-found") == codes(await accept(api, grant_id, "none"))
    missing = await api.post("/v1/grants/none/outcomes", OUTCOME, "officer", key=fresh("o"))
    assert (404, "not-found") == codes(missing)
    for body in ({}, OUTCOME | {"evidence_sha256": "0a"}, OUTCOME | {"state": "accepted"}):
        bad = await api.post(path, body, "officer", key=fresh("o"))
        assert (422, "malformed") == codes(bad)


async def test_a_grant_that_gave_no_credit_has_no_outcome(api: Api) -> None:
    """Proposed or rejected it takes none; a revoked one gave some, and may have one."""
    grant_id = await proposed_grant(api, "one", "5")
    path = f"/v1/grants/{grant_id}/outcomes"
    early = await api.post(path, OUTCOME, "officer", key=fresh("o"))
    assert (409, "not-approved", "proposed") == (*codes(early), early.json()["state"])
    await api.post(f"/v1/grants/{grant_id}/reject", {"reason": "x"}, "approver", key=fresh("r"))
    late = await api.post(path, OUTCOME, "officer", key=fresh("o"))
    assert (409, "not-approved", "rejected") == (*codes(late), late.json()["state"])
    revoked_id = await granted(api, "one", "5")
    path = f"/v1/grants/{revoked_id}/revoke"
    revocation = await api.post(path, {"reason": "x"}, "officer", key=fresh("r"))
    assert 200 == (await approve(api, revocation.json()["proposal_id"])).status_code
    outcome_id = await submitted(api, revoked_id)
    assert 200 == (await accept(api, revoked_id, outcome_id)).status_code


async def test_a_repeated_submission_is_one_outcome(api: Api) -> None:
    """The same key, the same answer; and as many as can be shown with a grant, at once too."""
    grant_id = await granted(api, "two", "5")
    path = f"/v1/grants/{grant_id}/outcomes"
    made = [await api.post(path, OUTCOME, "officer", key="same-outcome") for _ in range(2)]
    assert made[0].content == made[1].content
    assert 1 == len(await outcomes_of(api, grant_id))
    for _ in range(MOST_OUTCOMES - 5):
        await submitted(api, grant_id)
    rest = await asyncio.gather(
        *(api.insist(path, OUTCOME, "officer", key=fresh("o")) for _ in range(8))
    )
    assert [(409, "too-many-outcomes")] * 4 == [codes(x) for x in rest if not x.is_success]
    assert MOST_OUTCOMES == len(await outcomes_of(api, grant_id))


@pytest.mark.parametrize("door", ["grants", "proposals"])
async def test_a_tranche_waits_for_an_accepted_outcome_of_the_earlier_one(
    api: Api, ledger: RealLedger, door: str
) -> None:
    """At both doors; a submitted outcome, or one of another grant, is not enough."""
    tenant_id = await ledger.tenant(fresh("lab"), "university")
    first = await proposed_grant(api, tenant_id, "50")
    second = await proposed_grant(api, tenant_id, "70", after_grant=first)
    other = await granted(api, tenant_id, "1")
    path = f"/v1/{door}/{second}/approve"

    async def approved() -> httpx2.Response:
        return await api.insist(path, {}, "approver", key=fresh("a"))

    missing = await approved()
    assert (409, "outcome-missing", first) == (*codes(missing), missing.json()["after_grant"])
    assert 200 == (await approve(api, first)).status_code
    assert (409, "outcome-missing") == codes(await approved())
    outcome_id = await submitted(api, first)
    await accept(api, other, await submitted(api, other))
    assert (409, "outcome-missing") == codes(await approved())
    shown = (await api.get(f"/v1/grants/{second}", "officer")).json()
    assert ("proposed", first, "0") == (
        shown["state"],
        shown["after_grant"],
        shown["remaining_micro"],
    )
    listed = (await api.get(f"/v1/proposals?tenant_id={tenant_id}", "officer")).json()["items"]
    assert [None, first, None] == [item["terms"]["after_grant"] for item in listed]
    assert 200 == (await accept(api, first, outcome_id)).status_code
    done = await approved()
    assert (200, "approved") == (done.status_code, done.json()["state"])
    shown = (await api.get(f"/v1/grants/{second}", "officer")).json()
    assert ("approved", "70") == (shown["state"], shown["remaining_micro"])


async def test_a_tranche_comes_after_a_grant_of_its_tenant(api: Api) -> None:
    """No other, and none that is not there: whoever proposes learns it at once."""
    theirs = await proposed_grant(api, "two")
    for after_grant, status in (("none", 404), (theirs, 404), ("a b", 422), (5, 422)):
        body = grant_of("one", after_grant=after_grant)
        refused = await api.post("/v1/grants", body, "officer", key=fresh("g"))
        assert status == refused.status_code, refused.text


async def test_an_acceptance_and_an_approval_at_once_never_pass_each_other(
    api: Api, ledger: RealLedger
) -> None:
    """Approved only where the acceptance came first; and refused, it can be approved after."""
    rivals = [await approver(api) for _ in range(4)]
    for _ in range(6):
        tenant_id = await ledger.tenant(fresh("lab"), "university")
        first = await granted(api, tenant_id, "5")
        second = await proposed_grant(api, tenant_id, "7", after_grant=first)
        outcome_id = await submitted(api, first)
        answers = await asyncio.gather(
            *(approve(api, second, who) for who in rivals[:2]),
            accept(api, first, outcome_id),
            *(approve(api, second, who) for who in rivals[2:]),
            accept(api, first, outcome_id, rivals[0]),
        )
        accepted = [answers[2], answers[5]]
        refused = [codes(x) for x in accepted if not x.is_success]
        assert [(409, "already-decided")] == refused
        approvals = [answers[number] for number in (0, 1, 3, 4)]
        for lost in (x for x in approvals if not x.is_success):
            assert codes(lost) in {(409, "outcome-missing"), (409, "already-decided")}
        won = [x for x in approvals if x.is_success]
        assert len(won) <= 1
        if not won:
            assert {(409, "outcome-missing")} == {codes(x) for x in approvals}
            assert 200 == (await approve(api, second)).status_code
        async with ledger.admin.connection() as connection:
            in_order = await connection.fetchval(
                """
                select o.accepted_at < g.approved_at from grants g
                  join outcomes o on o.grant_id = g.after_grant
                 where g.grant_id = $1
                """,
                second,
            )
        assert in_order is True


async def test_an_approval_waits_for_an_acceptance_that_is_about_to_commit(
    api: Api, ledger: RealLedger
) -> None:
    """It is decided on what stands once it holds the lock: not on what was there before."""
    tenant_id = await ledger.tenant(fresh("lab"), "university")
    first = await granted(api, tenant_id, "5")
    second = await proposed_grant(api, tenant_id, "7", after_grant=first)
    outcome_id = await submitted(api, first)
    async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
        await connection.execute(
            "update outcomes set state = 'accepted', accepted_by = 'k', accepted_at = now()"
            " where outcome_id = $1",
            outcome_id,
        )
        waiting = asyncio.create_task(approve(api, second))
        async with ledger.admin.connection() as looking:
            # Who does not wait has been refused, which the last line shows.
            blocked = "select exists (select from pg_locks where not granted)"
            while not (waiting.done() or await looking.fetchval(blocked)):
                pass
    assert 200 == (await waiting).status_code


async def test_the_database_itself_keeps_submitter_and_accepter_apart(
    api: Api, ledger: RealLedger
) -> None:
    """Whatever the code does; and a tenant's role sees no other tenant's outcomes."""
    grant_id = await granted(api, "two", "5")
    outcome_id = await submitted(api, grant_id)
    statement = """
    update outcomes set state = 'accepted', accepted_by = submitted_by, accepted_at = now()
     where outcome_id = $1
    """
    with pytest.raises(asyncpg.CheckViolationError):
        async with ledger.api.transaction(tenant=ALL_TENANTS) as connection:
            await connection.execute(statement, outcome_id)
    async with ledger.api.transaction(tenant="one") as connection:
        assert "UPDATE 0" == await connection.execute(statement, outcome_id)
        assert 0 == await connection.fetchval(
            "select count(*) from outcomes where tenant_id <> 'one'"
        )
    # Nor does a tranche come after another tenant's grant.
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        async with ledger.admin.transaction() as admin:
            await admin.execute(
                """
                insert into grants (grant_id, tenant_id, programme_id, grant_micro, priority,
                                    effective_at, state, proposed_by, after_grant)
                select 'g-foreign', 'one', programme_id, 1, 1, effective_at, 'proposed', 'k',
                       grant_id
                  from grants where grant_id = $1
                """,
                grant_id,
            )


async def test_what_outcomes_cost_is_reported_by_theme(api: Api, ledger: RealLedger) -> None:
    """Drawn of grants with an accepted outcome, over accepted outcomes; of all its programmes."""
    name = fresh("theme")
    funds = [await programme(api, "1000", theme=name) for _ in range(2)]
    empty = {"theme": name, "currency": "PKR", "drawn_micro": "0", "cost_per_outcome_micro": None}
    assert empty | {"grant_count": 0, "accepted_count": 0} == await theme(api, name)
    tenants = [await ledger.tenant(fresh("lab"), "university") for _ in range(3)]
    grants = [
        await granted(api, tenant_id, "100", programme_id=fund)
        for tenant_id, fund in zip(tenants, (*funds, funds[0]), strict=True)
    ]
    for tenant_id, micro in zip(tenants, (60, 41, 90), strict=True):
        await ledger.book(total(micro, tenant_id=tenant_id))
    for grant_id, count in ((grants[0], 2), (grants[1], 1)):
        for _ in range(count):
            await accept(api, grant_id, await submitted(api, grant_id))
    # One of the third grant is submitted and no more: neither it nor what it drew counts.
    await submitted(api, grants[2])
    # 101 / 3 = 33.67, half-up.
    assert {
        "theme": name,
        "currency": "PKR",
        "grant_count": 2,
        "accepted_count": 3,
        "drawn_micro": "101",
        "cost_per_outcome_micro": "34",
    } == await theme(api, name)
    assert (403, "forbidden") == codes(await api.get("/v1/outcomes/by-theme", "one"))
