"""Metering: what hubs report becomes coverage, charges and quarantine, each GPU-nanosecond once.

Theory. A hub's records come in over Kafka (or over `POST /v1/events`, which only puts them there).
Every record, whether it is new or comes out of quarantine, goes one way: reference data is loaded,
`core.engine.prepare` reads and rates the records, what they touch is locked and loaded,
`core.engine.meter` decides, and what has changed is saved with the messages about it, in one
transaction. So whatever is published was stored, and whatever was read is stored.

Reading order: `core/engine.py` (the decisions and their order), `core/coverage.py` and
`core/sources.py` (what it decides by), `batches.py` (load, decide, save), `store/state.py` (the SQL
of that), `ingest.py` (what is new from Kafka), `replay.py` (the same out of quarantine), `jobs.py`
(watermarks, finals, releases), `commands.py` (what operators ask for), `facts.py` (what it follows
of its own), `reconcile.py` (against the ledger). Then `api/`, one module per resource.
"""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
