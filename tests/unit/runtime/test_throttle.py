"""Token buckets: how much is given, to whom, and in how much memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.throttle import MOST_PARTIES, Throttle, keep_newest, party_of


def test_a_burst_is_given_and_then_the_rate() -> None:
    """Five at once, then two a second; a refusal says when to come again."""
    throttle = Throttle(2, 5)
    assert [0, 0, 0, 0, 0, 1] == [throttle.take("a", 0) for _ in range(6)]
    assert [0, 1] == [throttle.take("a", 0.5) for _ in range(2)]
    assert [0, 0, 0, 0, 0, 1] == [throttle.take("a", 1_000) for _ in range(6)]


def test_one_party_does_not_pay_for_another() -> None:
    """Each has a bucket of its own."""
    throttle = Throttle(1, 1)
    assert [0, 1, 0] == [throttle.take(party, 0) for party in ("a", "a", "b")]


def test_what_is_given_back_was_not_taken() -> None:
    """It can be had again at once; a bucket holds no more than its size, and none is made."""
    throttle = Throttle(1, 2)
    throttle.give_back("a")
    assert [0, 0, 1] == [throttle.take("a", 0) for _ in range(3)]
    throttle.give_back("a")
    assert [0, 1] == [throttle.take("a", 0) for _ in range(2)]
    for _ in range(5):
        throttle.give_back("a")
    assert [0, 0, 1] == [throttle.take("a", 0) for _ in range(3)]


@given(st.lists(st.integers(0, 5_000), max_size=200))
def test_never_more_than_the_burst_and_the_rate(steps_ms: list[int]) -> None:
    """Whatever the times of asking: at most the bucket's size and what flowed in since."""
    throttle, now_ms, taken = Throttle(3, 4), 0, 0
    for step_ms in steps_ms:
        now_ms += step_ms
        taken += throttle.take("a", now_ms / 1_000) == 0
        assert taken * 1_000 <= 4_000 + 3 * now_ms + 1


def test_invented_parties_do_not_fill_the_memory() -> None:
    """As many as there is room for; the one that was silent longest goes first."""
    throttle = Throttle(1, 1)
    for number in range(3 * MOST_PARTIES):
        throttle.take(str(number), 0)
        throttle.take("steady", 0)
    assert MOST_PARTIES == len(throttle._levels)
    assert throttle.take("steady", 0) > 0


def test_a_cache_forgets_its_oldest() -> None:
    """Not everything at once: a flood does not empty it for those who come again."""
    cache: dict[str, int] = {}
    for number in range(MOST_PARTIES + 5):
        keep_newest(cache, str(number), number)
        keep_newest(cache, "kept", number)
    assert MOST_PARTIES == len(cache)
    assert {"kept", str(MOST_PARTIES + 4)} <= set(cache)
    assert "0" not in cache


@pytest.mark.parametrize(
    ("address", "party"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        (None, "unknown"),
        ("testclient", "unknown"),
        ("1" * 1_000_000, "unknown"),
    ],
)
def test_a_party_is_whoever_has_the_address(address: str | None, party: str) -> None:
    """A household's IPv6 network is one party: it has 2^64 addresses to choose from."""
    assert party == party_of(address)
