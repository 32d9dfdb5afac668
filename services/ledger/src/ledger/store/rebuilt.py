"""What a rebuild of one book has come to, outside of memory: the states of its buckets and holds.

A book of many years has more buckets than fit into memory, and an audit has to fold them all. So
their states lie in a temporary file (SQLite, from Python's own library) that is gone with the
audit: whatever a page of entries touches is read from it, folded, and written back. Each state is
marked once it was held against its live projection; what is left unmarked has none.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from typing import Final, Generic, TypeVar

import msgspec

State = TypeVar("State", bound=msgspec.Struct)

_CACHE = "pragma cache_size = -8192"
_NO_JOURNAL = "pragma journal_mode = off"
_NO_SYNC = "pragma synchronous = off"
# One row per bucket, or per hold, of the book in hand.
_CREATE = """
create table states (
  id text primary key, state blob not null, lap int not null, marked int not null default 0
) without rowid
"""
_LOAD = "select state from states where id = ?1"
_SAVE = """
insert into states (id, state, lap) values (?1, ?2, ?3)
on conflict (id) do update set state = excluded.state
"""
_MARK = "update states set marked = 1 where id = ?1"
_UNMARKED = """
select state from states where marked = 0 and lap < ?2 and id > ?1 order by id limit ?3
"""
_CLEAR = "delete from states"

ROWS_AT_ONCE: Final = 5_000


class RebuiltStates(Generic[State]):
    """States by id, on disk. For one book at a time."""

    def __init__(self, kind: type[State]) -> None:
        """Make an empty temporary file; SQLite removes it when it is closed."""
        self._lap = 0
        self._decoder = msgspec.msgpack.Decoder(kind)
        # An empty name: a file of SQLite's own, deleted with the connection.
        self._file = sqlite3.connect("", isolation_level=None)
        for command in (_CACHE, _NO_JOURNAL, _NO_SYNC, _CREATE):
            self._file.execute(command)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def clear(self) -> None:
        """Begin another book."""
        self._file.execute(_CLEAR)

    def load(self, ids: Collection[str]) -> dict[str, State]:
        """Return the states of these; those that have none yet are left out."""
        found: dict[str, State] = {}
        for state_id in ids:
            row = self._file.execute(_LOAD, (state_id,)).fetchone()
            if row is not None:
                found[state_id] = self._decoder.decode(row[0])
        return found

    def save(self, states: Iterable[tuple[str, State]]) -> None:
        """Write these states; what was marked stays marked."""
        with self._written():
            self._file.executemany(
                _SAVE,
                [
                    (state_id, msgspec.msgpack.encode(state), self._lap)
                    for state_id, state in states
                ],
            )

    def mark(self, ids: Collection[str]) -> None:
        """Note that these were held against their projections."""
        with self._written():
            self._file.executemany(_MARK, [(state_id,) for state_id in ids])

    def next_lap(self) -> None:
        """Count what comes from now on apart: a book that grows must not keep us for ever."""
        self._lap += 1

    def unmarked(self, after: str) -> list[State]:
        """Return states of earlier laps that were never marked, in order of ids after one."""
        rows = self._file.execute(_UNMARKED, (after, self._lap, ROWS_AT_ONCE)).fetchall()
        return [self._decoder.decode(state) for (state,) in rows]

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        self._file.execute("begin")
        yield
        self._file.execute("commit")
