"""Grants from a file: CSV as an officer's spreadsheet writes it, one proposal per row.

A file is read into what a request for each row would say (`read_grant_file`), so that a row is
held to the rules of a single proposal, and to no others. Then all rows are decided together, on
what was looked up for the whole file at once (`decide_rows`).

**Reference.** Each row has one: the officer's own name for what is awarded, unique per tenant. A
row whose reference the tenant has seen before, in an earlier file or further up in this one, is a
duplicate: it proposes nothing and keeps nothing else from being proposed, so a file that was sent
before can be sent again with rows added. Per tenant, because an award to several tenants has one
reference in the officer's papers; not per programme, because a wrong programme that is corrected
in the file would then grant twice. What became of the first grant does not matter: a reference
that was rejected stays used, and the grant that is proposed instead has another.

**All or nothing.** A row that is rejected keeps all from being proposed, unless the officer asks
for a part (`grants_to_propose`). A window that began in the past is legal, as it is for one grant:
usage that was charged before approval is not drawn again.

Refusals of the whole file (`FileFault`): not UTF-8; not CSV; another header; too many rows; a
control character. Of a row: not well-formed (`RowFault`); then `Duplicate`; then `NotFound` and
those of a proposal (`grants.refuse_proposal`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from hisab_contracts.ids import GrantId
from ledger.core.decisions import NotFound
from ledger.core.grants import Grant, ProposalRefusal, refuse_proposal

COLUMNS: Final = (
    "tenant_id",
    "programme_id",
    "grant_micro",
    "priority",
    "effective_at",
    "expires_at",
    "hubs",
    "skus",
    "projects",
    "coverage_bps",
    "reference",
)
"""The header, in this order."""

MOST_ROWS: Final = 1_000
"""How many grants a file may propose: all are decided in one transaction."""

LONGEST_REFERENCE: Final = 200
"""In characters."""

_SCOPE: Final = ("hubs", "skus", "projects")
_TERMS: Final = (
    ("programme_id", "programme_id"),
    ("grant_micro", "grant_micro"),
    ("priority", "priority"),
    ("effective_ms", "effective_at"),
    ("expires_ms", "expires_at"),
    ("scope", "scope"),
    ("coverage_bps", "coverage_bps"),
)
"""What a row says of a grant: the member, and what the file calls it."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_WHOLE = re.compile(r"-?[0-9]{1,19}")
_BYTE_ORDER_MARK: Final = "\ufeff"


class GrantRow(Struct, frozen=True, kw_only=True):
    """A row as read: what a request for this grant would say, and what the officer calls it."""

    request: Mapping[str, object]
    reference: str


class RowFault(Struct, frozen=True):
    """A row that says nothing well-formed, and what to change."""

    reason: str


class FileFault(Struct, frozen=True):
    """A file that is none of ours: nothing of it was looked at, and what to change."""

    detail: str


class GrantFile(Struct, frozen=True):
    """The rows of a file, in its order; the first below the header is row 1."""

    rows: tuple[GrantRow | RowFault, ...]


class Duplicate(Struct, frozen=True, kw_only=True):
    """The tenant has a grant of this reference already."""

    grant_id: GrantId
    differing: tuple[str, ...]
    """Columns in which this row says something else than the grant has."""


class ImportFacts(Struct, frozen=True, kw_only=True):
    """All that decides whether the grants of a file can be proposed, looked up at one moment."""

    tenant_currencies: Mapping[str, str]
    programme_currencies: Mapping[str, str]
    complete_until_ms: Mapping[str, int | None]
    """By tenant: until when its usage has been heard of."""
    known: Mapping[GrantId, Grant]
    """Grants of these references that are there already, whatever became of them."""


RowOutcome = Grant | RowFault | Duplicate | NotFound | ProposalRefusal
"""What a row comes to: a grant that can be proposed, or why it is none."""


def read_grant_file(body: bytes) -> GrantFile | FileFault:
    """Read a file, in time linear in its length; what its cells mean is not looked at.

    UTF-8, with or without a byte order mark; lines end with LF or CRLF; a cell with a comma or a
    quote is quoted (RFC 4180). A row with the wrong number of cells is that row's fault alone.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        return FileFault(f"save the file as UTF-8: byte {error.start} is not")
    # Empty lines at the end mean nothing; an empty one between others is a row without cells.
    text = text.removeprefix(_BYTE_ORDER_MARK).rstrip("\r\n")
    records = csv.reader(_lines(text), strict=True)
    rows: list[GrantRow | RowFault] = []
    try:
        if tuple(next(records)) != COLUMNS:
            return FileFault(f"the first line must be: {','.join(COLUMNS)}")
        for cells in records:
            if len(rows) == MOST_ROWS:
                return FileFault(f"a file has at most {MOST_ROWS} rows: send it in parts")
            if any(_CONTROL.search(cell) is not None for cell in cells):
                return FileFault(
                    f"row {len(rows) + 1}: take line breaks and control characters out of its cells"
                )
            rows.append(_row_of(cells))
    except csv.Error as error:
        return FileFault(f"line {records.line_num} is no CSV: {error}")
    return GrantFile(tuple(rows))


def decide_rows(rows: Sequence[Grant | RowFault], facts: ImportFacts) -> tuple[RowOutcome, ...]:
    """Decide each row, in the order of the file; only one of a reference is ever proposed."""
    # A row that is refused uses no reference up: a later one may have it.
    known = dict(facts.known)
    outcomes: list[RowOutcome] = []
    for row in rows:
        outcome = row if isinstance(row, RowFault) else _decide_grant(row, facts, known)
        if isinstance(outcome, Grant):
            known[outcome.grant_id] = outcome
        outcomes.append(outcome)
    return tuple(outcomes)


def grants_to_propose(outcomes: Sequence[RowOutcome], *, partial: bool) -> tuple[Grant, ...]:
    """Return what is proposed: all that can be, or nothing where a row is refused.

    A duplicate is not refused: what it asks for is there.
    """
    if not partial and any(not isinstance(outcome, Grant | Duplicate) for outcome in outcomes):
        return ()
    return tuple(outcome for outcome in outcomes if isinstance(outcome, Grant))


def refuse_grant(
    grant: Grant,
    *,
    tenant_currency: str | None,
    programme_currency: str | None,
    complete_until_ms: int | None,
) -> NotFound | ProposalRefusal | None:
    """Say why a grant cannot be proposed, from a file or by itself, or None.

    A currency that is None is that of a tenant or programme which does not exist.
    """
    if tenant_currency is None:
        return NotFound(f"tenant: {grant.tenant_id}")
    if programme_currency is None:
        return NotFound(f"programme: {grant.programme_id}")
    return refuse_proposal(
        grant,
        tenant_currency=tenant_currency,
        programme_currency=programme_currency,
        complete_until_ms=complete_until_ms,
    )


def _decide_grant(
    grant: Grant, facts: ImportFacts, known: Mapping[GrantId, Grant]
) -> Grant | Duplicate | NotFound | ProposalRefusal:
    first = known.get(grant.grant_id)
    if first is not None:
        differing = tuple(
            column for name, column in _TERMS if getattr(grant, name) != getattr(first, name)
        )
        return Duplicate(grant_id=grant.grant_id, differing=differing)
    refused = refuse_grant(
        grant,
        tenant_currency=facts.tenant_currencies.get(grant.tenant_id),
        programme_currency=facts.programme_currencies.get(grant.programme_id),
        complete_until_ms=facts.complete_until_ms.get(grant.tenant_id),
    )
    return grant if refused is None else refused


def _lines(text: str) -> Iterator[str]:
    """Yield lines with their ends: within quotes an end is part of the cell.

    Not `splitlines`, which takes form feeds and Unicode's separators for ends as well.
    """
    return (f"{line}\n" for line in text.split("\n"))


def _row_of(cells: Sequence[str]) -> GrantRow | RowFault:
    if len(cells) != len(COLUMNS):
        return RowFault(
            f"write {len(COLUMNS)} cells, quoted where they have a comma: there are {len(cells)}"
        )
    said = dict(zip(COLUMNS, cells, strict=True))
    reference = said["reference"]
    if not reference:
        return RowFault("reference: give each grant a name of your own, so that none comes twice")
    if len(reference) > LONGEST_REFERENCE:
        return RowFault(f"reference: write at most {LONGEST_REFERENCE} characters")
    request: dict[str, object] = {
        "tenant_id": said["tenant_id"],
        "programme_id": said["programme_id"],
        "grant_micro": said["grant_micro"],
        "priority": _number_of(said["priority"]),
        "effective_at": said["effective_at"],
        "expires_at": said["expires_at"] or None,
        "scope": {name: said[name].split(";") for name in _SCOPE if said[name]},
    }
    if said["coverage_bps"]:
        request["coverage_bps"] = _number_of(said["coverage_bps"])
    return GrantRow(request=request, reference=reference)


def _number_of(cell: str) -> int | str:
    """Read a whole number; what is none stays as it is, for the rules of a request to refuse."""
    return cell if _WHOLE.fullmatch(cell) is None else int(cell)
