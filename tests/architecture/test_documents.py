"""What documents and docstrings name exists, and types and modules have one name each."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from architecture import document_rules
from architecture.source import (
    PACKAGES,
    ROOT,
    Finding,
    deploy_modules,
    modules_of_tests,
    package_modules,
    report,
    shared_names,
    sizes,
)
from architecture.word_rules import words_of

KNOWN = document_rules.public_names()
MODULES = package_modules()


def test_documents_name_what_exists() -> None:
    """Rule 1: no README, decision or guide speaks of a file or module that is gone."""
    found = [
        finding
        for path, text in document_rules.documents()
        for finding in document_rules.named_in_text(path, text, KNOWN)
    ]
    assert found == [], report(found)


def test_docstrings_name_what_exists() -> None:
    """Rule 1: nor does a docstring; a package's docstring names its own modules."""
    found: list[Finding] = []
    for module in (*MODULES, *deploy_modules(), *modules_of_tests()):
        package = module.package if module.package in PACKAGES else None
        for text in document_rules.docstrings_of(module):
            found += document_rules.named_in_text(
                module.path, text, KNOWN, package=package, single_words=module.is_package
            )
    assert found == [], report(found)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("see `contracts/GLOSSARY.md` and `hisab_contracts.units`", 0),
        ("see `contracts/schemas/` and `tests/{unit,property}/`", 0),
        ("see `hisab_contracts.units.rated_micro` and `.hisab/bench.json`", 0),
        ("see `contracts/NOWHERE.md`", 1),
        ("see `nowhere/`", 1),
        ("see `ledger.nowhere.decide`", 1),
        ("see `hisab_contracts.units.guess_micro`", 1),
        ("(" + "DESIGN" + " section 6)", 1),
        ("as `units.guess_micro` says", 1),
        ("as `units.rated_micro` says", 0),
        ("reading order: `units`, `nowhere`", 1),
    ],
)
def test_a_name_of_what_is_gone_is_found(text: str, broken: int) -> None:
    """The check finds a path, a folder, a module, a function and a document that do not exist."""
    found = document_rules.named_in_text(
        "README.md", text, KNOWN, package="hisab_contracts", single_words=True
    )
    assert broken == len(list(found))


def test_the_changelog_names_tests_that_are_there() -> None:
    """Rule 33: a fault that was mended names the test that would find it again."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert [] == document_rules.lost_tests(changelog, document_rules.test_names())
    assert ["test_gone"] == document_rules.lost_tests("- Mended (`test_gone`).", ["test_here"])


def test_no_two_public_types_share_a_name() -> None:
    """Rule 8: one name, one meaning, over all packages; what is shared on purpose is listed."""
    owners: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for owner in module.classes():
            if not owner.name.startswith("_") and owner in module.tree.body:
                owners[owner.name].append(module.name)
    doubled = {name: places for name, places in owners.items() if len(places) > 1}
    assert sorted(shared_names()) == sorted(doubled), doubled


def test_every_module_whose_size_is_excused_exists() -> None:
    """Rule 5: the list of sizes names no module that is gone or needs no excuse."""
    lengths = {module.name: len(module.text.splitlines()) for module in MODULES}
    needless = [name for name in sizes() if 40 <= lengths.get(name, 0) <= 600]
    assert [] == [name for name in sizes() if name not in lengths] + needless


def glossary() -> set[str]:
    """Return the words that the glossary defines, each in its singular."""
    text = (ROOT / "contracts/GLOSSARY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", text, flags=re.MULTILINE)
    return {_singular(word) for row in rows for word in re.findall(r"[a-z]+", row.lower())}


def _singular(word: str) -> str:
    if len(word) <= 3:
        return word
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("s", "")):
        if word.endswith(ending) and not word.endswith("ss"):
            return word[: -len(ending)] + instead
    return word


SMALL_WORDS = frozenset(
    {"already", "beyond", "by", "for", "in", "is", "new", "no", "not", "of", "out", "to", "with"}
)


def test_nouns_of_modules_and_types_are_in_the_glossary() -> None:
    """Rule 8: the words that names are made of are defined once; small words need no meaning."""
    defined = glossary() | SMALL_WORDS
    unknown: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        names = [owner.name for owner in module.classes() if owner in module.tree.body]
        for name in (module.leaf.strip("_"), *(name for name in names if name[0] != "_")):
            for word in words_of(name):
                if _singular(word) not in defined:
                    unknown[word].add(f"{module.name}:{name}")
    assert {} == dict(unknown)
