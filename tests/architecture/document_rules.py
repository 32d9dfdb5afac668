"""Rule 1: every module, file and section that a document or a docstring names exists.

What counts as a name: a text between backticks (in documents also in tables and lists) that looks
like a path, or like a dotted name that begins with one of our packages; in the docstring of a
package also a single word, because there a single word is a module of that package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from architecture.source import (
    PACKAGES,
    ROOT,
    Finding,
    Module,
    modules_of_tests,
    package_modules,
    project_files,
)

QUOTED = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"(?:[\w.*{},-]+/)*[\w.*{},-]+\.(?:py|md|json|sql|toml|txt|yaml|csv|typ|lock)")
FOLDER = re.compile(r"(?:[\w.-]+/)+")
WORD = re.compile(r"[a-z_]+")
DOTTED = re.compile(r"[a-z_]\w*(?:\.\w+)+")
SECTION = re.compile(r"\b(?:DESIGN|INTERFACE|STYLE)(?:\.md)?\b")
TEST_NAME = re.compile(r"`(test_[a-z0-9_]+)`")
GENERATED = (".hisab/", ".venv/", "*", ".")
"""What begins like this is made when the project runs, or is the end of a name."""
ELSEWHERE = re.compile(
    r"(.*/)?(stack|bench|demo-summary|invoice)\.json|uv\.lock|[a-z]+\.[a-z_]+\.v1"
    r"|(metering|ledger|invoicing|path)\.(events|charges|charges_hot|freshness)"
)
"""Files that the project makes or does without, topics, and figures of the benchmark."""


def named_in_text(
    path: str,
    text: str,
    known: Mapping[str, Sequence[str]],
    *,
    package: str | None = None,
    single_words: bool = False,
) -> Iterator[Finding]:
    """Find every path, dotted name and document that a text names and that does not exist.

    `known` gives the public names of each module of ours. `package` is where the text stands: there
    `book.decide` is a name in a module `book` of it, and, with `single_words`, `book` is one.
    """
    if SECTION.search(text):
        yield _missing(path, SECTION.findall(text)[0], "a document that is not in the project")
    for quoted in QUOTED.findall(text):
        name = quoted.strip()
        if name.startswith(GENERATED) or ELSEWHERE.fullmatch(name):
            continue
        if PATH.fullmatch(name) or FOLDER.fullmatch(name):
            for single in _expanded(name):
                if not _exists(single, path):
                    yield _missing(path, single, "no such file or folder")
        elif DOTTED.fullmatch(name) and name.split(".")[0] in PACKAGES:
            if not _resolves(name, known):
                yield _missing(path, name, "no such module or name")
        elif DOTTED.fullmatch(name) and package is not None:
            leaf, _, rest = name.partition(".")
            namesakes = [m for m in known if m.startswith(package) and m.endswith(f".{leaf}")]
            if namesakes and not any(_resolves(f"{m}.{rest}", known) for m in namesakes):
                yield _missing(path, name, f"{leaf} has no such name")
        elif WORD.fullmatch(name) and package is not None and single_words:
            known_words = {part for module in known for part in module.split(".")}
            if name not in known_words and name not in known[package]:
                yield _missing(path, name, f"no module of {package}")


def lost_tests(changelog: str, known: Collection[str]) -> list[str]:
    """Return the tests, by name or file, that a changelog names and that there are no more.

    It speaks of what was; but the test that would catch a fault again has to be there.
    """
    return sorted(set(TEST_NAME.findall(changelog)) - set(known))


def test_names() -> set[str]:
    """Return the name of every test of the project and of every file of them."""
    found: set[str] = set()
    for module in modules_of_tests():
        found.add(module.name.rpartition(".")[2])
        found |= {
            node.name
            for node in module.nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    return found


def _missing(path: str, name: str, why: str) -> Finding:
    return Finding(1, path, f"`{name}`: {why}", "what is there now")


def _expanded(name: str) -> list[str]:
    """Write a path with choices in braces as the paths that it stands for."""
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    return [
        single
        for choice in match[1].split(",")
        for single in _expanded(name[: match.start()] + choice.strip() + name[match.end() :])
    ]


def _exists(name: str, mentioned_in: str) -> bool:
    """Say whether a path exists: from the root, beside who names it, or as the end of a path."""
    pattern = PurePosixPath(name.rstrip("/"))
    beside = ROOT / PurePosixPath(mentioned_in).parent
    if any(any(folder.glob(str(pattern))) for folder in (ROOT, beside)):
        return True
    ends = {str(path.relative_to(ROOT)) for path in project_files()}
    folders = {str(parent) for path in ends for parent in PurePosixPath(path).parents}
    return any(PurePosixPath(path).match(str(pattern)) for path in (*ends, *folders) if path != ".")


def _resolves(name: str, known: Mapping[str, Sequence[str]]) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in known:
            return length == len(parts) or parts[length] in known[module]
    return False


def public_names() -> Mapping[str, Sequence[str]]:
    """Return what each module of the packages defines, by the module's dotted name."""
    found: dict[str, list[str]] = {}
    for module in package_modules():
        names: list[str] = []
        for node in module.tree.body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.append(name)
                case ast.ClassDef(name=name):
                    names.append(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.append(name)
                case ast.Assign(targets=targets):
                    names += [target.id for target in targets if isinstance(target, ast.Name)]
                case _:
                    pass
        found[module.name] = names
    return found


def docstrings_of(module: Module) -> Iterator[str]:
    """Return every docstring of a module."""
    for node in module.nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield text


def documents() -> Iterator[tuple[str, str]]:
    """Return the documents of the project, but the changelog: it speaks of what was."""
    for path in project_files():
        if path.suffix == ".md" and path.name != "CHANGELOG.md":
            yield str(path.relative_to(ROOT)), Path(path).read_text(encoding="utf-8")
