"""Files of grants: what is read, what is refused whole, and what each row comes to."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from hisab_contracts.ids import GrantId, ProgrammeId, TenantId
from ledger.core.decisions import NotFound
from ledger.core.grant_files import (
    COLUMNS,
    LONGEST_REFERENCE,
    MOST_ROWS,
    Duplicate,
    FileFault,
    GrantFile,
    GrantRow,
    ImportFacts,
    RowFault,
    RowOutcome,
    decide_rows,
    grants_to_propose,
    read_grant_file,
)
from ledger.core.grants import CurrencyDiffers, Grant, GrantExpired
from unit.ledger.values import at, grant

HEADER = ",".join(COLUMNS)
ROW = "lab,ignite,50,1,2025-07-01T00:00:00.000Z,,,,,,A-1"
READ = GrantRow(
    request={
        "tenant_id": "lab",
        "programme_id": "ignite",
        "grant_micro": "50",
        "priority": 1,
        "effective_at": "2025-07-01T00:00:00.000Z",
        "expires_at": None,
        "scope": {},
    },
    reference="A-1",
)


def rows_of(text: str) -> tuple[GrantRow | RowFault, ...]:
    """The rows of a file that is read."""
    read = read_grant_file(text.encode())
    assert isinstance(read, GrantFile), read
    return read.rows


def fault_of(body: bytes) -> str:
    """Why a file is refused whole."""
    read = read_grant_file(body)
    assert isinstance(read, FileFault), read
    return read.detail


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n{ROW}",
        f"{HEADER}\n{ROW}\n",
        f"{HEADER}\r\n{ROW}\r\n\r\n\n",
        f"\ufeff{HEADER}\r\n{ROW}\r\n",
        f'{HEADER}\n"lab","ignite","50","1","2025-07-01T00:00:00.000Z","","","","","","A-1"\n',
    ],
    ids=["no end", "lf", "crlf and empty lines", "byte order mark", "all quoted"],
)
def test_a_file_is_read_however_a_spreadsheet_wrote_it(text: str) -> None:
    """Line ends, a byte order mark and quotes say nothing."""
    assert (READ,) == rows_of(text)


def test_a_header_alone_is_a_file_without_rows() -> None:
    """Nothing to propose is no fault."""
    assert () == rows_of(HEADER)


def test_cells_become_what_a_request_would_say() -> None:
    """Lists by semicolon; an empty cell is all, never, or the default."""
    (row,) = rows_of(f'{HEADER}\nlab,p,5,-2,a,b,lhr;khi,h100,main,2500,"A, ""1"""')
    assert (
        GrantRow(
            request={
                "tenant_id": "lab",
                "programme_id": "p",
                "grant_micro": "5",
                "priority": -2,
                "effective_at": "a",
                "expires_at": "b",
                "scope": {"hubs": ["lhr", "khi"], "skus": ["h100"], "projects": ["main"]},
                "coverage_bps": 2500,
            },
            reference='A, "1"',
        )
        == row
    )


@pytest.mark.parametrize("cell", ["", "1.0", "one", "+1", "1" * 20, "\u0661"])
def test_what_is_no_whole_number_is_left_for_the_rules_of_a_request(cell: str) -> None:
    """No second set of rules: a text is not taken where a request says a number."""
    (row,) = rows_of(f"{HEADER}\nlab,p,5,{cell},a,b,,,,,A")
    assert isinstance(row, GrantRow)
    assert cell == row.request["priority"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROW.rpartition(",")[0], "there are 10"),
        (f"{ROW},", "there are 12"),
        (f"\n{ROW}", "there are 0"),
        (ROW.removesuffix("A-1"), "give each grant a name"),
        (ROW + "x" * LONGEST_REFERENCE, "at most 200 characters"),
    ],
    ids=["cell missing", "cell too many", "empty line", "no reference", "long reference"],
)
def test_a_row_that_says_nothing_well_formed_is_its_own_fault(row: str, words: str) -> None:
    """The others are read."""
    rows = rows_of(f"{HEADER}\n{row}\n{ROW}")
    assert isinstance(rows[0], RowFault)
    assert words in rows[0].reason
    assert READ == rows[-1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "first line must be: tenant_id,"),
        (b"\r\n", "first line must be"),
        (ROW.encode(), "first line must be"),
        (HEADER.replace(",", ";").encode(), "first line must be"),
        ((HEADER + ",more").encode(), "first line must be"),
        (b"," * 1_048_576, "first line must be"),
        (b"\n" * 1_048_576, "first line must be"),
        (b"\xff\xfe" + HEADER.encode("utf-16-le"), "save the file as UTF-8: byte 0"),
        (f"{HEADER}\n{ROW}\x00".encode(), "row 1: take line breaks and control"),
        (f"{HEADER}\n{ROW}\n{ROW}\t".encode(), "row 2: take line breaks and control"),
        (f'{HEADER}\n{ROW}\n"a\nb"'.encode(), "row 2: take line breaks and control"),
        (f'{HEADER}\n"{ROW}\n{ROW}\n'.encode(), "is no CSV: unexpected end"),
        (f'{HEADER}\n{ROW}\n"a"b'.encode(), "line 3 is no CSV"),
        (f"{HEADER}\r{ROW}\r".encode(), "line 1 is no CSV"),
        (f"{HEADER}\n{'x' * 1_000_000}".encode(), "line 2 is no CSV: field larger"),
        (f"{HEADER}\n".encode() + b'"' * 1_000_001, "line 2 is no CSV"),
        (f"{HEADER}\n".encode() + b",\n" * (MOST_ROWS + 1), "at most 1000 rows"),
        (f"{HEADER}\n".encode() + b"\n" * 1_000_000 + b"x", "at most 1000 rows"),
    ],
    ids=str,
)
def test_a_file_that_is_none_is_refused_whole_and_says_what_to_change(
    body: bytes, words: str
) -> None:
    """Another header, another encoding, no CSV, control characters, too many rows."""
    assert words in fault_of(body)


def test_a_file_has_as_many_rows_as_it_may() -> None:
    """The bound itself is taken."""
    assert MOST_ROWS == len(rows_of(f"{HEADER}\n" + f"{ROW}\n" * MOST_ROWS))


def test_a_row_of_a_mebibyte_of_commas_is_one_row() -> None:
    """It has too many cells, and costs no more than its length."""
    (row,) = rows_of(f"{HEADER}\n" + "," * 1_000_000)
    assert isinstance(row, RowFault)
    assert "there are 1000001" in row.reason


def written(rows: Sequence[Sequence[str]]) -> bytes:
    """A file as Python's own writer writes it."""
    out = io.StringIO()
    csv.writer(out).writerows([COLUMNS, *rows])
    return out.getvalue().encode()


def test_rows_of_pythons_own_writer_are_read() -> None:
    """Its line ends are CRLF, its quotes are where they are needed."""
    rows = [ROW.split(","), [*ROW.split(",")[:-1], 'B;"2",']]
    read = read_grant_file(written(rows))
    assert GrantFile((READ, replace(READ, reference='B;"2",'))) == read


# What rows come to.


def facts(**more: object) -> ImportFacts:
    """Tenant `t` and programme `p`, both in rupees; whatever else is said."""
    found = ImportFacts(
        tenant_currencies={"t": "PKR", "abroad": "USD"},
        programme_currencies={"p": "PKR"},
        complete_until_ms={"t": at(11), "abroad": None},
        known={},
    )
    return replace(found, **more)


GOOD = grant("good", 5)
FAULT = RowFault("no")


def decided(*rows: Grant | RowFault, **more: object) -> tuple[RowOutcome, ...]:
    """What rows come to."""
    return decide_rows(rows, facts(**more))


def test_each_row_is_refused_as_a_proposal_by_itself_would_be() -> None:
    """In the order of the file, each for its own reason; the tenant is looked for first."""
    nobody = replace(grant("n", 1, tenant_id="nobody"), programme_id=ProgrammeId("none"))
    none = replace(grant("m", 1), programme_id=ProgrammeId("none"))
    outcomes = decided(
        GOOD, FAULT, nobody, none, grant("a", 1, tenant_id="abroad"), grant("o", 1, expires_ms=0)
    )
    assert (
        GOOD,
        FAULT,
        NotFound("tenant: nobody"),
        NotFound("programme: none"),
        CurrencyDiffers("PKR"),
        GrantExpired(0),
    ) == outcomes


def test_a_grant_that_is_there_is_a_duplicate_whatever_became_of_it() -> None:
    """Even where it could not be proposed any more; it says which columns differ."""
    first = replace(GOOD, state="rejected")
    assert (Duplicate(grant_id=GrantId("good"), differing=()),) == decided(
        GOOD, known={first.grant_id: first}
    )
    other = replace(
        GOOD,
        programme_id=ProgrammeId("none"),
        grant_micro=6,
        priority=9,
        effective_ms=at(1),
        expires_ms=at(2),
        coverage_bps=1,
    )
    assert (
        Duplicate(
            grant_id=GrantId("good"),
            differing=(
                "programme_id",
                "grant_micro",
                "priority",
                "effective_at",
                "expires_at",
                "coverage_bps",
            ),
        ),
    ) == decided(other, known={first.grant_id: first})


def test_only_the_first_of_a_reference_that_can_be_proposed_is() -> None:
    """A row that is refused uses no reference up."""
    refused = replace(GOOD, tenant_id=TenantId("nobody"))
    again = Duplicate(grant_id=GrantId("good"), differing=())
    assert (NotFound("tenant: nobody"), GOOD, again, again) == decided(refused, GOOD, GOOD, GOOD)


@pytest.mark.parametrize(
    "refused", [FAULT, NotFound("tenant: x"), CurrencyDiffers("PKR"), GrantExpired(0)], ids=repr
)
def test_one_row_that_is_refused_keeps_all_from_being_proposed(refused: RowOutcome) -> None:
    """Unless a part is asked for."""
    outcomes = (GOOD, refused, grant("b", 1))
    assert () == grants_to_propose(outcomes, partial=False)
    assert (GOOD, grant("b", 1)) == grants_to_propose(outcomes, partial=True)


def test_a_duplicate_keeps_nothing_from_being_proposed() -> None:
    """A file that was sent before can be sent again with rows added."""
    again = Duplicate(grant_id=GrantId("a"), differing=())
    for partial in (False, True):
        assert (GOOD,) == grants_to_propose((again, GOOD), partial=partial)
