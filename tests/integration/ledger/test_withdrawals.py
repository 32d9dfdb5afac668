"""Reversed, revoked and reclaimed by two people, over HTTP and on real PostgreSQL."""

from __future__ import annotations

import httpx2

from integration.ledger.real import RealLedger
from integration.ledger.test_api import Api, api, hold_of
from integration.ledger.test_proposals import (
    approve,
    codes,
    entries_of,
    fresh,
    granted,
    programme,
    report,
)
from unit.ledger.values import total

__all__ = ["api"]


async def test_an_entry_is_reversed_by_two_people(api: Api, ledger: RealLedger) -> None:
    """The lot is gone, the programme has its budget back; a second reversal is refused."""
    name = await programme(api, "100")
    tenant_id = await ledger.tenant(fresh("lab"), "university")
    grant_id = await granted(api, tenant_id, "60", programme_id=name)
    (entry,) = await entries_of(api, tenant_id)
    path, body = f"/v1/entries/{entry['entry_id']}/reverse", {"reason": "wrong tenant"}
    terms = {
        "kind": "reverse",
        "tenant_id": tenant_id,
        "entry_id": entry["entry_id"],
        "grant_micro": "60",
        "reason": "wrong tenant",
    }
    made = [await api.post(path, body, who, key=fresh("x")) for who in ("officer", "finance")]
    assert [(202, terms)] * 2 == [(answer.status_code, answer.json()["terms"]) for answer in made]
    first, second = [answer.json()["proposal_id"] for answer in made]
    approved = await approve(api, first)
    assert [f"{tenant_id}.2"] == approved.json()["entry_ids"]
    reversal = (await entries_of(api, tenant_id))[-1]
    assert ("reversal", entry["entry_id"], "wrong tenant") == tuple(
        reversal[member] for member in ("kind", "reverses", "reason")
    )
    shown = (await api.get(f"/v1/grants/{grant_id}", "officer")).json()
    assert ("reversed", "0", "0") == tuple(
        shown[member] for member in ("state", "remaining_micro", "drawn_micro")
    )
    found = await report(api, name)
    assert ("100", "0") == (found["left_micro"], found["granted_micro"])
    assert (409, "already-reversed") == codes(await approve(api, second))
    again = await api.post(path, body, "officer", key=fresh("x"))
    assert (409, "already-reversed") == codes(again)
    ended = await api.post(f"/v1/entries/{tenant_id}.2/reverse", body, "officer", key=fresh("x"))
    assert (409, "is-reversal") == codes(ended)
    assert [] == [line for line in await ledger.audit() if tenant_id in line or name in line]


async def test_what_cannot_be_reversed_says_why(api: Api, ledger: RealLedger) -> None:
    """Drawn on, reserved, a charge, a document, a hold, nothing at all."""
    tenant_id = await ledger.tenant(fresh("firm"), limit_micro=1_000)
    await granted(api, tenant_id, "60")
    placed = await api.post("/v1/holds", hold_of(tenant_id, "30"), "scheduler", key=fresh("h"))
    body = {"reason": "wrong"}

    async def ask(seq: object) -> httpx2.Response:
        path = f"/v1/entries/{tenant_id}.{seq}/reverse"
        return await api.post(path, body, "officer", key=fresh("x"))

    reserved = await ask(1)
    assert ((409, "reserved"), "30") == (codes(reserved), reserved.json()["reserved_micro"])
    assert (409, "not-reversible") == codes(await ask(2))
    await api.post(f"/v1/holds/{placed.json()['hold_id']}/release", {}, "scheduler", key=fresh("r"))
    await ledger.book(total(100, tenant_id=tenant_id))
    drawn = await ask(1)
    assert ((409, "already-drawn"), "60") == (codes(drawn), drawn.json()["drawn_micro"])
    assert (409, "correct-in-metering") == codes(await ask(4))
    await ledger.invoiced(tenant_id, fresh("doc"), 40)
    assert (409, "correct-in-invoicing") == codes(await ask(5))
    for seq in (6, 0, -1, "x", "1x", "9" * 30, ""):
        assert (404, "not-found") == codes(await ask(seq))
    wordless = await api.post(f"/v1/entries/{tenant_id}.1/reverse", {}, "officer", key=fresh("x"))
    assert (422, "malformed") == codes(wordless)
    other = await api.post(f"/v1/entries/{tenant_id}.1/reverse", body, "approver", key=fresh("x"))
    assert (403, "forbidden") == codes(other)


async def test_a_grant_is_revoked_and_what_expired_of_it_reclaimed_by_two_people(
    api: Api, ledger: RealLedger
) -> None:
    """One whose window has not begun expires whole, at once; then its programme has it back."""
    name = await programme(api, "100")
    tenant_id = await ledger.tenant(fresh("lab"), "university")
    grant_id = await granted(
        api, tenant_id, "60", programme_id=name, effective_at="2090-01-01T00:00:00.000Z"
    )
    revoke, reclaim = f"/v1/grants/{grant_id}/revoke", f"/v1/programmes/{name}/reclaim"
    early = await api.post(reclaim, {"grant_id": grant_id}, "officer", key=fresh("c"))
    assert (409, "not-expired") == codes(early)
    made = await api.post(revoke, {"reason": "closed"}, "officer", key=fresh("v"))
    terms = {
        "kind": "revoke",
        "tenant_id": tenant_id,
        "grant_id": grant_id,
        "grant_micro": "60",
        "reason": "closed",
    }
    assert (202, terms) == (made.status_code, made.json()["terms"])
    assert (403, "maker-is-checker") == codes(
        await approve(api, made.json()["proposal_id"], "officer")
    )
    approved = await approve(api, made.json()["proposal_id"])
    kinds = {entry["entry_id"]: entry["kind"] for entry in await entries_of(api, tenant_id)}
    assert ["grant", "grant_revoked", "expiry"] == list(kinds.values())
    assert "grant_revoked" in [kinds[entry_id] for entry_id in approved.json()["entry_ids"]]
    twice = await api.post(revoke, {"reason": "closed"}, "officer", key=fresh("v"))
    assert (409, "already-decided") == codes(twice)
    shown = (await api.get(f"/v1/grants/{grant_id}", "officer")).json()
    assert ("revoked", "0", "60", "0") == tuple(
        shown[member] for member in ("state", "remaining_micro", "expired_micro", "drawn_micro")
    )
    found = await report(api, name)
    assert ("40", "60", "60", "0") == tuple(
        found[member]
        for member in ("left_micro", "granted_micro", "expired_micro", "reclaimed_micro")
    )
    back = await api.post(reclaim, {"grant_id": grant_id}, "officer", key=fresh("c"))
    assert (202, "reclaim") == (back.status_code, back.json()["kind"])
    assert 200 == (await approve(api, back.json()["proposal_id"])).status_code
    found = await report(api, name)
    assert ("100", "100", "60", "60", "60", "0") == tuple(
        found[member]
        for member in (
            "budget_micro",
            "left_micro",
            "granted_micro",
            "expired_micro",
            "reclaimed_micro",
            "drawn_micro",
        )
    )
    late = await api.post(reclaim, {"grant_id": grant_id}, "officer", key=fresh("c"))
    assert (409, "already-reclaimed") == codes(late)
    elsewhere = await api.post(
        "/v1/programmes/ignite/reclaim", {"grant_id": grant_id}, "officer", key=fresh("c")
    )
    assert (404, "not-found") == codes(elsewhere)
    assert [] == [line for line in await ledger.audit() if tenant_id in line or name in line]
