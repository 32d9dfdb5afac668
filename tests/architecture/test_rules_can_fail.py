"""Each rule finds what it is for and leaves the rest in peace: a check that cannot fail is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from textwrap import indent

import pytest

from architecture import pattern_rules, shape_rules, sql_rules, text_rules, word_rules
from architecture.source import Finding, Module, sample
from architecture.test_rules import DEPLOY_RULES, PACKAGE_RULES, TEST_RULES

Rule = Callable[[Module], Iterable[Finding]]

PURE = {"name": "ledger.book", "pure": True}
LONG = "def f() -> int:\n" + "    x_ms = 1\n" * 70 + "    return x_ms\n"
CASES = "match x:\n    case A():\n        pass\n    case _:\n"
TRANSACTION = "async def f(db: D) -> None:\n    async with db.transaction():\n"
QUERY = '_LOAD = """\nselect a from b where c = $1\n"""\n\n\n'
LOADING = "async def load(c: C) -> Row:\n    return from_row(await c.fetch(_LOAD, 1))\n"
SAYING = LOADING.replace("Row:\n", 'Row:\n    """Load what is wanted."""\n')
LOGGED = "try:\n    f()\nexcept E as error:\n    _log.error('no', error=error)\n"

BAD: list[tuple[Rule, str, dict[str, object]]] = [
    # The pattern that took hours on a text without an end, plain and possessive.
    (pattern_rules.linear_patterns, r"""x = re.sub(r'"(?:[^"\\]|\\.)*"', "", y)""", {}),
    (pattern_rules.linear_patterns, r"""x = re.sub(r'"(?:[^"\\]|\\.)*+"', "", y)""", {}),
    (pattern_rules.linear_patterns, 'P = re.compile("a+b")\nx = P.search(y)', {}),
    (pattern_rules.linear_patterns, 'P = re.compile("(a+)+b")\nx = P.fullmatch(y)', {}),
    (pattern_rules.linear_patterns, 'x = re.match("(x?a|xb)*c", y)', {}),
    (pattern_rules.linear_patterns, 'x = re.match(r"\\d*\\d*x", y)', {}),
    (pattern_rules.linear_patterns, 'x = re.match(".*,.*", y)', {}),
    (pattern_rules.linear_patterns, r'x = re.sub(r"\s+$", "", y)', {}),
    (pattern_rules.linear_patterns, 'x = re.search("(?=a)b", y)', {}),
    (pattern_rules.linear_patterns, "x = re.search(given, y)", {}),
    (pattern_rules.linear_patterns, 'A = "(b+)+"\nX = Annotated[str, Meta(pattern=f"{A}$")]', {}),
    (shape_rules.long_functions, LONG, {}),
    (shape_rules.module_size, "x = 1\n" * 601, {}),
    (shape_rules.module_smallness, "x = 1\n" * 39, {}),
    (shape_rules.vague_names, "", {"name": "ledger.utils"}),
    (shape_rules.vague_names, "", {"name": "ledger.http_helpers"}),
    (shape_rules.foreign_services, "from metering.coverage import split", {}),
    (shape_rules.foreign_services, "def f():\n    import invoicing", {}),
    (shape_rules.foreign_services, "import ledger.book", {"name": "runtime.http"}),
    (shape_rules.foreign_services, "from runtime import http", {"name": "hisab_contracts.ids"}),
    (shape_rules.outside_libraries, "import aiokafka", {"name": "ledger.consumer"}),
    (shape_rules.outside_libraries, "from asyncpg import Record", {"name": "ledger.api"}),
    (shape_rules.pure_imports, "import asyncio", PURE),
    (shape_rules.pure_imports, "from os import environ", PURE),
    (shape_rules.pure_imports, "import asyncpg", PURE),
    (shape_rules.pure_imports, "def f():\n    import time", PURE),
    (shape_rules.pure_calls, "x = dt.datetime.now(dt.UTC)", PURE),
    (shape_rules.pure_calls, "x = date.today()", PURE),
    (shape_rules.pure_calls, "print(1)", PURE),
    (shape_rules.demo_imports, "from ledger.book import decide", {"name": "deploy.demo.play"}),
    (shape_rules.demo_imports, "import runtime.kafka", {"name": "deploy.local.stack"}),
    (word_rules.float_ban, "x = 0.1", {}),
    (word_rules.float_ban, "def f(x: float) -> None: ...", {}),
    (word_rules.float_ban, "x = float('1')", {}),
    (word_rules.float_ban, "x = a_micro / b", {}),
    (word_rules.float_ban, "x /= 2", {}),
    (word_rules.float_ban, "x = elapsed.total_seconds()", {}),
    (word_rules.float_ban, "x = round(y)", {}),
    (word_rules.float_ban, "timeout_s = 0.5", PURE),
    (word_rules.float_ban, "x = moment.timestamp()", {"name": "runtime.kafka"}),
    (word_rules.domain_words, "def charge_micro() -> int: ...", {"name": "runtime.kafka"}),
    (word_rules.domain_words, "class Invoice: ...", {"name": "runtime.http"}),
    (word_rules.domain_words, "def officer() -> str: ...", {"name": "runtime.auth"}),
    (word_rules.private_words, "class Said: ...", {}),
    (word_rules.private_words, "", {"name": "metering.upkeep"}),
    (word_rules.loop_variables, "x = [one.a for one in y]", {}),
    (word_rules.loop_variables, "for at, one in y:\n    f(one)", {}),
    (word_rules.unit_suffixes, "class A:\n    amount: int", {}),
    (word_rules.unit_suffixes, "class A:\n    total: int | None", {}),
    (word_rules.unit_suffixes, "class RecordCounts:\n    amount: Decimal", {}),
    (word_rules.unit_suffixes, "class A:\n    price: Decimal", {}),
    (word_rules.unit_suffixes, "class A:\n    created: dt.datetime", {}),
    (word_rules.unit_suffixes, "class A:\n    issued: dt.date", {}),
    (word_rules.unit_suffixes, "def f(grant: int) -> None: ...", PURE),
    (word_rules.frozen_facts, "class A(Struct):\n    x: str", {}),
    (word_rules.frozen_facts, "@dataclass\nclass A:\n    x: str", {}),
    (word_rules.frozen_facts, "@dataclass(slots=True)\nclass A:\n    x: str", {}),
    (word_rules.frozen_facts, "object.__setattr__(a, 'x', 1)", {}),
    (word_rules.distinct_ids, "class A:\n    tenant_id: str", PURE),
    (word_rules.distinct_ids, "key = str(uuid.uuid4())", {}),
    (word_rules.exhaustive_matches, "match x:\n    case A():\n        pass", {}),
    (word_rules.exhaustive_matches, CASES + "        pass", {}),
    (word_rules.docstrings, "x = 1", {}),
    (word_rules.docstrings, '"""M."""\ndef f() -> None: ...', PURE),
    (word_rules.docstrings, '"""M."""\nclass A:\n    """A."""\n    def f(self) -> None: ...', PURE),
    (word_rules.docstrings, '"""M."""\ndef f() -> None:\n    """No full stop"""', PURE),
    (word_rules.any_and_ignores, "from typing import Any", PURE),
    (word_rules.any_and_ignores, "x = y  # type: " + "ignore", {}),
    (sql_rules.sql_text, 'x = f"select a from {table}"', {}),
    (sql_rules.sql_text, 'x = "select a from b where c = " + value', {}),
    (sql_rules.sql_text, 'x = "select a from b where c = %s" % value', {}),
    (sql_rules.sql_text, 'x = "select a from {}".format(table)', {}),
    (sql_rules.sql_text, 'x = "SELECT a FROM b"', {}),
    (sql_rules.sql_text, 'x = "select a FROM b"', {}),
    (sql_rules.sql_text, 'x = "select * from b"', {}),
    (sql_rules.sql_text, 'x = "with a as (select b.* from b) select c from a"', {}),
    (sql_rules.sql_place, 'async def f(c: C) -> None:\n    await c.execute("select a from b")', {}),
    (sql_rules.sql_text, '_A = "a"\n_B = "select " + _A + " FROM b"', {}),
    (sql_rules.sql_text, 'def f(a):\n    return "select " + a + " from b"', {}),
    (sql_rules.sql_place, LOADING + "\n\n" + QUERY, {}),
    (sql_rules.sql_place, QUERY + LOADING, {}),
    (sql_rules.sql_place, QUERY, {}),
    (sql_rules.limited_sums, '_A = "select sum(a) from (select a from b limit $1) c"', {}),
    (
        sql_rules.limited_sums,
        '_A = "with c as (select a from b order by a limit 9) select d, sum(a) from c group by d"',
        {},
    ),
    (
        sql_rules.limited_sums,
        "def f(buckets: list[B]) -> int:\n    return sum(bucket.gpu_ns for bucket in buckets)",
        {"name": "metering.api.usage"},
    ),
    (
        sql_rules.locking_reads,
        '_A = "select a, (select sum(c) from d where d.b = b.b) from b where a = $1 for update"',
        {},
    ),
    (sql_rules.locking_reads, '_A = "select b.a from b join d on d.a = b.a for share of b"', {}),
    (
        sql_rules.locking_reads,
        '_A = "with e as (select a from b for update skip locked) select e.a, c from e, d join f"',
        {},
    ),
    (sql_rules.locking_reads, '_A = "update b set a = 1 where not exists (select from d)"', {}),
    (
        sql_rules.locking_reads,
        '_A = "insert into b select a from d on conflict (a) do update set a = 2"',
        {},
    ),
    (sql_rules.outside_calls, TRANSACTION + "        await p.send(x)", {}),
    (
        sql_rules.outside_calls,
        TRANSACTION.replace("()", "(tenant=t) as c, other") + "        await client.post(x)",
        {},
    ),
    (sql_rules.driver_records, "x = await c.fetch(Q)", {"name": "ledger.api"}),
    (
        sql_rules.driver_records,
        "from asyncpg import Record as Row\nasync def all() -> list[Row]: ...",
        {"name": "ledger.store"},
    ),
    (
        sql_rules.driver_records,
        "import asyncpg\ndef sum_of(row: asyncpg.Record) -> int: ...",
        {"name": "ledger.store"},
    ),
    (text_rules.settings, "x = os.environ['A']", {"name": "ledger.store"}),
    (text_rules.settings, "from os import getenv", {"name": "ledger.store"}),
    (text_rules.module_state, "_seen = []", {}),
    (text_rules.module_state, "_seen: dict[str, int] = {}", {}),
    (text_rules.module_state, "_seen = defaultdict(list)", {}),
    (text_rules.module_state, "def f() -> None:\n    global x", {}),
    (text_rules.swallowed_failures, "try:\n    f()\nexcept:\n    raise", {}),
    (text_rules.swallowed_failures, "try:\n    f()\nexcept E:\n    pass", {}),
    (text_rules.swallowed_failures, LOGGED, {}),
    (text_rules.swallowed_failures, "for x in y:\n" + indent(LOGGED + "    continue", "    "), {}),
    (text_rules.mocks, "from unittest.mock import Mock", {"name": "tests.test_x"}),
    (text_rules.mocks, "monkeypatch.setattr(ledger.store, 'f', g)", {"name": "tests.test_x"}),
    (text_rules.mocks, "monkeypatch.setattr('metering.api.f', g)", {"name": "tests.test_x"}),
    (text_rules.test_facts, "def test_it_works() -> None: ...", {"name": "tests.test_x"}),
    (text_rules.test_facts, 'def test_x() -> None:\n    """One."""', {"name": "tests.test_x"}),
]

GOOD: list[tuple[Rule, str, dict[str, object]]] = [
    (pattern_rules.linear_patterns, 'P = re.compile("[a-z]+/[0-9]+")\nx = P.fullmatch(y)', {}),
    (pattern_rules.linear_patterns, r'x = re.findall(r"\{(\w+)", y)', {}),
    (pattern_rules.linear_patterns, 'X = Annotated[str, Meta(pattern="^[a-z]+$")]', {}),
    (shape_rules.long_functions, LONG.replace("    x_ms = 1\n", "", 2), {}),
    (shape_rules.module_smallness, "x = 1\n" * 40, {}),
    (shape_rules.outside_libraries, "import asyncpg", {"name": "metering.store.state"}),
    (word_rules.domain_words, "def tenant_of() -> str: ...", {"name": "runtime.auth"}),
    (word_rules.private_words, "class _Said: ...", {}),
    (word_rules.loop_variables, "x = [line.a for line in y]", {}),
    (text_rules.swallowed_failures, LOGGED + "    raise", {}),
    (text_rules.swallowed_failures, "try:\n    f()\nexcept E:\n    pass  # Looked at below.", {}),
    (text_rules.swallowed_failures, LOGGED + "    return Failed()", {}),
    (shape_rules.foreign_services, "from hisab_contracts.ids import Sku", {}),
    (shape_rules.pure_imports, "import datetime as dt\nimport hashlib\nimport msgspec", PURE),
    (shape_rules.demo_imports, "import hisab_contracts.topics\nimport aiokafka", {}),
    (word_rules.float_ban, "await asyncio.sleep(0.2)\nidle_s: float = pause_ms / 1000", {}),
    (word_rules.float_ban, "x = a // b\ny = folder / 'name'", PURE),
    (word_rules.float_ban, "def f(*, timeout: float = 2.0) -> None: ...", {}),
    (word_rules.unit_suffixes, "class A:\n    grant_micro: int\n    seq: int\n    name: str", {}),
    (word_rules.unit_suffixes, "class A:\n    valid_from: dt.datetime\n    issued_on: dt.date", {}),
    (word_rules.unit_suffixes, "class RecordCounts:\n    read: int\n    accepted: int", {}),
    (word_rules.frozen_facts, "class A(Struct, frozen=True):\n    x: str", {}),
    (word_rules.frozen_facts, "@dataclass(frozen=True, slots=True)\nclass A:\n    x: str", {}),
    (word_rules.distinct_ids, "class A:\n    tenant_id: TenantId", PURE),
    (word_rules.exhaustive_matches, CASES + "        assert_never(x)", {}),
    (word_rules.exhaustive_matches, "match x:\n    case str():\n        pass", {}),
    (word_rules.docstrings, '"""M."""\ndef _f() -> None: ...', PURE),
    (sql_rules.sql_text, QUERY + 'x = "Select a colour from the list."', {}),
    (sql_rules.sql_text, 'x = "insert into a (b) select * from unnest($1::text[])"', {}),
    (sql_rules.sql_text, '_A = "a"\n_B = "select " + _A + " from b"', {}),
    (sql_rules.sql_place, QUERY + SAYING + SAYING.replace("load", "again"), {}),
    (sql_rules.sql_place, "# What is wanted.\n" + QUERY + LOADING, {}),
    (sql_rules.limited_sums, '_A = "select a, sum(a) from b group by a order by a limit 9"', {}),
    (
        sql_rules.limited_sums,
        '_A = "with c as (select a from b limit 9) select sum(a) over (order by a) as d from c"',
        {},
    ),
    (
        sql_rules.limited_sums,
        '_A = "with c as (select a from b limit 9) select (select sum(e) from d) from c"',
        {},
    ),
    (sql_rules.limited_sums, "x = sum(y)", {"name": "metering.core.engine"}),
    (sql_rules.locking_reads, '_A = "select a from b where a is distinct from c for update"', {}),
    (
        sql_rules.locking_reads,
        '_A = "with e as (delete from b using unnest($1) as k (a) returning a) select a from e"',
        {},
    ),
    (sql_rules.locking_reads, '_A = "select b.a from b join d on d.a = b.a"', {}),
    (
        sql_rules.driver_records,
        "from asyncpg import Record as Row\ndef lot_from_row(row: Row) -> Lot: ...",
        {"name": "ledger.store"},
    ),
    (
        sql_rules.outside_calls,
        TRANSACTION + "        await c.execute(Q)\n    await p.send(x)",
        {},
    ),
    (text_rules.settings, "x = os.environ['A']", {"name": "ledger.__main__"}),
    (text_rules.module_state, "_ORDER = ('a', 'b')\n_MAP = {'a': 1}", {}),
]


def _name(value: object) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else ""


@pytest.mark.parametrize(("rule", "text", "as_module"), BAD, ids=_name)
def test_rule_finds_bad_sample(rule: Rule, text: str, as_module: dict[str, object]) -> None:
    """A sample that breaks the rule is found, with the rule's number and a replacement."""
    found = list(rule(sample(text, **as_module)))  # type: ignore[arg-type]
    assert found != []
    assert all(1 <= finding.rule <= 40 and finding.instead for finding in found)


@pytest.mark.parametrize(("rule", "text", "as_module"), GOOD, ids=_name)
def test_rule_leaves_good_sample_in_peace(
    rule: Rule, text: str, as_module: dict[str, object]
) -> None:
    """A sample that keeps the rule is not found."""
    assert list(rule(sample(text, **as_module))) == []  # type: ignore[arg-type]


def test_every_rule_has_a_bad_sample() -> None:
    """No rule is applied that was never seen to fail."""
    proven = {rule for rule, _, _ in BAD}
    assert set(PACKAGE_RULES + DEPLOY_RULES + TEST_RULES) - proven == set()


def test_cycle_is_found_through_three_modules() -> None:
    """A circle of imports is found, also when one of them is inside a function."""
    modules = [
        sample("import ledger.b", name="ledger.a"),
        sample("def f():\n    from ledger.c import x", name="ledger.b"),
        sample("import ledger.a", name="ledger.c"),
    ]
    assert len(list(shape_rules.cycles(modules))) == 1
    assert list(shape_rules.cycles(modules[:2])) == []


def test_migration_names_and_text_are_judged() -> None:
    """A number given twice, a strange name, upper case and a drop in `pre` are found."""
    assert list(sql_rules.migrations(["0001_a.pre.sql", "0002_b.post.sql"])) == []
    assert len(list(sql_rules.migrations(["0003_a.pre.sql", "0003_b.pre.sql"]))) == 1
    assert len(list(sql_rules.migrations(["0001_a.sql"]))) == 1
    assert len(list(sql_rules.migration_text("0001_a.pre.sql", "CREATE TABLE a (b int);"))) == 1
    assert (
        len(list(sql_rules.migration_text("0001_a.pre.sql", "alter table a drop column b;"))) == 1
    )
    assert len(list(sql_rules.migration_text("0001_a.pre.sql", "drop table a;"))) == 1
    assert list(sql_rules.migration_text("0001_a.post.sql", "drop table a;")) == []


def test_machine_paths_and_registry_hosts_are_found() -> None:
    """A path of one machine and the host of a registry are found; other paths are not."""
    bad = [
        "/ho" + "me/amna/hisab",
        "see /wo" + "rk/x",
        "--index" + "-url http://x",
        "UV_DEFAULT" + "_INDEX=https://mirror.example/simple",
        "extra-index" + '-url = "https://mirror.example"',
        "trusted" + "-host mirror.example",
        "py" + "pi.org",
    ]
    for line in bad:
        assert len(list(text_rules.forbidden_text("a.txt", line))) == 1, line
    good = "https://example.org/work/ and contracts/src and /usr/lib and /hubs/lhr/nodes/n1"
    assert list(text_rules.forbidden_text("a.txt", good)) == []
    options = 'made with --no-emit-index-url; {"trusted-host": "UV_INSECURE_HOST"}'
    assert list(text_rules.forbidden_text("a.txt", options)) == []
