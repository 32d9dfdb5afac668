"""Rules about the shape of the source: size, names, direction, functions that fit a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from architecture.source import PACKAGES, SERVICES, Finding, Module, sizes, stores

LONGEST_MODULE = 600
SHORTEST_MODULE = 40
LONGEST_FUNCTION = 70
VAGUE_NAMES = frozenset(
    {"utils", "util", "helpers", "helper", "common", "managers", "manager", "base", "misc", "lib"}
)

ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "aiokafka": (
        "runtime.kafka",
        "runtime.feed",
        "runtime.records",
        "runtime.topics",
        "runtime.decoding",
    ),
    "cramjam": ("runtime.decoding",),
    "asyncpg": (
        "runtime.database",
        "runtime.idempotency",
        "runtime.migrations",
        "runtime.outages",
        *stores(),
    ),
    "fastapi": (
        "runtime.http",
        "runtime.application",
        "runtime.openapi",
        "runtime.service",
        "*.api.*",
    ),
    "starlette": (
        "runtime.http",
        "runtime.application",
        "runtime.gate",
        "runtime.server",
        "runtime.idempotency",
        "runtime.service",
        "runtime.auth",
        "runtime.streams",
    ),
    "uvicorn": ("runtime.server",),
    "uvloop": ("runtime.service",),
    "opentelemetry": ("runtime.telemetry",),
    "prometheus_client": ("runtime.telemetry",),
    "h11": ("runtime.server",),
    "typst": ("invoicing.pdf",),
    "httpx2": ("invoicing.ledger_client",),
}
"""A library of the outside, and the only modules that may import it (rule 38)."""


def long_functions(module: Module) -> Iterator[Finding]:
    """Rule 7: a function fits a screen."""
    for function in module.functions():
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > LONGEST_FUNCTION:
            yield Finding(
                7,
                module.at(function),
                f"{function.name} has {length} lines, more than {LONGEST_FUNCTION}",
                "keep the ifs here and move loops and leaves into named pure functions",
            )


def module_size(module: Module) -> Iterator[Finding]:
    """Rule 5: a module of more than 600 lines is listed with its reason."""
    lines = len(module.text.splitlines())
    if lines > LONGEST_MODULE and module.name not in sizes():
        yield Finding(
            5,
            module.path,
            f"{lines} lines, more than {LONGEST_MODULE}",
            "split by knowledge, or say in [tool.hisab.sizes] why it is one",
        )


def module_smallness(module: Module) -> Iterator[Finding]:
    """Rule 5: a module of less than 40 lines is listed with its reason."""
    lines = len(module.text.splitlines())
    if lines < SHORTEST_MODULE and not module.is_package and module.name not in sizes():
        yield Finding(
            5,
            module.path,
            f"{lines} lines, fewer than {SHORTEST_MODULE}",
            "put it with what uses it, or say in [tool.hisab.sizes] why it stands alone",
        )


def vague_names(module: Module) -> Iterator[Finding]:
    """Rule 5: a module is named by what it knows."""
    for part in module.name.split("."):
        if part in VAGUE_NAMES or part.endswith(("_utils", "_helpers", "_common", "_base")):
            yield Finding(
                5, module.path, f"`{part}` says nothing", "name the module by what it knows"
            )


def foreign_services(module: Module) -> Iterator[Finding]:
    """Rule 2: services never import each other, and nothing below imports what stands above."""
    allowed = {
        "hisab_contracts": ("hisab_contracts",),
        "runtime": ("runtime", "hisab_contracts"),
        **{service: (service, "runtime", "hisab_contracts") for service in SERVICES},
    }.get(module.package)
    if allowed is None:
        return
    for node, target in module.imports():
        package = target.split(".")[0]
        if package in PACKAGES and package not in allowed:
            yield Finding(
                2,
                module.at(node),
                f"{module.package} imports {package}",
                "say it in a message or a public call; what both must know belongs to contracts",
            )


def outside_libraries(module: Module) -> Iterator[Finding]:
    """Rule 38: one module is allowed to import a library of the outside."""
    for node, target in module.imports():
        allowed = ONLY_IN.get(target.split(".")[0])
        if allowed is None or (isinstance(node, ast.ImportFrom) and target.count(".") > 1):
            continue
        if not any(fnmatchcase(module.name, pattern) for pattern in allowed):
            yield Finding(
                38,
                module.at(node),
                f"imports {target}, which only {', '.join(allowed)} may",
                "go through that module, or add this one to ONLY_IN with a reason in the commit",
            )


def demo_imports(module: Module) -> Iterator[Finding]:
    """The demo and the local stack speak to the services like anybody else, never from inside."""
    for node, target in module.imports():
        if target.split(".")[0] in (*SERVICES, "runtime"):
            yield Finding(
                2,
                module.at(node),
                f"{module.path} imports {target}",
                "hisab_contracts and a public client library, over Kafka and HTTP",
            )


def cycles(modules: Iterable[Module]) -> Iterator[Finding]:
    """Rule 6: no import cycle, not even one that Python happens to survive."""
    known = {module.name: module for module in modules}
    graph: dict[str, set[str]] = {name: set() for name in known}
    for module in known.values():
        for _, target in module.imports():
            if target in known and target != module.name:
                graph[module.name].add(target)
    state: dict[str, str] = {}
    trail: list[str] = []

    def visit(name: str) -> Iterator[Finding]:
        state[name] = "open"
        trail.append(name)
        for target in sorted(graph[name]):
            if state.get(target) == "open":
                circle = " -> ".join([*trail[trail.index(target) :], target])
                yield Finding(
                    6, known[name].path, f"cycle {circle}", "move what both need below both"
                )
            elif target not in state:
                yield from visit(target)
        trail.pop()
        state[name] = "done"

    for name in sorted(graph):
        if name not in state:
            yield from visit(name)


def pure_imports(module: Module) -> Iterator[Finding]:
    """Rule 3: what decides imports nothing that reads, waits or draws lots."""
    for node, target in module.imports():
        top = target.split(".")[0]
        if module.pure and (top in IMPURE or top in ONLY_IN):
            yield Finding(
                3,
                module.at(node),
                f"imports {target}",
                "take the value as an argument; the shell reads and passes it down",
            )


IMPURE = frozenset(
    name
    for line in (
        "asyncio concurrent contextvars ctypes glob http io logging multiprocessing os pathlib",
        "platform random sched secrets select selectors shutil signal socket sqlite3 ssl structlog",
        "subprocess tempfile threading time urllib uuid",
    )
    for name in line.split()
)


def pure_calls(module: Module) -> Iterator[Finding]:
    """Rule 3: time is an argument, never read; nothing is opened or printed."""
    if not module.pure:
        return
    for node in module.nodes:
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called.split(".")[-1] in {"now", "utcnow", "today"} or called in {
            "open",
            "print",
            "input",
            "exec",
            "eval",
        }:
            yield Finding(3, module.at(node), f"calls {called}()", "take the value as an argument")
