"""All SQL of the ledger: rows become types here, and driver records go no further.

`books` locks, loads and saves what commands are decided on; `entries` reads entries back and
numbers them for publishing; `directory` keeps what was registered; `queries` answers questions.
"""
