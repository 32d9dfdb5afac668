"""Entries, watermarks and sellers for tests of invoicing, by the service's own store."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import httpx2

import infrastructure
from hisab_contracts import topics
from hisab_contracts.charges import OpenQuarantine
from hisab_contracts.entries import EntryWatermark
from hisab_contracts.ids import HubCode, LegalEntityId, PriceClass, Sku, TenantId
from hisab_contracts.reference import TenantRecord
from hisab_contracts.units import month_bounds_ms
from invoicing import closing_store, store
from invoicing.__main__ import SERVICE
from invoicing.billing import RatedUsage
from invoicing.books import KeptCharge, KeptEntry
from invoicing.closing import Closer, compute_some
from invoicing.document import default_issued_on
from invoicing.tax import TaxRow
from runtime.auth import Role, mint, store_keys
from runtime.database import Database
from runtime.service import Settings, make_app, make_kit
from runtime.streams import Outbox

SELLER = LegalEntityId("ignite-haas")
MONTH = "2025-07"
TAXES = (("lhr", "PRA", 1600), ("khi", "SRB", 1500), ("isb", "FBR", 1500))


def charge(
    tenant: str,
    seq: int,
    receivable_micro: int,
    *,
    hub: str = "lhr",
    month: str = MONTH,
    funded_micro: int = 0,
    unfunded_micro: int = 0,
    price_class: str = "on_demand",
    used_gpu_ns: int = 3_600_000_000_000,
) -> KeptEntry:
    """A charge in the first hour of a month."""
    hour_ms = month_bounds_ms(month)[0]
    usage = RatedUsage(
        HubCode(hub),
        Sku("h100-sxm-80"),
        PriceClass(price_class),
        used_gpu_ns,
        funded_micro,
        receivable_micro,
        unfunded_micro,
    )
    return KeptEntry(
        TenantId(tenant), seq, "charge", entry_hash(tenant, seq), KeptCharge(month, hour_ms, usage)
    )


def entry_hash(tenant: str, seq: int) -> bytes:
    """Some hash of an entry."""
    return hashlib.sha256(f"{tenant}.{seq}".encode()).digest()


@dataclass(frozen=True, slots=True)
class Books:
    """Invoicing's database in a test, by its two roles, with the closing job's own parts."""

    api: Database
    writer: Database
    closer: Closer

    async def keep(self, *entries: KeptEntry) -> None:
        """Insert entries as the consumer does."""
        async with self.writer.transaction() as connection:
            await store.keep_entries(connection, entries)

    async def tenants(self, *tenants: str, kind: str = "commercial") -> None:
        """Make tenants known."""
        records = [TenantRecord(TenantId(t), kind, "PKR", 0, []) for t in tenants]  # type: ignore[arg-type]
        async with self.writer.transaction() as connection:
            await store.keep_tenants(connection, records)

    async def seller(self) -> None:
        """Register who sells and the tax rows."""
        async with self.api.transaction(tenant="*") as connection:
            await store.add_seller(connection, SELLER, "Ignite HaaS", actor="test")
            for number, (hub, authority, bps) in enumerate(TAXES, start=1):
                row = TaxRow(
                    number, HubCode(hub), authority, bps, dt.date(2024, 7, 1), "unconfirmed"
                )
                await store.add_tax_row(connection, row, actor="test")

    async def watermark(
        self,
        hub: str,
        watermark_ms: int | None,
        revision: int = 1,
        *,
        partitions: int = 4,
        quarantined: tuple[OpenQuarantine, ...] = (),
    ) -> None:
        """Have a hub say W in every partition."""
        mark = EntryWatermark(HubCode(hub), revision, watermark_ms, False, list(quarantined), [])
        async with self.writer.transaction() as connection:
            await store.keep_watermarks(
                connection, [(number, mark) for number in range(partitions)]
            )

    async def close(self, month: str = MONTH) -> None:
        """Put a closing and its bills on the record."""
        async with self.api.transaction(tenant="*") as connection:
            request = closing_store.CloseRequest(
                month, SELLER, default_issued_on(month), None, (), "test"
            )
            assert await closing_store.request_closing(connection, request)
            await closing_store.add_bills(connection, month)

    async def compute(self, month: str = MONTH) -> None:
        """Compute every bill of a month that is being closed."""
        async with self.writer.connection() as connection:
            while await compute_some(connection, month):
                pass

    async def number(self, month: str = MONTH, limit: int = 50) -> int:
        """Number the computed bills of a month; says how many."""
        done = 0
        async with self.writer.connection() as connection:
            while some := await self.closer.number_some(connection, month, limit):
                done += some
        return done


@contextlib.asynccontextmanager
async def books_in(database: infrastructure.Database) -> AsyncIterator[Books]:
    """Open invoicing's database by its two roles."""
    api = Database(database.api, name="test-api")
    writer = Database(database.writer, name="test-writer")
    await api.open()
    await writer.open()
    try:
        yield Books(api, writer, Closer(Outbox((topics.DOCUMENTS,))))
    finally:
        await api.close()
        await writer.close()


@dataclass(frozen=True, slots=True)
class Served:
    """The service's own application on a database, without a socket; a key for each role."""

    books: Books
    client: httpx2.AsyncClient
    keys: Mapping[str, str]

    async def get(self, path: str, role: str, **params: str) -> httpx2.Response:
        """GET with a role's key."""
        return await self.client.get(path, params=params, headers=self._as(role))

    async def post(
        self, path: str, role: str, body: Mapping[str, object], key: str = ""
    ) -> httpx2.Response:
        """POST with a role's key and an idempotency key."""
        headers = {**self._as(role), "Idempotency-Key": key or f"{path}:{sorted(body.items())}"}
        headers["Idempotency-Key"] = headers["Idempotency-Key"].replace(" ", "")[:255]
        return await self.client.post(path, json=dict(body), headers=headers)

    def _as(self, role: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[role]}"}


@contextlib.asynccontextmanager
async def served(database: infrastructure.Database) -> AsyncIterator[Served]:
    """Build the service on a database and give every role a key; `a` and `b` are tenants."""
    settings = Settings(
        http_host="",
        http_port=0,
        kafka="127.0.0.1:1",
        partitions=4,
        hub_partitions=4,
        replication=1,
        instance="0",
        database_api=database.api,
        database_writer=database.writer,
        otlp_endpoint=None,
    )
    kit = make_kit(SERVICE, settings)
    app = make_app(SERVICE, kit, SERVICE.build(kit))
    await kit.api.open()
    await kit.writer.open()
    try:
        minted = {str(role): mint(f"k-{role}", role) for role in Role if role not in OWNED}
        minted |= {t: mint(f"k-{t}", Role.TENANT, tenant_id=t) for t in ("a", "b")}
        minted["hub"] = mint("k-hub", Role.HUB, hub="lhr")
        async with kit.writer.transaction() as connection:
            await store_keys(connection, [one.access_key for one in minted.values()])
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://invoicing") as client:
            books = Books(kit.api, kit.writer, Closer(Outbox((topics.DOCUMENTS,))))
            keys = {name: one.secret for name, one in minted.items()}
            yield Served(books, client, keys)
    finally:
        await kit.api.close()
        await kit.writer.close()


OWNED = (Role.TENANT, Role.HUB)
