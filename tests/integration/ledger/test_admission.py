"""May this job start, over HTTP: terms of grants, extensions, suspension, and credit paid for."""

from __future__ import annotations

from integration.ledger.real import RealLedger
from integration.ledger.test_api import FAR, Api, api, grant_of, hold_of

__all__ = ["api"]


async def test_holds_are_found_by_job_and_extended_whole_or_not_at_all(
    api: Api, ledger: RealLedger
) -> None:
    """A scheduler that forgot a hold's id finds it by its job, and asks for more time and money."""
    await ledger.tenant("longer", "commercial", 1_000)
    key = "h-longer"
    asked = hold_of("longer", "400", job_ref="slurm-77", price_class="on_demand")
    placed = (await api.post("/v1/holds", asked, "scheduler", key=key)).json()
    assert ("400", "0", "0", None) == tuple(
        placed[name] for name in ("open_micro", "drawn_micro", "short_micro", "end")
    )
    (found,) = (await api.get("/v1/holds?job_ref=slurm-77&state=open", "scheduler")).json()["items"]
    assert (placed["hold_id"], "longer", "on_demand", FAR) == tuple(
        found[name] for name in ("hold_id", "tenant_id", "price_class", "expires_at")
    )
    path = f"/v1/holds/{placed['hold_id']}"
    refused = await api.post(f"{path}/extend", {"add_micro": "601"}, "scheduler", key="x-1")
    assert ("insufficient-credit", "600", "1") == tuple(
        refused.json()[name] for name in ("code", "available_micro", "shortfall_micro")
    )
    until = "2091-01-01T00:00:00.000Z"
    more = {"add_micro": "600", "expires_at": until}
    answers = [await api.post(f"{path}/extend", more, "scheduler", key="x-2") for _ in range(2)]
    assert [200, 200] == [answer.status_code for answer in answers]
    assert ("1000", "0") == tuple(
        answers[1].json()[name] for name in ("open_micro", "available_micro")
    )
    await api.post(f"{path}/release", {}, "scheduler", key="x-3")
    closed = await api.post(f"{path}/extend", {}, "scheduler", key="x-4")
    assert (409, "hold-closed", "released") == (
        closed.status_code,
        closed.json()["code"],
        closed.json()["state"],
    )
    by_state = [
        len((await api.get(f"/v1/holds?tenant_id=longer&state={state}", "auditor")).json()["items"])
        for state in ("open", "released")
    ]
    assert [0, 1] == by_state
    assert [] == (await api.get("/v1/holds?job_ref=slurm-77", "one")).json()["items"]
    odd = await api.get("/v1/holds?state=over", "scheduler")
    assert (422, "malformed") == (odd.status_code, odd.json()["code"])


async def test_a_suspended_tenant_is_refused_before_anything_else_about_its_hold(
    api: Api, ledger: RealLedger
) -> None:
    """Before a price that is missing and credit that lacks; and only until it is resumed."""
    await ledger.tenant("paused", "commercial", 1_000)
    path = "/v1/tenants/paused"
    said = [
        (await api.post(f"{path}/suspend", {"reason": "abuse"}, "operator", key=f"s-{n}")).json()
        for n in range(2)
    ]
    assert [{"tenant_id": "paused", "state": "suspended"}] * 2 == said
    unpriced = hold_of("paused", None, sku="unheard", price_class="x", gpus=1, duration_ms=1)
    for number, asked in enumerate((hold_of("paused", "5000"), unpriced)):
        refused = await api.post("/v1/holds", asked, "scheduler", key=f"s-hold-{number}")
        assert (409, "suspended") == (refused.status_code, refused.json()["code"])
    assert (await api.get(f"{path}/balance", "auditor")).json()["is_suspended"]
    resumed = await api.post(f"{path}/resume", {}, "operator", key="s-9")
    assert "active" == resumed.json()["state"]
    placed = await api.post("/v1/holds", hold_of("paused", "5"), "scheduler", key="s-10")
    assert 201 == placed.status_code
    nobody = await api.post("/v1/tenants/nobody-here/resume", {}, "operator", key="s-11")
    assert 404 == nobody.status_code
    by_tenant = await api.post(f"{path}/suspend", {"reason": "x"}, "one", key="s-12")
    assert 403 == by_tenant.status_code


async def test_a_payment_is_credited_once_under_whatever_key_it_is_told(
    api: Api, ledger: RealLedger
) -> None:
    """The bank's file is read twice: the second reading gets the first answer."""
    await ledger.tenant("payer")
    path, body = "/v1/tenants/payer/top-ups", {"payment_id": "ibft-1", "topup_micro": "900"}
    first = await api.post(path, body, "finance", key="u-1")
    again = await api.post(path, body, "finance", key="u-2")
    assert (201, 201) == (first.status_code, again.status_code)
    assert first.json() == again.json()
    other = await api.post(path, body | {"topup_micro": "901"}, "finance", key="u-3")
    assert (409, "payment-differs", "900") == (
        other.status_code,
        other.json()["code"],
        other.json()["topup_micro"],
    )
    seen = (await api.get("/v1/tenants/payer/balance", "finance")).json()
    assert [("prepaid", "900")] == [(lot["source"], lot["remaining_micro"]) for lot in seen["lots"]]
    for bad in ({"expires_at": "2090-01-01T00:30:00.000Z"}, {"topup_micro": "0"}):
        refused = await api.post(path, body | bad, "finance", key=f"u-{bad}")
        assert (422, "malformed") == (refused.status_code, refused.json()["code"])
    nobody = await api.post("/v1/tenants/nobody-here/top-ups", body, "finance", key="u-5")
    assert (404, "not-found") == (nobody.status_code, nobody.json()["code"])
    taken = {"programme_id": "prepaid", "name": "Taken", "budget_micro": "1"}
    refused = await api.post("/v1/programmes", taken, "operator", key="u-6")
    assert (422, "malformed") == (refused.status_code, refused.json()["code"])


async def test_a_grant_for_some_usage_says_so_everywhere_and_holds_for_other_usage_are_refused(
    api: Api, ledger: RealLedger
) -> None:
    """40 % of what runs on two hubs in one class: the entry has the terms, a hold their effect."""
    await ledger.tenant("scoped", "startup")
    terms: dict[str, object] = {
        "scope": {"hubs": ["lhr", "isb"], "price_classes": ["on_demand"]},
        "coverage_bps": 4_000,
        "tax_effect": "reduces_base",
    }
    proposed = await api.post(
        "/v1/grants", grant_of("scoped", "50", **terms), "officer", key="g-terms"
    )
    assert 201 == proposed.status_code
    path = f"/v1/grants/{proposed.json()['grant_id']}/approve"
    assert 200 == (await api.post(path, {}, "approver", key="a-terms")).status_code
    (entry,) = (await api.get("/v1/tenants/scoped/entries", "auditor")).json()["items"]
    kept = {"hubs": ["isb", "lhr"], "price_classes": ["on_demand"]}
    granted = entry["grant"]
    assert (kept, 4_000, "reduces_base") == (
        granted["scope"],
        granted["coverage_bps"],
        granted["tax_effect"],
    )
    other_usage = (
        hold_of("scoped", "5", hub="khi", price_class="on_demand"),
        hold_of("scoped", "5", price_class="reserved"),
        hold_of("scoped", "5"),
    )
    for number, hold in enumerate(other_usage):
        refused = await api.post("/v1/holds", hold, "scheduler", key=f"h-terms-{number}")
        body = refused.json()
        assert (409, "insufficient-credit", "0", "5") == (
            refused.status_code,
            body["code"],
            body["available_micro"],
            body["shortfall_micro"],
        )
    # A startup has no limit for the other 60 %, so the lot alone can guarantee nothing.
    refused = await api.post(
        "/v1/holds",
        hold_of("scoped", "5", price_class="on_demand"),
        "scheduler",
        key="h-terms-share",
    )
    assert ("0", "3") == (refused.json()["available_micro"], refused.json()["shortfall_micro"])
