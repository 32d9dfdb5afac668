"""A closing that is parked goes on: with tax rows that came later, or without what failed."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest

from hisab_contracts.ids import HubCode, LegalEntityId, TenantId
from invoicing.core.periods import (
    CloseRequest,
    Closing,
    OutstandingBill,
    PeriodBlocker,
    PeriodClosed,
    RecordedClosing,
)
from invoicing.core.resumptions import (
    ParkedClosing,
    Resumption,
    TaxRowsMissing,
    resume_closing,
)
from invoicing.core.tax import TaxRow

LHR, PEW, ISB = HubCode("lhr"), HubCode("pew"), HubCode("isb")
A = TenantId("indus-foundry")
PRA = TaxRow(1, LHR, "PRA", 1600, dt.date(2025, 1, 1), "cited")
NEW_PRA = TaxRow(2, LHR, "PRA", 1900, dt.date(2025, 7, 1), "cited")
KPRA = TaxRow(3, PEW, "KPRA", 1500, dt.date(2025, 1, 1), "cited")
CLOSING = Closing(
    period="2025-07",
    legal_entity_id=LegalEntityId("ignite-haas"),
    issued_on=dt.date(2025, 8, 1),
    override_reason=None,
    overridden=(),
    tax_version=1,
    actor="key:finance",
)
ASKED_AT = dt.datetime(2025, 8, 2, tzinfo=dt.UTC)
UNTAXED = OutstandingBill(A, "tax-missing", PEW, 3, "no tax row covers pew on 2025-07-31")
FAILED = PeriodBlocker(
    kind="tax-missing",
    hub=PEW,
    tenant_id=A,
    detail="attempt 3: no tax row covers pew on 2025-07-31",
)
PARKED = ParkedClosing(
    recorded=RecordedClosing(CLOSING, ASKED_AT, None),
    failed=(UNTAXED,),
    failed_count=1,
    pending_hubs=(LHR, PEW),
    tax_rows=(PRA, NEW_PRA, KPRA),
    taken_up_versions=(),
)
REQUEST = CloseRequest("2025-07", None, None, "key:finance-2")
FORCED = replace(REQUEST, override_reason="the hub is abroad")
RESUMED = Resumption(
    period="2025-07",
    override_reason=None,
    tax_version=3,
    taken_up=(KPRA,),
    failed=(FAILED,),
    failed_count=1,
    actor="key:finance-2",
)


def test_a_row_recorded_since_the_close_is_taken_up_for_the_hub_that_had_none() -> None:
    """On the record with who asked; the new rate of a hub that had one is not."""
    assert RESUMED == resume_closing(PARKED, REQUEST)


def test_a_row_that_was_taken_up_before_is_not_taken_up_anew() -> None:
    """A newer one of its hub has no effect, and only what lacks one is on the record."""
    newer = TaxRow(4, PEW, "KPRA", 1600, dt.date(2025, 7, 1), "cited")
    ict = TaxRow(5, ISB, "ICT", 1500, dt.date(2025, 1, 1), "cited")
    parked = replace(
        PARKED,
        pending_hubs=(ISB, PEW),
        tax_rows=(PRA, NEW_PRA, KPRA, newer, ict),
        taken_up_versions=(3,),
    )
    assert replace(RESUMED, tax_version=5, taken_up=(ict,)) == resume_closing(parked, REQUEST)


def test_while_the_row_is_missing_the_hubs_are_named() -> None:
    """Of all pending bills, not only those that have failed so far."""
    parked = replace(PARKED, pending_hubs=(ISB, LHR, PEW), tax_rows=(PRA, NEW_PRA))
    assert TaxRowsMissing((FAILED,), (ISB, PEW)) == resume_closing(parked, REQUEST)


def test_with_an_override_the_month_goes_on_without_what_failed() -> None:
    """What can be taken up is, all the same."""
    without = replace(PARKED, tax_rows=(PRA,))
    forced = replace(RESUMED, override_reason="the hub is abroad", tax_version=None, taken_up=())
    assert forced == resume_closing(without, FORCED)
    assert replace(RESUMED, override_reason="the hub is abroad") == resume_closing(PARKED, FORCED)


def test_what_failed_for_another_reason_is_tried_again_without_new_rows() -> None:
    """The ledger refused, or a PDF could not be made: no tax row has to do with it."""
    refused = OutstandingBill(A, "ledger", None, 9, "ledger not-receivable: too much")
    parked = replace(PARKED, failed=(refused,), pending_hubs=())
    detail = "attempt 9: ledger not-receivable: too much"
    blocker = PeriodBlocker(kind="ledger", tenant_id=A, detail=detail)
    again = replace(RESUMED, tax_version=None, taken_up=(), failed=(blocker,))
    assert again == resume_closing(parked, REQUEST)


@pytest.mark.parametrize(
    ("parked", "request_"),
    [
        (replace(PARKED, failed=()), REQUEST),
        (replace(PARKED, failed=()), FORCED),
        (replace(PARKED, recorded=RecordedClosing(CLOSING, ASKED_AT, ASKED_AT)), FORCED),
        (PARKED, replace(REQUEST, issued_on=dt.date(2025, 8, 2))),
    ],
)
def test_a_closing_that_is_not_parked_or_another_one_is_refused(
    parked: ParkedClosing, request_: CloseRequest
) -> None:
    """Nothing has failed, it is done, or finance names another date."""
    assert PeriodClosed("2025-07") == resume_closing(parked, request_)


def test_the_closings_own_date_may_be_named_again() -> None:
    """The same command, word for word."""
    again = replace(REQUEST, issued_on=dt.date(2025, 8, 1))
    assert RESUMED == resume_closing(PARKED, again)
