"""Books with a gap: however much came behind it, and whichever other book cannot be fetched."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec

import infrastructure
from hisab_contracts.entries import Entry
from hisab_contracts.ids import TenantId
from hisab_contracts.units import instant_text
from integration.invoicing.months import MONTH, books_in, charge, served
from invoicing.consumer import GapFetcher
from invoicing.ledger_client import LedgerClient
from invoicing.store import entries
from invoicing.store.entries import SEQS_AT_ONCE, BookGap

Migrated = Callable[[str], infrastructure.Database]


async def test_a_gap_that_is_filled_moves_the_book_on_over_all_that_waited_behind_it(
    migrated: Migrated,
) -> None:
    """More entries than one statement looks at, and a second gap far behind."""
    last = 2 * SEQS_AT_ONCE + 500
    async with books_in(migrated("invoicing")) as books:
        await books.tenants("a")
        await books.keep(charge("a", 1, 1))
        await books.keep(*(charge("a", seq, 1) for seq in range(3, last)))
        await books.keep(charge("a", last + 1, 1))
        async with books.writer.connection() as connection:
            assert [BookGap(TenantId("a"), 1, last + 1)] == await entries.gaps(connection)
        await books.keep(charge("a", 2, 1))
        async with books.writer.connection() as connection:
            assert [BookGap(TenantId("a"), last - 1, last + 1)] == await entries.gaps(connection)
        await books.keep(charge("a", last, 1))
        async with books.writer.connection() as connection:
            assert [] == await entries.gaps(connection)


async def test_gaps_are_read_page_by_page_and_those_of_programmes_hold_up_nobody(
    migrated: Migrated,
) -> None:
    """A fund's book is no tenant's: nobody can fetch it, and no bill is made of it."""
    tenants = [f"t{number:02d}" for number in range(25)]
    async with served(migrated("invoicing")) as service:
        await service.books.seller()
        await service.books.tenants(*tenants)
        fund = msgspec.structs.replace(charge("/programmes/p", 2, 1), kind="grant", charge=None)
        await service.books.keep(fund, *(charge(tenant, 2, 1) for tenant in tenants))
        async with service.books.writer.connection() as connection:
            first = await entries.gaps(connection)
            rest = await entries.gaps(connection, first[-1].tenant_id)
        assert tenants == [gap.tenant_id for gap in (*first, *rest)]
        assert 20 == len(first)
        await service.books.keep(*(charge(tenant, 1, 1) for tenant in tenants))
        month = (await service.get(f"/v1/periods/{MONTH}", "finance")).json()
        assert ["no-watermark"] == [blocker["kind"] for blocker in month["blocked_by"]]


async def test_a_book_that_the_ledger_does_not_give_holds_up_no_other(migrated: Migrated) -> None:
    """One is refused, the next is fetched, in one turn; a ledger that is down is asked again."""
    async with (
        books_in(migrated("invoicing")) as books,
        answering({"a": None, "b": page_of(charge("b", 1, 1))}) as url,
    ):
        await books.tenants("a", "b")
        await books.keep(charge("a", 2, 1), charge("b", 2, 1))
        ledger = LedgerClient(url, "no-key")
        async with books.writer.connection() as connection:
            await GapFetcher(ledger).run(connection)
            left = await entries.gaps(connection)
            await ledger.close()
            down = LedgerClient("http://127.0.0.1:9", "no-key")
            await GapFetcher(down).run(connection)
            await down.close()
            assert left == await entries.gaps(connection)
    assert [BookGap(TenantId("a"), 0, 2)] == left


def page_of(entry: Entry) -> bytes:
    """A page of the ledger's API with one charge."""
    assert entry.charge is not None
    item = {
        "seq": str(entry.seq),
        "kind": entry.kind,
        "hash": entry.hash,
        "postings": [
            {"account": p.account, "posting_micro": str(p.posting_micro), "balance_micro": "0"}
            for p in entry.postings
        ],
        "charge": {
            "hub": entry.charge.hub,
            "sku": entry.charge.sku,
            "price_class": entry.charge.price_class,
            "hour_at": instant_text(entry.charge.hour_ms),
            "gpu_ns": str(entry.charge.gpu_ns),
            "charge_micro": str(entry.charge.charge_micro),
        },
    }
    return json.dumps({"items": [item], "next": None}).encode()


@contextlib.asynccontextmanager
async def answering(pages: Mapping[str, bytes | None]) -> AsyncIterator[str]:
    """Stand where the ledger would: the same page of a book each time, or 404."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = pages.get(head.split("/")[3])
        status = "404 Not Found" if body is None else "200 OK"
        sent = body or b'{"code": "not-found"}'
        head_lines = f"HTTP/1.1 {status}\r\ncontent-length: {len(sent)}\r\nconnection: close"
        writer.write(head_lines.encode() + b"\r\n\r\n" + sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
