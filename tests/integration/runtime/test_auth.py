"""API keys as they come from the access topic, and what their roles open."""

from __future__ import annotations

import re

import msgspec
import pytest

from hisab_contracts import topics
from hisab_contracts.ids import ID_PATTERN
from hisab_contracts.reference import AccessRecord, Role
from integration.runtime.bare import Bare
from runtime.auth import AccessKey, Principal, find_access_key, keep_access_keys, mint
from runtime.consumer import Batch
from runtime.records import Record

COUNT = "select count(*) from access_keys"


def batch(*values: bytes) -> Batch:
    """What the access topic brings."""
    records = [
        Record(topics.ACCESS, 0, offset, 0, b"k", value, ()) for offset, value in enumerate(values)
    ]
    return Batch(records, {})


async def test_an_unreadable_access_key_stops_the_consumer(bare: Bare) -> None:
    """It may be a revocation: passing over it would leave a door open. Nothing of it is kept."""
    good = msgspec.json.encode(mint("k1", "operator").access_key)
    async with bare.open_kit() as kit:
        with pytest.raises(msgspec.DecodeError):
            async with kit.writer.transaction() as connection:
                await keep_access_keys(batch(good, b'{"key_id": "k2", "revoked"'), connection)
        async with kit.writer.transaction() as connection:
            assert 0 == await connection.fetchval(COUNT)
            await keep_access_keys(batch(good), connection)
            assert 1 == await connection.fetchval(COUNT)


async def test_a_revocation_stays_whatever_comes_after_it(bare: Bare) -> None:
    """The same key unrevoked behind it, in one batch or in the next: it opens nothing any more."""
    good = mint("k1", "operator").access_key
    revoked = msgspec.structs.replace(good, revoked=True)
    messages = [msgspec.json.encode(key) for key in (good, revoked, good)]
    async with bare.open_kit() as kit, kit.writer.transaction() as connection:
        for brought in (messages, messages[:1]):
            await keep_access_keys(batch(*brought), connection)
            assert revoked == await find_access_key(connection, "k1")


def test_an_access_key_is_the_record_of_the_contract() -> None:
    """The kit reads the published record without its vocabulary: member by member the same."""
    key = mint("k1", "hub", bound_to="lhr").access_key
    record = msgspec.json.decode(msgspec.json.encode(key), type=AccessRecord)
    assert Role.HUB is record.role
    assert "lhr" == record.hub
    assert key == msgspec.json.decode(msgspec.json.encode(record), type=AccessKey)


def test_commands_about_no_tenant_have_a_scope_that_no_tenant_has() -> None:
    """A tenant may be named `operator`: its key must not meet the answers of operators."""
    principal = Principal("k1", "operator", None, None)
    assert "/operator" == principal.role_scope
    assert re.fullmatch(ID_PATTERN, principal.role_scope) is None
    assert "key:k1" == principal.actor
