"""Where an invoice differs from what its entries come to now, member by member, and in which part.

A recomputation reads nothing of what was issued. What it arrives at is compared here with three
things: the hash that was recorded when the invoice was numbered, the content as it is stored, and
the PDF as it is stored. The *part* says where to look:

* `content`: the stored document does not have its recorded hash any more: it was edited;
* `entries`: what was used, who paid, or up to which entry: they are not those that were billed;
* `tax`: a rate, an authority or its law: the tax table is not the one that was pinned;
* `issue`: anything else that the document states, such as the seller's name or its date;
* `pdf`: the stored PDF is not the one that was recorded, or that the content gives.

What follows from another difference is not named: totals where a line differs, taxes where other
lines are billed, a PDF where its content differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, assert_never

import msgspec

from hisab_contracts.canonical import content_sha256
from invoicing.core.billing import BillRefused, CurrencyUnknown, ZeroBill
from invoicing.core.document import Content
from invoicing.core.tax import TaxMissing

DifferencePart = Literal["content", "entries", "tax", "issue", "pdf"]
"""Which of the things that an invoice rests on, or is, was changed."""

SHOWN: Final = 50
"""At most so many differences are named; one is enough to look."""

_ENTRIES: Final = frozenset(
    {"hub", "sku", "price_class", "gpu_ms", "net_micro", "first_seq", "last_seq", "last_hash"}
)
_TAX: Final = frozenset({"authority", "tax_bps", "valid_from", "citation", "tax_version"})
_DERIVED: Final = frozenset({"net_minor", "tax_minor", "residue_micro", "total_minor", "due_minor"})


class Difference(msgspec.Struct, frozen=True):
    """One member in which an invoice differs; null where one side lacks it."""

    part: DifferencePart
    member: str
    """Where in the document, as `lines[0].net_micro`; of a whole, the name of its hash."""
    issued: str | None
    recomputed: str | None


@dataclass(frozen=True, slots=True)
class IssuedDocument:
    """An invoice as it is stored now, and the hashes recorded when it was made."""

    content: Content
    content_sha256: str
    pdf_sha256: str | None
    """Of the PDF's record; None while it is not rendered."""
    stored_pdf_sha256: str | None
    """Of the PDF's bytes as they are now."""


@dataclass(frozen=True, slots=True)
class RecomputedDocument:
    """What a fresh computation arrives at."""

    content: Content
    pdf_sha256: str


def differences(
    issued: IssuedDocument, recomputed: RecomputedDocument | BillRefused
) -> tuple[Difference, ...]:
    """Name what differs; empty when the invoice is what its entries come to, to the last byte."""
    found = [*_stored(issued)]
    if isinstance(recomputed, RecomputedDocument):
        found += _compared(issued, recomputed)
    else:
        found.append(_no_document(recomputed))
    return tuple(found[:SHOWN])


def _stored(issued: IssuedDocument) -> Iterator[Difference]:
    """Hold what is stored to the hashes recorded with it."""
    stored_sha256 = content_sha256(issued.content)
    if stored_sha256 != issued.content_sha256:
        yield Difference("content", "content_sha256", issued.content_sha256, stored_sha256)
    if issued.stored_pdf_sha256 != issued.pdf_sha256:
        yield Difference("pdf", "pdf_sha256", issued.pdf_sha256, issued.stored_pdf_sha256)


def _compared(issued: IssuedDocument, recomputed: RecomputedDocument) -> Iterator[Difference]:
    was = dict(_members(msgspec.to_builtins(issued.content)))
    now = dict(_members(msgspec.to_builtins(recomputed.content)))
    now_sha256 = content_sha256(recomputed.content)
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    causes = [name for name in changed if _leaf(name) not in _DERIVED]
    if _billed(issued.content) != _billed(recomputed.content):
        causes = [name for name in causes if _part_of(name) != "tax"]
    # What was hashed is what the entries come to: then only the stored document can be wrong.
    only_stored = now_sha256 == issued.content_sha256
    for name in causes or changed:
        part: DifferencePart = "content" if only_stored else _part_of(name)
        yield Difference(part, name, was.get(name), now.get(name))
    if not changed and not only_stored:
        # The stored document and the entries agree, and neither is what was hashed.
        yield Difference("entries", "content_sha256", issued.content_sha256, now_sha256)
    if only_stored and issued.pdf_sha256 not in {None, recomputed.pdf_sha256}:
        yield Difference("pdf", "pdf_sha256", issued.pdf_sha256, recomputed.pdf_sha256)


def _billed(content: Content) -> list[tuple[str, str, str]]:
    return [(line.hub, line.sku, line.price_class) for line in content.lines]


def _no_document(refused: BillRefused) -> Difference:
    match refused:
        case TaxMissing(hub, at_on):
            return Difference("tax", "taxes", None, f"no tax row covers {hub} on {at_on}")
        case CurrencyUnknown(currency):
            return Difference("issue", "currency", None, f"{currency} has no minor unit")
        case ZeroBill():
            return Difference("entries", "lines", None, "nothing comes to a whole minor unit")
        case _:
            assert_never(refused)


def _part_of(member: str) -> DifferencePart:
    leaf = _leaf(member)
    if leaf in _TAX:
        return "tax"
    return "entries" if leaf in _ENTRIES or leaf == "tender_minor" else "issue"


def _leaf(member: str) -> str:
    return member.rpartition(".")[2]


def _members(value: object, at: str = "") -> Iterator[tuple[str, str]]:
    """Walk a document to its leaves, each named by its path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _members(inner, f"{at}.{name}" if at else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _members(inner, f"{at}[{index}]")
    else:
        yield at, str(value)
