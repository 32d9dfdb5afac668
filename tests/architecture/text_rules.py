"""Rules about settings, state, tests, and what no file of the project may contain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from architecture.source import PACKAGES, Finding, Module

MUTABLE = frozenset({"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"})

MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(work|root|home/[a-z]\w*|Users/\w+|mnt|private/tmp|tmp/[a-z]\w*/)(/|\b)"
)
REGISTRY = re.compile(
    r"pypi[.]org|pythonhosted[.]org|repo1?[.]maven[.](org|apache[.]org)|registry[.]npmjs"
    r"|proxy[.]golang|artifactor[y]|nexus/repositor[y]"
    r"|(index[-_]url|default[-_]index|uv[-_]index|find[-_]links)[\"']?[\s=:]+[\"']?[a-z+]+://"
    r"|(trusted|insecure)[-_]host[\"']?[\s=:]+[\"']?[\w-]+[.:]\w",
    re.IGNORECASE,
)
"""Hosts of package registries: a lock or a file that names one ties the project to a mirror.

The options that take such a host may be spoken of; with a host behind them they are found.
"""


def settings(module: Module) -> Iterator[Finding]:
    """Rule 24: the environment is read in `__main__` and passed down."""
    if module.leaf == "__main__":
        return
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}:
            yield Finding(
                24, module.at(node), "reads the environment", "an argument, from __main__"
            )
    for node, target in module.imports():
        if target in {"os.environ", "os.getenv", "dotenv"}:
            yield Finding(24, module.at(node), f"imports {target}", "an argument, from __main__")


def module_state(module: Module) -> Iterator[Finding]:
    """Rule 24: nothing at module level changes while the program runs."""
    for statement in module.tree.body:
        match statement:
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                if _is_empty_container(value):
                    yield Finding(
                        24,
                        module.at(statement),
                        "module-level state",
                        "an object that __main__ makes",
                    )
            case _:
                pass
    for inner in module.nodes:
        if isinstance(inner, ast.Global):
            yield Finding(24, module.at(inner), "global", "an object that __main__ makes")


def _is_empty_container(value: ast.expr) -> bool:
    match value:
        case ast.List(elts=[]) | ast.Dict(keys=[]):
            return True
        case ast.Call(func=func, args=args):
            name = ast.unparse(func).split(".")[-1]
            return name in MUTABLE and not any(isinstance(a, ast.List | ast.Dict) for a in args)
        case _:
            return False


def swallowed_failures(module: Module) -> Iterator[Finding]:
    """Rule 17: nothing logs a failure and goes on, and nothing catches without a name.

    A handler whose statements all log, or pass, or continue a loop has taken no decision: the
    failure is gone. Returning an outcome, raising, or waiting to try again is one. A handler that
    only passes, because nothing has failed, says so in a comment.
    """
    for node in module.nodes:
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield Finding(17, module.at(node), "a bare except", "name what may happen")
        elif all(_goes_on(statement) for statement in node.body) and not _explained(module, node):
            yield Finding(
                17,
                module.at(node),
                "a failure is logged, and work goes on",
                "raise, return what happened, or store it",
            )


def _explained(module: Module, handler: ast.ExceptHandler) -> bool:
    """Say whether a handler logs nothing and has a comment that says why it may pass."""
    lines = module.text.splitlines()[handler.lineno - 1 : handler.end_lineno]
    silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in handler.body)
    return silent and any("# " in line for line in lines)


def _goes_on(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Continue():
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=owner)))):
            return owner in {"_log", "log", "logger", "logging"}
        case _:
            return False


def mocks(module: Module) -> Iterator[Finding]:
    """Rule 32: our own code is not mocked."""
    for node, target in module.imports():
        if target.startswith(("unittest.mock", "mock", "pytest_mock")):
            yield Finding(32, module.at(node), f"imports {target}", "a value, or the real thing")
    for call in module.nodes:
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "monkeypatch.setattr":
            target = ast.unparse(call.args[0]).strip("'\"") if call.args else ""
            if target.split(".")[0] in PACKAGES:
                yield Finding(32, module.at(call), f"replaces {target}", "pass another argument")


def test_facts(module: Module) -> Iterator[Finding]:
    """Rule 30: a test's name is a fact, and one line says it to a reader."""
    if not module.leaf.startswith("test_"):
        return
    for function in module.functions():
        if function.name.startswith("test_"):
            text = ast.get_docstring(function)
            if text is None or function.name.count("_") < 2:
                yield Finding(
                    30,
                    module.at(function),
                    f"{function.name} states no fact",
                    "a name and one line",
                )


def forbidden_text(path: str, text: str) -> Iterator[Finding]:
    """No file names a path of one machine or the host of a package registry."""
    for number, line in enumerate(text.splitlines(), start=1):
        if MACHINE_PATH.search(line):
            yield Finding(24, f"{path}:{number}", "a path of one machine", "a path of the checkout")
        if REGISTRY.search(line):
            yield Finding(
                24,
                f"{path}:{number}",
                "the host of a registry",
                "what the machine is configured for",
            )
