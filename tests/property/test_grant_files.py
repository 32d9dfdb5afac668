"""Properties of files of grants: what was written is read back, and any bytes are answered."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from ledger.core.grant_files import (
    COLUMNS,
    FileFault,
    GrantFile,
    GrantRow,
    RowFault,
    read_grant_file,
)

CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)
LISTS = st.lists(st.text("abc-,\" '", min_size=1, max_size=4), max_size=3)
NUMBERS = st.integers(-(10**6), 10**6)


@st.composite
def rows(draw: st.DrawFn) -> GrantRow:
    """A row as a request says it; what its texts mean is not looked at here."""
    scope = {name: draw(LISTS) for name in ("hubs", "skus", "projects")}
    request: dict[str, object] = {
        "tenant_id": draw(CELLS),
        "programme_id": draw(CELLS),
        "grant_micro": draw(CELLS),
        "priority": draw(NUMBERS),
        "effective_at": draw(CELLS),
        "expires_at": draw(st.none() | NAMES),
        "scope": {name: members for name, members in scope.items() if members},
    }
    if draw(st.booleans()):
        request["coverage_bps"] = draw(NUMBERS)
    return GrantRow(request=request, reference=draw(NAMES))


def cells_of(row: GrantRow) -> list[str]:
    """What an officer's spreadsheet has for a row."""
    scope = row.request["scope"]
    assert isinstance(scope, dict)
    said = {**row.request, "reference": row.reference}
    said |= {name: ";".join(members) for name, members in scope.items()}
    return ["" if (cell := said.get(name)) is None else str(cell) for name in COLUMNS]


@given(
    st.lists(rows(), max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(["", "\ufeff"]),
)
def test_a_written_file_reads_back(
    written: list[GrantRow], line_end: str, all_quoted: bool, mark: str
) -> None:
    """Whatever its cells hold, however lines end and cells are quoted."""
    out = io.StringIO(newline="")
    dialect = csv.unix_dialect if all_quoted else csv.excel
    writer = csv.writer(out, dialect, lineterminator=line_end)
    writer.writerows([COLUMNS, *map(cells_of, written)])
    assert GrantFile(tuple(written)) == read_grant_file((mark + out.getvalue()).encode())


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([b",", b'"', b"\n", b"\r", b"\0", b";", b"a", b"\xef\xbb\xbf"])).map(
        b"".join
    ),
    st.booleans(),
)
def test_any_bytes_are_answered(body: bytes, with_header: bool) -> None:
    """A file, rows and their faults, or a fault of the file: never an exception."""
    header = ",".join(COLUMNS).encode() + b"\n" if with_header else b""
    read = read_grant_file(header + body)
    if isinstance(read, FileFault):
        assert read.detail
    else:
        for row in read.rows:
            assert isinstance(row, RowFault) or row.reference
