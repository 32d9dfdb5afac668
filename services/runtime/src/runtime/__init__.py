"""The shell kit that the services share: everything that touches the outside world, no domain noun.

Reading order: `machine` (what the consumer loop decides, pure) → `kafka` (its thin driver) →
`database` (transactions, leases, stored progress) → `outbox` → `http` → `auth` → `telemetry` →
`service` (what `python -m <service>` does).
"""
