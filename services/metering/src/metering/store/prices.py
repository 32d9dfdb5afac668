"""Prices, and the currencies of the tenants' books, which say which prices apply.

Operators add price lists, the ledger says which tenants there are; whoever rates or quotes reads
both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from hisab_contracts.ids import PriceClass, PriceVersion, Sku, TenantId
from hisab_contracts.prices import PriceSeries
from hisab_contracts.reference import PriceLine
from metering.core.pricing import DisplacedLine

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

PRICE_LOCK: Final = (20_510, 1)
"""The two halves of the advisory lock on prices: shared by all who rate, exclusive to who adds."""

_COLUMNS: Final = (
    "rate_line_id, price_version, currency, sku, price_class, micro_per_gpu_hour, valid_from_ms, "
    "valid_until_ms"
)

_LINES = "select " + _COLUMNS + " from price_lines"


async def load_price_lines(connection: Connection) -> list[PriceLine]:
    """Read every price line there is."""
    return [_line_from_row(row) for row in await connection.fetch(_LINES)]


# All that compete for an hour: which of them rates it is the price book's rule.
_LINES_OF = _LINES + " where currency = $1 and sku = $2 and price_class = $3 order by valid_from_ms"


async def price_lines_of(connection: Connection, series: PriceSeries) -> list[PriceLine]:
    """Read the price lines of one series."""
    return [_line_from_row(row) for row in await connection.fetch(_LINES_OF, *series)]


def _line_from_row(row: Row) -> PriceLine:
    return PriceLine(
        rate_line_id=row["rate_line_id"],
        price_version=PriceVersion(row["price_version"]),
        currency=row["currency"],
        sku=Sku(row["sku"]),
        price_class=PriceClass(row["price_class"]),
        micro_per_gpu_hour=row["micro_per_gpu_hour"],
        valid_from_ms=row["valid_from_ms"],
        valid_until_ms=row["valid_until_ms"],
    )


_LOCK_PRICES = "select pg_advisory_xact_lock($1, $2)"


async def lock_prices(connection: Connection) -> None:
    """Wait for all who rate and keep them out until this transaction ends."""
    await connection.execute(_LOCK_PRICES, *PRICE_LOCK)


# An hour, per line that would end, that is rated on it from that end on. The list of hubs makes the
# index on (hub, hour) usable: there is none that begins with the line.
_RATED_HOURS = """
select k.rate_line_id,
       (select b.hour_ms from buckets b
         where b.hub = any(array(select hub from hubs)) and b.hour_ms >= k.from_ms
           and b.rate_line_id = k.rate_line_id and b.gpu_ns > 0
         limit 1) as hour_ms
  from unnest($1::text[], $2::bigint[]) as k (rate_line_id, from_ms)
"""


async def rated_hours(connection: Connection, displaced: Sequence[DisplacedLine]) -> dict[str, int]:
    """Return an hour, per line that would end, that is rated on it from that end on."""
    rows = await connection.fetch(
        _RATED_HOURS,
        [line.rate_line_id for line in displaced],
        [line.from_ms for line in displaced],
    )
    return {row["rate_line_id"]: row["hour_ms"] for row in rows if row["hour_ms"] is not None}


_ADD_LIST = """
insert into price_lists (price_version, currency, valid_from_ms, valid_until_ms, added_by)
values ($1, $2, $3, $4, $5)
"""

_ADD_LINES = (
    "insert into price_lines ("
    + _COLUMNS
    + """)
select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[],
                     $7::bigint[], $8::bigint[])
"""
)


async def add_price_list(connection: Connection, lines: Sequence[PriceLine], added_by: str) -> None:
    """Add a list and its lines; the price lock is held exclusively."""
    first = lines[0]
    await connection.execute(
        _ADD_LIST,
        first.price_version,
        first.currency,
        first.valid_from_ms,
        first.valid_until_ms,
        added_by,
    )
    rows = [_line_row(line) for line in lines]
    await connection.execute(_ADD_LINES, *zip(*rows, strict=True))


def _line_row(line: PriceLine) -> tuple[object, ...]:
    return (
        line.rate_line_id,
        line.price_version,
        line.currency,
        line.sku,
        line.price_class,
        line.micro_per_gpu_hour,
        line.valid_from_ms,
        line.valid_until_ms,
    )


_KNOWN_LINES = "select rate_line_id from price_lines where rate_line_id = any($1::text[])"


async def unknown_lines(connection: Connection, lines: Sequence[PriceLine]) -> list[PriceLine]:
    """Return those of these published lines that we do not have, in the order of their ids."""
    by_id = {line.rate_line_id: line for line in lines}
    rows = await connection.fetch(_KNOWN_LINES, list(by_id))
    for row in rows:
        del by_id[row["rate_line_id"]]
    return [by_id[line_id] for line_id in sorted(by_id)]


# A list that was published is the same whoever has it, but for when it was added here.
_KEEP_LISTS = """
insert into price_lists (price_version, currency, valid_from_ms, valid_until_ms, added_by)
select k.price_version, k.currency, k.valid_from_ms, k.valid_until_ms, k.added_by
  from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::text[])
       as k (price_version, currency, valid_from_ms, valid_until_ms, added_by)
 order by k.price_version
on conflict (price_version) do nothing
"""

# Lines are immutable, so one that is there already is the same. Another line with the same start is
# no such conflict: it would be a second price for one hour, and ends the transaction loudly.
_KEEP_LINES = _ADD_LINES + " on conflict (rate_line_id) do nothing"


async def keep_published(connection: Connection, lines: Sequence[PriceLine]) -> None:
    """Take up lines that we published once and have forgotten; the price lock is held."""
    lists = {line.price_version: line for line in lines}
    rows = [
        (
            line.price_version,
            line.currency,
            line.valid_from_ms,
            line.valid_until_ms,
            line.added_by or "published",
        )
        for line in lists.values()
    ]
    await connection.execute(_KEEP_LISTS, *zip(*rows, strict=True))
    await connection.execute(_KEEP_LINES, *zip(*map(_line_row, lines), strict=True))


_SAVE_TENANTS = """
insert into tenants as t (tenant_id, currency)
select k.tenant_id, k.currency from unnest($1::text[], $2::text[]) as k (tenant_id, currency)
 order by k.tenant_id
on conflict (tenant_id) do nothing
returning t.tenant_id
"""


async def save_tenants(
    connection: Connection, currencies: Mapping[TenantId, str]
) -> list[TenantId]:
    """Keep which tenants exist; return those that are new. A book's currency never changes."""
    rows = await connection.fetch(_SAVE_TENANTS, list(currencies), list(currencies.values()))
    return [TenantId(row["tenant_id"]) for row in rows]


_CURRENCIES = "select tenant_id, currency from tenants where tenant_id = any($1::text[])"


async def currencies_of(
    connection: Connection, tenants: Collection[TenantId]
) -> dict[TenantId, str]:
    """Return the currency of the book of each of these tenants that is known."""
    rows = await connection.fetch(_CURRENCIES, list(tenants))
    return {TenantId(row["tenant_id"]): row["currency"] for row in rows}
