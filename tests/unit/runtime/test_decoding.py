"""Decoding is bounded for every codec, and garbage is named."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import cramjam
import pytest
from aiokafka.codec import (
    gzip_encode,
    lz4_encode,
    snappy_encode,
    zstd_encode,
)
from aiokafka.record.default_records import (
    DefaultRecordBase,
    DefaultRecordBatch,
    _DefaultRecordBatchBuilderPy,
)

from runtime.decoding import _DECODERS, MOST_PARTS, TooLarge, Undecodable, bound_decoding, budget

CODECS = {
    "gzip": DefaultRecordBase.CODEC_GZIP,
    "snappy": DefaultRecordBase.CODEC_SNAPPY,
    "lz4": DefaultRecordBase.CODEC_LZ4,
    "zstd": DefaultRecordBase.CODEC_ZSTD,
}
ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip_encode,
    "snappy": snappy_encode,
    "lz4": lz4_encode,
    "zstd": zstd_encode,
}
MANY = bytes(range(256)) * 4096


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> str:
    """Each codec that Kafka has."""
    bound_decoding()
    name: str = request.param
    return name


def test_what_fits_is_decoded_and_one_byte_more_is_too_large(codec: str) -> None:
    """The bound is exact, and the budget is shared by all that is decoded within it."""
    encoded = ENCODERS[codec](MANY)
    decode = _DECODERS[codec]
    with budget(2 * len(MANY)):
        assert MANY == decode(encoded)
        assert MANY == decode(encoded)
        with pytest.raises(TooLarge):
            decode(ENCODERS[codec](b"x"))
    with budget(len(MANY) - 1), pytest.raises(TooLarge, match=f"more than {len(MANY) - 1} bytes"):
        decode(encoded)


def test_garbage_and_what_is_cut_off_are_undecodable(codec: str) -> None:
    """Whatever a codec raises, it is one kind of trouble, and it is not too large."""
    encoded = ENCODERS[codec](MANY)
    for broken in (b"\xff" * 64, encoded[: len(encoded) // 2]):
        with pytest.raises(Undecodable) as raised:
            _DECODERS[codec](broken)
        assert not isinstance(raised.value, TooLarge)


def test_aiokafka_decodes_batches_within_the_budget(codec: str) -> None:
    """The replaced functions are those that its compiled batches call."""
    builder = _DefaultRecordBatchBuilderPy(2, CODECS[codec], 0, -1, -1, 0, 10_000_000)
    builder.append(0, None, b"k", MANY, [])
    raw = bytes(builder.build())
    [record] = DefaultRecordBatch(raw)
    assert MANY == record.value
    with budget(len(MANY)), pytest.raises(TooLarge):
        list(DefaultRecordBatch(raw))


def test_raw_snappy_and_several_gzip_members_are_read_whole() -> None:
    """Both forms that clients write."""
    assert MANY == _DECODERS["snappy"](bytes(cramjam.snappy.compress_raw(MANY)))
    two = gzip.compress(b"one") + gzip.compress(b"two") + b"\x00\x00"
    assert b"onetwo" == _DECODERS["gzip"](two)
    with budget(5), pytest.raises(TooLarge):
        _DECODERS["gzip"](two)


def test_gzip_in_too_many_parts_is_undecodable() -> None:
    """Each part costs as much as all that follow it: megabytes of them would take a minute."""
    part = gzip.compress(b"x")
    assert MOST_PARTS * b"x" == _DECODERS["gzip"](MOST_PARTS * part)
    with pytest.raises(Undecodable, match=f"more than {MOST_PARTS} parts"):
        _DECODERS["gzip"]((MOST_PARTS + 1) * part)


def test_a_snappy_block_of_negative_length_is_undecodable() -> None:
    """It would be read for ever."""
    header = snappy_encode(b"x")[:16]
    with pytest.raises(Undecodable, match="negative length"):
        _DECODERS["snappy"](header + b"\xff\xff\xff\xf0")
