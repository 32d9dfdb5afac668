"""Refusals as problems: the only place where what the core and the commands refuse gets a code."""

from __future__ import annotations

from typing import assert_never

from metering.commands import HubAlreadyExists
from metering.core.pricing import NotPriced, PriceListRefused
from metering.core.proposals import CorrectionDecided, OwnCorrection
from metering.core.quarantine import QuarantineClosed
from metering.core.sources import SourceNotActive
from runtime.http import Problem

CommandRefusal = (
    HubAlreadyExists
    | PriceListRefused
    | NotPriced
    | SourceNotActive
    | QuarantineClosed
    | OwnCorrection
    | CorrectionDecided
)
"""Why a command is refused, over HTTP."""


def problem_of(refusal: CommandRefusal) -> Problem:
    """Return the problem of a refusal. Raise it inside the transaction: that rolls it back."""
    match refusal:
        case HubAlreadyExists(hub):
            return Problem("already-exists", f"hub {hub} is registered")
        case PriceListRefused(code, detail):
            return Problem(code, detail)
        case NotPriced(series):
            return Problem("no-price", f"no price for {series.sku}, {series.price_class} now")
        case SourceNotActive(hub, path):
            return Problem("source-unknown", f"{hub} has no active source {path}")
        case QuarantineClosed(_, state):
            return Problem("quarantine-closed", f"the record is {state}")
        case OwnCorrection():
            return Problem("maker-is-checker", "another operator must approve it")
        case CorrectionDecided(_, state):
            return Problem("already-decided", f"the correction is {state}")
        case _:
            assert_never(refusal)
