"""Every release's entries, price lists and documents still have the bytes and hashes they had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from msgspec import Struct

from contract.golden import GOLDEN
from hisab_contracts import entries
from hisab_contracts.canonical import canonical_bytes, content_sha256
from hisab_contracts.entries import GENESIS_HASH, Entry, entry_hash, read_entry_message
from invoicing.core import document
from invoicing.core.document import Content, content_bytes, read_content
from metering.core.pricing import PriceList, price_lines_of, price_version

RELEASES = sorted(GOLDEN.iterdir())


def lines(folder: Path, name: str) -> list[bytes]:
    """Return the facts of one golden file, a line each."""
    found = (folder / name).read_bytes().splitlines()
    assert found != []
    return found


@pytest.mark.parametrize("folder", RELEASES, ids=lambda folder: folder.name)
@pytest.mark.defect("L2", "L21")
def test_entries_of_a_release_keep_their_bytes_and_hashes(folder: Path) -> None:
    """Read through today's types and encoded again, each is what it was, and so is the chain."""
    heads: dict[str, str] = {}
    kinds = set()
    for line in lines(folder, "entries.jsonl"):
        entry = read_entry_message(line)
        assert isinstance(entry, Entry)
        assert line == canonical_bytes(entry)
        assert entry.hash == entry_hash(entry)
        assert entry.prev_hash == heads.get(entry.tenant_id, GENESIS_HASH)
        heads[entry.tenant_id] = entry.hash
        kinds.add(entry.kind)
    assert {"grant", "charge", "hold_placed", "hold_released", "invoiced", "budget_set"} <= kinds


@pytest.mark.parametrize("folder", RELEASES, ids=lambda folder: folder.name)
def test_documents_of_a_release_keep_their_bytes_and_hashes(folder: Path) -> None:
    """The content of an invoice is the same bytes, however much documents have grown since."""
    for line in lines(folder, "documents.jsonl"):
        kept = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        content = read_content(bytes(kept["content"]))
        assert bytes(kept["content"]) == content_bytes(content)
        assert json.loads(bytes(kept["content_sha256"])) == content_sha256(content)


@pytest.mark.parametrize("folder", RELEASES, ids=lambda folder: folder.name)
def test_price_lists_of_a_release_keep_their_versions(folder: Path) -> None:
    """A price version and the ids of its lines are what they were when usage was rated by them."""
    for line in lines(folder, "price-lists.jsonl"):
        kept = json.loads(line)
        price_list = msgspec.convert(kept["price_list"], PriceList)
        assert kept["price_version"] == price_version(price_list)
        assert kept["rate_line_ids"] == [line.rate_line_id for line in price_lines_of(price_list)]


def hashed_types() -> list[type[Struct]]:
    """Every type whose values are hashed and kept: entries, documents, and what is inside them."""
    inside_documents = {
        kind
        for kind in vars(document).values()
        if isinstance(kind, type)
        and issubclass(kind, Struct)
        and kind.__module__ == document.__name__
    }
    inside_entries = {
        kind
        for kind in vars(entries).values()
        if isinstance(kind, type)
        and issubclass(kind, Struct)
        and kind.__module__ == entries.__name__
    }
    reached: set[type[Struct]] = set()
    waiting: list[type[Struct]] = [Entry, Content]
    while waiting:
        kind = waiting.pop()
        reached.add(kind)
        for field in msgspec.structs.fields(kind):
            text = str(field.type)
            waiting += [
                other
                for other in inside_documents | inside_entries
                if other not in reached and f".{other.__name__}" in text
            ]
    return sorted(reached, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", hashed_types(), ids=lambda kind: kind.__name__)
def test_what_is_hashed_can_grow(kind: type[Struct]) -> None:
    """It leaves out null members, and nothing but null is a default of it (decision 0009)."""
    assert kind.__struct_config__.omit_defaults
    for field in msgspec.structs.fields(kind):
        assert field.default_factory is msgspec.NODEFAULT
        assert field.default is msgspec.NODEFAULT or field.default is None, field.name
        is_nullable = type(None) in get_args(field.type)
        assert is_nullable == (field.default is None), field.name


def test_the_walk_reaches_what_is_inside() -> None:
    """The check looks at the details of entries and the lines of documents, too."""
    names = {kind.__name__ for kind in hashed_types()}
    assert {"Entry", "Posting", "ChargeDetail", "HoldDetail", "GrantDetail"} <= names
    assert {"Content", "InvoiceLine", "TaxBreakdown", "EntryRange", "Versions"} <= names
