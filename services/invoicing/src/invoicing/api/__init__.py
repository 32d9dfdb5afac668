"""The HTTP edge: who sells and what tax, closing months, invoices and their PDFs, recomputing.

Order of checks, as everywhere: who calls (401, 403), what the path names (404), the body (413,
422), then the act (409). Tenants' keys see their own invoices and nothing else: row-level security
is told the key's tenant in every transaction.

One module per resource, its bodies and answers in the same file. Amounts and seqs are strings,
rates numbers. Writes act through `commands`, reads ask `store`. Refusals come from `core` as values
and become problems here, and nowhere below.
"""

from __future__ import annotations

from invoicing.api.invoices import Invoices
from invoicing.api.legal_entities import LegalEntities
from invoicing.api.periods import Periods
from invoicing.api.tax_rates import TaxRates
from invoicing.recompute import RecomputePool
from runtime.http import Resource
from runtime.service import Kit


def resources(kit: Kit, pool: RecomputePool) -> tuple[Resource, ...]:
    """Wire the service's resources."""
    return (
        LegalEntities(kit),
        TaxRates(kit),
        Periods(kit),
        Invoices(kit, pool),
    )
