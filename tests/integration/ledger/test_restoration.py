"""A ledger's database restored to an earlier point: found, named, and taken back exactly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from hisab_contracts.ids import ProgrammeId, TenantId
from hisab_contracts.topics import partition_of
from infrastructure import Database as Addresses
from infrastructure import Infrastructure
from integration.ledger.real import RealLedger, Refused, opened
from ledger.core.book import Book
from ledger.core.proposals import AlreadyDecided, BudgetTerms, CreditLimitTerms
from ledger.recovery import NotRecovered, Recovery
from ledger.restoration import LedgerTopics, PublishedGuard, offsets_to_compare
from ledger.sequencer import Sequencer
from ledger.store import sequence
from ledger.store.queries import book_ids_after, projected_book
from runtime.gate import Gate
from runtime.kafka import Kafka, Message, Topic
from runtime.machine import Partition, Slice
from runtime.progress import (
    PartitionRange,
    ProgressOverride,
    advance,
    claim,
    override_progress,
)
from runtime.readback import OffsetRange
from unit.ledger.values import total, watermark

TENANT = "acme"


@dataclass
class Restored:
    """A ledger, and a copy of its database that was made before more was published."""

    infrastructure: Infrastructure
    kafka: Kafka
    published: LedgerTopics
    now: RealLedger
    copies: AsyncExitStack
    addresses: Addresses

    async def publish(self, ledger: RealLedger) -> None:
        """Publish all that is entered, as the sequencer does."""
        sequencer = Sequencer(
            self.kafka, topic=self.published.entries, charges=self.published.entries, most=3
        )
        async with ledger.writer.connection() as connection, asyncio.timeout(60):
            while True:
                await sequencer.step(connection)
                waiting = await sequence.due_watermarks(connection, 2**62)
                if not waiting and await sequence.count_unpublished(connection) == 0:
                    return

    async def copy(self) -> RealLedger:
        """Copy the database as it is now, and open the copy."""
        for pool in (self.now.api, self.now.writer, self.now.reader, self.now.admin):
            await pool.close()
        addresses = self.infrastructure.copied_database("ledger", self.addresses)
        self.copies.callback(self.infrastructure.drop_database, addresses)
        self.now = await self.copies.enter_async_context(opened(self.addresses))
        return await self.copies.enter_async_context(opened(addresses))

    async def refusal(self, ledger: RealLedger) -> str | None:
        """What the guard says of a database."""
        return await PublishedGuard(self.kafka, ledger.writer, self.published).refusal()

    def recovery(self, ledger: RealLedger, **budgets_micro: int) -> Recovery:
        """The recovery of a database."""
        budgets = {ProgrammeId(name): micro for name, micro in budgets_micro.items()}
        return Recovery(self.kafka, ledger.writer, self.published, budgets_micro=budgets)


@pytest.fixture
async def restored(
    infrastructure: Infrastructure,
    migrated: Callable[[str], Addresses],
    unique: Callable[[str], str],
) -> AsyncIterator[Restored]:
    """A ledger with a tenant, a grant and charges, all of them published."""
    addresses = migrated("ledger")
    kafka = Kafka(infrastructure.bootstrap_servers, client="test", instance="0")
    published = LedgerTopics(
        entries=unique("entries"), tenants=unique("tenants"), keys=unique("access")
    )
    await kafka.create_topics([Topic(published.entries, 4)])
    async with AsyncExitStack() as copies:
        now = await copies.enter_async_context(opened(addresses))
        found = Restored(infrastructure, kafka, published, now, copies, addresses)
        await now.programme("ignite")
        await now.tenant(TENANT, "startup")
        await now.grant(TENANT, "g1", 100)
        await now.book(total(30, bucket="1", tenant_id=TENANT), watermark("lhr", 1, None))
        await found.publish(now)
        yield found
    await kafka.close()


async def books_of(ledger: RealLedger) -> list[Book]:
    """Every book, whole."""
    async with ledger.reader.connection() as connection:
        ids = await book_ids_after(connection, "", 1_000)
        return [await projected_book(connection, tenant_id) for tenant_id in ids]


async def test_a_ledger_that_has_all_it_published_is_served(restored: Restored) -> None:
    """Also when it was killed before it noted what had left; and before anything has left."""
    assert None is await restored.refusal(restored.now)
    async with restored.now.admin.connection() as connection:
        await connection.execute("delete from published_positions")
    assert None is await restored.refusal(restored.now)


async def test_a_partition_without_a_position_is_compared_at_its_end_and_recovered_whole(
    restored: Restored,
) -> None:
    """Each by itself: after an upgrade, some partitions have a position and others none."""
    topic = restored.published.entries
    ranges = {0: OffsetRange(100, 50_000), 1: OffsetRange(100, 50_000), 2: OffsetRange(100, 200)}
    async with restored.now.admin.connection() as connection:
        await connection.execute("delete from published_positions")
        await sequence.keep_positions(connection, topic, {0: 49_000})
        compared = await offsets_to_compare(connection, topic, ranges)
        taken = await offsets_to_compare(connection, topic, ranges, before_positions=None)
    assert {0: 49_000, 1: 40_000, 2: 100} == compared
    assert {0: 49_000, 1: 100, 2: 100} == taken


async def test_a_copy_that_lacks_a_published_entry_is_refused_and_recovered(
    restored: Restored,
) -> None:
    """Holds, charges on a lot, a second grant and an invoice are back, to the last projection."""
    copy = await restored.copy()
    assert None is await restored.refusal(copy)
    await restored.now.hold(TENANT, "h1", 20)
    await restored.now.book(total(9, bucket="2", tenant_id=TENANT, hold_id="h1"))
    await restored.now.grant(TENANT, "g2", 50)
    await restored.now.release("h1")
    await restored.now.hold(TENANT, "h2", 5)
    await restored.now.book(watermark("lhr", 2, 1_753_920_000_000))
    await restored.publish(restored.now)
    refused = await restored.refusal(copy)
    assert refused is not None
    assert "python -m ledger recover" in refused
    assert TENANT not in refused
    done = await restored.recovery(copy).run(accepted_by="ops", reason="disk lost")
    assert (5, ["h1", "h2"]) == (done.entries, done.holds)
    assert None is await restored.refusal(copy)
    assert await books_of(restored.now) == await books_of(copy)
    assert [] == await copy.audit()
    again = await restored.recovery(copy).run(accepted_by="ops", reason="once more")
    assert 0 == again.entries
    async with copy.reader.connection() as connection:
        grants = await connection.fetch(
            "select grant_id, state, approved_by from grants order by grant_id"
        )
        kept = await connection.fetch("select accepted_by, reason, entries from recoveries")
    assert [("g1", "approved", "approver"), ("g2", "approved", "approver")] == [
        tuple(row) for row in grants
    ]
    assert {("ops", "disk lost", 5), ("ops", "once more", 0)} == {tuple(row) for row in kept}


async def test_what_is_entered_after_a_recovery_follows_what_was_taken_back(
    restored: Restored,
) -> None:
    """The next entry has the next seq, and a charge that is read again books nothing."""
    copy = await restored.copy()
    said = total(9, bucket="2", tenant_id=TENANT)
    await restored.now.book(said)
    await restored.publish(restored.now)
    await restored.recovery(copy).run(accepted_by="ops", reason="disk lost")
    await copy.book(said)
    await copy.book(total(10, bucket="2", tenant_id=TENANT))
    assert [4] == [book.seq for book in await books_of(copy) if book.tenant_id == TENANT]
    assert [] == await copy.audit()


async def test_charges_are_read_on_from_where_the_copy_stands_also_where_it_had_read_none(
    restored: Restored, unique: Callable[[str], str]
) -> None:
    """The hint is ahead of both partitions: without a word of the operator neither is read."""
    charges = unique("charges")
    await restored.kafka.create_topics([Topic(charges, 2)])
    known, new = Partition(charges, 0), Partition(charges, 1)
    hints = {known: PartitionRange(0, 9, 9), new: PartitionRange(0, 9, 9)}
    async with restored.now.writer.transaction() as connection:
        await claim(connection, {known: hints[known]}, compacted=False)
        await advance(connection, [Slice(known, 0, 4, (), epoch=1)])
    copy = await restored.copy()
    await Recovery(restored.kafka, copy.writer, restored.published, charges=charges).run(
        accepted_by="ops", reason="disk lost"
    )
    async with copy.writer.transaction() as connection:
        claims = await claim(connection, hints, compacted=False)
    assert [(known, 4, None), (new, 0, None)] == [
        (found.partition, found.next_offset, found.hint_offset) for found in claims
    ]


async def test_a_document_that_is_asked_for_again_after_a_recovery_gets_its_entry(
    restored: Restored,
) -> None:
    """Its answer was lost and its key is forgotten; entered it is, once."""
    await restored.now.tenant("billed", "commercial", 1_000)
    await restored.now.book(total(300, tenant_id="billed"))
    copy = await restored.copy()
    first = await restored.now.invoiced("billed", "d-1", 200)
    await restored.now.book(total(301, tenant_id="billed"))
    await restored.publish(restored.now)
    await restored.recovery(copy).run(accepted_by="ops", reason="disk lost")
    assert first == await copy.invoiced("billed", "d-1", 200)
    assert await books_of(restored.now) == await books_of(copy)


async def test_a_database_that_was_served_after_its_restore_is_named_as_forked(
    restored: Restored,
) -> None:
    """Another entry stands in the place of a published one: nothing can join the two."""
    copy = await restored.copy()
    await restored.now.book(total(9, bucket="2", tenant_id=TENANT))
    await restored.publish(restored.now)
    await copy.book(total(7, bucket="3", tenant_id=TENANT))
    refused = await restored.refusal(copy)
    assert refused is not None
    assert "nothing can join them" in refused
    with pytest.raises(NotRecovered, match="served after it was restored"):
        await restored.recovery(copy).run(accepted_by="ops", reason="disk lost")


async def test_a_programme_of_later_needs_its_budget_named(restored: Restored) -> None:
    """No topic has it; named, the programme's own book is right again."""
    copy = await restored.copy()
    await restored.now.programme("relief", 500)
    await restored.now.grant(TENANT, "g3", 50, programme_id="relief")
    await restored.publish(restored.now)
    with pytest.raises(NotRecovered, match="--programme relief=BUDGET_MICRO"):
        await restored.recovery(copy).run(accepted_by="ops", reason="disk lost")
    with pytest.raises(NotRecovered, match="less than it granted"):
        await restored.recovery(copy, relief=49).run(accepted_by="ops", reason="disk lost")
    await restored.recovery(copy, relief=500).run(accepted_by="ops", reason="disk lost")
    (relief,) = [book for book in await books_of(copy) if book.tenant_id.endswith("relief")]
    assert (450, 50) == (relief.accounts["budget"], relief.accounts[f"granted:{TENANT}"])
    assert [] == await copy.audit()


async def test_a_budget_raised_since_the_backup_has_to_be_named_whole(restored: Restored) -> None:
    """What a programme was given is in no topic: the refusal says how to name it."""
    copy = await restored.copy()
    more = BudgetTerms(programme_id=ProgrammeId("ignite"), add_micro=50)
    await restored.now.by_two("more", more)
    await restored.now.grant(TENANT, "g2", 10**14 - 60)
    await restored.publish(restored.now)
    with pytest.raises(NotRecovered, match="--programme ignite=BUDGET_MICRO"):
        await restored.recovery(copy).run(accepted_by="op", reason="backup")
    recovery = restored.recovery(copy, ignite=10**14 + 50)
    await recovery.run(accepted_by="op", reason="backup")
    was, taken_back = [
        {str(book.tenant_id): book.accounts for book in await books_of(ledger)}
        for ledger in (restored.now, copy)
    ]
    assert was["/programmes/ignite"] == taken_back["/programmes/ignite"]
    assert [] == await copy.audit()


async def test_a_budget_proposal_of_the_backup_is_not_approved_again_once_it_is_named(
    restored: Restored,
) -> None:
    """Approved since the backup and spent, it would be given a second time."""
    more = BudgetTerms(programme_id=ProgrammeId("ignite"), add_micro=50)
    proposal_id = await restored.now.propose("more", more)
    copy = await restored.copy()
    await restored.now.approve(proposal_id)
    await restored.now.grant(TENANT, "g2", 10**14 - 60)
    await restored.publish(restored.now)
    await restored.recovery(copy, ignite=10**14 + 50).run(accepted_by="op", reason="backup")
    with pytest.raises(Refused) as again:
        await copy.approve(proposal_id)
    assert AlreadyDecided("rejected") == again.value.refusal
    assert [] == await copy.audit()


async def test_a_grant_is_taken_back_before_what_made_room_for_it(restored: Restored) -> None:
    """A reversal gave one tenant's credit back, and another got it: of two partitions either may
    come first, and nobody has to name a budget."""
    await restored.now.tenant("elsewhere", "startup")
    copy = await restored.copy()
    left_micro = await left_of(restored.now, "ignite")
    await restored.now.grant(TENANT, "g-mistaken", left_micro)
    (*_, mistaken) = [e for e in await restored.now.entries(TENANT) if e.kind == "grant"]
    await restored.now.reverse(mistaken)
    await restored.now.grant("elsewhere", "g-right", left_micro)
    await restored.publish(restored.now)
    await restored.recovery(copy).run(accepted_by="op", reason="backup")
    assert 0 == await left_of(copy, "ignite")
    assert [] == await copy.audit()


async def left_of(ledger: RealLedger, programme_id: str) -> int:
    """What a programme may still promise."""
    books = await books_of(ledger)
    (book,) = [book for book in books if book.tenant_id == f"/programmes/{programme_id}"]
    return book.accounts["budget"]


async def test_a_limit_approved_since_the_backup_holds_and_is_not_approved_again(
    restored: Restored,
) -> None:
    """Its proposal is in the backup as open: it is marked as what its entry says."""
    await restored.now.tenant("firm", limit_micro=100)
    terms = CreditLimitTerms(tenant_id=TenantId("firm"), credit_limit_micro=70, reason="owes")
    proposal_id = await restored.now.propose("limit", terms)
    copy = await restored.copy()
    await restored.now.approve(proposal_id)
    await restored.publish(restored.now)
    await restored.recovery(copy).run(accepted_by="op", reason="backup")
    assert await books_of(restored.now) == await books_of(copy)
    assert 70 == (await copy.balance("firm")).book.credit_limit_micro
    with pytest.raises(Refused) as again:
        await copy.approve(proposal_id)
    assert AlreadyDecided("approved") == again.value.refusal
    assert [] == await copy.audit()


async def test_a_window_that_came_twice_is_taken_back_once(restored: Restored) -> None:
    """Killed between the topic and the mark: the topic has the same entries again."""
    copy = await restored.copy()
    await restored.now.book(total(9, bucket="2", tenant_id=TENANT))
    await restored.publish(restored.now)
    async with restored.now.admin.connection() as connection:
        await connection.execute(
            "update sequence_windows set published_at = null"
            " where window_id = (select max(window_id) from sequence_windows)"
        )
    await restored.publish(restored.now)
    done = await restored.recovery(copy).run(accepted_by="ops", reason="disk lost")
    assert 1 == done.entries


async def test_an_empty_ledger_is_not_served_beside_a_topic_that_has_entries(
    restored: Restored, migrated: Callable[[str], Addresses]
) -> None:
    """The whole database lost and made again is the oldest of all copies."""
    async with opened(migrated("ledger")) as fresh:
        refused = await restored.refusal(fresh)
    assert refused is not None
    assert "lacks" in refused


async def test_a_message_that_is_none_of_ours_is_named_by_its_place(restored: Restored) -> None:
    """Nobody but the ledger writes there."""
    await restored.kafka.publish([Message(restored.published.entries, b"k", b"{}", (), 1)])
    refused = await restored.refusal(restored.now)
    assert refused is not None
    assert f"{restored.published.entries} partition 1 offset" in refused


async def remove_before(
    infrastructure: Infrastructure, topic: str, partition: int, offset: int
) -> None:
    """Have the broker forget records, as retention does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=infrastructure.bootstrap_servers)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(offset)})
    finally:
        await admin.close()


async def test_records_that_were_removed_are_excused_by_an_operator_and_nothing_else_is(
    restored: Restored, apache_kafka: object
) -> None:
    """An override says from where reading may begin; what is there is compared all the same."""
    copy = await restored.copy()
    topic = restored.published.entries
    await restored.now.book(*(total(1, bucket=str(n), tenant_id=TENANT) for n in range(2, 5)))
    await restored.publish(restored.now)
    partition = partition_of(TENANT.encode(), 4)
    async with restored.now.reader.connection() as connection:
        end = (await sequence.published_positions(connection, topic))[partition]
    await remove_before(restored.infrastructure, topic, partition, end - 1)
    refused = await restored.refusal(copy)
    assert refused is not None
    assert "override-progress" in refused
    async with copy.admin.transaction() as connection:
        await override_progress(
            connection, ProgressOverride(Partition(topic, partition), end - 1, "ops", "lost")
        )
    refused = await restored.refusal(copy)
    assert refused is not None
    assert "has an entry that this database lacks" in refused
    with pytest.raises(NotRecovered, match="in no topic any more"):
        await restored.recovery(copy).run(accepted_by="ops", reason="disk lost")


async def test_a_broker_that_is_down_at_start_keeps_the_gate_closed_and_the_process_up(
    restored: Restored,
) -> None:
    """Not ready, asked again, and no exception that would end the process."""
    nowhere = Kafka("127.0.0.1:1", client="test", instance="0")
    guard = PublishedGuard(nowhere, restored.now.writer, restored.published)
    asked = asyncio.Event()
    here = PublishedGuard(restored.kafka, restored.now.writer, restored.published)
    answers = [guard.refusal, guard.refusal, here.refusal]

    async def ask() -> str | None:
        answer = answers.pop(0)
        asked.set()
        return await answer()

    async def start() -> None:
        started.append(True)

    started: list[bool] = []
    gate = Gate(ask)
    opening = asyncio.create_task(gate.open(asyncio.Event(), start))
    async with asyncio.timeout(120):
        while len(answers) > 1:
            assert gate.problem is not None
            assert ("unavailable", []) == (gate.problem.kind.code, started)
            asked.clear()
            await asked.wait()
        await opening
    assert (None, [True]) == (gate.problem, started)


async def test_a_key_revoked_since_the_backup_is_revoked_again(restored: Restored) -> None:
    """A restored ledger would accept it: it is on its topic, and is taken back."""
    keys = restored.published.keys
    await restored.kafka.create_topics([Topic(keys, 1, compacted=True)])
    said = {
        "key_id": "k1",
        "sha256": "a" * 64,
        "role": "auditor",
        "tenant_id": None,
        "hub": None,
        "expires_at_ms": None,
        "revoked": True,
    }
    await restored.kafka.publish([Message(keys, b"k1", msgspec.json.encode(said))])
    refused = await restored.refusal(restored.now)
    assert refused is not None
    assert "has a key, or a revocation" in refused
    await restored.recovery(restored.now).run(accepted_by="ops", reason="disk lost")
    assert None is await restored.refusal(restored.now)
    async with restored.now.admin.connection() as connection:
        assert await connection.fetchval("select revoked from access_keys where key_id = 'k1'")


async def test_a_tenant_opened_since_the_backup_is_back_with_its_id_for_a_name(
    restored: Restored,
) -> None:
    """Names are personal data and in no topic."""
    tenants = restored.published.tenants
    await restored.kafka.create_topics([Topic(tenants, 1, compacted=True)])
    said = {
        "tenant_id": "late",
        "kind": "commercial",
        "currency": "PKR",
        "credit_limit_micro": 7,
        "projects": ["main"],
    }
    await restored.kafka.publish([Message(tenants, b"late", msgspec.json.encode(said))])
    refused = await restored.refusal(restored.now)
    assert refused is not None
    assert "has a tenant that this database lacks" in refused
    done = await restored.recovery(restored.now).run(accepted_by="ops", reason="disk lost")
    assert ["late"] == list(done.tenants)
    assert None is await restored.refusal(restored.now)
    await restored.now.book(total(3, tenant_id="late"))
    assert [] == await restored.now.audit()
