"""The committed schemas are those of the types, and released ones are frozen."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from generate import release, schema_text, snapshots

from contract.compatibility import narrowings
from contract.examples import CONTRACTS, TOPIC_HUB, load, valid_records
from hisab_contracts.events import HubEvent, read_event
from hisab_contracts.ids import HubCode
from hisab_contracts.schema import schemas

SCHEMAS = schemas()
RELEASED = CONTRACTS / "schemas/released"
MANIFEST = RELEASED / "SHA256SUMS"


def manifest(path: Path = MANIFEST) -> dict[str, str]:
    """Return the digest of every frozen file by its path inside contracts/."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def edited(folder: Path) -> list[str]:
    """Return the frozen files of a contracts folder that are gone or not what was released."""
    return [
        name
        for name, digest in manifest(folder / "schemas/released/SHA256SUMS").items()
        if not (folder / name).exists()
        or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
    ]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_committed_schema_is_that_of_the_types(name: str) -> None:
    """A type that changed has its schema regenerated (`python contracts/generate.py`)."""
    committed = (CONTRACTS / "schemas" / f"{name}.json").read_text(encoding="utf-8")
    assert schema_text(SCHEMAS[name]) == committed


def test_no_schema_without_a_type() -> None:
    """What stands in the folder is generated: nothing is left over."""
    assert set(SCHEMAS) == {path.stem for path in (CONTRACTS / "schemas").glob("*.json")}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schema_is_valid_json_schema_2020_12(name: str) -> None:
    """Each schema is one by its own dialect, and every reference in it resolves."""
    schema = load(CONTRACTS / "schemas" / f"{name}.json")
    jsonschema.Draft202012Validator.check_schema(schema)
    referred = set(_references(schema))
    assert {f"#/$defs/{part}" for part in schema.get("$defs", {})} == referred


def _references(part: object) -> list[str]:
    if isinstance(part, dict):
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [found for inner in part.values() for found in _references(inner)]
    if isinstance(part, list):
        return [found for inner in part for found in _references(inner)]
    return []


def test_vocabularies_of_hubs_are_open() -> None:
    """What a hub names (SKU, price class, state) is no closed list: a new one breaks no reader."""
    data = SCHEMAS["pk.hisab.usage.interval.v1"]["$defs"]
    assert isinstance(data, dict)
    for member in ("sku", "price_class", "state"):
        assert "enum" not in data["Interval"]["properties"][member]


def test_nothing_released_was_edited() -> None:
    """Frozen schemas and examples are byte for byte what was published: add, never edit."""
    assert edited(CONTRACTS) == []


def test_every_frozen_file_is_listed() -> None:
    """No snapshot stands outside the manifest, and every schema has one."""
    files = {path.relative_to(CONTRACTS).as_posix() for path in RELEASED.glob("*.json")}
    assert files == {name for name in manifest() if name.startswith("schemas/")}
    assert [name for name in SCHEMAS if not snapshots(name)] == []


@pytest.mark.parametrize("name", sorted(SCHEMAS))
@pytest.mark.defect("F7")
def test_schema_takes_all_that_any_release_took(name: str) -> None:
    """A schema, released or not yet, only ever takes more than the releases before it."""
    released = [load(path) for path in snapshots(name)]
    today = json.loads(schema_text(SCHEMAS[name]))
    for place, older in enumerate(released):
        for newer in (*released[place + 1 :], today):
            assert narrowings(older, newer) == []


def test_released_examples_still_decode() -> None:
    """Whatever was once valid reads for ever."""
    frozen = {name for name in manifest() if name.startswith("examples/valid/")}
    for record in valid_records():
        if f"examples/{record.name}.json" in frozen:
            assert isinstance(
                read_event(record.value, record.headers, HubCode(TOPIC_HUB)), HubEvent
            )
    assert len(frozen) > 10


def test_edit_in_place_is_found(tmp_path: Path) -> None:
    """The check can fail: one changed bound in a frozen schema, one lost example."""
    folder = tmp_path / "contracts"
    shutil.copytree(CONTRACTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert edited(folder) == []
    path = folder / "schemas/released/pk.hisab.usage.interval.v1.1.json"
    path.write_text(path.read_text().replace('"maxItems": 64', '"maxItems": 65'))
    (folder / "examples/valid/structured/usage-interval.json").unlink()
    assert {
        "schemas/released/pk.hisab.usage.interval.v1.1.json",
        "examples/valid/structured/usage-interval.json",
    } == set(edited(folder))


def test_release_of_nothing_new_adds_nothing(tmp_path: Path) -> None:
    """Releasing twice freezes once."""
    folder = tmp_path / "contracts"
    shutil.copytree(CONTRACTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    release(folder)
    before = (folder / "schemas/released/SHA256SUMS").read_bytes()
    assert release(folder) == []
    assert before == (folder / "schemas/released/SHA256SUMS").read_bytes()


def narrowed(edit: str) -> tuple[Any, Any]:
    """Return a schema and an edited copy."""
    old: Any = json.loads(schema_text(SCHEMAS["pk.hisab.usage.interval.v1"]))
    new = copy.deepcopy(old)
    interval = new["$defs"]["Interval"]
    if edit == "required":
        interval["required"].append("cluster")
    elif edit == "removed":
        del interval["properties"]["energy_end_mj"]
    elif edit == "maximum":
        interval["properties"]["end_ms"]["exclusiveMaximum"] -= 1
    elif edit == "pattern":
        interval["properties"]["sku"]["pattern"] = "^h100$"
    elif edit == "type":
        interval["properties"]["start_ms"]["type"] = "string"
    elif edit == "closed":
        interval["additionalProperties"] = False
    elif edit == "enum":
        interval["properties"]["state"]["enum"] = ["running"]
    elif edit == "optional added":
        interval["properties"]["rack"] = {"type": "string"}
    elif edit == "required dropped":
        interval["required"].remove("state")
    elif edit == "description":
        interval["description"] = "Other words."
    elif edit == "more of a list":
        old["$defs"]["Interval"]["properties"]["state"]["enum"] = ["running"]
        interval["properties"]["state"]["enum"] = ["running", "stopped"]
    elif edit in {"a choice", "another choice"}:
        old["properties"]["data"] = {"$ref": "#/$defs/Interval"}
        mine = "Interval" if edit == "a choice" else "Device"
        choices = [{"$ref": "#/$defs/Other"}, {"$ref": f"#/$defs/{mine}"}]
        new["properties"]["data"] = {"oneOf": choices}
    elif edit == "devices":
        interval["properties"]["devices"]["maxItems"] = 128
    return old, new


@pytest.mark.parametrize(
    "edit",
    ["required", "removed", "maximum", "pattern", "type", "closed", "enum", "another choice"],
)
def test_narrowing_edit_is_found(edit: str) -> None:
    """What would refuse an old event is found and named."""
    assert narrowings(*narrowed(edit)) != []


@pytest.mark.parametrize(
    "edit",
    [
        "optional added",
        "required dropped",
        "description",
        "devices",
        "more of a list",
        "a choice",
    ],
)
def test_widening_edit_is_allowed(edit: str) -> None:
    """A new optional member, a dropped demand and other words keep old events readable."""
    assert narrowings(*narrowed(edit)) == []
