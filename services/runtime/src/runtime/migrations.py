"""Migrations: numbered SQL files, forward only, each applied once.

Theory. Files are `NNNN_name.(pre|post).sql`, the kit's own first: `pre` runs before new code and
must be survived by old code, `post` after it. Each is applied in its own transaction, under an
advisory lock, with `lock_timeout` 4 s, so that a migration never stands in front of the traffic.
Its SHA-256 is recorded and edited history is refused. `:service` in a file stands for the service,
so that `:service_writer` names its role.

Refusals: `EditedHistory`; `ValueError` for a file whose name is not a migration's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

import asyncpg


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: where it comes from, what it says, and the hash that history keeps."""

    origin: str
    name: str
    phase: str
    sql: str
    sha256: str


class EditedHistory(Exception):
    """An applied migration was changed or removed; write a new one instead."""


_FILE_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.(pre|post)\.sql")


def migrations_of(service: str, folder: Traversable) -> tuple[Migration, ...]:
    """Return the kit's files, then those of the service, each in the order of their numbers."""
    return (
        *_read_folder("runtime", files("runtime") / "migrations", service),
        *_read_folder(service, folder, service),
    )


def _read_folder(origin: str, folder: Traversable, service: str) -> Iterator[Migration]:
    numbers: set[str] = set()
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".sql"):
            continue
        match = _FILE_NAME.fullmatch(file.name)
        if match is None or match[1] in numbers:
            raise ValueError(f"{origin}/{file.name}: want a new number, NNNN_name.(pre|post).sql")
        numbers.add(match[1])
        text = file.read_text(encoding="utf-8")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        yield Migration(origin, file.name, match[2], text.replace(":service", service), sha256)


_MIGRATION_LOCK = "select pg_advisory_lock(hashtextextended('schema_migrations', 0))"
_HISTORY = """
create table if not exists schema_migrations (
  origin     text        not null,
  name       text        not null,
  sha256     text        not null,
  applied_at timestamptz not null default clock_timestamp(),
  primary key (origin, name)
)
"""
_APPLIED = "select origin, name, sha256 from schema_migrations"
_RECORD = "insert into schema_migrations (origin, name, sha256) values ($1, $2, $3)"


async def migrate(
    service: str,
    folder: Traversable,
    dsn: str,
    *,
    phase: str | None = None,
    plan: bool = False,
) -> list[str]:
    """Apply what is missing, as the owner role; returns the names applied (or planned).

    `folder` holds the service's files; `phase` (`pre` or `post`) limits it to those.
    """
    known = migrations_of(service, folder)
    connection = await asyncpg.connect(
        dsn, server_settings={"lock_timeout": "4s", "application_name": f"{service}-migrate"}
    )
    try:
        await connection.execute(_MIGRATION_LOCK)
        await connection.execute(_HISTORY)
        rows = await connection.fetch(_APPLIED)
        history = {(row["origin"], row["name"]): row["sha256"] for row in rows}
        missing = _missing(known, history, phase)
        if not plan:
            for migration in missing:
                async with connection.transaction():
                    # The file and its record together: half a migration never counts as applied.
                    await connection.execute(migration.sql)
                    await connection.execute(
                        _RECORD, migration.origin, migration.name, migration.sha256
                    )
        return [f"{migration.origin}/{migration.name}" for migration in missing]
    finally:
        await connection.close()


def _missing(
    known: Sequence[Migration], history: Mapping[tuple[str, str], str], phase: str | None
) -> list[Migration]:
    hashes = {(migration.origin, migration.name): migration.sha256 for migration in known}
    for applied, sha256 in sorted(history.items()):
        if hashes.get(applied) != sha256:
            raise EditedHistory("/".join(applied))
    return [
        migration
        for migration in known
        if (migration.origin, migration.name) not in history and phase in (None, migration.phase)
    ]
