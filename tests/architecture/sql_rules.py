"""Rules about SQL, migrations and what happens inside a transaction."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from architecture.source import (
    Finding,
    Module,
    is_store,
    locking_reads_listed,
    own_sums,
    package_modules,
)

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
CHANGED = re.compile(
    r"\b(?:update|delete from|insert into)\s+(?!set\b|of\b|skip\b|nowait\b)([a-z_]+)\b"
)
"""The table that a statement changes; `for update` and `do update` name none."""
READ = re.compile(r"(?:(?<!distinct )\bfrom|\bjoin|\busing)\s+([a-z_]+)\b(?!\s*\()")
NAMED = re.compile(r"(?:\bwith(?: recursive)?|,)\s+([a-z_]+)(?:\s*\([^)]*\))?\s+as\s*\(")
WAITS = re.compile(r"\bfor (no key )?(update|(key )?share)\b|\bupdate\s|\bdelete from\b")
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
    """Rule 20: lower case, no `select *`, and nothing but named constants in a statement."""
    constants = sql_constants(module)
    inside = {id(inner) for _, constant, _ in constants for inner in ast.walk(constant)}
    for _, constant, statement in constants:
        yield from _statement(statement, module.at(constant))
    for node in module.nodes:
        match node:
            case ast.JoinedStr(values=values):
                first = values[0] if values else None
                begin = first.value if isinstance(first, ast.Constant) else ""
                if isinstance(begin, str) and STATEMENT.match(begin):
                    yield Finding(20, module.at(node), "SQL in an f-string", "a constant with $n")
            case ast.BinOp(left=ast.Constant(value=str() as text)) if id(node) not in inside:
                if STATEMENT.match(text):
                    yield Finding(20, module.at(node), "SQL put together", "named constants and $n")
            case ast.Call(
                func=ast.Attribute(value=ast.Constant(value=str() as text), attr="format")
            ):
                if STATEMENT.match(text):
                    yield Finding(20, module.at(node), "SQL filled by format", "a constant with $n")
            case ast.Constant(value=str() as text) if STATEMENT.match(text):
                if id(node) not in inside:
                    yield from _statement(text, module.at(node))
            case _:
                pass


def sql_constants(module: Module) -> Sequence[tuple[str, ast.stmt, str]]:
    """Return every statement that is a constant of a module or class: name, place, whole text.

    A constant may put other named constants of its module together with `+`: so that the columns
    of a table stand once. Nothing else is ever part of a statement.
    """
    texts = _text_constants(module)
    return [
        (name, node, texts[name])
        for name, node, _ in _named_values(module)
        if name in texts and STATEMENT.match(texts[name])
    ]


def _named_values(module: Module) -> Iterator[tuple[str, ast.stmt, ast.expr]]:
    """Yield every name that a module or a class of it gives to a value."""
    for body in _bodies(module.tree):
        for node in body:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                ):
                    yield name, node, value
                case _:
                    pass


def _text_constants(module: Module) -> dict[str, str]:
    """Return every constant of a module that is text, whole, by its name."""
    texts = dict(_imported_constants(module))
    for name, _, value in _named_values(module):
        text = _constant_text(value, texts)
        if text is not None:
            texts[name] = text
    return texts


def _imported_constants(module: Module) -> Iterator[tuple[str, str]]:
    """Return the texts that a store imports by name from another: the columns of its table."""
    for node in module.tree.body:
        if not isinstance(node, ast.ImportFrom) or not is_store(node.module or ""):
            continue
        for other in package_modules():
            if other.name == node.module:
                texts = _text_constants(other)
                for alias in node.names:
                    if alias.name in texts:
                        yield alias.asname or alias.name, texts[alias.name]


def _constant_text(value: ast.expr, known: Mapping[str, str]) -> str | None:
    match value:
        case ast.Constant(value=str() as text):
            return text
        case ast.Name(id=name):
            return known.get(name)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _constant_text(left, known), _constant_text(right, known)
            return None if first is None or second is None else first + second
        case _:
            return None


def _statement(text: str, where: str) -> Iterator[Finding]:
    shouting = KEYWORD.search(_without_literals(text))
    if shouting is not None:
        yield Finding(20, where, f"`{shouting[0]}` in upper case", "SQL in lower case")
    if EVERYTHING.search(text):
        yield Finding(20, where, "select *", "name the columns that are used")


def _without_literals(text: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|--[^\n]*", "''", text)


def sql_place(module: Module) -> Iterator[Finding]:
    """Rule 20: a statement is a named constant above what uses it, and something says what for.

    Several functions may use one, and one function several. What it is for is said by a comment
    above it, or by the docstring of a function that uses it.
    """
    named: set[int] = set()
    for name, node, _ in sql_constants(module):
        named.update(id(inner) for inner in ast.walk(node))
        users = module.users.get(name, ())
        if not users and not _is_part(name, module):
            yield Finding(
                20, module.at(node), f"{name} is used nowhere here", "put it beside what uses it"
            )
        elif any(user.lineno < node.lineno for user in users):
            yield Finding(20, module.at(node), f"{name} stands below what uses it", "put it above")
        elif not _has_comment(module, node) and users and not any(map(ast.get_docstring, users)):
            yield Finding(
                20,
                module.at(node),
                f"nothing says what {name} is for",
                "a comment above it, or the docstring of a function that uses it",
            )
    for inner in module.nodes:
        match inner:
            case ast.Constant(value=str() as text) if id(inner) not in named:
                if STATEMENT.match(text):
                    yield Finding(20, module.at(inner), "SQL without a name", "a named constant")
            case _:
                pass


def locking_reads(module: Module) -> Iterator[Finding]:
    """Rule 20: a statement that waits for a row's lock reads no other table.

    PostgreSQL looks at the locked row again after the wait, and at nothing else: sub-selects, joins
    and the rest of a `with` still see what was committed before it. What a lock protects is read by
    the next statement. `[tool.hisab.locking_reads]` lists those that may, each with its reason.
    """
    for name, node, statement in sql_constants(module):
        plain = _without_literals(statement)
        if not WAITS.search(plain):
            continue
        named, changed = set(NAMED.findall(plain)), set(CHANGED.findall(plain))
        read = [table for table in READ.findall(plain) if table not in named]
        # What is locked by a `select` is the first table that it reads.
        foreign = sorted({*read} - (changed or {*read[:1]}))
        if foreign and f"{module.name}.{name}" not in locking_reads_listed():
            yield Finding(
                20,
                module.at(node),
                f"{name} waits for a lock and reads {', '.join(foreign)} as it was before",
                "lock first, read in the next statement",
            )


def limited_sums(module: Module) -> Iterator[Finding]:
    """Rule 20: a total is taken by the database, over all rows: nothing cut by `limit` is added up.

    So a statement sums no part that has a `limit`, and neither `store` nor `api` adds up a list
    that it read. `[tool.hisab.own_sums]` names the functions that may, each with its reason.
    """
    for name, node, statement in sql_constants(module):
        if _sums_a_cut_list(_without_literals(statement)):
            yield Finding(
                20, module.at(node), f"{name} sums rows that a `limit` has cut", "a sum of all rows"
            )
    if not re.search(r"\.(store|api)(\.|$)", module.name):
        return
    for function in module.functions():
        calls = [inner for inner in ast.walk(function) if isinstance(inner, ast.Call)]
        added = [call for call in calls if ast.unparse(call.func) in {"sum", "math.fsum"}]
        if added and f"{module.name}.{function.name}" not in own_sums():
            yield Finding(
                20, module.at(added[0]), f"{function.name} adds up a list", "`sum` in the statement"
            )


def _sums_a_cut_list(statement: str) -> bool:
    """Say whether a `select` with a sum reads from a part of the statement that has a `limit`."""
    cut = {
        match[1]
        for match in re.finditer(r"\b(\w+)\s+as\s*\(", statement)
        if re.search(r"\blimit\b", _parenthesised(statement, match.end() - 1))
    }
    for match in re.finditer(r"\b(?:from|join)\s+(?:(\w+)|(?=\())", statement):
        inner = "" if match[1] else _parenthesised(statement, match.end())
        if match[1] not in cut and not re.search(r"\blimit\b", inner):
            continue
        shown = _shown_before(statement, match.start())
        if re.search(r"\bsum\s*\((?!.*\)\s*over\b)", shown, re.DOTALL):
            return True
    return False


def _shown_before(statement: str, at: int) -> str:
    """Return what the `select` of a `from` shows, without what stands in its sub-selects."""
    shown, depth = "", 0
    for place in range(at - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(statement[place], 0)
        if depth < 0 or (depth == 0 and statement.startswith("select", place)):
            break
        inner = _parenthesised(statement, place) if statement[place] == "(" else ""
        if inner.lstrip().startswith("select"):
            shown = shown[len(inner) :]
        shown = statement[place] + shown
    return shown


def _parenthesised(text: str, at: int) -> str:
    """Return what stands between the parenthesis at a place and the one that closes it."""
    depth = 0
    for place in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return text[at + 1 : place]
    return text[at + 1 :]


def _is_part(name: str, module: Module) -> bool:
    """Say whether another constant is put together from this one."""
    return any(
        isinstance(inner, ast.Name) and inner.id == name
        for other, node, _ in sql_constants(module)
        if other != name
        for inner in ast.walk(node)
    )


def _has_comment(module: Module, node: ast.stmt) -> bool:
    lines = module.text.splitlines()
    return node.lineno >= 2 and lines[node.lineno - 2].lstrip().startswith("#")


def _bodies(tree: ast.Module) -> Iterator[Sequence[ast.stmt]]:
    yield tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.body


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
    """Rule 21: each migration has a number of its own, and says `pre` or `post`."""
    numbers: list[int] = []
    for name in sorted(names):
        match = MIGRATION.fullmatch(PurePath(name).name)
        if match is None:
            yield Finding(
                21, name, "not a migration's name", "NNNN_what_it_does.pre.sql or .post.sql"
            )
        else:
            numbers.append(int(match["number"]))
    if len({*numbers}) < len(numbers):
        yield Finding(21, names[0], f"numbers {numbers}", "each once")


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
