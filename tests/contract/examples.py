"""Loads `contracts/examples`, which outsiders use as they are."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"
EXAMPLES = CONTRACTS / "examples"
TOPIC_HUB = "lhr"
"""Every example of a hub's event is read as if it came in Lahore's topic."""

Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Record:
    """A Kafka record as an example states it."""

    name: str
    value: bytes
    headers: Headers
    reason: str | None = None
    """Under which reason it must be refused; None: it must be read."""
    schema_accepts: str | None = None
    """Why a JSON Schema cannot refuse it, where that is so."""

    @property
    def binary(self) -> bool:
        """Say whether the attributes stand in headers."""
        return any(name == "ce_specversion" for name, _ in self.headers)


def load(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """Name an example by its place."""
    return path.relative_to(EXAMPLES).with_suffix("").as_posix()


def valid_records() -> Iterator[Record]:
    """Yield every event that must be read, in both modes."""
    for path in sorted((EXAMPLES / "valid/structured").glob("*.json")):
        headers = (("content-type", b"application/cloudevents+json"),)
        yield Record(name_of(path), path.read_bytes(), headers)
    for path in sorted((EXAMPLES / "valid/binary").glob("*.json")):
        example = load(path)
        yield Record(name_of(path), _encode(example["value"]), _headers(example))


def invalid_records() -> Iterator[Record]:
    """Yield every record that must be refused, with the reason."""
    for path in sorted((EXAMPLES / "invalid").glob("*.json")):
        example = load(path)
        if "value_base64" in example:
            value = base64.b64decode(example["value_base64"])
        elif "value_text" in example:
            value = example["value_text"].encode()
        else:
            value = _encode(example["value"])
        yield Record(
            name_of(path),
            value,
            _headers(example),
            example["reason"],
            example.get("schema_accepts"),
        )


def messages(kind: str) -> Iterator[tuple[str, str, Any]]:
    """Yield topic, name and value of every example of a downstream message."""
    for folder in sorted((EXAMPLES / kind).iterdir()):
        if folder.is_dir() and folder.name not in {"structured", "binary"}:
            for path in sorted(folder.glob("*.json")):
                example = load(path)
                yield folder.name, name_of(path), example if kind == "valid" else example["value"]


def _headers(example: dict[str, Any]) -> Headers:
    return tuple((name, text.encode()) for name, text in example["headers"].items())


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
