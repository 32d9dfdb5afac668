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
from hisab_contracts.entries import ChargeDetail, Entry, EntryWatermark, Posting
from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    EntryId,
    HubCode,
    LegalEntityId,
    NodeId,
    PriceClass,
    PriceVersion,
    ProjectId,
    Sku,
    TenantId,
)
from hisab_contracts.reference import Role, TenantRecord
from hisab_contracts.units import month_bounds_ms
from invoicing.__main__ import SERVICE
from invoicing.closing import Closer, compute_some
from invoicing.core.billing import book_entry_of
from invoicing.core.document import default_issued_on
from invoicing.core.periods import Closing
from invoicing.core.sellers import Seller
from invoicing.core.tax import TaxRow, version_of
from invoicing.store import closings, entries, reference, tax_rates
from runtime.auth import mint, store_keys
from runtime.database import Database, Limits, Unavailable
from runtime.outbox import Outbox
from runtime.service import Settings, make_app, make_kit

SELLER = Seller(LegalEntityId("ignite-haas"), "Ignite HaaS", "INV")
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
) -> Entry:
    """A charge in the first hour of a month, as the ledger says it."""
    hour_ms = month_bounds_ms(month)[0]
    charge_micro = funded_micro + receivable_micro + unfunded_micro
    paid = (("lot:g", funded_micro), ("receivable", receivable_micro), ("unfunded", unfunded_micro))
    detail = ChargeDetail(
        bucket_id=BucketId("00" * 16),
        allocation_id=AllocationId("job"),
        project_id=ProjectId("main"),
        hub=HubCode(hub),
        node_id=NodeId("n1"),
        sku=Sku("h100-sxm-80"),
        price_class=PriceClass(price_class),
        price_version=PriceVersion("p1"),
        hour_ms=hour_ms,
        revision=0,
        gpu_ns=used_gpu_ns,
        charge_micro=charge_micro,
        over_limit=False,
    )
    return Entry(
        tenant_id=TenantId(tenant),
        seq=seq,
        entry_id=EntryId(f"{tenant}.{seq}"),
        kind="charge",
        effective_ms=hour_ms,
        recorded_ms=hour_ms,
        postings=[
            Posting(account, change_micro, 0)
            for account, change_micro in (
                *((account, -micro) for account, micro in paid),
                ("usage", charge_micro),
            )
        ],
        caused_by="",
        actor="metering",
        prev_hash="",
        hash=entry_hash(tenant, seq).hex(),
        charge=detail,
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

    async def keep(self, *booked: Entry) -> None:
        """Insert entries as the consumer does."""
        async with self.writer.transaction() as connection:
            await entries.append_entries(connection, [book_entry_of(entry) for entry in booked])

    async def tenants(self, *tenants: str, kind: str = "commercial", currency: str = "PKR") -> None:
        """Make tenants known."""
        records = [TenantRecord(TenantId(tenant), kind, currency, 0, []) for tenant in tenants]  # type: ignore[arg-type]
        async with self.writer.transaction() as connection:
            await reference.store_tenants(connection, records)

    async def seller(self) -> None:
        """Register who sells and the tax rows."""
        async with self.api.transaction(tenant="*") as connection:
            await reference.add_seller(connection, SELLER, actor="test")
            for number, (hub, authority, bps) in enumerate(TAXES, start=1):
                row = TaxRow(
                    number, HubCode(hub), authority, bps, dt.date(2024, 7, 1), "unconfirmed"
                )
                await tax_rates.add_tax_row(connection, row, actor="test")

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
            await entries.store_watermarks(
                connection, [(number, mark) for number in range(partitions)]
            )

    async def close(self, month: str = MONTH, issued_on: dt.date | None = None) -> None:
        """Put a closing and its bills on the record, whatever the month and its series say."""
        async with self.api.transaction(tenant="*") as connection:
            closing = Closing(
                period=month,
                legal_entity_id=SELLER.legal_entity_id,
                issued_on=issued_on or default_issued_on(month),
                override_reason=None,
                overridden=(),
                tax_version=version_of(await tax_rates.tax_rows(connection)),
                actor="test",
            )
            assert await closings.record_closing(connection, closing)
            await closings.add_bills(connection, month)

    async def compute(self, month: str = MONTH) -> None:
        """Compute every bill of a month that is being closed."""
        async with self.writer.connection() as connection:
            while await compute_some(connection, month):
                pass

    async def number(self, month: str = MONTH, limit: int = 50) -> int:
        """Number the computed bills of a month; says how many."""
        done = 0
        while True:
            try:
                async with self.writer.connection() as connection:
                    while some := await self.closer.number_some(connection, month, limit):
                        done += some
                return done
            except Unavailable:
                # Many ask at once, and a slow machine connects slowly: whoever was refused comes
                # again, as a task of the service does.
                continue


@contextlib.asynccontextmanager
async def books_in(database: infrastructure.Database, *, writers: int = 16) -> AsyncIterator[Books]:
    """Open invoicing's database by its two roles; so many may write at once."""
    api = Database(database.api, name="test-api")
    # Waiting for a lock is bounded by the test, not by how fast this machine is today.
    limits = Limits(statement_timeout_ms=600_000, lock_timeout_ms=600_000, max_connections=writers)
    writer = Database(database.writer, name="test-writer", limits=limits)
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
        minted |= {name: mint(f"k-{name}", Role.TENANT, tenant_id=name) for name in ("a", "b")}
        minted["hub"] = mint("k-hub", Role.HUB, bound_to="lhr")
        async with kit.writer.transaction() as connection:
            await store_keys(connection, [key.access_key for key in minted.values()])
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://invoicing") as client:
            books = Books(kit.api, kit.writer, Closer(Outbox((topics.DOCUMENTS,))))
            keys = {name: key.secret for name, key in minted.items()}
            yield Served(books, client, keys)
    finally:
        await kit.api.close()
        await kit.writer.close()


OWNED = (Role.TENANT, Role.HUB)
