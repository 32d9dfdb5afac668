"""Every operation of the OpenAPI documents against every role: its own things, another's, no key.

What is expected stands nowhere here: each endpoint states it in its decorator (`roles`, `others`),
and the document shows it as `x-hisab-access`. So an endpoint that is added is in this matrix at
once. Cursors are tried in the same way: each list's against every other list, filter and caller.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from generate import SERVICES

from contract.examples import CONTRACTS, load
from e2e.outside import Outside, at, outside_of, until
from runtime.auth import mint
from stack import Stack

STAFF = ("operator", "officer", "approver", "finance", "auditor", "scheduler")
MINE, OTHERS = "indus-foundry", "chenab-robotics"
MY_HUB, OTHER_HUB = "lhr", "khi"
TENANT, HUB = f"tenant:{MINE}", f"hub:{MY_HUB}"
KEYS = (*STAFF, TENANT, HUB)
STATUS_OF = {"not-found": {404}, "forbidden": {403}}
TAKEN_TO_BE_REFUSED = {
    ("/v1/grants/{grant_id}/approve", "officer"),
    ("/v1/grants/{grant_id}/approve", "finance"),
    ("/v1/grants/{grant_id}/reject", "finance"),
    ("/v1/grants/{grant_id}/outcomes/{outcome_id}/accept", "officer"),
    ("/v1/proposals/{proposal_id}/approve", "officer"),
    ("/v1/proposals/{proposal_id}/approve", "finance"),
    ("/v1/proposals/{proposal_id}/reject", "officer"),
}
"""Keys that may propose are read there only so that a proposer hears that makers are no checkers.

They may take back what is their own: grants are the officer's here, limits are finance's.
"""
PKR = 1_000_000
ONE_ITEM = {"/v1/legal-entities"}
"""Lists that cannot have a second page yet: one legal entity sells."""


@dataclass(frozen=True)
class Operation:
    """An operation of a service, as its document describes it."""

    service: str
    method: str
    path: str
    described: Mapping[str, Any]

    @property
    def query(self) -> list[str]:
        """The parameters of its query."""
        return [given["name"] for given in self.described["parameters"] if given["in"] == "query"]

    @property
    def paged(self) -> bool:
        """Whether it is a list."""
        return "cursor" in self.query

    def takes(self, role: str) -> bool:
        """Whether it takes keys of a role."""
        roles = self.described["x-hisab-access"]["roles"]
        return roles == ["*"] or role in roles

    def others(self, role: str) -> str:
        """What a key of a role gets for what is another's."""
        rule: str = self.described["x-hisab-access"]["others"].get(role, "own")
        return rule


def operations() -> Iterator[Operation]:
    """Yield everything that any service answers."""
    for service in SERVICES:
        for path, item in load(CONTRACTS / "openapi" / f"{service}.json")["paths"].items():
            for method, described in item.items():
                yield Operation(service, method.upper(), path, described)


@pytest.mark.parametrize("operation", list(operations()), ids=lambda o: f"{o.method} {o.path}")
def test_every_operation_says_whose_keys_it_takes(operation: Operation) -> None:
    """Roles that exist, and for tenants and hubs what they get for what is another's."""
    access = operation.described["x-hisab-access"]
    assert access["roles"] == ["*"] or set(access["roles"]) <= {*STAFF, "tenant", "hub"}
    owners = {"tenant", "hub"} & set(access["roles"])
    assert owners == set(access["others"])
    assert set(access["others"].values()) <= {"not-found", "forbidden", "own"}


@dataclass(frozen=True)
class Things:
    """By the name of a parameter: what a key's owner has, and what its neighbour has."""

    mine: Mapping[str, str]
    others: Mapping[str, str]


async def plant(outside: Outside) -> Mapping[str, Things]:
    """Give two tenants and two hubs one of everything, so that nothing is missing by chance."""
    for hub in (MY_HUB, OTHER_HUB):
        for name, tenant_id in (("job-mine", MINE), ("job-others", OTHERS)):
            node = f"n-{name}"
            job = f"{name}-{hub}"
            usage = outside.usage(hub, node, tenant_id, job, at("10:00"), at("12:00"))
            await outside.say(usage, outside.watermark(hub, node, at("19:00")))
        for _ in range(2):
            await outside.raw(hub, b"no event")
    for tenant_id in (MINE, OTHERS):
        await outside.charged(tenant_id, 4 * 840 * PKR)
    holds = [await hold_of(outside, tenant_id) for tenant_id in (MINE, OTHERS)]
    period = "/v1/periods/2025-07"
    await until(
        lambda: outside.api.get("invoicing", period, "finance"), lambda x: x["state"] == "closable"
    )
    closing = {"issued_on": None, "override": None}
    await outside.api.post("invoicing", f"{period}/close", "finance", closing)
    invoices = await until(
        lambda: outside.api.items("invoicing", "/v1/invoices", "finance"),
        lambda found: [x["state"] for x in found] == ["finalised"] * 2,
    )
    bills = {invoice["tenant_id"]: str(invoice["invoice_id"]) for invoice in invoices}
    quarantined = (await outside.quarantined(MY_HUB))[0]["quarantine_id"]
    anybody = {"month": "2025-07", "quarantine_id": quarantined, "key_id": "k"}
    proposed = {tenant_id: await propose_for(outside, tenant_id) for tenant_id in (MINE, OTHERS)}
    second = {"programme_id": "second", "name": "Second", "budget_micro": "1"}
    second |= {"theme": "health"}
    await outside.api.post("ledger", "/v1/programmes", "operator", second)
    anybody |= {"programme_id": "ignite"}
    corrected = [
        await correction_of(outside, hub, f"{job}-{hub}", reason)
        for hub in (MY_HUB, OTHER_HUB)
        for job in ("job-mine", "job-others")
        for reason in ("test load", "maintenance")
    ]
    anybody |= {"correction_id": corrected[0]}
    mine = {"tenant_id": MINE, "hub": MY_HUB, "allocation_id": f"job-mine-{MY_HUB}"}
    mine |= {"hold_id": holds[0], "invoice_id": bills[MINE]}
    others = {"tenant_id": OTHERS, "hub": MY_HUB, "allocation_id": f"job-others-{MY_HUB}"}
    others |= {"hold_id": holds[1], "invoice_id": bills[OTHERS]}
    mine |= proposed[MINE] | {"entry_id": f"{MINE}.1"}
    others |= proposed[OTHERS] | {"entry_id": f"{OTHERS}.1"}
    elsewhere = mine | {"hub": OTHER_HUB, "allocation_id": f"job-mine-{OTHER_HUB}"}
    return {
        TENANT: Things(anybody | mine, anybody | others),
        HUB: Things(anybody | mine, anybody | elsewhere),
    } | {role: Things(anybody | mine, anybody | others) for role in STAFF}


async def propose_for(outside: Outside, tenant_id: str) -> dict[str, str]:
    """Propose two grants, of which one is approved, and a credit limit; name one of each."""
    grant = {
        "tenant_id": tenant_id,
        "programme_id": "ignite",
        "priority": 1,
        "effective_at": "2025-07-01T00:00:00.000Z",
        "expires_at": None,
    }
    grants = [
        await outside.api.post("ledger", "/v1/grants", "officer", grant | {"grant_micro": micro})
        for micro in ("1", "2")
    ]
    limit = {"credit_limit_micro": str(10**15), "reason": "as before"}
    path = f"/v1/tenants/{tenant_id}/credit-limit"
    limited = await outside.api.post("ledger", path, "finance", limit)
    grant_path = f"/v1/grants/{grants[0]['grant_id']}"
    await outside.api.post("ledger", f"{grant_path}/approve", "approver", {})
    achieved = {"kind": "pilot", "evidence_sha256": "ab" * 32, "note": ""}
    outcome = await outside.api.post("ledger", f"{grant_path}/outcomes", "officer", achieved)
    return {
        "grant_id": str(grants[0]["grant_id"]),
        "outcome_id": str(outcome["outcome_id"]),
        "proposal_id": str(limited["proposal_id"]),
    }


async def correction_of(outside: Outside, hub: str, job: str, reason: str) -> str:
    """Propose to void an hour of a job."""
    body = {
        "hub": hub,
        "node_id": None,
        "allocation_id": job,
        "slice_uuids": None,
        "start_ms": at("10:00"),
        "end_ms": at("11:00"),
        "action": "void",
        "reason": reason,
    }
    proposed = await outside.api.post("metering", "/v1/corrections", "operator", body)
    return str(proposed["correction_id"])


async def hold_of(outside: Outside, tenant_id: str) -> str:
    """Reserve a little for a tenant."""
    body = {
        "tenant_id": tenant_id,
        "project_id": "main",
        "job_ref": "job-1",
        "allocation_id": None,
        "hub": MY_HUB,
        "sku": "h100-sxm-80",
        "hold_micro": str(PKR),
        "expires_at": "2099-01-01T00:00:00.000Z",
    }
    placed = await outside.api.post("ledger", "/v1/holds", "scheduler", body)
    return str(placed["hold_id"])


@dataclass(frozen=True)
class Caller:
    """Calls operations with any key, and takes every answer as it is."""

    outside: Outside
    client: httpx2.AsyncClient

    async def call(
        self, operation: Operation, secret: str | None, things: Mapping[str, str], **query: str
    ) -> httpx2.Response:
        """Call an operation about these things; a command brings a body that is no JSON.

        A part of a list is asked for as its reader sees it, without an owner in the query.
        """
        owners: dict[str, str] = {
            name: things[name]
            for name in ("hub", "tenant_id")
            if name in operation.query and not {"limit", "cursor"} & set(query)
        }
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        content = None
        if operation.method in ("POST", "PUT"):
            headers |= {"content-type": "application/json", "idempotency-key": "matrix"}
            content = b"no JSON"
        return await self.client.request(
            operation.method,
            self.outside.api.url(operation.service, operation.path.format(**things)),
            params=owners | query,
            headers=headers,
            content=content,
        )


@asynccontextmanager
async def calling(stack: Stack) -> AsyncIterator[tuple[Caller, Mapping[str, Things]]]:
    """Plant, and call."""
    async with outside_of(stack) as outside, httpx2.AsyncClient(timeout=60) as client:
        yield Caller(outside, client), await plant(outside)


async def check_operation(caller: Caller, operation: Operation, all_things: Any) -> list[str]:
    """Return what an operation answers otherwise than it states."""
    found: list[str] = []

    def expect(whose: str, answer: httpx2.Response, wanted: set[int]) -> None:
        if answer.status_code not in wanted:
            code = f"{answer.status_code} instead of {sorted(wanted)}"
            found.append(f"{operation.method} {operation.path}, {whose}: {code}")

    fine = {200} if operation.method == "GET" else {200, 202, 404, 409, 415, 422}
    for key in KEYS:
        role, things = key.partition(":")[0], all_things[key]
        secret = caller.outside.api.secret(key)
        mine = await caller.call(operation, secret, things.mine)
        others = await caller.call(operation, secret, things.others)
        if not operation.takes(role) or (operation.path, role) in TAKEN_TO_BE_REFUSED:
            expect(f"{role}, own", mine, {403})
            expect(f"{role}, another's", others, {403})
            continue
        expect(f"{role}, own", mine, fine)
        expect(f"{role}, another's", others, STATUS_OF.get(operation.others(role), fine))
        foreign = {TENANT: OTHERS, HUB: f"/hubs/{OTHER_HUB}/"}.get(key)
        for answer in (mine, others):
            # A problem may name what was asked for; an answer shows nothing of a neighbour.
            seen = foreign is not None and answer.is_success and foreign in answer.text
            found += [f"{operation.method} {operation.path}: {role} sees {foreign}"] * seen
    for no_key in (None, "nonsense", mint("x", "operator").secret):
        nobody = await caller.call(operation, no_key, all_things["operator"].mine)
        expect("no valid key", nobody, {401})
    return found


async def check_cursors(caller: Caller, all_things: Any) -> tuple[set[str], list[str]]:
    """Return which lists gave a cursor, and where one was taken that does not belong there."""
    lists = [operation for operation in operations() if operation.paged]
    cursors: dict[tuple[str, str], str] = {}
    for listed in lists:
        for key in KEYS:
            if listed.takes(key.partition(":")[0]):
                secret = caller.outside.api.secret(key)
                page = await caller.call(listed, secret, all_things[key].mine, limit="1")
                cursor = page.json()["next"]
                if cursor is not None:
                    again = {"limit": "1", "cursor": cursor}
                    further = await caller.call(listed, secret, all_things[key].mine, **again)
                    assert 200 == further.status_code, (listed.path, further.text)
                    assert page.json() != further.json(), listed.path
                    cursors[listed.path, key] = cursor
    found: list[str] = []
    for (path, owner), cursor in cursors.items():
        for listed in lists:
            for key in KEYS:
                if not listed.takes(key.partition(":")[0]):
                    continue
                things, secret = all_things[key], caller.outside.api.secret(key)
                asked: list[dict[str, str]] = [
                    {name: "x"} for name in listed.query if name not in {"limit", "cursor"}
                ]
                own_sight = {owner, key} <= set(STAFF) or owner == key
                if listed.path != path or not own_sight:
                    asked.append({})
                for query in asked:
                    answer = await caller.call(listed, secret, things.mine, cursor=cursor, **query)
                    # Another check may come first: what `x` names is not there, or not one's own.
                    if answer.status_code not in {403, 404, 422}:
                        said = f"{answer.status_code} for {listed.path} {query} with {key}"
                        found.append(f"cursor of {path} with {owner}: {said}")
    return {path for path, _ in cursors}, found


@pytest.mark.slow
@pytest.mark.defect("F64", "L26", "I28", "M36", "F64")
async def test_every_operation_keeps_what_it_states_for_every_role(own_stack: Stack) -> None:
    """Own, another's and no key: 401, 403, 404 and nothing of a neighbour, on real services.

    And a cursor is worth nothing but in the list that gave it, with its filter, to its caller.
    """
    async with calling(own_stack) as (caller, things):
        found = [
            fault
            for operation in operations()
            for fault in await check_operation(caller, operation, things)
        ]
        assert [] == found, json.dumps(found, indent=1)
        gave, taken = await check_cursors(caller, things)
        lists = {operation.path for operation in operations() if operation.paged}
        assert lists - ONE_ITEM == gave, "give each list two items in `plant`"
        assert [] == taken, json.dumps(taken, indent=1)
