"""Reads the project as text and trees, so that a rule is a function of one module.

A rule never imports what it looks at: a module that cannot be imported is still checked. Every rule
returns findings; each names the style rule of CONTRIBUTING.md that it enforces, where, what is
wrong, and what to write instead.
"""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hisab_contracts", "runtime", "metering", "ledger", "invoicing")
SERVICES = ("metering", "ledger", "invoicing")


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that breaks one rule."""

    rule: int
    where: str
    problem: str
    instead: str

    def __str__(self) -> str:
        """Say it as a reader of a failing check wants to see it."""
        return f"rule {self.rule}: {self.where}: {self.problem}; instead: {self.instead}"


@dataclass(frozen=True)
class Module:
    """A Python file: its dotted name, its path inside the project, its text."""

    name: str
    path: str
    text: str
    pure: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of the tree, in no order that matters."""
        return tuple(ast.walk(self.tree))

    @cached_property
    def users(self) -> Mapping[str, Sequence[ast.FunctionDef | ast.AsyncFunctionDef]]:
        """By name: the functions that mention it."""
        found: dict[str, list[ast.FunctionDef | ast.AsyncFunctionDef]] = {}
        for function in self.functions():
            for name in {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}:
                found.setdefault(name, []).append(function)
        return found

    @property
    def package(self) -> str:
        """The package it belongs to."""
        return self.name.split(".")[0]

    @property
    def is_package(self) -> bool:
        """Whether it is the `__init__` of a package."""
        return self.path.endswith("/__init__.py")

    @property
    def leaf(self) -> str:
        """Its own name."""
        return self.name.rpartition(".")[2]

    def at(self, node: ast.AST) -> str:
        """Where a node stands."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def classes(self) -> Iterator[ast.ClassDef]:
        """Every class."""
        for node in self.nodes:
            if isinstance(node, ast.ClassDef):
                yield node

    def imports(self) -> Iterator[tuple[ast.stmt, str]]:
        """Every module named by an import, also those inside functions."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.name
            elif isinstance(node, ast.ImportFrom):
                prefix = "." * node.level + (node.module or "")
                yield node, prefix
                for alias in node.names:
                    yield node, f"{prefix}.{alias.name}"


def sample(text: str, *, name: str = "ledger.sample", pure: bool = False) -> Module:
    """Make a module out of a text: what the self-tests of the rules are written with."""
    return Module(name=name, path=f"{name.replace('.', '/')}.py", text=text, pure=pure)


@lru_cache(maxsize=1)
def configuration() -> dict[str, Any]:
    """The root pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def is_pure(name: str) -> bool:
    """Say whether a module is on the list of those that decide."""
    return any(fnmatchcase(name, pattern) for pattern in _listed("pure"))


def is_store(name: str) -> bool:
    """Say whether a module is on the list of those that hold SQL."""
    return any(fnmatchcase(name, pattern) for pattern in stores())


def stores() -> tuple[str, ...]:
    """Return the patterns of the modules that hold SQL."""
    return _listed("stores")


def sizes() -> Mapping[str, str]:
    """Return the modules that may be longer than 600 or shorter than 40 lines, with the reason."""
    return dict(configuration()["tool"]["hisab"]["sizes"])


def locking_reads_listed() -> Mapping[str, str]:
    """Return the statements that may read another table beside a lock, with the reason."""
    return dict(configuration()["tool"]["hisab"]["locking_reads"])


def own_sums() -> Mapping[str, str]:
    """Return the functions of `store` and `api` that add up a list, with the reason."""
    return dict(configuration()["tool"]["hisab"]["own_sums"])


def shared_names() -> Mapping[str, str]:
    """Return the type names that two modules may use, with the reason."""
    return dict(configuration()["tool"]["hisab"]["shared_names"])


def mutable() -> frozenset[str]:
    """Return the classes whose work is to change, by their dotted names."""
    return frozenset(_listed("mutable"))


def _listed(name: str) -> tuple[str, ...]:
    return tuple(configuration()["tool"]["hisab"][name])


@lru_cache(maxsize=1)
def package_modules() -> tuple[Module, ...]:
    """Every module of the five packages."""
    found: list[Module] = []
    for source in (ROOT / "contracts/src", *sorted((ROOT / "services").glob("*/src"))):
        found.extend(_modules(source, source))
    return tuple(found)


@lru_cache(maxsize=1)
def deploy_modules() -> tuple[Module, ...]:
    """Every module of deploy/: the local stack and the demo."""
    return tuple(_modules(ROOT / "deploy", ROOT))


@lru_cache(maxsize=1)
def modules_of_tests() -> tuple[Module, ...]:
    """Every module of tests/."""
    return tuple(_modules(ROOT / "tests", ROOT))


def _modules(folder: Path, base: Path) -> Iterator[Module]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield Module(
            name=name,
            path=str(path.relative_to(ROOT)),
            text=path.read_text(encoding="utf-8"),
            pure=is_pure(name),
        )


@lru_cache(maxsize=1)
def project_files() -> tuple[Path, ...]:
    """Every file that is, or would be, under version control; all of them outside a clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names: Iterable[Path] = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    else:
        names = (path for path in ROOT.rglob("*") if not _is_generated(path))
    return tuple(sorted(path for path in names if path.is_file()))


def _is_generated(path: Path) -> bool:
    generated = {".venv", ".hisab", ".git", "__pycache__", "build", "dist"}
    return any(part in generated or part.endswith("_cache") for part in path.parts)


def report(findings: Iterable[Finding]) -> str:
    """Write findings one to a line, for the message of a failing test."""
    return "\n" + "\n".join(sorted(str(finding) for finding in findings))
