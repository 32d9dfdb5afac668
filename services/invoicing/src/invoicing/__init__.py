"""Invoicing: the ledger becomes bills.

Reading order: `tax` and `billing` (what a month costs), `periods` (when it may be closed),
`document` (what the invoice says, and its hash), then the shell: `store`, `register`, `consumer`,
`closing`, `api`.
"""

__version__ = "0.1.0"
