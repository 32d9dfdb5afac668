"""The SQL of invoicing, by what it is about; rows become facts of `core` here and nowhere else.

`entries` holds what the ledger booked and how far hubs are, `reference` who is who,
`closings` all that a close writes (and the tax table it pins), `periods` what a month's state and
its reconciliation are read from, `documents` what is asked about invoices.
"""
