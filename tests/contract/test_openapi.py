"""The committed OpenAPI documents are those of the services, and keep the rules of every API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
from generate import SERVICES, openapi_text

from contract.examples import CONTRACTS, load
from hisab_contracts.currencies import EXPONENTS
from hisab_contracts.problems import PROBLEMS

METHODS = ("get", "post", "put", "patch", "delete")
PROMISED = {
    "metering": """GET /v1/status, POST /v1/events, GET /v1/reconciliation,
        GET /v1/allocations/{}/{}, GET /v1/quarantine, POST /v1/quarantine/{}/replay,
        POST /v1/quarantine/{}/dismiss, POST /v1/price-lists, POST /v1/quotes, GET /v1/hubs/{},
        GET /v1/hubs/{}/sources, POST /v1/hubs, POST /v1/hubs/{}/sources/retire""",
    "ledger": """GET /v1/status, POST /v1/tenants, POST /v1/programmes, POST /v1/keys,
        POST /v1/keys/{}/revoke, POST /v1/grants, POST /v1/grants/import,
        POST /v1/grants/{}/approve, POST /v1/holds,
        GET /v1/holds/{}, POST /v1/holds/{}/release, GET /v1/tenants/{}/balance,
        GET /v1/tenants/{}/entries, GET /v1/trial-balance, POST /v1/tenants/{}/invoiced""",
    "invoicing": """GET /v1/status, GET /v1/periods/{}, POST /v1/periods/{}/close,
        GET /v1/invoices, GET /v1/invoices/{}, GET /v1/invoices/{}/pdf,
        POST /v1/invoices/{}/recompute""",
}
"""What outsiders rely on: a path may gain neighbours, it never goes away."""


@lru_cache
def document(service: str) -> dict[str, Any]:
    """Return the committed document of a service."""
    loaded: dict[str, Any] = load(CONTRACTS / "openapi" / f"{service}.json")
    return loaded


def operations(service: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and operation of everything a service answers."""
    for path, item in document(service)["paths"].items():
        for method in METHODS:
            if method in item:
                yield method.upper(), path, item[method]


@pytest.mark.parametrize("service", SERVICES)
def test_committed_document_is_that_of_the_service(service: str) -> None:
    """An API that changed has its document regenerated (`python contracts/generate.py`)."""
    committed = (CONTRACTS / "openapi" / f"{service}.json").read_text(encoding="utf-8")
    assert openapi_text(service) == committed


def test_a_currency_that_a_request_names_is_one_of_iso_4217() -> None:
    """Wherever one enters, at whichever service: the closed table, so another is malformed."""
    asked = {
        f"{service} {path}": schema["properties"]["currency"]
        for service in SERVICES
        for _, path, operation in operations(service)
        for schema in bodies(service, operation)
        if "currency" in schema.get("properties", {})
    }
    assert {"ledger /v1/tenants", "metering /v1/price-lists"} <= set(asked)
    for place, schema in asked.items():
        assert sorted(EXPONENTS) == sorted(schema.get("enum", [])), place


def bodies(service: str, operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the schemas of what an operation takes."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        name = content["schema"].get("$ref", "").rpartition("/")[2]
        if name:
            yield document(service)["components"]["schemas"][name]


@pytest.mark.parametrize("service", SERVICES)
def test_every_promised_endpoint_is_there(service: str) -> None:
    """No endpoint that outsiders rely on is missing."""
    promised = {" ".join(call.split()) for call in PROMISED[service].split(",")}
    present = {f"{m} {re.sub(r'{[^}]*}', '{}', path)}" for m, path, _ in operations(service)}
    assert promised - present == set()


@pytest.mark.parametrize("service", SERVICES)
def test_document_is_openapi_3_1_with_distinct_operation_ids(service: str) -> None:
    """The version is 3.1, and a client's generator finds one name per operation."""
    assert document(service)["openapi"].startswith("3.1")
    names = [operation.get("operationId") for _, _, operation in operations(service)]
    assert None not in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("service", SERVICES)
def test_every_reference_resolves(service: str) -> None:
    """No part is named that is not there."""
    text = json.dumps(document(service))
    parts = document(service).get("components", {}).get("schemas", {})
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in parts


@pytest.mark.parametrize("service", SERVICES)
def test_errors_are_problems_of_the_catalogue(service: str) -> None:
    """Every documented error is problem+json under a status that some problem has."""
    statuses = {str(problem.status) for problem in PROBLEMS.values()}
    for method, path, operation in operations(service):
        for status, response in operation["responses"].items():
            if status.startswith(("4", "5")):
                assert status in statuses, (method, path, status)
                assert "application/problem+json" in response.get("content", {}), (method, path)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.defect("L15", "F63")
def test_amounts_are_strings(service: str) -> None:
    """Amounts, GPU time and sequence numbers are JSON strings: no reader's double can bend them."""
    for name, schema in document(service).get("components", {}).get("schemas", {}).items():
        for member, part in schema.get("properties", {}).items():
            if re.search(r"(_micro|_minor|_gpu_ms|_gpu_ns|^seq|_seq)$|^micro_per_", member):
                kinds = {part.get("type")} | {
                    choice.get("type") for choice in part.get("anyOf", ())
                }
                assert kinds & {"integer", "number"} == set(), f"{name}.{member}"
