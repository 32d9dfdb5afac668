"""The catalogue of problems is complete, stable, and knows which refusals a retry can cure."""

from __future__ import annotations

import ast
import re
from typing import get_args

import pytest

from architecture.source import Module, package_modules
from hisab_contracts.events import QuarantineReason
from hisab_contracts.problems import PROBLEMS

PUBLISHED = {
    # What outsiders may rely on: a code never changes its status.
    "unauthenticated": 401,
    "forbidden": 403,
    "maker-is-checker": 403,
    "not-found": 404,
    "too-large": 413,
    "malformed": 422,
    "unsupported": 422,
    "idempotency-key-missing": 422,
    "idempotency-key-reused": 409,
    "idempotency-key-in-flight": 409,
    "insufficient-credit": 409,
    "budget-exceeded": 409,
    "not-receivable": 409,
    "price-overlap": 409,
    "price-past": 409,
    "period-incomplete": 409,
    "hub-mismatch": 409,
    "too-many-requests": 429,
}


def test_published_codes_keep_their_status() -> None:
    """A code that was published is there, with the status it had."""
    assert {code: PROBLEMS[code].status for code in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("code", sorted(PROBLEMS))
def test_problem_is_well_formed(code: str) -> None:
    """A code is its own key and fit for a URL; its title is a phrase; its status is an error's."""
    problem = PROBLEMS[code]
    assert code == problem.code
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
    assert problem.title[0].isupper()
    assert not problem.title.endswith(".")
    assert problem.status in {400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 500, 503}


def test_malformed_never_becomes_well_formed_by_waiting() -> None:
    """A retry cures load and outages, never a malformed request."""
    for problem in PROBLEMS.values():
        if problem.status in {401, 403, 404, 405, 413, 415, 422}:
            assert not problem.retryable, problem.code
        if problem.status in {429, 500, 503}:
            assert problem.retryable, problem.code


def raised(module: Module) -> set[str]:
    """Return the codes of problems that a module answers."""
    found = set()
    for node in module.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Problem":
            code = node.args[0] if node.args else None
            if isinstance(code, ast.Constant) and isinstance(code.value, str):
                found.add(code.value)
        if isinstance(node, ast.keyword) and node.arg == "problems":
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.add(part.value)
    return found


def test_services_answer_nothing_outside_the_catalogue() -> None:
    """Every code that any API raises or documents stands in the catalogue."""
    unknown = {
        (module.name, code)
        for module in package_modules()
        for code in raised(module) - set(PROBLEMS)
    }
    assert unknown == set()


def test_quarantine_reasons_are_words_of_their_own() -> None:
    """Reasons of quarantine are written like codes; where both exist they mean the same."""
    reasons = set(get_args(QuarantineReason))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", reason) for reason in reasons)
    assert {"hub-mismatch", "no-price"} == reasons & set(PROBLEMS)
