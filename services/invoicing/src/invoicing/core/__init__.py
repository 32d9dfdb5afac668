"""What decides about bills: values in, values out; no I/O, no clock.

Reading order: `tax` (which rate a line carries), `sellers` (who sells), `billing` (what a month
costs), `document` (what the invoice says, and its hash), `periods` (when a month may be closed),
`reconciliation` (from what the ledger charged to what invoices say).
"""
