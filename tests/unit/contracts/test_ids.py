"""Ids: their grammar, and what is derived from content."""

from __future__ import annotations

import hashlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hisab_contracts.ids import (
    AllocationId,
    BucketId,
    HubCode,
    NodeId,
    ProjectId,
    Source,
    SourceRefused,
    TenantId,
    bucket_id,
    entry_id,
    parse_source,
)
from hisab_contracts.topics import hub_of_topic, hub_topic, partition_of

ids = st.from_regex(r"[A-Za-z0-9._:@+=-]{1,20}", fullmatch=True)
parts = st.tuples(ids, st.text(min_size=1, max_size=10), ids, ids, ids, ids, st.integers(0, 2**53))


def bucket(part: tuple[str, str, str, str, str, str, int]) -> BucketId:
    """Name a bucket from a plain tuple."""
    tenant, project, allocation, hub, node, line, hour_ms = part
    return bucket_id(
        tenant_id=TenantId(tenant),
        project_id=ProjectId(project),
        allocation_id=AllocationId(allocation),
        hub=HubCode(hub),
        node_id=NodeId(node),
        rate_line_id=line,
        hour_ms=hour_ms,
    )


def test_source_is_taken_apart() -> None:
    """The source without its epoch is the Kafka key of its node."""
    source = parse_source("/hubs/lhr/nodes/n1/epochs/e1")
    assert isinstance(source, Source)
    assert ("/hubs/lhr/nodes/n1", "lhr", "e1") == (source.node_path, source.hub, source.epoch)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/hubs/lhr/nodes/n1",
        "/hubs/lhr/nodes/n1/epochs/",
        "/hubs/LHR/nodes/n1/epochs/e1",
        "/hubs/lhr/nodes/n1/epochs/e1/",
        "/hubs/lhr/nodes/n1/epochs/e1\n",
        "/hubs/lhr/nodes/a b/epochs/e1",
        "hubs/lhr/nodes/n1/epochs/e1",
        "/hubs/lhr/nodes/" + "n" * 129 + "/epochs/e1",
    ],
)
def test_what_is_no_source_is_refused_with_the_form(text: str) -> None:
    """A refusal says what a source looks like."""
    refused = parse_source(text)
    assert isinstance(refused, SourceRefused)
    assert "/hubs/<hub>/nodes/<node>/epochs/<epoch>" in refused.detail


def test_invented_sources_do_not_fill_the_memory() -> None:
    """What a hub invents is not kept at its length, however long and however many."""
    tracemalloc.start()
    for number in range(200):
        refused = parse_source(f"/hubs/lhr/nodes/{number}" + "x" * 1_000_000)
        assert isinstance(refused, SourceRefused)
    kept_bytes, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < 1_000_000


@given(parts, parts)
@pytest.mark.defect("L2", "L7")
def test_bucket_id_comes_from_content_alone(
    one: tuple[str, str, str, str, str, str, int], other: tuple[str, str, str, str, str, str, int]
) -> None:
    """The same bucket has the same id everywhere; two buckets never share one."""
    assert bucket(one) == bucket(one)
    assert (one == other) == (bucket(one) == bucket(other))


def test_bucket_id_is_the_documented_digest() -> None:
    """Recomputed with nothing but SHA-256: parts joined by zero bytes, the free text last."""
    text = "ravi-health\0job-1\0lhr\0n1\0line-1\x001751310000000\0main"
    expected = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert expected == bucket(
        ("ravi-health", "main", "job-1", "lhr", "n1", "line-1", 1_751_310_000_000)
    )


@pytest.mark.defect("L2")
def test_parts_that_join_alike_are_different_buckets() -> None:
    """Shifting a character from one part to the next makes another bucket."""
    one = bucket(("a", "p", "bc", "h", "n", "l", 1))
    other = bucket(("ab", "p", "c", "h", "n", "l", 1))
    assert one != other


def test_entry_is_named_by_its_place() -> None:
    """An entry id is its book and its number there."""
    assert "ravi-health.3" == entry_id(TenantId("ravi-health"), 3)


def test_hub_topic_and_back() -> None:
    """A hub writes its own topic; other topics are nobody's."""
    assert "hub.lhr.usage.v1" == hub_topic(HubCode("lhr"))
    assert "lhr" == hub_of_topic("hub.lhr.usage.v1")
    for topic in ("metering.charges.v1", "hub..usage.v1", "hub.lhr.usage.v2", "hub.a.b.usage.v1"):
        assert hub_of_topic(topic) is None


# From Kafka's own UtilsTest.testMurmur2: signed 32-bit results for these keys.
MURMUR2 = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize(("key", "murmur2"), MURMUR2.items(), ids=lambda part: str(part)[:12])
def test_partition_is_that_of_kafkas_java_client(key: bytes, murmur2: int) -> None:
    """Our partitioner agrees with Apache Kafka's published vectors, at any number of partitions."""
    for partitions in (1, 4, 12, 24, 97):
        assert (murmur2 & 0x7FFFFFFF) % partitions == partition_of(key, partitions)


@given(st.binary(max_size=40), st.integers(1, 1000))
def test_every_key_has_a_partition(key: bytes, partitions: int) -> None:
    """Any key, the empty one too, falls into the range, always the same."""
    assert 0 <= partition_of(key, partitions) < partitions
    assert partition_of(key, partitions) == partition_of(bytes(key), partitions)
