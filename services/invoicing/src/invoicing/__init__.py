"""Invoicing: the ledger becomes bills.

Reading order: `core` (`tax`, `billing`: what a month costs; `document`: what the invoice says, and
its hash; `periods`: when it may be closed; `reconciliation`: does it add up), then `consumer` (the
ledger's entries come in), `commands` (what finance asks) and `closing` (bills, numbers, PDFs), then
`store` and `api`.

Where a change goes: a rate or a tax authority is data (`api/tax_rates.py`), as is a hub, at
metering; a rule of the bill is `core/billing.py`, in a new pipeline version; a member of the
document is `core/document.py` and the template in `templates/`; what keeps a month open is
`core/periods.py`.
"""

__version__ = "0.1.0"
