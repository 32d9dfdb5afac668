"""Migrations of a database that is in use: how long what keeps writers out."""

from __future__ import annotations

import re
from importlib.resources import files

MADE = re.compile(r"^create table (\w+)", re.MULTILINE)
INDEXED = re.compile(r"^create (?:unique )?index \w+\s+on (\w+)", re.MULTILINE)


def test_no_migration_indexes_two_tables_that_may_hold_rows() -> None:
    """Writers of a table wait until the file ends: two at once keep ingest out for longer."""
    indexed = {
        file.name: set(INDEXED.findall(text)) - set(MADE.findall(text))
        for file in (files("metering") / "migrations").iterdir()
        if file.name.endswith(".sql")
        for text in [file.read_text(encoding="utf-8")]
    }
    assert {"quarantine"} in indexed.values()
    assert {} == {name: tables for name, tables in indexed.items() if len(tables) > 1}
