"""The order in which entries leave: windows, watermarks among them, how far each partition is. SQL.

A window of transaction ids [from, until) below the horizon (`horizon_of`: every older transaction
has ended) is complete for ever: no commit can add to it. The sequencer numbers entries by such
windows, and sorts each by (book, seq), because within one book a later entry can carry an older
transaction id than the one before it, but never from another window. A window is cut at a number of
rows, so that whatever waits is numbered in time and memory that its size alone decides. The rows
of windows stay: they are the index, and there are at most as many as entries.

A watermark is kept twice. `hub_watermarks` has the newest per hub and partition, which balances
read. `unpublished_watermarks` has each until one that is at least as new is out: the newest alone
may never be ready, because while transactions overlap without end the next one always replaces it
before it lies below the horizon.

`published_positions` says how far the topic was when a window or a watermark was acknowledged.
Whatever lies behind it there was published later: by a run that was killed before it could note so,
or by a database that this one is an older copy of (`restoration`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from hisab_contracts.entries import Entry, EntryWatermark
from hisab_contracts.units import optional_moment_of
from ledger.store.entries import ENTRY_COLUMNS, entry_from_row

if TYPE_CHECKING:
    from asyncpg import Record as Row

    from runtime.database import Connection

UNPUBLISHED_COUNTED: Final = 100_000
"""Where counting what is not published ends: more is "at least so many"."""


_HORIZON = """
select pg_snapshot_xmin(pg_current_snapshot())::text::bigint as horizon
"""


async def horizon_of(connection: Connection) -> int:
    """Return the oldest transaction id that may still be running: all below it have ended."""
    return int(await connection.fetchval(_HORIZON))


class Window(Struct, frozen=True, kw_only=True):
    """A numbered range of transactions: its entries have the indexes from `first_index` on."""

    window_id: int
    from_xid: int
    until_xid: int
    first_index: int
    entries: int
    is_published: bool


_WINDOW_COLUMNS: Final = """
window_id, from_xid::text::bigint as from_xid, until_xid::text::bigint as until_xid, first_index,
entries, published_at
"""
_LAST_WINDOW = (
    "select " + _WINDOW_COLUMNS + " from sequence_windows order by window_id desc limit 1"
)


async def last_window(connection: Connection) -> Window | None:
    """Return the newest window, published or not; None before the first."""
    row = await connection.fetchrow(_LAST_WINDOW)
    return None if row is None else _window_from_row(row)


def _window_from_row(row: Row) -> Window:
    return Window(
        window_id=row["window_id"],
        from_xid=row["from_xid"],
        until_xid=row["until_xid"],
        first_index=row["first_index"],
        entries=row["entries"],
        is_published=row["published_at"] is not None,
    )


# At the horizon, or where the row after the last that fits begins: a transaction is never divided.
# One that is larger than a window by itself is a window by itself.
_WINDOW_END = """
select case when count(*) <= $3 then $2::text::bigint
            when min(xid) < max(xid) then max(xid)
            else max(xid) + 1
       end as until_xid
  from (select xid::text::bigint as xid
          from entries
         where xid >= $1::text::xid8 and xid < $2::text::xid8
         order by entries.xid
         limit $3 + 1) found
"""
# Nothing is numbered where no entry lies: an empty window would only be a row to keep.
_CUT_WINDOW = (
    """
with found as (
  select count(*) as entries from entries
   where xid >= $1::text::xid8 and xid < $2::text::xid8
)
insert into sequence_windows (from_xid, until_xid, first_index, entries)
select $1::text::xid8, $2::text::xid8, $3, entries from found where entries > 0
returning """
    + _WINDOW_COLUMNS
)


async def cut_window(
    connection: Connection, from_xid: int, horizon: int, first_index: int, most: int
) -> Window | None:
    """Commit the next window, of at most so many entries unless one transaction made more.

    None when no entry lies below the horizon, and nothing is committed.
    """
    until_xid = await connection.fetchval(_WINDOW_END, str(from_xid), str(horizon), most)
    row = await connection.fetchrow(_CUT_WINDOW, str(from_xid), str(until_xid), first_index)
    return None if row is None else _window_from_row(row)


# The window's rows first, whatever the planner thinks of its size: read in the order of the primary
# key, a window would cost as much as the table. The hash before is looked up row by row: the
# predecessor of a window's entry may lie in an older window.
_WINDOW_ENTRIES = (
    "with e as materialized (select "
    + ENTRY_COLUMNS
    + " from entries where xid >= $1::text::xid8 and xid < $2::text::xid8) select "
    + ENTRY_COLUMNS
    + """,
       (select p.hash from entries p
         where p.tenant_id = e.tenant_id and p.seq = e.seq - 1) as prev_hash
  from e
 order by e.tenant_id, e.seq
"""
)


async def window_entries(connection: Connection, window: Window) -> list[tuple[Entry, str | None]]:
    """Read a window's entries in index order, each with its trace id."""
    rows = await connection.fetch(_WINDOW_ENTRIES, str(window.from_xid), str(window.until_xid))
    return [
        (entry_from_row(row), None if row["trace_id"] is None else row["trace_id"].hex)
        for row in rows
    ]


_MARK_PUBLISHED = """
update sequence_windows set published_at = clock_timestamp() where window_id = $1
"""


async def mark_published(connection: Connection, window: Window) -> None:
    """Note that a window's entries are all in Kafka."""
    await connection.execute(_MARK_PUBLISHED, window.window_id)


# Entries in open windows, and those that no window has numbered yet, as far as they are counted.
_UNPUBLISHED = """
select (select coalesce(sum(entries), 0) from sequence_windows where published_at is null)
       + (select count(*)
            from (select from entries
                   where xid >= coalesce((select until_xid from sequence_windows
                                           order by window_id desc limit 1), '0'::xid8)
                   limit $1) unnumbered)
       as unpublished
"""


async def count_unpublished(connection: Connection) -> int:
    """Count the entries committed and not yet in Kafka; beyond 100 000, say at least that many."""
    return int(await connection.fetchval(_UNPUBLISHED, UNPUBLISHED_COUNTED))


# A database whose windows lie ahead of its server's transaction ids came out of a dump: what is
# written from now on would sort before what is numbered already, and never leave.
_IS_AHEAD = """
select exists (select from entries where xid >= pg_snapshot_xmax(pg_current_snapshot()))
       or coalesce((select until_xid > pg_snapshot_xmax(pg_current_snapshot())
                      from sequence_windows order by window_id desc limit 1), false)
"""


async def is_ahead_of_its_server(connection: Connection) -> bool:
    """Say whether entries were numbered under transaction ids this server has not reached."""
    return bool(await connection.fetchval(_IS_AHEAD))


# That a lower revision is ignored is decided here and not in the core, as the row is not locked
# before. What is new is written down a second time, under the transaction id that places it among
# the entries: it has to leave after those of the transaction that brought it.
_KEEP_WATERMARKS = """
with stated as (
  select n.partition, n.hub, n.revision, n.watermark_at, n.message
    from unnest($1::int[], $2::text[], $3::bigint[], $4::timestamptz[], $5::bytea[])
         as n (partition, hub, revision, watermark_at, message)
), newest as (
  insert into hub_watermarks as w (partition, hub, revision, watermark_at)
  select partition, hub, revision, watermark_at from stated order by partition, hub
  on conflict (partition, hub) do update
     set revision = excluded.revision, watermark_at = excluded.watermark_at
   where w.revision < excluded.revision
  returning partition, hub, revision
)
insert into unpublished_watermarks (partition, hub, revision, message)
select s.partition, s.hub, s.revision, s.message
  from stated s
  join newest using (partition, hub, revision)
"""


async def keep_watermarks(
    connection: Connection, watermarks: Sequence[tuple[int, EntryWatermark]]
) -> None:
    """Keep the newest watermark of each (partition, hub), placed among the entries by its xid."""
    if not watermarks:
        return
    await connection.execute(
        _KEEP_WATERMARKS,
        [partition for partition, _ in watermarks],
        [watermark.hub for _, watermark in watermarks],
        [watermark.revision for _, watermark in watermarks],
        [optional_moment_of(watermark.watermark_ms) for _, watermark in watermarks],
        [msgspec.json.encode(watermark) for _, watermark in watermarks],
    )


# Of each hub and partition the newest that is ready: it says all that older ones do.
_DUE_WATERMARKS = """
select distinct on (partition, hub) partition, message
  from unpublished_watermarks
 where xid < $1::text::xid8
 order by partition, hub, revision desc
"""
# All transactions below that id have ended, so none has come between the reading and this.
_FORGET_WATERMARKS = """
delete from unpublished_watermarks where xid < $1::text::xid8
"""


async def due_watermarks(connection: Connection, until_xid: int) -> list[tuple[int, bytes]]:
    """Read what has to leave of the watermarks of these ended transactions: (partition, bytes)."""
    rows = await connection.fetch(_DUE_WATERMARKS, str(until_xid))
    return [(row["partition"], row["message"]) for row in rows]


async def forget_watermarks(connection: Connection, until_xid: int) -> None:
    """Note that the newest watermarks of these ended transactions are in Kafka."""
    await connection.execute(_FORGET_WATERMARKS, str(until_xid))


# Not the greater of two: a topic that was made again counts from 0.
_KEEP_POSITIONS = """
insert into published_positions (topic, partition, next_offset)
select $1, n.partition, n.next_offset
  from unnest($2::int[], $3::bigint[]) as n (partition, next_offset)
 order by n.partition
on conflict (topic, partition) do update set next_offset = excluded.next_offset
"""
_POSITIONS = "select partition, next_offset from published_positions where topic = $1"


async def keep_positions(connection: Connection, topic: str, until: Mapping[int, int]) -> None:
    """Note the offset behind the last record acknowledged, per partition."""
    if until:
        await connection.execute(_KEEP_POSITIONS, topic, list(until), list(until.values()))


async def published_positions(connection: Connection, topic: str) -> dict[int, int]:
    """Return the offset behind the last record known to be published, per partition."""
    rows = await connection.fetch(_POSITIONS, topic)
    return {row["partition"]: row["next_offset"] for row in rows}
