"""The OpenAPI 3.1 document of a service, made from its resources and their models.

It is generated, committed and compared by a test, so that it says what the code does. Problems that
follow from how an endpoint is built (a path parameter, a body, an Idempotency-Key) are added here.
`x-hisab-access` says whose keys an endpoint takes, and by role what a key gets for what is
another's (`Operation.others`); the same statement is what the endpoint enforces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts

from hisab_contracts.problems import PROBLEMS
from runtime.http import Operation, ProblemDocument, may_be_absent, operation_of

_ALWAYS: Final = (
    "unauthenticated",
    "forbidden",
    "too-many-requests",
    "internal",
    "unavailable",
    "behind-published",
)
_WITH_BODY: Final = ("bad-request", "too-large", "unsupported-media-type", "malformed")
_WITH_KEY: Final = (
    "idempotency-key-missing",
    "idempotency-key-reused",
    "idempotency-key-in-flight",
)


EVERY_ROLE: Final = "*"
"""In `x-hisab-access`: every valid key will do."""


def openapi_document(app: FastAPI) -> bytes:
    """Return the document of an application in its committed form (sorted, indented)."""
    routes = [context.original_route for context in iter_route_contexts(app.routes)]
    endpoints = [
        (route, operation)
        for route in routes
        if isinstance(route, APIRoute) and (operation := operation_of(route)) is not None
    ]
    named = {
        model
        for _, operation in endpoints
        for model in (operation.answer, operation.body)
        if model is not None
    }
    models = sorted(named | {ProblemDocument}, key=lambda model: model.__name__)
    found, components = msgspec.json.schema_components(
        models, ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(models, found, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for route, operation in endpoints:
        paths.setdefault(route.path, {})[operation.method.lower()] = _described(
            route, operation, schemas
        )
    document = {
        "openapi": "3.1.0",
        "info": {"title": app.title, "version": app.version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
    encoded = msgspec.json.encode(document, order="sorted")
    return msgspec.json.format(encoded, indent=2) + b"\n"


Schemas = Mapping[type[msgspec.Struct], Mapping[str, object]]


def _described(route: APIRoute, operation: Operation, schemas: Schemas) -> dict[str, object]:
    in_path = re.findall(r"\{(\w+)", route.path)
    query = [*operation.query, *(("limit", "cursor") if operation.paged else ())]
    header = ["Idempotency-Key"] if operation.idempotent else []
    codes = {*_ALWAYS, *operation.problems}
    codes.update(["not-found"] if in_path else [], ["malformed"] if query else [])
    has_body = operation.body is not None or operation.csv_columns
    codes.update(_WITH_BODY if has_body else (), _WITH_KEY if header else ())
    described: dict[str, object] = {
        "operationId": route.name,
        "summary": (route.endpoint.__doc__ or route.name).strip().splitlines()[0],
        "parameters": [
            {"name": name, "in": place, "required": place != "query", "schema": {"type": "string"}}
            for place, names in (("path", in_path), ("query", query), ("header", header))
            for name in names
        ],
        "x-hisab-access": {
            "roles": list(operation.roles) or [EVERY_ROLE],
            "others": dict(operation.others),
        },
        "responses": {
            str(operation.status): {"description": "Done", "content": _answer(operation, schemas)},
            **_refusals(sorted(codes), schemas),
        },
    }
    if operation.body is not None:
        content = {"application/json": {"schema": schemas[operation.body]}}
        described["requestBody"] = {
            "required": not may_be_absent(operation.body),
            "content": content,
        }
    if operation.csv_columns:
        header_line = ",".join(operation.csv_columns) + "\n"
        described["requestBody"] = {
            "required": True,
            "content": {"text/csv": {"schema": {"type": "string"}, "example": header_line}},
        }
    return described


def _answer(operation: Operation, schemas: Schemas) -> dict[str, object]:
    if operation.answer is None:
        return {}
    schema = schemas[operation.answer]
    if operation.paged:
        members = {
            "items": {"type": "array", "items": schema},
            "next": {"type": ["string", "null"]},
        }
        schema = {"type": "object", "properties": members, "required": sorted(members)}
    forms: dict[str, object] = {form: {} for form in operation.forms}
    return {"application/json": {"schema": schema}} | forms


def _refusals(codes: Sequence[str], schemas: Schemas) -> dict[str, object]:
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(PROBLEMS[code].status, []).append(code)
    content = {"application/problem+json": {"schema": schemas[ProblemDocument]}}
    return {
        str(status): {"description": ", ".join(named), "content": content}
        for status, named in by_status.items()
    }
