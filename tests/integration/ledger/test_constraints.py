"""What the ledger's schema forbids, asked for over HTTP: each answer is a problem of its own.

`SHOWN` names, for each row, the constraints that it would break: `test_schema_constraints` holds
the list against the schema.
"""

from __future__ import annotations

from typing import Any

import pytest

from hisab_contracts.ids import PriceClass, PriceVersion, Sku
from hisab_contracts.reference import PriceLine
from hisab_contracts.units import MAX_MICRO
from integration.ledger.real import RealLedger
from integration.ledger.test_api import Api, api, grant_of, hold_of

__all__ = ["api"]

HALF = "2025-07-01T00:30:00.000Z"
TENANT = {
    "tenant_id": "con",
    "name": "Con",
    "kind": "commercial",
    "currency": "PKR",
    "credit_limit_micro": "1000",
}
PROGRAMME = {"programme_id": "con-p", "name": "Con", "budget_micro": "10"}
LIMIT = {"credit_limit_micro": "5", "reason": "grows"}
OUTCOME = {"kind": "pilot", "evidence_sha256": "ab" * 32, "note": "in two districts"}
KEY: dict[str, Any] = {"role": "tenant", "tenant_id": "con"}

Row = tuple[str, str, str, dict[str, Any], int, str]
"""What it would break (more than one: by a space), path, role, body, status, code."""

ROWS: tuple[Row, ...] = (
    ("tenants_tenant_id_check", "tenants", "operator", TENANT | {"tenant_id": "a/b"}, 422, ""),
    ("tenants_name_check", "tenants", "operator", TENANT | {"name": ""}, 422, ""),
    ("tenants_name_check", "tenants", "operator", TENANT | {"name": "x" * 201}, 422, ""),
    (
        "tenants_kind_check books_kind_check",
        "tenants",
        "operator",
        TENANT | {"kind": "fund"},
        422,
        "",
    ),
    ("tenants_currency_check", "tenants", "operator", TENANT | {"currency": "pkr"}, 422, ""),
    (
        "tenants_credit_limit_micro_check books_credit_limit_micro_check",
        "tenants",
        "operator",
        TENANT | {"credit_limit_micro": "-1"},
        422,
        "",
    ),
    ("bigint", "tenants", "operator", TENANT | {"credit_limit_micro": str(2**63)}, 422, ""),
    ("tenants_check", "tenants", "operator", TENANT | {"kind": "startup"}, 422, ""),
    ("tenants_pkey books_pkey", "tenants", "operator", TENANT, 409, "already-exists"),
    ("idempotency_scope_check", "tenants", "operator", TENANT | {"tenant_id": ""}, 422, ""),
    (
        "programmes_programme_id_check",
        "programmes",
        "operator",
        PROGRAMME | {"programme_id": "a b"},
        422,
        "",
    ),
    ("programmes_name_check", "programmes", "operator", PROGRAMME | {"name": ""}, 422, ""),
    (
        "programmes_budget_micro_check",
        "programmes",
        "operator",
        PROGRAMME | {"budget_micro": "-1"},
        422,
        "",
    ),
    ("bigint", "programmes", "operator", PROGRAMME | {"budget_micro": str(2**63)}, 422, ""),
    ("programmes_pkey", "programmes", "operator", PROGRAMME, 409, "already-exists"),
    (
        "grants_grant_micro_check lots_granted_micro_check",
        "grants",
        "officer",
        grant_of("con", "0"),
        422,
        "",
    ),
    ("bigint", "grants", "officer", grant_of("con", str(2**63)), 422, ""),
    ("int", "grants", "officer", grant_of("con", priority=2**31), 422, ""),
    (
        "grants_coverage_bps_check lots_coverage_bps_check",
        "grants",
        "officer",
        grant_of("con", coverage_bps=10_001),
        422,
        "",
    ),
    (
        "grants_tax_effect_check",
        "grants",
        "officer",
        grant_of("con", tax_effect="gift"),
        422,
        "",
    ),
    (
        "grants_effective_at_check lots_effective_at_check",
        "grants",
        "officer",
        grant_of("con", effective_at=HALF),
        422,
        "",
    ),
    (
        "grants_expires_at_check lots_expires_at_check",
        "grants",
        "officer",
        grant_of("con", expires_at="2090-07-01T00:30:00.000Z"),
        422,
        "",
    ),
    (
        "grants_check2",
        "grants",
        "officer",
        grant_of("con", expires_at="2025-07-01T00:00:00.000Z"),
        422,
        "",
    ),
    ("grants_tenant_id_fkey", "grants", "officer", grant_of("nobody"), 404, "not-found"),
    (
        "grants_programme_id_fkey",
        "grants",
        "officer",
        grant_of("con", programme_id="none"),
        404,
        "not-found",
    ),
    ("programmes_theme_check", "programmes", "operator", PROGRAMME | {"theme": ""}, 422, ""),
    ("maker_is_not_checker", "grants/GRANT/approve", "officer", {}, 403, "maker-is-checker"),
    (
        "proposer_is_not_approver",
        "proposals/PROPOSAL/approve",
        "finance",
        {},
        403,
        "maker-is-checker",
    ),
    ("grants_reason_check", "grants/GRANT/reject", "approver", {"reason": ""}, 422, ""),
    ("rejected_for_a_reason", "proposals/PROPOSAL/reject", "approver", {"reason": ""}, 422, ""),
    ("proposals_tenant_id_fkey", "tenants/none/credit-limit", "finance", LIMIT, 404, "not-found"),
    (
        "proposals_amount_micro_check",
        "tenants/con/credit-limit",
        "finance",
        LIMIT | {"credit_limit_micro": "-1"},
        422,
        "",
    ),
    (
        "grants_approved_by_check grants_approved_at_check lots_pkey",
        "grants/GRANT/approve",
        "approver",
        {},
        409,
        "already-decided",
    ),
    (
        "grants_after_grant_fkey",
        "grants",
        "officer",
        grant_of("con", after_grant="none"),
        404,
        "not-found",
    ),
    (
        "outcomes_kind_check",
        "grants/GRANT/outcomes",
        "officer",
        OUTCOME | {"kind": ""},
        422,
        "",
    ),
    (
        "outcomes_evidence_sha256_check",
        "grants/GRANT/outcomes",
        "officer",
        OUTCOME | {"evidence_sha256": "AB" * 32},
        422,
        "",
    ),
    (
        "outcomes_note_check",
        "grants/GRANT/outcomes",
        "officer",
        OUTCOME | {"note": "x" * 1_001},
        422,
        "",
    ),
    (
        "submitter_is_not_accepter",
        "grants/GRANT/outcomes/OUTCOME/accept",
        "officer",
        {},
        403,
        "maker-is-checker",
    ),
    (
        "accepted_by_somebody",
        "grants/GRANT/outcomes/OUTCOME/accept",
        "approver",
        {},
        409,
        "already-decided",
    ),
    ("holds_hold_micro_check", "holds", "scheduler", hold_of("con", "-1"), 422, ""),
    ("bigint", "holds", "scheduler", hold_of("con", str(2**63)), 422, ""),
    (
        "bigint",
        "holds",
        "scheduler",
        hold_of("con", None, price_class="dear", gpus=1_000_000, duration_ms=10**12),
        422,
        "",
    ),
    (
        "lots_check1 books_reserved_micro_check",
        "holds",
        "scheduler",
        hold_of("con", "1100"),
        409,
        "insufficient-credit",
    ),
    ("holds_tenant_id_fkey", "holds", "scheduler", hold_of("nobody", "1"), 404, "not-found"),
    ("holds_check2", "holds/HOLD/release", "scheduler", {}, 409, "hold-closed"),
    ("access_keys_pkey", "keys", "operator", KEY | {"role": "king"}, 422, ""),
    ("tenants_pkey", "keys", "operator", KEY | {"tenant_id": "nobody"}, 404, "not-found"),
)
SHOWN = {f"{name}" for row in ROWS for name in row[0].split()} - {"bigint", "int"}


async def test_what_the_schema_forbids_is_refused_before_it_gets_there(
    api: Api, ledger: RealLedger
) -> None:
    """Every row: the status, the code, a detail that says what to change; never a 500."""
    assert 201 == (await api.post("/v1/tenants", TENANT, "operator", key="con")).status_code
    assert 201 == (await api.post("/v1/programmes", PROGRAMME, "operator", key="con")).status_code
    proposed = await api.post("/v1/grants", grant_of("con", "50"), "officer", key="con-g")
    grant_id = proposed.json()["grant_id"]
    limited = await api.post("/v1/tenants/con/credit-limit", LIMIT, "finance", key="con-l")
    proposal_id = limited.json()["proposal_id"]
    placed = await api.post("/v1/holds", hold_of("con", "1"), "scheduler", key="con-h")
    hold_id = placed.json()["hold_id"]
    for path, who in (
        (f"grants/{grant_id}/approve", "approver"),
        (f"holds/{hold_id}/release", "scheduler"),
    ):
        assert 200 == (await api.post(f"/v1/{path}", {}, who, key=f"con-{who}")).status_code
    outcomes = f"/v1/grants/{grant_id}/outcomes"
    submitted = await api.post(outcomes, OUTCOME, "officer", key="con-o")
    outcome_id = submitted.json()["outcome_id"]
    accepted = await api.post(f"{outcomes}/{outcome_id}/accept", {}, "approver", key="con-oa")
    assert [201, 200] == [submitted.status_code, accepted.status_code]
    await ledger.prices(
        PriceLine(
            rate_line_id="dear",
            price_version=PriceVersion("v1"),
            currency="PKR",
            sku=Sku("h100-sxm-80"),
            price_class=PriceClass("dear"),
            micro_per_gpu_hour=10**12,
            valid_from_ms=1_577_836_800_000,
            valid_until_ms=None,
        )
    )
    for number, (name, path, who, body, status, code) in enumerate(ROWS):
        named = path.replace("GRANT", grant_id).replace("HOLD", hold_id)
        named = named.replace("PROPOSAL", proposal_id).replace("OUTCOME", outcome_id)
        answer = await api.post(f"/v1/{named}", body, who, key=f"con-{number}")
        found = answer.json()
        assert (status, code or "malformed") == (answer.status_code, found["code"]), (name, found)
        assert found["detail"] or found["title"], name


@pytest.mark.parametrize("micro", ["0", None])
async def test_a_hold_priced_0_is_a_hold(api: Api, ledger: RealLedger, micro: str | None) -> None:
    """Reserved capacity costs nothing per hour: it reserves nothing, ends once, and is listed."""
    await ledger.prices(
        PriceLine(
            rate_line_id="free",
            price_version=PriceVersion("v1"),
            currency="PKR",
            sku=Sku("h100-sxm-80"),
            price_class=PriceClass("reserved-free"),
            micro_per_gpu_hour=0,
            valid_from_ms=1_577_836_800_000,
            valid_until_ms=None,
        )
    )
    tenant_id = f"free-{micro}"
    await ledger.tenant(tenant_id, "startup")
    by_price = {"price_class": "reserved-free", "gpus": 8, "duration_ms": 3_600_000}
    asked = hold_of(tenant_id, micro, **({} if micro else by_price))
    placed = await api.post("/v1/holds", asked, "scheduler", key="free")
    assert (201, "open", "0", "0", "0") == (
        placed.status_code,
        *(placed.json()[name] for name in ("state", "hold_micro", "open_micro", "available_micro")),
    )
    path = f"/v1/holds/{placed.json()['hold_id']}"
    assert "open" == (await api.get(path, "scheduler")).json()["state"]
    released = await api.post(f"{path}/release", {}, "scheduler", key="free-r")
    assert (200, "released") == (released.status_code, released.json()["state"])
    assert [] == [line for line in await ledger.audit() if tenant_id in line]


async def test_a_hold_beyond_64_bits_is_refused_though_the_credit_would_cover_it(
    api: Api, ledger: RealLedger
) -> None:
    """A limit and a lot may be more together than one amount can be."""
    await ledger.tenant("vast", limit_micro=MAX_MICRO)
    await ledger.programme("vast-p", MAX_MICRO)
    await ledger.grant("vast", "g-vast", MAX_MICRO, programme_id="vast-p")
    balance = await api.get("/v1/tenants/vast/balance", "operator")
    assert str(2 * MAX_MICRO) == balance.json()["available_micro"]
    # 10^12 a GPU-hour: 10 million GPU-hours pass 64 bits and stay below what is available.
    asked = hold_of("vast", None, price_class="vast", gpus=1_000_000, duration_ms=36_000_000)
    await ledger.prices(
        PriceLine(
            rate_line_id="vast",
            price_version=PriceVersion("v1"),
            currency="PKR",
            sku=Sku("h100-sxm-80"),
            price_class=PriceClass("vast"),
            micro_per_gpu_hour=10**12,
            valid_from_ms=1_577_836_800_000,
            valid_until_ms=None,
        )
    )
    refused = await api.post("/v1/holds", asked, "scheduler", key="vast")
    assert (422, "malformed") == (refused.status_code, refused.json()["code"])
    assert f"at most {MAX_MICRO} micro" in refused.json()["detail"]


@pytest.mark.parametrize("key", ["x" * 256, "with space", ""])
async def test_a_key_that_is_none_is_malformed(api: Api, key: str) -> None:
    """`idempotency_idempotency_key_check`."""
    answer = await api.post("/v1/holds", hold_of("con", "1"), "scheduler", key=key)
    assert (422, "malformed") == (answer.status_code, answer.json()["code"])


async def test_every_constraint_was_held_against_the_rows_that_were_there(
    ledger: RealLedger,
) -> None:
    """One that a `pre` file adds without looking is looked at by a `post` file."""
    async with ledger.admin.connection() as connection:
        unchecked = await connection.fetch(
            "select conname from pg_constraint where not convalidated order by conname"
        )
    assert [] == [row["conname"] for row in unchecked]
