"""The ledger: immutable double-entry books of credit grants, holds and charges.

A book is one tenant's stream of entries; its state is a fold of them. What is entered into books is
decided by one pure function, `decisions.decide(books, command, now_ms) -> entries | refusal`, which
a `UnitOfWork` calls on the books that a transaction has locked.

Four floors, each importing only what stands before it:

* `core` decides: read `grants`, then `holds`, `book`, `decisions`.
* `store` holds all SQL: `books` locks, loads and saves; `entries` appends entries and reads them
  back; `directory` keeps tenants, programmes, grants and prices; `queries` answers questions.
* The shell stands here. `consumer` books charges, `commands` runs what is asked over HTTP, `jobs`
  is what the ledger does by itself, `sequencer` publishes, `audit` checks everything.
* `api` is HTTP: one resource per module, with its requests and answers beside it.
"""

__version__ = "0.1.0"
