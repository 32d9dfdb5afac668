"""Write the generated files of this folder, or publish them.

    python contracts/generate.py             schemas/*.json from the types, openapi/*.json from the
                                             services that are installed
    python contracts/generate.py release     freeze what changed since the last release

A released file is never edited: `schemas/released/SHA256SUMS` (made for `sha256sum -c`, run in
`contracts/`) names every frozen schema, example and golden file, and a test compares.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from hisab_contracts.schema import JsonSchema, schemas

HERE = Path(__file__).resolve().parent
SERVICES = ("metering", "ledger", "invoicing")
ANNOTATIONS = frozenset({"$comment", "default", "description", "examples", "title"})
"""Keywords that explain and do not decide what is valid."""


def schema_text(schema: JsonSchema) -> str:
    """Write a schema as it stands in the folder."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def openapi_text(service: str) -> str:
    """Ask a service for its OpenAPI document; it connects to nothing."""
    done = subprocess.run(
        [sys.executable, "-m", service, "openapi"], capture_output=True, text=True, check=True
    )
    return json.dumps(json.loads(done.stdout), indent=2, ensure_ascii=False) + "\n"


def decisive(part: object) -> object:
    """Return a schema without what only explains."""
    if isinstance(part, dict):
        named = {"properties", "$defs"}
        return {
            name: {k: decisive(v) for k, v in inner.items()} if name in named else decisive(inner)
            for name, inner in part.items()
            if name not in ANNOTATIONS
        }
    if isinstance(part, list):
        return [decisive(inner) for inner in part]
    return part


def snapshots(name: str, folder: Path = HERE) -> list[Path]:
    """Return the released versions of one schema, oldest first."""
    found = folder.glob(f"schemas/released/{name}.*.json")
    numbered = [path for path in found if path.suffixes[-2][1:].isdigit()]
    exact = [path for path in numbered if path.name.rsplit(".", 2)[0] == name]
    return sorted(exact, key=lambda path: int(path.suffixes[-2][1:]))


def write_generated(folder: Path = HERE) -> None:
    """Write schemas and OpenAPI documents."""
    (folder / "schemas").mkdir(exist_ok=True)
    for name, schema in schemas().items():
        (folder / "schemas" / f"{name}.json").write_text(schema_text(schema), encoding="utf-8")
    (folder / "openapi").mkdir(exist_ok=True)
    for service in SERVICES:
        try:
            text = openapi_text(service)
        except subprocess.CalledProcessError as error:
            print(f"openapi/{service}.json not written: {error.stderr.strip()[-200:]}")
            continue
        (folder / "openapi" / f"{service}.json").write_text(text, encoding="utf-8")


def release(folder: Path = HERE) -> list[str]:
    """Freeze schemas that differ from their last snapshot, new valid examples and golden files."""
    frozen = folder / "schemas/released"
    frozen.mkdir(parents=True, exist_ok=True)
    manifest = frozen / "SHA256SUMS"
    lines = manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []
    listed = {line.split("  ", 1)[1] for line in lines}
    added: list[str] = []
    for name, schema in schemas().items():
        known = snapshots(name, folder)
        last = json.loads(known[-1].read_text(encoding="utf-8")) if known else None
        if decisive(last) != decisive(json.loads(schema_text(schema))):
            path = frozen / f"{name}.{len(known) + 1}.json"
            path.write_text(schema_text(schema), encoding="utf-8")
            added.append(path.relative_to(folder).as_posix())
    kept = [*folder.glob("examples/valid/**/*.json"), *folder.glob("golden/*/*.jsonl")]
    for path in sorted(kept):
        relative = path.relative_to(folder).as_posix()
        if relative not in listed:
            added.append(relative)
    for relative in added:
        digest = hashlib.sha256((folder / relative).read_bytes()).hexdigest()
        lines.append(f"{digest}  {relative}")
    manifest.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return added


if __name__ == "__main__":
    if sys.argv[1:] == ["release"]:
        print("\n".join(release()) or "nothing new")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        write_generated()
