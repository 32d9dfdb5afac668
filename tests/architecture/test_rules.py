"""The project keeps the rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

from architecture import pattern_rules, shape_rules, sql_rules, text_rules, word_rules
from architecture.source import (
    ROOT,
    Finding,
    Module,
    deploy_modules,
    modules_of_tests,
    package_modules,
    project_files,
    report,
)

Rule = Callable[[Module], Iterable[Finding]]

PACKAGE_RULES: tuple[Rule, ...] = (
    shape_rules.long_functions,
    shape_rules.module_size,
    shape_rules.module_smallness,
    shape_rules.vague_names,
    shape_rules.foreign_services,
    shape_rules.outside_libraries,
    shape_rules.pure_imports,
    shape_rules.pure_calls,
    word_rules.float_ban,
    word_rules.domain_words,
    word_rules.private_words,
    word_rules.loop_variables,
    word_rules.unit_suffixes,
    word_rules.frozen_facts,
    word_rules.distinct_ids,
    word_rules.exhaustive_matches,
    word_rules.docstrings,
    word_rules.any_and_ignores,
    sql_rules.sql_text,
    sql_rules.sql_place,
    sql_rules.locking_reads,
    sql_rules.limited_sums,
    sql_rules.outside_calls,
    sql_rules.driver_records,
    text_rules.settings,
    text_rules.module_state,
    text_rules.swallowed_failures,
    pattern_rules.linear_patterns,
)
DEPLOY_RULES: tuple[Rule, ...] = (
    pattern_rules.linear_patterns,
    shape_rules.demo_imports,
    shape_rules.long_functions,
    shape_rules.module_size,
    shape_rules.vague_names,
    word_rules.loop_variables,
)
TEST_RULES: tuple[Rule, ...] = (
    shape_rules.long_functions,
    shape_rules.module_size,
    word_rules.loop_variables,
    text_rules.mocks,
    text_rules.test_facts,
)


def findings(rule: Rule, modules: Iterable[Module]) -> list[Finding]:
    """Apply one rule to many modules."""
    return [finding for module in modules for finding in rule(module)]


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_packages_keep_rule(rule: Rule) -> None:
    """Every module of contracts and services keeps the rule."""
    found = findings(rule, package_modules())
    assert found == [], report(found)


@pytest.mark.parametrize("rule", DEPLOY_RULES, ids=lambda rule: rule.__name__)
def test_deploy_keeps_rule(rule: Rule) -> None:
    """The local stack and the demo keep the rule, and look at no service from inside."""
    found = findings(rule, deploy_modules())
    assert found == [], report(found)


@pytest.mark.parametrize("rule", TEST_RULES, ids=lambda rule: rule.__name__)
def test_tests_keep_rule(rule: Rule) -> None:
    """Tests keep the rule."""
    found = findings(rule, modules_of_tests())
    assert found == [], report(found)


def test_no_import_cycle() -> None:
    """Rule 6: imports of the five packages form no circle."""
    found = list(shape_rules.cycles(package_modules()))
    assert found == [], report(found)


def test_migrations_are_numbered_and_forward() -> None:
    """Rule 21: each service's migrations are numbered, and `pre` takes nothing away."""
    found: list[Finding] = []
    for folder in sorted((ROOT / "services").glob("*/src/*/migrations")):
        files = sorted(folder.glob("*.sql"))
        found.extend(sql_rules.migrations([str(path.relative_to(ROOT)) for path in files]))
        for path in files:
            name = str(path.relative_to(ROOT))
            found.extend(sql_rules.migration_text(name, path.read_text(encoding="utf-8")))
    assert found == [], report(found)


def test_no_file_names_a_machine_or_a_registry() -> None:
    """Nothing under version control knows where it was written or where its packages came from."""
    found = [finding for path, text in texts() for finding in text_rules.forbidden_text(path, text)]
    assert found == [], report(found)


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project."""
    for path in project_files():
        try:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def test_every_module_was_seen() -> None:
    """The checks look at something: all five packages, and as many modules as there are files."""
    seen = {module.path for module in package_modules()}
    files = {str(path.relative_to(ROOT)) for path in project_files() if path.suffix == ".py"}
    missed = {f for f in files if f.startswith(("contracts/src/", "services/"))} - seen
    assert missed == set()
    assert {"hisab_contracts", "runtime", "metering", "ledger", "invoicing"} == {
        module.package for module in package_modules()
    }
