"""The pages a service shows of itself: what it is, and how it is called. Pure.

They are written from the service's own OpenAPI document, so they say what the code does. They load
nothing: no script, no font, no picture, from here or elsewhere, and the policy that goes with them
(`PAGE_POLICY`) lets a browser load nothing. So they work without the internet, and nobody can make
them do more. They need no key, and show nothing that the committed document does not.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final, TypeAlias

Json: TypeAlias = Mapping[str, Any]

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2730; --soft: #5b6b79; --line: #d8e0e7;
  --paper: #ffffff; --card: #f6f8fa; --get: #0b6e4f; --post: #8a4b08; --link: #0a5ea8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #9aa9b7; --line: #33414e;
  --paper: #12181e; --card: #1a222a; --get: #5fd0a5; --post: #f0b266; --link: #7fbdf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 5rem; max-width: 66rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 2rem; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h3 { margin: 1.25rem 0 .4rem; font-size: .95rem; }
p { margin: .4rem 0; } a { color: var(--link); }
code, pre { font: .875em/1.5 ui-monospace, monospace; }
pre { margin: 0; padding: .75rem 1rem; overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: .4rem; }
.soft { color: var(--soft); } .version { font-size: 1rem; font-weight: 400; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: .4rem; }
summary { display: flex; flex-wrap: wrap; gap: .35rem .75rem; align-items: baseline;
  padding: .6rem 1rem; cursor: pointer; background: var(--card); border-radius: .4rem; }
summary code { font-weight: 600; } summary .soft { flex: 1 1 16rem; }
details > div { padding: .25rem 1rem 1rem; }
.method { min-width: 3.2rem; font: 700 .8rem ui-monospace, monospace; }
.GET { color: var(--get); } .POST { color: var(--post); }
.role { display: inline-block; margin: 0 .3rem .3rem 0; padding: 0 .55rem; font-size: .85rem;
  border: 1px solid var(--line); border-radius: 1rem; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .6rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
"""
_STYLE_SHA256: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
PAGE_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_SHA256}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy of these pages: their own style sheet, and nothing else."""

_OTHERS: Final = {
    "not-found": "asks for what is another's: 404, as if there were none",
    "forbidden": "asks for what is another's: 403",
    "own": "gets what is its own; nothing in the request names an owner",
}


_COMMANDS: Final = (
    "<p>Every call carries a key. A command (POST) with an <code>Idempotency-Key</code> is run "
    "once for that key, and a retry gets the first answer.</p>"
)
_CONVENTIONS: Final = (
    "<p>Errors are <code>application/problem+json</code>; <code>code</code> is stable, and "
    "<code>retryable</code> says whether the same request may succeed later. Amounts, GPU time "
    "and sequence numbers are strings of digits; instants are RFC 3339 in UTC. Lists take "
    "<code>limit</code> and <code>cursor</code>; give back <code>next</code> with the same "
    "filter until it is null.</p>"
)


def front_page(service: str, version: str, purpose: str) -> str:
    """Write `/`: what the service is, and where to go."""
    rows = (
        ("/docs", "how it is called: every endpoint, who may call it, what goes in and comes out"),
        ("/openapi.json", "the same for programs (OpenAPI 3.1)"),
        ("/v1/status", "how far it is; takes any valid key"),
        ("/healthz", "whether the process is alive"),
        ("/readyz", "whether it can answer"),
        ("/metrics", "its metrics, for Prometheus"),
    )
    listed = "".join(
        f'<tr><td><a href="{path}"><code>{path}</code></a></td><td>{said}</td></tr>'
        for path, said in rows
    )
    title = f"Hisab {service}"
    return _page(title, f"{_heading(title, version, purpose)}<h2>Where to go</h2>{_table(listed)}")


def docs_page(document: Json, purpose: str) -> str:
    """Write `/docs` from an OpenAPI document."""
    title = f"Hisab {document['info']['title']}"
    operations = [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    parts = [
        _heading(title, document["info"]["version"], purpose),
        '<p><a href="/openapi.json">openapi.json</a> says the same for programs.</p>',
        "<h2>Calling it</h2>",
        _COMMANDS,
        _example("GET", "/v1/status", {}),
        _CONVENTIONS,
        "<h2>Endpoints</h2>",
        *(_operation(*operation) for operation in operations),
        "<h2>Models</h2>",
        *(_model(name, schema) for name, schema in document["components"]["schemas"].items()),
    ]
    return _page(title, "".join(parts))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _heading(title: str, version: str, purpose: str) -> str:
    return (
        f'<h1>{escape(title)} <span class="soft version">{escape(version)}</span></h1>'
        f"<p>{escape(purpose)}</p>"
    )


def _operation(method: str, path: str, operation: Json) -> str:
    access = operation["x-hisab-access"]
    roles = ["any valid key"] if access["roles"] == ["*"] else access["roles"]
    chips = "".join(f'<span class="role">{escape(role)}</span>' for role in roles)
    others = "".join(
        f"<p>A key of role <code>{escape(role)}</code> {_OTHERS[rule]}.</p>"
        for role, rule in access["others"].items()
    )
    parts = [f"<h3>Takes keys of</h3>{chips}{others}"]
    if operation["parameters"]:
        rows = "".join(
            f"<tr><td><code>{escape(given['name'])}</code></td><td>{escape(given['in'])}</td>"
            f"<td>{'required' if given['required'] else 'optional'}</td></tr>"
            for given in operation["parameters"]
        )
        parts.append(f"<h3>Parameters</h3>{_table(rows)}")
    body = operation.get("requestBody")
    if body is not None:
        parts.append(f"<h3>Body</h3>{_body(body['content'])}")
    parts += ["<h3>Answers</h3>", _table("".join(_answers(operation["responses"])))]
    parts += ["<h3>Example</h3>", _example(method, path, operation)]
    return (
        f'<details id="{escape(operation["operationId"])}"><summary>'
        f'<span class="method {method}">{method}</span><code>{escape(path)}</code>'
        f'<span class="soft">{escape(operation["summary"])}</span></summary>'
        f"<div>{''.join(parts)}</div></details>"
    )


def _body(content: Json) -> str:
    """Say what is sent: a model of JSON, or the header of a CSV file."""
    if "text/csv" in content:
        header = escape(content["text/csv"]["example"])
        return f"<p>A CSV file in UTF-8, with this first line:</p><pre>{header}</pre>"
    return f"<p>{_kind(content['application/json']['schema'])}</p>"


def _answers(responses: Json) -> Iterator[str]:
    for status, response in responses.items():
        said = f"<code>{escape(response['description'])}</code>"
        if not status.startswith(("4", "5")):
            content = response["content"].get("application/json")
            said = "bytes" if content is None else _kind(content["schema"])
        yield f"<tr><td><code>{status}</code></td><td>{said}</td></tr>"


def _example(method: str, path: str, operation: Json) -> str:
    verb = "" if method == "GET" else f"-X {method} "
    lines = [f'curl {verb}-H "Authorization: Bearer $HISAB_KEY" "$HISAB_URL{path}"']
    if any(given["in"] == "header" for given in operation.get("parameters", ())):
        lines.append('  -H "Idempotency-Key: a-name-for-this-command"')
    content = operation.get("requestBody", {}).get("content", {})
    if "text/csv" in content:
        lines.append('  -H "Content-Type: text/csv" --data-binary @body.csv')
    elif content:
        lines.append('  -H "Content-Type: application/json" -d @body.json')
    text = " \\\n".join(lines)
    return f"<pre>{escape(text)}</pre>"


def _model(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(member)}</code></td><td>{_kind(part)}</td>"
        f"<td>{'' if member in required else 'optional'}</td></tr>"
        for member, part in schema.get("properties", {}).items()
    )
    return (
        f'<details id="model-{escape(name)}"><summary><code>{escape(name)}</code>'
        f'<span class="soft">{escape(schema.get("description", ""))}</span></summary>'
        f"<div>{_table(rows) if rows else f'<p>{_kind(schema)}</p>'}</div></details>"
    )


def _kind(schema: Json) -> str:
    """Say in a few words what a schema takes."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#model-{name}"><code>{name}</code></a>'
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if kind == "object" and "properties" in schema:
        members = ", ".join(
            f"<code>{escape(name)}</code>: {_kind(part)}"
            for name, part in schema["properties"].items()
        )
        return f"{{ {members} }}"
    names: Sequence[str] = [kind] if isinstance(kind, str) else kind
    return " or ".join(escape(name) for name in names) + _bounds(schema)


def _bounds(schema: Json) -> str:
    said = {
        "minimum": "from",
        "maximum": "to",
        "minLength": "at least",
        "maxLength": "at most",
        "minItems": "at least",
        "maxItems": "at most",
        "pattern": "like",
    }
    found: Iterable[str] = (
        f"{word} <code>{escape(str(schema[name]))}</code>"
        for name, word in said.items()
        if name in schema
    )
    text = ", ".join(found)
    return f' <span class="soft">({text})</span>' if text else ""


def _table(rows: str) -> str:
    return f"<table>{rows}</table>"
