"""Rule 18: no regular expression of ours takes more than linear time, whatever it is given.

What comes from outside decides how long a backtracking matcher works. Two properties keep it to one
pass. A pattern is *deterministic*: wherever it stands, the next character can be read in one way
only, so that there is never anything to go back to. And where it is searched for (`search`, `sub`,
`split`, `findall`, `finditer`), an unbounded repeat stands at its end: otherwise a text without
what must follow is read again from every place where the pattern could begin (possessive repeats
do not help against that). Patterns are constants, so that this can be seen.

Positions and what may follow them are those of Glushkov's automaton. A repeat with a fixed count is
one step. Look-around and back references are not taken.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from architecture.source import Finding, Module, deploy_modules, package_modules

SEARCHES = frozenset({"search", "sub", "subn", "split", "findall", "finditer"})
WHOLE = frozenset({"match", "fullmatch"})

_BOUND = 1_000
"""Repeats beyond it count as unbounded."""

_EVERY = frozenset(range(257))
"""Characters by number; 256 stands for all others."""


def linear_patterns(module: Module) -> Iterator[Finding]:
    """Rule 18: every pattern is a constant, deterministic, and safe in the way it is used."""
    constants = {**_project_constants(), **_constants(module)}
    for node, pattern, searched in _uses(module):
        text = _text(pattern, constants)
        if text is None:
            problem = "a pattern that is no constant"
            yield Finding(18, module.at(node), problem, "a named constant made of constants")
            continue
        fault = fault_of(text, searched=searched)
        if fault is not None:
            yield Finding(
                18, module.at(node), f"{text!r} {fault}", "str methods, or one way to read it"
            )


def fault_of(pattern: str, *, searched: bool) -> str | None:
    """Say why a pattern may take more than linear time; None for one that cannot."""
    automaton = _Automaton()
    parts = list(_parser.parse(pattern))
    # What is anchored at its beginning is tried there and nowhere else.
    searched = searched and parts[:1] != [(sre.AT, sre.AT_BEGINNING)]
    try:
        shape = automaton.add(parts)
    except _NotTaken as refused:
        return f"has {refused}"
    if automaton.doubled:
        return "repeats a repeat"
    for choices in (shape.first, *automaton.following.values()):
        seen: set[int] = set()
        for position in sorted(choices):
            if seen & automaton.characters[position]:
                return "can read a character in two ways"
            seen |= automaton.characters[position]
    if searched and automaton.repeated - shape.last:
        return "is searched for, and something must follow an unbounded repeat"
    return None


class _NotTaken(Exception):
    """A part of a pattern that this rule cannot prove."""


@dataclass(frozen=True)
class _Shape:
    """Where a part can begin and end, and whether it can be nothing."""

    first: frozenset[int]
    last: frozenset[int]
    empty: bool


_NOTHING = _Shape(frozenset(), frozenset(), empty=True)


@dataclass
class _Automaton:
    """Glushkov's automaton: one position per character class of the pattern."""

    characters: list[frozenset[int]] = field(default_factory=list)
    following: dict[int, set[int]] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)
    """Positions at which an unbounded repeat ends."""
    doubled: bool = False
    """Whether one step can be taken as that of two repeats."""

    def add(self, parts: Any) -> _Shape:
        """Add a sequence of parts."""
        shape = _NOTHING
        for operation, argument in parts:
            shape = self._joined(shape, self._part(operation, argument))
        return shape

    def _part(self, operation: Any, argument: Any) -> _Shape:
        if operation in {sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT}:
            return self._repeat(*argument)
        if operation is sre.SUBPATTERN:
            return self.add(argument[-1])
        if operation is sre.ATOMIC_GROUP:
            return self.add(argument)
        if operation is sre.BRANCH:
            shapes = [self.add(branch) for branch in argument[1]]
            return _Shape(
                frozenset().union(*(shape.first for shape in shapes)),
                frozenset().union(*(shape.last for shape in shapes)),
                any(shape.empty for shape in shapes),
            )
        if operation is sre.AT and argument is sre.AT_BEGINNING:
            return _NOTHING
        position = len(self.characters)
        self.characters.append(_characters(operation, argument))
        self.following[position] = set()
        return _Shape(frozenset({position}), frozenset({position}), empty=False)

    def _repeat(self, least: int, most: int, part: Any) -> _Shape:
        shape = self.add(part)
        if most > 1 and (least != most or most is sre.MAXREPEAT):
            for position in shape.last:
                self.doubled |= bool(self.following[position] & shape.first)
                self.following[position] |= shape.first
        if most > _BOUND:
            self.repeated |= shape.last
        return _Shape(shape.first, shape.last, shape.empty or least == 0)

    def _joined(self, before: _Shape, after: _Shape) -> _Shape:
        for position in before.last:
            self.following[position] |= after.first
        return _Shape(
            before.first | (after.first if before.empty else frozenset()),
            after.last | (before.last if after.empty else frozenset()),
            before.empty and after.empty,
        )


def _characters(operation: Any, argument: Any) -> frozenset[int]:
    """Return which characters one class takes."""
    if operation is sre.LITERAL:
        return frozenset({min(argument, 256)})
    if operation is sre.NOT_LITERAL:
        return _EVERY - {argument}
    if operation is sre.ANY:
        return _EVERY
    if operation is sre.AT:
        return frozenset()
    if operation is sre.RANGE:
        low, high = argument
        return frozenset(range(min(low, 256), min(high, 256) + 1))
    if operation is sre.CATEGORY:
        taken = frozenset(n for n in range(256) if _in_category(argument, chr(n)))
        return taken | {256}
    if operation is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        taken = frozenset().union(*(_characters(*part) for part in argument[negated:]))
        # A class that is negated still takes what lies beyond, whatever it names there.
        return (_EVERY - taken) | {256} if negated else taken
    raise _NotTaken(str(operation).lower())


def _in_category(category: Any, character: str) -> bool:
    escapes = {
        sre.CATEGORY_DIGIT: r"\d",
        sre.CATEGORY_NOT_DIGIT: r"\D",
        sre.CATEGORY_SPACE: r"\s",
        sre.CATEGORY_NOT_SPACE: r"\S",
        sre.CATEGORY_WORD: r"\w",
        sre.CATEGORY_NOT_WORD: r"\W",
    }
    return re.match(escapes[category], character) is not None


def _uses(module: Module) -> Iterator[tuple[ast.AST, ast.expr, bool]]:
    """Yield every pattern of a module, and whether it is searched for rather than matched."""
    searched_names = {
        node.func.value.id
        for node in module.nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.attr in SEARCHES
    }
    matched_names = {
        node.value.id
        for node in module.nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in WHOLE
    }
    named = {
        id(statement.value): target.id
        for statement in module.nodes
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (
            statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        )
        if isinstance(target, ast.Name)
    }
    for node in module.nodes:
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "re.compile":
            name = named.get(id(node))
            # One that is handed on may be used in any way, unless its module only matches it.
            searched = name in searched_names or (name is not None and name not in matched_names)
            yield node, node.args[0], searched and not _is_argument(module, name)
        elif called.startswith("re.") and called[3:] in SEARCHES | WHOLE:
            yield node, node.args[0], called[3:] in SEARCHES
        elif called in {"Meta", "msgspec.Meta"}:
            for keyword in node.keywords:
                if keyword.arg == "pattern":
                    # msgspec searches; the patterns of a contract are anchored at both ends.
                    yield node, keyword.value, True


def _is_argument(module: Module, name: str | None) -> bool:
    """Say whether a compiled pattern is only handed to a function that matches with it."""
    return name is not None and any(
        isinstance(node, ast.Call)
        and any(isinstance(argument, ast.Name) and argument.id == name for argument in node.args)
        for node in module.nodes
    )


Constants = Mapping[str, ast.expr]


def _constants(module: Module) -> Constants:
    """Return what the names at the top of a module stand for."""
    found: dict[str, ast.expr] = {}
    for statement in module.tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                found[name] = value
            case _:
                pass
    return found


@lru_cache(maxsize=1)
def _project_constants() -> Constants:
    """Return the constants that a module may import."""
    found: dict[str, ast.expr] = {}
    modules: Sequence[Module] = (*package_modules(), *deploy_modules())
    for module in modules:
        found.update({n: v for n, v in _constants(module).items() if not n.startswith("_")})
    return found


def _text(pattern: ast.expr, constants: Constants) -> str | None:
    """Return the text of a pattern, put together from constants; None when it is not."""
    match pattern:
        case ast.Constant(value=str() as text):
            return text
        case ast.Constant(value=bytes() as raw):
            return raw.decode("latin-1")
        case ast.Name(id=name) if name in constants:
            return _text(constants[name], constants)
        case ast.FormattedValue(value=value, format_spec=None):
            return _text(value, constants)
        case ast.JoinedStr(values=values):
            parts = [_text(value, constants) for value in values]
            return None if None in parts else "".join(part for part in parts if part is not None)
        case _:
            return None
