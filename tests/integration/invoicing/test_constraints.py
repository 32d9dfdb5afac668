"""What invoicing's schema forbids, asked for over HTTP: each answer is a problem of its own.

`SHOWN` names, for each row, the constraints that it would break: `test_schema_constraints` holds
the list against the schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import infrastructure
from hisab_contracts.units import month_bounds_ms
from integration.invoicing.months import MONTH, charge, served

Migrated = Callable[[str], infrastructure.Database]
RATE = {
    "hub": "con",
    "authority": "ICT",
    "tax_bps": 1500,
    "valid_from": "2020-01-01",
    "citation": "an act",
}
SELLER = {"legal_entity_id": "con", "name": "Con"}
CLOSE: dict[str, Any] = {"issued_on": None, "override": None}

Row = tuple[str, str, str, dict[str, Any], int, str]
"""What it would break (more than one: by a space), path, role, body, status, code."""

ROWS: tuple[Row, ...] = (
    (
        "legal_entities_legal_entity_id_check",
        "legal-entities",
        "operator",
        SELLER | {"legal_entity_id": "a b"},
        422,
        "malformed",
    ),
    (
        "legal_entities_name_check",
        "legal-entities",
        "operator",
        SELLER | {"name": ""},
        422,
        "malformed",
    ),
    (
        "legal_entities_pkey",
        "legal-entities",
        "operator",
        {"legal_entity_id": "ignite-haas", "name": "Other"},
        409,
        "already-exists",
    ),
    (
        "tax_rates_authority_check",
        "tax-rates",
        "operator",
        RATE | {"authority": ""},
        422,
        "malformed",
    ),
    (
        "tax_rates_citation_check",
        "tax-rates",
        "operator",
        RATE | {"citation": ""},
        422,
        "malformed",
    ),
    (
        "tax_rates_tax_bps_check",
        "tax-rates",
        "operator",
        RATE | {"tax_bps": 10_001},
        422,
        "malformed",
    ),
    ("int", "tax-rates", "operator", RATE | {"tax_bps": 2**31}, 422, "malformed"),
    (
        "tax_rates_hub_valid_from_key",
        "tax-rates",
        "operator",
        RATE | {"tax_bps": 1},
        409,
        "already-exists",
    ),
    ("date", "tax-rates", "operator", RATE | {"valid_from": "9999-99-99"}, 422, "malformed"),
    ("closings_period_check", "periods/2025-13/close", "finance", CLOSE, 422, "malformed"),
    ("date", "periods/9999-11/close", "finance", CLOSE, 422, "malformed"),
    ("date", "periods/0001-01/close", "finance", CLOSE, 422, "malformed"),
    (
        "date",
        f"periods/{MONTH}/close",
        "finance",
        CLOSE | {"issued_on": "9999-12-31"},
        422,
        "malformed",
    ),
    (
        "closings_override_reason_check",
        f"periods/{MONTH}/close",
        "finance",
        CLOSE | {"override": {"reason": ""}},
        422,
        "malformed",
    ),
    ("closings_pkey bills_pkey", f"periods/{MONTH}/close", "finance", CLOSE, 409, "period-closed"),
)
SHOWN = {name for row in ROWS for name in row[0].split()} - {"int", "date"}


async def test_what_the_schema_forbids_is_refused_before_it_gets_there(migrated: Migrated) -> None:
    """Every row: the status, the code, a detail that says what to change; never a 500."""
    async with served(migrated("invoicing")) as service:
        await service.books.seller()
        await service.books.tenants("a")
        await service.books.keep(charge("a", 1, 630_000_000))
        for hub in ("lhr", "khi"):
            await service.books.watermark(hub, month_bounds_ms(MONTH)[1])
        assert 201 == (await service.post("/v1/tax-rates", "operator", RATE)).status_code
        closed = await service.post(f"/v1/periods/{MONTH}/close", "finance", CLOSE, "first")
        assert 202 == closed.status_code
        for number, (name, path, role, body, status, code) in enumerate(ROWS):
            answer = await service.post(f"/v1/{path}", role, body, f"con-{number}")
            found = answer.json()
            assert (status, code) == (answer.status_code, found["code"]), (name, found)
            assert found["detail"], name
        for month in ("0001-01", "9999-12", "2019-12", "2100-02"):
            for path in (f"/v1/periods/{month}", f"/v1/periods/{month}/reconciliation"):
                assert 422 == (await service.get(path, "finance")).status_code, path
            listed = await service.get("/v1/invoices", "finance", period=month)
            assert 422 == listed.status_code, month
