"""Rules about words, units, facts and decisions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from architecture.source import Finding, Module, mutable

# Units, and what else a whole number may be. An `int` that is neither is an amount without a unit.
UNIT = re.compile(
    r"(^|_)(micro|minor|gpu_ns|gpu_ms|ppm|bps|ms|us|mj|kib|mib|bytes|s|hour|hours|days|year|month)$"
    r"|^micro_per_|^(max|min)_micro"
)
COUNT = re.compile(
    r"(^|_)(seq|sequence|sequences|revision|version|epoch|partition|partitions|offset|index|xid"
    r"|rows|records|count|counts|number|attempt|attempts|limit|size|length|priority|rank|status"
    r"|gpus|devices|until|expected|position|lag|depth|replication|step|port|level|generation|page"
    r"|duplicates|gaps|pid|lines|months|connections|left|pauses|xmin|xmax|id|unpublished"
    r"|entries|buckets|differences|row|created)$"
)
INSTANT = r"_(at|from|until)$|^(now|moment|instant)$"
VAGUE = re.compile(r"(^|_)(amount|amounts|cost|costs|price|fee|value_int|duration|timestamp)$")
SECONDS = re.compile(r"(^|_)(s|seconds|timeout|delay|lifetime|interval)$", re.IGNORECASE)
SLEEPERS = re.compile(r"(^|\.)_?(sleep|wait_for|timeout|wait|call_later|fail_after|move_on_after)$")


def float_ban(module: Module) -> Iterator[Finding]:
    """Rule 9: no float touches time, money or credits.

    A module that decides has none at all. A shell may give a library seconds to wait: a name that
    ends in `_s`, or the argument of a sleep or a timeout. The runtime kit, which knows no domain
    word (`domain_words`), may measure how long something took. Nothing else.
    """
    kit = module.package == "runtime" and not module.pure
    waiting = set() if module.pure else _waiting(module.tree)
    for node in module.nodes:
        if id(node) in waiting:
            continue
        if kit and not isinstance(node, ast.Call):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, float | complex):
            problem = f"the float {node.value}"
        elif isinstance(node, ast.Name) and node.id == "float":
            problem = "the type float"
        elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div):
            if isinstance(node, ast.BinOp) and (_is_path(node.left) or _is_path(node.right)):
                continue
            problem = "a true division"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in {"total_seconds", "timestamp"}:
                continue
            problem = f".{node.func.attr}() is a float"
        elif isinstance(node, ast.Name) and node.id == "round":
            problem = "round() rounds half to even"
        else:
            continue
        yield Finding(
            9,
            module.at(node),
            problem,
            "integers (`//`, `_ms`, `_micro`), or a named rounding of hisab_contracts.units",
        )


def domain_words(module: Module) -> Iterator[Finding]:
    """Rule 2: the runtime kit has no domain noun inside; tenants and keys it must know."""
    if module.package != "runtime":
        return
    for node in module.nodes:
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                pass
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.AsyncFunctionDef(name=name):
                pass
            case _:
                continue
        words = set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")) & DOMAIN
        if words:
            yield Finding(2, module.at(node), f"`{name}`", "a word of messages, rows and requests")


DOMAIN = frozenset(
    {"micro", "minor", "gpu", "ppm", "bps", "invoice", "invoices", "grant", "grants", "lot", "lots"}
    | {"charge", "charges", "price", "prices", "tax", "sku", "coverage", "hold", "holds", "bucket"}
    | {"book", "books", "usage", "quarantine", "node", "device", "allocation", "programme"}
    | {"hub", "hubs", "scheduler", "officer", "approver", "finance", "auditor", "operator"}
)
"""Nouns of metering, ledger and billing, and the roles that a service gives to `auth`. A tenant is
the kit's: it isolates tenants."""

PRIVATE_WORDS = frozenset(
    {"answers", "asked", "feed", "forms", "heard", "hearing", "known", "lookup", "paper", "prior"}
    | {"reading", "registry", "said", "settled", "settling", "told", "upkeep", "vouched", "waits"}
)
"""Words that meant something to whoever wrote them, and nothing to a reader."""


def private_words(module: Module) -> Iterator[Finding]:
    """Rule 8: modules and types are nouns of the field; no vocabulary of our own."""
    if module.package == "runtime" and module.leaf == "feed":
        return  # `Feed`: what a member of a consuming group reads; Kafka's own word.
    if module.leaf in PRIVATE_WORDS:
        yield Finding(8, module.path, f"the module `{module.leaf}`", "a noun of the field")
    for owner in module.classes():
        words = set(words_of(owner.name)) & PRIVATE_WORDS
        if words and not owner.name.startswith("_"):
            yield Finding(8, module.at(owner), f"the type `{owner.name}`", "a noun of the field")


def words_of(name: str) -> list[str]:
    """Split a name in CamelCase or snake_case into words in lower case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")


def loop_variables(module: Module) -> Iterator[Finding]:
    """Rule 8: what a loop goes through has a name."""
    for node in module.nodes:
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            for inner in ast.walk(node.target):
                if isinstance(inner, ast.Name) and inner.id in {"one", "each"}:
                    yield Finding(
                        8, module.at(inner), f"`{inner.id}` is a loop variable", "what it is"
                    )


def _waiting(tree: ast.Module) -> set[int]:
    """Return the ids of all nodes that only say how many seconds to wait."""
    found: set[int] = set()

    def take(node: ast.AST | None) -> None:
        if node is not None:
            found.update(id(inner) for inner in ast.walk(node))

    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func, args=args, keywords=keywords):
                if SLEEPERS.search(ast.unparse(func)):
                    for argument in (*args, *keywords):
                        take(argument)
                for keyword in keywords:
                    if keyword.arg is not None and SECONDS.search(keyword.arg):
                        take(keyword)
            case ast.AnnAssign(target=ast.Name(id=name) | ast.Attribute(attr=name)):
                if SECONDS.search(name):
                    take(node)
            case ast.Assign(targets=[ast.Name(id=name) | ast.Attribute(attr=name)]):
                if SECONDS.search(name):
                    take(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if SECONDS.search(node.name):
                    take(node.returns)
                    for inner in ast.walk(node):
                        if isinstance(inner, ast.Return):
                            take(inner)
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                for argument in arguments:
                    if SECONDS.search(argument.arg):
                        take(argument)
                defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                for argument, default in defaults:
                    if SECONDS.search(argument.arg):
                        take(default)
            case _:
                pass
    return found


def _is_path(node: ast.expr) -> bool:
    """Say whether an operand shows that `/` joins a path."""
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def unit_suffixes(module: Module) -> Iterator[Finding]:
    """Rule 9: a whole number says its unit in its name, or is a count; no bare `amount`.

    Looks at every field of a class, and at every parameter of a function in a module that decides.
    A class named `...Counts` says of its whole numbers that they are counts.
    """
    for name, annotation, node in _named_values(module):
        kind = _kind(annotation)
        if VAGUE.search(name) and kind in {"int", "other"}:
            yield Finding(
                9, module.at(node), f"`{name}` has no unit", f"`{name}_micro`, `_minor` or `_ms`"
            )
        elif kind == "int" and not (UNIT.search(name) or COUNT.search(name)):
            yield Finding(
                9,
                module.at(node),
                f"the whole number `{name}` has no unit",
                "a suffix: _micro, _minor, _gpu_ns, _gpu_ms, _ppm, _bps, _ms, _bytes; or a count's "
                "name (COUNT in tests/architecture/word_rules.py)",
            )
        elif kind == "datetime" and not re.search(INSTANT, name):
            yield Finding(9, module.at(node), f"the instant `{name}`", f"`{name}_at`")
        elif kind == "date" and not re.search(r"_(on|from|until)$|^day$", name):
            yield Finding(9, module.at(node), f"the date `{name}`", f"`{name}_on`")


def _named_values(module: Module) -> Iterator[tuple[str, ast.expr, ast.AST]]:
    """Return name, annotation and node of every field, and of parameters where it is decided."""
    for owner in module.classes():
        for member in owner.body:
            match member:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                    counts = owner.name.endswith("Counts") and _kind(annotation) == "int"
                    unit = "_count" if counts else ""
                    yield f"{name.strip('_').lower()}{unit}", annotation, member
                case _:
                    pass
    if module.pure:
        for function in module.functions():
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            for argument in arguments:
                if argument.annotation is not None:
                    yield argument.arg.strip("_").lower(), argument.annotation, argument


def _kind(annotation: ast.expr) -> str:
    """Return what an annotation says: int, datetime, date, text, or other."""
    text = ast.unparse(annotation).replace("ClassVar[", "").replace("Final[", "").rstrip("]")
    parts = {part.strip() for part in text.split("|")} - {"None"}
    if parts & {"str", "bytes"}:
        return "text"
    if parts & {"int", "_Instant", "_Count", "_Total"} or re.match(r"Annotated\[int\b", text):
        return "int"
    if parts & {"datetime", "dt.datetime", "datetime.datetime"}:
        return "datetime"
    if parts & {"date", "dt.date", "datetime.date"}:
        return "date"
    return "text" if "bool" in parts else "other"


def frozen_facts(module: Module) -> Iterator[Finding]:
    """Rule 10: facts are frozen.

    Names that begin with `_` are buffers of one module; `[tool.hisab] mutable` lists the few
    objects whose work is to change.
    """
    for owner in module.classes():
        if owner.name.startswith("_") or f"{module.name}.{owner.name}" in mutable():
            continue
        frozen = {
            keyword.arg: ast.unparse(keyword.value)
            for keyword in owner.keywords
            if keyword.arg is not None
        }
        bases = {ast.unparse(base).split(".")[-1] for base in owner.bases}
        if "Struct" in bases and frozen.get("frozen") != "True":
            yield _not_frozen(module, owner, "class X(Struct, frozen=True)")
        for decorator in owner.decorator_list:
            text = ast.unparse(decorator)
            is_dataclass = re.match(r"(dataclasses\.)?dataclass\b", text)
            if is_dataclass and not re.search(r"\bfrozen=True\b", text):
                yield _not_frozen(module, owner, "@dataclass(frozen=True, slots=True)")
    for node in module.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            yield Finding(10, module.at(node), "edits a frozen fact", "dataclasses.replace")


def _not_frozen(module: Module, owner: ast.ClassDef, instead: str) -> Finding:
    return Finding(10, module.at(owner), f"{owner.name} can be edited", instead)


def distinct_ids(module: Module) -> Iterator[Finding]:
    """Rule 11: an id has its own type, and no id is drawn at random."""
    for owner in module.classes():
        for member in owner.body:
            match member:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                    text = ast.unparse(annotation)
                    bare = text in {"str", "str | None"}
                    if module.pure and name.endswith("_id") and bare and name not in FREE_IDS:
                        yield Finding(
                            11, module.at(member), f"`{name}: {text}`", "a NewType of ids.py"
                        )
                case _:
                    pass
    for node in module.nodes:
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"(^|\.)uuid[14]$", called):
                yield Finding(
                    11,
                    module.at(node),
                    f"{called}() draws an id at random",
                    "derive it from content (hisab_contracts.ids), so that a retry makes the same",
                )


FREE_IDS = frozenset({"event_id", "rate_line_id", "trace_id", "span_id"})
"""Ids that others choose, or that name nothing of ours beyond one module."""


def exhaustive_matches(module: Module) -> Iterator[Finding]:
    """Rule 13: a match over a union of ours ends with assert_never, or refuses by raising."""
    for node in module.nodes:
        if not isinstance(node, ast.Match) or not _matches_union(node):
            continue
        last = node.cases[-1]
        ends = ast.unparse(ast.Module(body=list(last.body), type_ignores=[]))
        wildcard = isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None
        if not (wildcard and last.guard is None and ("assert_never(" in ends or "raise " in ends)):
            yield Finding(
                13,
                module.at(node),
                f"match {ast.unparse(node.subject)} may fall through",
                "`case _: assert_never(...)`",
            )


def _matches_union(node: ast.Match) -> bool:
    """Say whether a case names a class that is not one of Python's own kinds of value."""
    values = {"str", "int", "bool", "bytes", "dict", "list", "tuple", "set", "float", "Mapping"}
    return any(
        isinstance(pattern, ast.MatchClass)
        and ast.unparse(pattern.cls) not in values
        and not ast.unparse(pattern.cls).startswith("ast.")
        for case in node.cases
        for pattern in ast.walk(case.pattern)
    )


def docstrings(module: Module) -> Iterator[Finding]:
    """Rules 25 and 26: a module says its theory; public names where it is decided say theirs."""
    first = ast.get_docstring(module.tree)
    if first is None and module.text.strip():
        yield Finding(26, module.path, "no module docstring", "its theory and its refusals")
    if not module.pure:
        return
    for owner, node in _public(module.tree):
        text = ast.get_docstring(node)
        if text is None:
            yield Finding(
                25, module.at(node), f"{owner}{node.name} has no docstring", "one domain sentence"
            )
        elif not re.search(r"[.:?]$", text.split("\n\n")[0].replace("\n", " ").strip()):
            yield Finding(
                25,
                module.at(node),
                f"{owner}{node.name}: no sentence",
                "a first line that ends in .",
            )


Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(tree: ast.Module | ast.ClassDef, owner: str = "") -> Iterator[tuple[str, Documented]]:
    """Return every public class, function and method with its owner."""
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield owner, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{node.name}.")


def any_and_ignores(module: Module) -> Iterator[Finding]:
    """Rule 29: no `Any` where it is decided; an ignore names its code."""
    if module.pure:
        for node, target in module.imports():
            if target == "typing.Any":
                yield Finding(29, module.at(node), "imports Any", "`object`, and narrow it")
    for number, line in enumerate(module.text.splitlines(), start=1):
        if re.search(r"#\s*type:\s*ignore", line):
            yield Finding(
                29,
                f"{module.path}:{number}",
                "a type: ignore",
                "a stub, a Protocol, or [[tool.mypy.overrides]]",
            )
