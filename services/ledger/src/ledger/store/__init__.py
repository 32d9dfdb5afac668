"""All SQL of the ledger: rows become types here, and driver records go no further.

`books` locks, loads and saves what commands are decided on; `entries` appends entries, reads
them back, and keeps parked charges beside them; `sequence` numbers them for publishing, with the
watermarks among them; `directory` keeps what was registered; `recoveries` what a recovery takes
back; `queries` answers questions.
"""
