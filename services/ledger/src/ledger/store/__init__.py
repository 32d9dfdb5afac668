"""All SQL of the ledger: rows become types here, and driver records go no further.

`books` locks, loads and saves what commands are decided on; `entries` appends entries, reads
them back and numbers them for publishing, and keeps watermarks and parked charges beside them;
`directory` keeps what was registered; `queries` answers questions.
"""
