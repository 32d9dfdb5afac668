"""Documents worked by hand, for unit tests and for the golden files of a release."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace

from hisab_contracts.ids import HubCode, LegalEntityId, PriceClass, Sku, TenantId
from invoicing.core.billing import RatedUsage
from invoicing.core.document import (
    Content,
    Draft,
    InvoiceFacts,
    SeriesPosition,
    draft_of,
    number_draft,
)
from invoicing.core.tax import TaxRow

LHR, KHI = HubCode("lhr"), HubCode("khi")
H100, ON_DEMAND = Sku("h100-sxm-80"), PriceClass("on_demand")
TAX_ROWS = (
    TaxRow(1, LHR, "PRA", 1600, dt.date(2025, 1, 1), "Punjab (unconfirmed)"),
    TaxRow(2, KHI, "SRB", 1500, dt.date(2025, 1, 1), "Sindh (unconfirmed)"),
)
FACTS = InvoiceFacts(
    legal_entity_id=LegalEntityId("ignite-haas"),
    legal_entity_name="Ignite HaaS (Pvt) Ltd",
    series="INV",
    tenant_id=TenantId("indus-foundry"),
    period="2025-07",
    currency="PKR",
    issued_on=dt.date(2025, 8, 1),
    tax_version=2,
    taken_up_versions=(),
    last_seq=3,
    last_hash="ab" * 32,
)
WORKED_EXAMPLE_USAGE = (
    RatedUsage(KHI, H100, ON_DEMAND, 3_600_000_000_000, 0, 840_000_000, 0),
    RatedUsage(LHR, H100, ON_DEMAND, 600_000_000_000, 0, 140_000_000, 0),
)


def drafted(
    facts: InvoiceFacts = FACTS, usage: tuple[RatedUsage, ...] = WORKED_EXAMPLE_USAGE
) -> Draft:
    """Draft a document that there is a bill for."""
    draft = draft_of(facts, 1, usage, TAX_ROWS)
    assert isinstance(draft, Draft)
    return draft


def at(position: int, facts: InvoiceFacts = FACTS) -> SeriesPosition:
    """Return a position in the series of a document."""
    return SeriesPosition(facts.number_series, position)


def worked_example() -> Content:
    """A's July of the worked example: 840.00 + 140.00 + tax = 1 128.40."""
    return number_draft(drafted(), at(1), FACTS.issued_on)


def granted_example() -> Content:
    """A month of which a grant paid a part, with residues, free time and a name in Urdu."""
    facts = replace(FACTS, tenant_id=TenantId("ravi-health"), legal_entity_name="اگنائٹ “HaaS”")
    usage = (
        RatedUsage(KHI, H100, ON_DEMAND, 1_234_567_890, 500_004_999, 340_000_003, 0),
        RatedUsage(LHR, H100, PriceClass("reserved"), 7_000_000, 0, 0, 0),
        RatedUsage(LHR, H100, PriceClass("spot"), 9_000_000, 0, 15_000, 70_000),
    )
    return number_draft(drafted(facts, usage), at(2, facts), facts.issued_on)


def currency_example(currency: str, position: int) -> Content:
    """1 935.48 units of a currency, of which a grant paid 500.7055: by hand in each minor unit."""
    facts = replace(FACTS, tenant_id=TenantId("kaika-robotics"), currency=currency)
    usage = (RatedUsage(KHI, H100, ON_DEMAND, 8_294_914_285_714, 500_705_500, 1_434_774_500, 0),)
    return number_draft(drafted(facts, usage), at(position, facts), facts.issued_on)


def golden_documents() -> Mapping[str, Content]:
    """Contents whose bytes never change again, by the name of their golden file."""
    return {
        "invoice-worked-example": worked_example(),
        "invoice-granted": granted_example(),
        "invoice-jpy": currency_example("JPY", 3),
        "invoice-kwd": currency_example("KWD", 4),
        "invoice-pkr": currency_example("PKR", 5),
    }
