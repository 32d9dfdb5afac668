"""Rules about SQL, migrations and what happens inside a transaction."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from architecture.source import Finding, Module, is_store

STATEMENT = re.compile(
    r"^\s*(--[^\n]*\n\s*)*"
    r"(select\s|insert\s+into\s|update\s+\w+(\s+as)?(\s+\w+)?\s+set\s|delete\s+from\s|with\s+(recursive\s+)?\w+(\s*\([^)]*\))?\s+as\s|lock\s+table\s"
    r"|create\s+(table|index|role|database|policy)\s|alter\s+(table|role)\s|truncate\s|grant\s+\w+.*\son\s)",
    re.IGNORECASE | re.DOTALL,
)
KEYWORD = re.compile(
    r"\b(SELECT|INSERT|UPDATE|DELETE|FROM|WHERE|JOIN|VALUES|RETURNING|ORDER BY|GROUP BY|LIMIT"
    r"|CREATE|TABLE|INDEX|ALTER|GRANT|PRIMARY KEY|NOT NULL|CONFLICT|UNNEST|COALESCE)\b"
)
EVERYTHING = re.compile(r"select\s+(\w+\.)?\*(?!\s+from\s+unnest)", re.IGNORECASE)
OUTSIDE = frozenset(
    {
        "send",
        "send_and_wait",
        "post",
        "request",
        "publish",
        "compile",
        "getmany",
        "urlopen",
        "sleep",
    }
)
MIGRATION = re.compile(r"(?P<number>\d{4})_[a-z0-9_]+\.(?P<phase>pre|post)\.sql")


def sql_text(module: Module) -> Iterator[Finding]:
    """Rule 20: lower case, no `select *`, nothing pasted into a statement."""
    for node in module.nodes:
        match node:
            case ast.JoinedStr(values=values):
                first = values[0] if values else None
                text = first.value if isinstance(first, ast.Constant) else ""
                if isinstance(text, str) and STATEMENT.match(text):
                    yield Finding(20, module.at(node), "SQL in an f-string", "a constant with $n")
            case ast.BinOp(left=ast.Constant(value=str() as text), op=ast.Add() | ast.Mod()):
                if STATEMENT.match(text):
                    yield Finding(20, module.at(node), "SQL put together", "a constant with $n")
            case ast.Call(
                func=ast.Attribute(value=ast.Constant(value=str() as text), attr="format")
            ):
                if STATEMENT.match(text):
                    yield Finding(20, module.at(node), "SQL filled by format", "a constant with $n")
            case ast.Constant(value=str() as text) if STATEMENT.match(text):
                yield from _statement(text, module.at(node))
            case _:
                pass


def _statement(text: str, where: str) -> Iterator[Finding]:
    shouting = KEYWORD.search(_without_literals(text))
    if shouting is not None:
        yield Finding(20, where, f"`{shouting[0]}` in upper case", "SQL in lower case")
    if EVERYTHING.search(text):
        yield Finding(20, where, "select *", "name the columns that are used")


def _without_literals(text: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|--[^\n]*", "''", text)


def sql_place(module: Module) -> Iterator[Finding]:
    """Rule 20: a statement is a named constant directly above the one function that uses it."""
    named: set[int] = set()
    for body in _bodies(module.tree):
        for place, node in enumerate(body):
            name = _sql_constant(node)
            if name is None:
                continue
            named.update(id(inner) for inner in ast.walk(node))
            users = module.users.get(name, ())
            below = _next_definition(body[place + 1 :])
            if len(users) != 1 and not _nested(users):
                yield Finding(
                    20,
                    module.at(node),
                    f"{name} is used by {len(users)} functions",
                    "one statement, one function; let the others call it",
                )
            elif below is None or (users[0] is not below and users[0] not in ast.walk(below)):
                yield Finding(
                    20,
                    module.at(node),
                    f"{name} stands away from {users[0].name}",
                    "put it directly above",
                )
    for inner in module.nodes:
        match inner:
            case ast.Constant(value=str() as text) if id(inner) not in named:
                if STATEMENT.match(text):
                    yield Finding(20, module.at(inner), "SQL without a name", "a named constant")
            case _:
                pass


def _bodies(tree: ast.Module) -> Iterator[Sequence[ast.stmt]]:
    yield tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.body


def _sql_constant(node: ast.stmt) -> str | None:
    match node:
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str() as text))
            | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str() as text))
        ):
            return name if STATEMENT.match(text) else None
        case _:
            return None


def _next_definition(body: Sequence[ast.stmt]) -> ast.stmt | None:
    """Return the first function or class below, with nothing but constants in between."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return node
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            return None
    return None


def _nested(users: Sequence[ast.AST]) -> bool:
    """Say whether all users are one function and functions inside it."""
    return bool(users) and all(user in ast.walk(users[0]) for user in users)


def outside_calls(module: Module) -> Iterator[Finding]:
    """Rule 16: nothing of the outside is called between begin and commit."""
    for node in module.nodes:
        if not isinstance(node, ast.AsyncWith) or not _opens_transaction(node):
            continue
        for inner in ast.walk(node):
            if not isinstance(inner, ast.Call) or not isinstance(inner.func, ast.Attribute):
                continue
            owner = ast.unparse(inner.func.value)
            if inner.func.attr in OUTSIDE and owner not in {"re", "self._writer"}:
                yield Finding(
                    16,
                    module.at(inner),
                    f"{ast.unparse(inner.func)}() inside a transaction",
                    "write the intent, commit, act, record the outcome (outbox)",
                )


def _opens_transaction(node: ast.AsyncWith) -> bool:
    return any(
        re.search(r"\btransaction\w*\(", ast.unparse(item.context_expr)) for item in node.items
    )


def driver_records(module: Module) -> Iterator[Finding]:
    """Rule 23: a row becomes a fact in its store; driver records go no further.

    `[tool.hisab] stores` lists the modules that may fetch. What they offer to others neither takes
    nor returns a driver's record, but for the functions named `from_row` that turn one into a fact.
    """
    if module.package == "runtime":
        return
    if is_store(module.name):
        yield from _offered_records(module)
        return
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and node.attr in {"fetch", "fetchrow", "fetchval"}:
            yield Finding(
                23, module.at(node), f".{node.attr} outside a store", "a function of a store"
            )


def _offered_records(module: Module) -> Iterator[Finding]:
    records = {"asyncpg.Record"} | {
        alias.asname or alias.name
        for node in module.nodes
        if isinstance(node, ast.ImportFrom) and node.module == "asyncpg"
        for alias in node.names
        if alias.name == "Record"
    }
    for function in module.functions():
        if function.name.startswith("_") or function.name.endswith("from_row"):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        said = [function.returns, *(argument.annotation for argument in arguments)]
        names = {
            ast.unparse(node)
            for annotation in said
            if annotation is not None
            for node in ast.walk(annotation)
            if isinstance(node, ast.Name | ast.Attribute)
        }
        if names & records:
            yield Finding(
                23, module.at(function), f"{function.name} offers a driver's record", "a fact"
            )


def migrations(names: Sequence[str]) -> Iterator[Finding]:
    """Rule 21: migrations are numbered from 0001 without a gap, and say `pre` or `post`."""
    numbers: list[int] = []
    for name in sorted(names):
        match = MIGRATION.fullmatch(PurePath(name).name)
        if match is None:
            yield Finding(
                21, name, "not a migration's name", "NNNN_what_it_does.pre.sql or .post.sql"
            )
        else:
            numbers.append(int(match["number"]))
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        yield Finding(21, names[0], f"numbers {numbers}", "1, 2, 3 ... each once")


def migration_text(name: str, text: str) -> Iterator[Finding]:
    """Rules 20 and 21: lower case; nothing that old code cannot survive in a `pre` file."""
    plain = re.sub(r"\$(\w*)\$.*?\$\1\$", "''", _without_literals(text), flags=re.DOTALL)
    shouting = KEYWORD.search(plain)
    if shouting is not None:
        yield Finding(20, name, f"`{shouting[0]}` in upper case", "SQL in lower case")
    if name.endswith(".pre.sql") and re.search(
        r"\b(drop (table|column|function)|rename )\b", plain, re.IGNORECASE
    ):
        yield Finding(21, name, "takes something away in `pre`", "a `post` file of a later release")
