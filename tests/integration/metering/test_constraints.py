"""What metering's schema forbids, asked for over HTTP: each answer is a problem of its own.

`SHOWN` names, for each row, the constraints that it would break: `test_schema_constraints` holds
the list against the schema.
"""

from __future__ import annotations

from typing import Any

from integration.metering.service import Metering

FROM = "2040-01-01T00:00:00.000Z"
HALF = "2040-01-01T00:30:00.000Z"
HUB = {"hub": "con", "name": "Con", "heartbeat_ms": 60_000}


def price_list(micro: str = "1", **more: object) -> dict[str, Any]:
    """A list of one price, of a SKU that no other test knows."""
    price = {"sku": "con", "price_class": "spot", "micro_per_gpu_hour": micro}
    return {"currency": "PKR", "valid_from": FROM, "valid_until": None, "prices": [price]} | more


CORRECTION = {
    "hub": "con",
    "allocation_id": "job-1",
    "start_ms": 1_753_956_000_000,
    "end_ms": 1_753_959_600_000,
    "action": "void",
    "reason": "test load",
}

Row = tuple[str, str, dict[str, Any], int, str]
"""What it would break (more than one: by a space), path, body, status, code."""

ROWS: tuple[Row, ...] = (
    ("hubs_hub_check", "hubs", HUB | {"hub": "Con"}, 422, "malformed"),
    ("hubs_heartbeat_ms_check", "hubs", HUB | {"heartbeat_ms": 0}, 422, "malformed"),
    ("corrections_check", "corrections", CORRECTION | {"end_ms": 1}, 422, "malformed"),
    (
        "corrections_check",
        "corrections",
        CORRECTION | {"end_ms": 1_753_956_000_000},
        422,
        "malformed",
    ),
    ("bigint", "corrections", CORRECTION | {"end_ms": 2**63}, 422, "malformed"),
    (
        "corrections_action_check",
        "corrections",
        CORRECTION | {"action": "delete"},
        422,
        "malformed",
    ),
    ("bigint", "hubs", HUB | {"heartbeat_ms": 2**63}, 422, "malformed"),
    ("hubs_pkey", "hubs", HUB, 409, "already-exists"),
    (
        "price_lists_valid_from_ms_check price_lines_valid_from_ms_check",
        "price-lists",
        price_list(valid_from=HALF),
        422,
        "malformed",
    ),
    (
        "price_lists_valid_until_ms_check price_lines_valid_until_ms_check",
        "price-lists",
        price_list(valid_until="2041-01-01T00:30:00.000Z"),
        422,
        "malformed",
    ),
    ("price_lists_check", "price-lists", price_list(valid_until=FROM), 422, "malformed"),
    ("price_lines_micro_per_gpu_hour_check", "price-lists", price_list("-1"), 422, "malformed"),
    ("bigint", "price-lists", price_list(str(2**63)), 422, "malformed"),
    (
        "price_lists_pkey price_lines_pkey",
        "price-lists",
        price_list(),
        409,
        "price-overlap",
    ),
    (
        "price_lines_currency_sku_price_class_valid_from_ms_key",
        "price-lists",
        price_list("2"),
        409,
        "price-overlap",
    ),
    (
        "price_lines_currency_sku_price_class_valid_from_ms_key",
        "price-lists",
        price_list("3", valid_from="2050-01-01T00:00:00.000Z")
        | {
            "prices": [
                {"sku": "con", "price_class": "spot", "micro_per_gpu_hour": micro}
                for micro in ("3", "4")
            ]
        },
        409,
        "price-overlap",
    ),
)
SHOWN = {name for row in ROWS for name in row[0].split()} - {"bigint"}


def test_what_the_schema_forbids_is_refused_before_it_gets_there(metering: Metering) -> None:
    """Every row: the status, the code, a detail that says what to change; never a 500."""
    for path, body in (("hubs", HUB), ("price-lists", price_list())):
        assert 201 == metering.request("POST", f"/v1/{path}", json=body).status_code
    for name, path, body, status, code in ROWS:
        answer = metering.request("POST", f"/v1/{path}", json=body)
        found = answer.json()
        assert (status, code) == (answer.status_code, found["code"]), (name, found)
        assert found["detail"], name
