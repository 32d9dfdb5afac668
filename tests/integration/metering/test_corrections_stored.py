"""Corrections on the real database: whoever comes first, what the core decided is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from hisab_contracts.events import Correction
from hisab_contracts.ids import TenantId
from hisab_contracts.quarantine import CorrectionDecision, read_decision
from hisab_contracts.topics import DECISIONS
from infrastructure import Database as Addresses
from integration.metering.stored import StoredMetering, opened, unexplained_gpu_ns
from metering.core.proposals import ProposedCorrection
from metering.corrections import (
    approve_correction,
    propose_correction,
    reject_correction,
    take_decided,
)
from metering.jobs import Releases
from metering.store.state import ReferenceCache
from runtime.database import ALL_TENANTS
from unit.metering.hub_events import HOUR_MS, NOON_MS, correction, device, interval

A, B = "ravi-health", "indus-foundry"
HALF_MS = HOUR_MS // 2
HALF_GPU_NS = 1_800_000_000_000
ACCOUNTS = ("reported", "billed", "duplicate", "quarantined", "voided")


async def halves(metering: StoredMetering) -> tuple[int, ...]:
    """The accounts, in half hours of a device; they must explain everything."""
    sums = await metering.sums()
    assert 0 == unexplained_gpu_ns(sums)
    return tuple(getattr(sums, f"{name}_gpu_ns") // HALF_GPU_NS for name in ACCOUNTS)


async def all_that_is_stored(metering: StoredMetering) -> list[Any]:
    """Everything that metering usage may change, but for what counts records."""
    tables = ("coverage", "freed_coverage", "buckets", "corrections", "quarantine", "freed_time")
    return [sorted(map(repr, await metering.rows(f"select * from {table}"))) for table in tables]


async def judge_released(metering: StoredMetering, *, at_once: int = 500) -> None:
    """Have the service look once at what it may release."""
    async with metering.writer.connection() as connection:
        await Releases(metering.outbox, at_once=at_once).run(connection)


def said(data: dict[str, Any]) -> Correction:
    """A correction as an operator words it."""
    return msgspec.convert(data | {"revision": 1, "approved_by": None}, Correction)


async def proposed_by(metering: StoredMetering, who: str, **members: Any) -> ProposedCorrection:
    """Propose a correction."""
    async with metering.api.transaction(tenant=ALL_TENANTS) as connection:
        return await propose_correction(connection, said(correction(**members)), who)


async def approved_by(metering: StoredMetering, who: str, proposed: ProposedCorrection) -> object:
    """Approve a correction."""
    async with metering.api.transaction(tenant=ALL_TENANTS) as connection:
        return await approve_correction(
            connection, metering.outbox, ReferenceCache(), proposed.correction_id, who
        )


async def test_the_same_again_changes_nothing(migrated: Callable[[str], Addresses]) -> None:
    """A batch of usage, corrections and a release, resent whole: only duplicates are counted."""
    batch = [
        interval(tenant_id=A),
        correction(NOON_MS, NOON_MS + HALF_MS, release=True),
        interval(NOON_MS, NOON_MS + HALF_MS, tenant_id=B, allocation_id="guest"),
        correction(NOON_MS + HALF_MS, NOON_MS + HOUR_MS, replacement={"tenant_id": B}),
    ]
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        await metering.take(batch)
        assert (3, 2, 0, 0, 1) == await halves(metering)
        await judge_released(metering)
        before = await all_that_is_stored(metering)
        await metering.take(batch)
        assert before == await all_that_is_stored(metering)
        assert (6, 2, 3, 0, 1) == await halves(metering)


async def test_a_correction_and_its_usage_at_once_meet_on_whatever_node(
    migrated: Callable[[str], Addresses],
) -> None:
    """Twenty nodes at once with a correction of all of them: nothing of it is missed."""
    nodes = [f"n{number}" for number in range(20)]
    hours = [[interval(node_id=node, devices=[device(node)])] for node in nodes]
    void = correction(node_id=None)
    async with opened(migrated("metering")) as metering:
        await metering.facts([A])
        takes = [metering.take(batch) for batch in [*hours[:10], [void], *hours[10:]]]
        await asyncio.gather(*takes)
        assert (40, 0, 0, 0, 40) == await halves(metering)


@pytest.mark.defect("M25")
async def test_who_reads_during_a_correction_sees_it_whole_or_not_at_all(
    migrated: Callable[[str], Addresses],
) -> None:
    """Twenty corrections of an hour on eight devices, and somebody who asks all the time."""
    devices = [device(f"GPU-{number}") for number in range(8)]
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        await metering.take([interval(devices=devices)])
        corrected = asyncio.create_task(_correct_again_and_again(metering))
        seen = set()
        while not corrected.done():
            seen.add(await halves(metering))
        await corrected
        assert {(16, 0, 0, 0, 16), (16, 16, 0, 0, 0)} >= seen


async def _correct_again_and_again(metering: StoredMetering) -> None:
    for revision in range(1, 21):
        other = {"action": "void"} if revision % 2 else {"replacement": {"tenant_id": B}}
        await metering.take([correction(revision=revision, **other)])


async def test_of_two_corrections_of_one_revision_at_once_one_waits(
    migrated: Callable[[str], Addresses],
) -> None:
    """Whichever comes first counts; the other is in quarantine, and the hour is in one account."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        await metering.take([interval()])
        others = ({"action": "void"}, {"replacement": {"tenant_id": B}})
        await asyncio.gather(*(metering.take([correction(**other)]) for other in others))
        conflicts = await metering.rows("select reason from quarantine where state = 'open'")
        assert ["conflict"] == [row["reason"] for row in conflicts]
        assert await halves(metering) in {(2, 0, 0, 0, 2), (2, 2, 0, 0, 0)}


async def test_what_waited_in_conflict_with_released_time_is_taken_up_by_the_service(
    migrated: Callable[[str], Addresses],
) -> None:
    """Another allocation's hour, and the released one's own that came after it."""
    guest = interval(tenant_id=B, allocation_id="guest")
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        await metering.take([interval(), guest])
        await metering.take([interval(NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS, tenant_id=B)])
        assert (6, 4, 0, 2, 0) == await halves(metering)
        await metering.take([correction(release=True)])
        await judge_released(metering)
        assert (6, 4, 0, 0, 2) == await halves(metering)
        owners = await metering.rows("select allocation_id from coverage order by start_ms")
        assert ["guest", "job-1"] == [row["allocation_id"] for row in owners]
        assert [] == await metering.rows("select * from freed_time")


@pytest.mark.parametrize("count", [1, 3])
async def test_a_page_of_conflicts_is_judged_after_the_other(
    migrated: Callable[[str], Addresses], count: int
) -> None:
    """Where many wait, each look takes some; none is left, and none is judged for ever."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        await metering.take([interval()])
        guests = [
            interval(tenant_id=B, allocation_id="guest", devices=[device()])
            | {"start_ms": NOON_MS + number, "end_ms": NOON_MS + number + 1}
            for number in range(count)
        ]
        await metering.take(guests)
        await metering.take([correction(release=True)])
        await judge_released(metering, at_once=1)
        assert [] == await metering.open_ids()


async def test_a_waiting_correction_that_proves_too_large_goes_to_quarantine_with_its_bytes(
    migrated: Callable[[str], Addresses],
) -> None:
    """It covered nothing when it came; when its usage comes, an operator must approve it first."""
    devices = [device(f"GPU-{number}") for number in range(64)]
    long = interval(NOON_MS, NOON_MS + 3 * HOUR_MS, devices=devices)
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        await metering.take([correction(NOON_MS, NOON_MS + 3 * HOUR_MS)])
        assert [(True, True)] == [
            (row["counts"], row["waits"])
            for row in await metering.rows("select * from corrections")
        ]
        await metering.take([long])
        [parked] = await metering.rows("select * from quarantine")
        assert ("needs-approval", "open") == (parked["reason"], parked["state"])
        assert b"test load" in parked["message_value"]
        assert [] == await metering.rows("select * from corrections")
        assert (384, 384, 0, 0, 0) == await halves(metering)


async def test_a_waiting_correction_that_is_small_enough_counts_from_its_first_usage_on(
    migrated: Callable[[str], Addresses],
) -> None:
    """Then it is judged no more."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A])
        await metering.take([correction()])
        await metering.take([interval()])
        assert (2, 0, 0, 0, 2) == await halves(metering)
        assert [False] == [
            row["waits"] for row in await metering.rows("select waits from corrections")
        ]


async def test_a_correction_released_from_quarantine_can_come_back_to_it(
    migrated: Callable[[str], Addresses],
) -> None:
    """It waited for its tenant, then for its usage, and then it names too much."""
    devices = [device(f"GPU-{number}") for number in range(64)]
    replaced = {"replacement": {"tenant_id": B}}
    async with opened(migrated("metering")) as metering:
        await metering.facts([A])
        await metering.take([correction(NOON_MS, NOON_MS + 3 * HOUR_MS, **replaced)])
        await metering.know(B)
        await judge_released(metering)
        assert [] == await metering.open_ids()
        await metering.take([interval(NOON_MS, NOON_MS + 3 * HOUR_MS, devices=devices)])
        [parked] = await metering.rows("select * from quarantine")
        assert ("needs-approval", "open") == (parked["reason"], parked["state"])


async def test_a_correction_in_conflict_comes_to_quarantine_once(
    migrated: Callable[[str], Addresses],
) -> None:
    """Contradicted in part before its usage comes, which is too much to go without an approval."""
    devices = [device(f"GPU-{number}") for number in range(64)]
    span = (NOON_MS, NOON_MS + 3 * HOUR_MS)
    void, replaced = (
        correction(NOON_MS, NOON_MS + 1),
        correction(*span, replacement={"sku": "l40s-48"}),
    )
    used = interval(NOON_MS + 1, span[1], devices=devices)
    for batches in ([[void], [replaced], [used]], [[void, replaced, used]]):
        async with opened(migrated("metering")) as metering:
            await metering.facts([A])
            for batch in batches:
                await metering.take(batch)
            found = await metering.rows("select reason, state from quarantine")
            assert [("conflict", "open")] == [tuple(row) for row in found]
            assert [NOON_MS + 1] == [
                row["end_ms"] for row in await metering.rows("select end_ms from corrections")
            ]


async def test_two_approvals_at_once_count_once(migrated: Callable[[str], Addresses]) -> None:
    """The second waits for the first, and finds it decided."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A])
        await metering.take([interval()])
        proposed = await proposed_by(metering, "key:1", revision=1)
        found = await asyncio.gather(
            *(approved_by(metering, f"key:{number}", proposed) for number in (2, 3))
        )
        assert ["CorrectionDecided", "ProposedCorrection"] == sorted(
            type(answer).__name__ for answer in found
        )
        assert (2, 0, 0, 0, 2) == await halves(metering)
        [bucket] = await metering.rows("select revision, gpu_ns, charge_micro from buckets")
        assert (1, 0, 0) == tuple(bucket)


async def test_an_operators_revision_is_above_all_that_is_known(
    migrated: Callable[[str], Addresses],
) -> None:
    """Of the node or of all nodes; those of another node and another allocation do not matter."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A])
        await metering.take(
            [
                correction(revision=4),
                correction(NOON_MS - HOUR_MS, NOON_MS, revision=2, node_id=None),
                correction(revision=7, node_id="n2"),
                correction(revision=9, allocation_id="job-2"),
            ]
        )
        revisions = []
        for node_id in ("n1", "n3", None):
            proposed = await proposed_by(metering, "key:1", node_id=node_id)
            approved = await approved_by(metering, "key:2", proposed)
            assert isinstance(approved, ProposedCorrection)
            revisions.append(approved.correction.revision)
        assert [5, 3, 8] == revisions


async def test_an_approved_correction_counts_once_what_it_lacks_has_come(
    migrated: Callable[[str], Addresses],
) -> None:
    """Its tenant is not known yet: it says so, and the service tries again."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A])
        await metering.take([interval()])
        proposed = await proposed_by(metering, "key:1", replacement={"tenant_id": B})
        await approved_by(metering, "key:2", proposed)
        [row] = await metering.rows("select counts, waits_for, waits_detail from corrections")
        assert (False, "unknown-tenant", f"no tenant {B} is known") == tuple(row)
        await metering.know(B)
        await judge_released(metering)
        [row] = await metering.rows("select counts, waits_for, waits_detail from corrections")
        assert (True, None, None) == tuple(row)
        billed = await metering.rows("select tenant_id from buckets where gpu_ns > 0")
        assert [B] == [bucket["tenant_id"] for bucket in billed]


@pytest.mark.parametrize("tenant_first", [True, False])
async def test_of_equal_revisions_the_first_that_counted_stands_whenever_it_was_proposed(
    migrated: Callable[[str], Addresses], tenant_first: bool
) -> None:
    """An operator's waits for its tenant; a hub's of its revision counts meanwhile, and stays."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A])
        await metering.take([interval()])
        proposed = await proposed_by(metering, "key:1", replacement={"tenant_id": B})
        await approved_by(metering, "key:2", proposed)
        if tenant_first:
            await metering.know(B)
            await judge_released(metering)
        await metering.take([correction(NOON_MS, NOON_MS + HALF_MS)])
        await metering.know(B)
        await judge_released(metering)
        assert (2, 2 if tenant_first else 1, 0, 0, 0 if tenant_first else 1) == await halves(
            metering
        )
        await metering.take([correction(revision=2, action="void")])
        assert (2, 0, 0, 0, 2) == await halves(metering)
        assert [0, 0] == [row["gpu_ns"] for row in await metering.rows("select * from buckets")]


async def decided(metering: StoredMetering) -> list[CorrectionDecision]:
    """What was published of corrections."""
    rows = await metering.rows(
        "select message_value from outbox where topic = $1 order by outbox_id", DECISIONS
    )
    found = [read_decision(row["message_value"]) for row in rows]
    return [said for said in found if isinstance(said, CorrectionDecision)]


async def take(metering: StoredMetering, heard: Sequence[CorrectionDecision]) -> None:
    """Take up what was published."""
    async with metering.writer.transaction() as connection:
        await take_decided(connection, metering.outbox, ReferenceCache(), heard)


async def test_what_operators_decided_survives_a_restore(
    migrated: Callable[[str], Addresses],
) -> None:
    """A new database that hears the topic first, and the hub again, comes to the same accounts."""
    hours = [
        interval(NOON_MS + number * HOUR_MS, NOON_MS + (number + 1) * HOUR_MS) for number in (0, 1)
    ]
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B])
        await metering.take(hours)
        first = await proposed_by(metering, "key:1")
        await approved_by(metering, "key:2", first)
        hour = (NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS)
        second = await proposed_by(
            metering, "key:1", start_ms=hour[0], end_ms=hour[1], replacement={"tenant_id": B}
        )
        await approved_by(metering, "key:2", second)
        third = await proposed_by(metering, "key:1")
        async with metering.api.transaction(tenant=ALL_TENANTS) as connection:
            await reject_correction(connection, metering.outbox, third.correction_id, "key:1")
        heard = await decided(metering)
        accounts = await halves(metering)
        assert (4, 2, 0, 0, 2) == accounts
        await take(metering, heard)
        assert heard == await decided(metering)
    assert ["approved", "approved", "rejected"] == [said.state for said in heard]
    async with opened(migrated("metering")) as restored:
        await restored.facts([A, B])
        await take(restored, heard)
        await take(restored, heard)
        await restored.take(hours)
        assert accounts == await halves(restored)
        states = await restored.rows("select state, counts from corrections order by arrival")
        assert [("approved", True), ("approved", True), ("rejected", False)] == [
            tuple(row) for row in states
        ]


async def test_a_tenant_sees_the_corrections_of_its_allocations_only(
    migrated: Callable[[str], Addresses],
) -> None:
    """Those who were billed, and those who are to be; nobody else, and nothing of freed time."""
    async with opened(migrated("metering")) as metering:
        await metering.facts([A, B, "soan-fintech"])
        await metering.take([interval(tenant_id=A), correction(replacement={"tenant_id": B})])
        await metering.take([correction(revision=2, release=True)])
        seen = {}
        for tenant in (A, B, "soan-fintech"):
            async with metering.api.transaction(tenant=TenantId(tenant)) as connection:
                rows = await connection.fetch("select revision from corrections order by 1")
                freed = await connection.fetch("select tenant_id from freed_coverage")
            seen[tenant] = ([row["revision"] for row in rows], len(freed))
        assert {A: ([1, 2], 1), B: ([1, 2], 0), "soan-fintech": ([], 0)} == seen
