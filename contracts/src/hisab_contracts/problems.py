"""The catalogue of problems: every error any API of ours answers, once.

A code is stable for ever. `retryable` says whether the same request may succeed later unchanged.
A business refusal is 409; 422 means malformed, or a value that no
release takes yet (`unsupported`), or a command without its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ProblemType:
    """One row of the catalogue (RFC 9457: `type` is `/problems/<code>`)."""

    code: str
    title: str
    status: int
    retryable: bool = False


_CATALOGUE = (
    ProblemType("bad-request", "The request could not be read", 400),
    ProblemType("unauthenticated", "A valid key is missing", 401),
    ProblemType("forbidden", "This key's role may not do that", 403),
    ProblemType("maker-is-checker", "Who proposes something cannot approve it", 403),
    ProblemType("conflict-of-interest", "This approver has declared a conflict of interest", 403),
    ProblemType("above-limit", "It is more than this key may approve", 403),
    ProblemType("not-found", "There is no such thing, or it is not yours to see", 404),
    ProblemType("method-not-allowed", "This path does not take that method", 405),
    ProblemType("request-timeout", "The request did not arrive in time", 408, True),
    ProblemType("too-large", "The body is larger than this endpoint takes", 413),
    ProblemType("unsupported-media-type", "Send JSON with its content type", 415),
    ProblemType("malformed", "The request does not have the form this endpoint takes", 422),
    ProblemType("idempotency-key-missing", "A command needs an Idempotency-Key header", 422),
    ProblemType("unsupported", "This value is valid but not supported yet", 422),
    ProblemType("hub-mismatch", "The event belongs to another hub than its key or topic", 409),
    ProblemType("idempotency-key-reused", "This key was used for another command", 409),
    ProblemType(
        "idempotency-key-in-flight", "The first request with this key still runs", 409, True
    ),
    ProblemType("already-exists", "Something with this id exists, with other content", 409),
    ProblemType("insufficient-credit", "The credit available does not cover the hold", 409),
    ProblemType("budget-exceeded", "The programme's budget does not cover the grant", 409),
    ProblemType("budget-out-of-range", "The programme's budget would pass 64 bits", 409),
    ProblemType("already-decided", "It was approved or rejected before", 409),
    ProblemType("outcome-missing", "No outcome is accepted yet of the grant it comes after", 409),
    ProblemType("not-approved", "The grant gave no credit that could have an outcome", 409),
    ProblemType("too-many-outcomes", "The grant has as many outcomes as it may", 409),
    ProblemType("not-commercial", "Only a commercial tenant has a credit limit", 409),
    ProblemType("grant-expired", "The grant's window has already ended", 409),
    ProblemType("suspended", "The tenant is suspended: no new job of it is admitted", 409),
    ProblemType("hold-closed", "The hold has already reached its end", 409),
    ProblemType("not-receivable", "More than what is receivable would be invoiced", 409),
    ProblemType("already-reversed", "The entry has been negated before", 409),
    ProblemType("already-drawn", "Usage has drawn on the lot that would be taken back", 409),
    ProblemType("reserved", "Open holds reserve on the lot that would be taken back", 409),
    ProblemType("payment-differs", "The payment is credited, with other content", 409),
    ProblemType("already-reclaimed", "What had expired went back to the programme before", 409),
    ProblemType("not-expired", "Nothing of the grant has expired, or not all of it yet", 409),
    ProblemType("is-reversal", "A reversal is not reversed; the entry is made anew", 409),
    ProblemType("correct-in-metering", "A charge follows from usage: correct that", 409),
    ProblemType("correct-in-invoicing", "The entry follows from a document: correct that", 409),
    ProblemType("not-reversible", "Entries of this kind are not reversed", 409),
    ProblemType("price-overlap", "A price line for this window exists already", 409),
    ProblemType("price-past", "The window begins before an hour already rated on that line", 409),
    ProblemType("no-price", "No price line covers this SKU, class and hour", 409),
    ProblemType("quarantine-closed", "The quarantined record is no longer open", 409),
    ProblemType("source-unknown", "The hub has no such active source", 409),
    ProblemType("period-incomplete", "The month is not complete yet", 409, True),
    ProblemType("period-closed", "The month is closed already", 409),
    ProblemType("issue-date-order", "The date lies before the last one of its series", 409),
    ProblemType("tax-missing", "No tax row covers this hub and date", 409),
    ProblemType("too-many-requests", "This key, or this address, asks too often", 429, True),
    ProblemType("internal", "A defect of ours; it is logged under the trace id", 500, True),
    ProblemType(
        "behind-published",
        "This database lacks what was published: nothing is served before it is recovered",
        503,
        True,
    ),
    ProblemType("unavailable", "A part this answer needs is not reachable now", 503, True),
)

PROBLEMS: Mapping[str, ProblemType] = MappingProxyType({row.code: row for row in _CATALOGUE})
"""Every problem by its code."""
