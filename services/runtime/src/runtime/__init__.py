"""The shell kit that the services share: all that touches the outside. It knows tenants, no more.

Reading order: `machine` (what the consumer loop decides, pure) -> `kafka` (its thin driver; with
`records`, what aiokafka refuses to read) -> `database` (transactions, leases) -> `progress` (how
far each partition is) -> `consumer` (the loop) -> `outbox` (what leaves) -> `http`, `idempotency`,
`auth`, `openapi` (the edge) -> `migrations` -> `service` (what `python -m <service>` does).
`telemetry`, `clock` and `outages` are used everywhere.
"""
