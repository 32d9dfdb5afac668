"""Clients of the stack and the demo make a call again, and only one that may be made again."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest

import retries
from demo.api import Api, RefusedError
from hisab_contracts.reference import Role
from seeder import Seeder, SeedingFailed
from unit.deploy.scripted import LOST, Answer, service_of

OPERATOR = "operator"


async def test_a_lost_answer_is_asked_for_again_with_the_same_key() -> None:
    """Seeding once ended with `ReadError` when a kept connection was closed under a command."""
    planned: list[Answer | None] = [
        LOST,
        (503, {}),
        (429, {}),
        LOST,
        (201, {"secret": "s", "key_id": "k"}),
    ]
    async with (
        service_of(planned) as service,
        Seeder.at({"ledger": service.url}, OPERATOR) as seeder,
    ):
        assert "s" == await seeder.make_key({"role": Role.AUDITOR}, "x")
    assert [("post /v1/keys", "seed:key:x:1")] * 5 == service.asked


async def test_a_key_whose_secret_was_lost_is_revoked_and_another_is_made() -> None:
    """A repeat never shows the secret again: what nobody can use shall not stay good."""
    planned: list[Answer | None] = [
        LOST,
        (201, {"secret": None, "key_id": "k1"}),
        (200, {}),
        (201, {"secret": "s2", "key_id": "k2"}),
    ]
    async with (
        service_of(planned) as service,
        Seeder.at({"ledger": service.url}, OPERATOR) as seeder,
    ):
        assert "s2" == await seeder.make_key({"role": Role.AUDITOR}, "x")
    assert [
        ("post /v1/keys", "seed:key:x:1"),
        ("post /v1/keys", "seed:key:x:1"),
        ("post /v1/keys/k1/revoke", "seed:revoke:key:x:1"),
        ("post /v1/keys", "seed:key:x:2"),
    ] == service.asked


async def test_a_refusal_is_not_tried_again_and_names_the_service() -> None:
    """What is refused for good stays refused; the answer is in the message."""
    async with (
        service_of([(422, {"code": "malformed"})]) as service,
        Seeder.at({"ledger": service.url}, OPERATOR) as seeder,
    ):
        with pytest.raises(SeedingFailed, match=r"POST /v1/keys: 422 .*malformed") as failed:
            await seeder.make_key({"role": Role.AUDITOR}, "x")
    assert "ledger" == failed.value.service
    assert 1 == len(service.asked)


async def test_the_demo_reads_and_commands_again_and_looks_where_the_service_is(
    tmp_path: Path,
) -> None:
    """A service that comes back elsewhere is found by stack.json; a refusal is raised."""
    async with service_of([LOST]) as gone, service_of([(200, {"a": "b"}), (409, {})]) as back:
        file = tmp_path / "stack.json"

        def describe(url: str) -> None:
            file.write_text(
                json.dumps({"services": {"ledger": {"url": url}}, "keys": {"auditor": "k"}})
            )

        describe(gone.url)
        async with Api(file) as api:
            describe(back.url)
            assert {"a": "b"} == await api.get("ledger", "/v1/x", "auditor")
            assert [("get /v1/x", None)] == gone.asked == back.asked
            with pytest.raises(RefusedError):
                await api.post("ledger", "/v1/y", "auditor", {})


async def test_patience_ends() -> None:
    """Nobody listens: `Unanswered` says what happened the last time; a late answer is returned."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        with pytest.raises(retries.Unanswered, match="ConnectError"):
            await retries.call(lambda: client.get("http://127.0.0.1:9/"), patience_s=0)
        async with service_of([(503, {})]) as service:
            answer = await retries.call(lambda: client.get(service.url), patience_s=0)
    assert 503 == answer.status_code
