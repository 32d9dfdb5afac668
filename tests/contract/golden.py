"""What is kept for ever, as a release made it: entries, price lists, documents, and their hashes.

PYTHONPATH=tests python -m contract.golden RELEASE     writes `contracts/golden/`RELEASE, once

The files are made by the cores, out of values that stand here and beside the unit tests. A release
adds a folder and never edits one (`python contracts/generate.py release` freezes it by digest); the
test beside this module reads every folder through today's types and hashes it again (decision
0009).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hisab_contracts.canonical import canonical_bytes, content_sha256
from hisab_contracts.entries import Entry
from hisab_contracts.ids import PriceClass, Sku
from ledger.core.decisions import UnitOfWork
from ledger.core.movements import SetBudget
from metering.core.pricing import ListedPrice, PriceList, price_lines_of, price_version
from unit.invoicing.documents import golden_documents
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, invoiced, release, total

GOLDEN = Path(__file__).resolve().parents[2] / "contracts/golden"
ON_DEMAND, SPOT = PriceClass("on_demand"), PriceClass("spot")
PRICE_LISTS = (
    PriceList(
        "PKR",
        1_735_689_600_000,
        None,
        (
            ListedPrice(Sku("h100-sxm-80"), ON_DEMAND, 840_000_000),
            ListedPrice(Sku("h100-sxm-80"), SPOT, 420_000_000),
        ),
    ),
    PriceList("USD", 1_751_310_000_000, 1_753_988_400_000, (ListedPrice(Sku("b200"), SPOT, 1),)),
)


def golden_entries() -> Iterator[Entry]:
    """One book with every kind of entry there is, and the beginning of its programme's."""
    ledger = CoreLedger(book("commercial", limit_micro=10**9))
    commands = (
        (approve(grant("g-1", 500, expires_ms=at(24))), at(8)),
        (approve(grant("g-2", 300, priority=-1)), at(8, 1)),
        (hold("h-1", 400, allocation_id="job-1"), at(9)),
        (total(120, hold_id="h-1", allocation_id="job-1"), at(9, 30)),
        (total(900, gpu_ns=901), at(10)),
        (total(700, gpu_ns=701, revision=1), at(11)),
        (release("h-1"), at(12)),
        (invoiced("inv-1", 20), at(13)),
    )
    for command, now_ms in commands:
        decided = ledger.do(command, now_ms)
        if not isinstance(decided, tuple):
            raise TypeError(f"{command} was refused: {decided}")
    yield from ledger.entries
    fund = UnitOfWork({"/programmes/p": book("fund", tenant_id="/programmes/p")}, at(7))
    decided = fund.enter("/programmes/p", SetBudget(budget_micro=10**6, actor="key:operator"))
    if not isinstance(decided, tuple):
        raise TypeError(f"the budget was refused: {decided}")
    yield from decided


def golden_files() -> dict[str, str]:
    """Return the text of every golden file by its name, as today's code makes it."""
    return {
        "entries.jsonl": _lines(canonical_bytes(entry) for entry in golden_entries()),
        "documents.jsonl": _lines(
            canonical_bytes({"content_sha256": content_sha256(content)})[:-1]
            + b',"content":'
            + canonical_bytes(content)
            + b"}"
            for content in golden_documents().values()
        ),
        "price-lists.jsonl": _lines(
            msgspec.json.encode(
                {
                    "price_version": price_version(price_list),
                    "rate_line_ids": [line.rate_line_id for line in price_lines_of(price_list)],
                    "price_list": price_list,
                }
            )
            for price_list in PRICE_LISTS
        ),
    }


def _lines(encoded: Iterator[bytes]) -> str:
    return "".join(f"{line.decode()}\n" for line in encoded)


def main(release_name: str) -> int:
    """Write the golden files of a release; refuse to write one again."""
    folder = GOLDEN / release_name
    if folder.exists():
        print(f"{folder} is there already: golden files are never made again", file=sys.stderr)
        return 1
    folder.mkdir(parents=True)
    for name, text in golden_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
