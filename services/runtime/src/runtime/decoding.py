"""How large compressed records may become: decoding that is bounded, in place of aiokafka's.

Theory. A batch of 1 MiB may stand for a thousand times as many bytes. aiokafka decodes it whole
before anybody has seen a record, so the process would die before an attempt is marked, and again
after each start. Here the functions that aiokafka decodes with are replaced, once for the process,
by ones that never make more than is allowed: by default what one batch may have, and less within a
`budget`, which all batches share that are decoded while it holds.

Refusals: `Undecodable`, also for bytes that are not what their batch says.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Final

import aiokafka.record._crecords.default_records as fast_records
import aiokafka.record._crecords.legacy_records as fast_legacy_records
import aiokafka.record.default_records as slow_records
import aiokafka.record.legacy_records as slow_legacy_records
import cramjam

BATCH_DECODED_BYTES: Final = 64 * 1024 * 1024
"""No client makes a larger batch by itself: their limits, about 1 MiB, are of what is decoded, or
of an estimate of it by the ratio at which the batches before it were compressed."""

MOST_PARTS: Final = 1_000
"""Members of one gzip stream: each is found by copying all that follows it. Clients write one."""

_FIRST_GUESS: Final = 16
_LEAST_GUESS: Final = 256 * 1024
_XERIAL: Final = b"\x82SNAPPY\x00"
_XERIAL_HEADER: Final = 16
_BLOCK: Final = struct.Struct(">i")
_GZIP: Final = 31
_BUFFER_IS_FULL: Final = "failed to write whole buffer"


class Undecodable(Exception):
    """Compressed records are not what they say, or larger than is allowed."""


class TooLarge(Undecodable):
    """Decoded, these records would have more bytes than is allowed."""

    def __init__(self, most_bytes: int) -> None:
        """Say what was allowed."""
        super().__init__(f"decoded, it has more than {most_bytes} bytes")


class _Budget:
    """How many bytes may still be decoded."""

    def __init__(self, most_bytes: int) -> None:
        self.left_bytes = most_bytes


# Of the task that decodes: what others decode meanwhile is not its business.
_BUDGET: Final = ContextVar[_Budget]("decoding budget")


@contextlib.contextmanager
def budget(most_bytes: int) -> Iterator[None]:
    """Allow no more than this to be decoded by this task, in all, until the block ends."""
    token = _BUDGET.set(_Budget(most_bytes))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def bound_decoding() -> None:
    """Have aiokafka decode with the functions below; once is enough, and more does no harm."""
    for module in (fast_records, fast_legacy_records, slow_records, slow_legacy_records):
        for name, decode in _DECODERS.items():
            setattr(module, f"{name}_decode", decode)


def _bounded(decode: Callable[[bytes, int], bytes | None]) -> Callable[[bytes], bytes]:
    """Make a decoder as aiokafka calls it: of bytes alone, raising nothing but `Undecodable`.

    `decode` returns None for what would be too large.
    """

    def decode_within_budget(payload: bytes) -> bytes:
        allowed = _BUDGET.get(None) or _Budget(BATCH_DECODED_BYTES)
        try:
            decoded = decode(payload, allowed.left_bytes)
        except (cramjam.DecompressionError, zlib.error, struct.error, ValueError) as error:
            raise Undecodable(f"its compressed bytes cannot be read: {error}") from error
        if decoded is None:
            raise TooLarge(allowed.left_bytes)
        allowed.left_bytes -= len(decoded)
        return decoded

    return decode_within_budget


def _gunzip(payload: bytes, most_bytes: int) -> bytes | None:
    parts: list[bytes] = []
    size, rest = 0, bytes(payload)
    # Members may follow one another; zeros behind the last one are padding.
    while rest:
        if len(parts) == MOST_PARTS:
            raise ValueError(f"it has more than {MOST_PARTS} parts")
        member = zlib.decompressobj(_GZIP)
        # One byte more than is allowed tells too large from just large enough.
        part = member.decompress(rest, most_bytes - size + 1)
        size += len(part)
        if size > most_bytes:
            return None
        if not member.eof:
            raise ValueError("it is cut off")
        parts.append(part)
        rest = member.unused_data.lstrip(b"\x00")
    return b"".join(parts)


def _unsnap(payload: bytes, most_bytes: int) -> bytes | None:
    if bytes(payload[: len(_XERIAL)]) != _XERIAL:
        return _unsnap_block(payload, most_bytes)
    parts: list[bytes] = []
    size, at = 0, _XERIAL_HEADER
    while at < len(payload):
        (length,) = _BLOCK.unpack_from(payload, at)
        if length < 0:
            raise ValueError("a block has a negative length")
        at += _BLOCK.size
        part = _unsnap_block(payload[at : at + length], most_bytes - size)
        if part is None:
            return None
        size += len(part)
        parts.append(part)
        at += length
    return b"".join(parts)


def _unsnap_block(block: bytes, most_bytes: int) -> bytes | None:
    # The length stands before the data, and what is decoded never grows beyond it.
    if cramjam.snappy.decompress_raw_len(block) > most_bytes:
        return None
    return bytes(cramjam.snappy.decompress_raw(block))


def _unlz4(payload: bytes, most_bytes: int) -> bytes | None:
    return _decompress_into(cramjam.lz4.decompress_into, payload, most_bytes)


def _unzstd(payload: bytes, most_bytes: int) -> bytes | None:
    return _decompress_into(cramjam.zstd.decompress_into, payload, most_bytes)


def _decompress_into(
    decompress: Callable[[bytes, bytearray], int], payload: bytes, most_bytes: int
) -> bytes | None:
    """Decode into as many bytes as are likely to do, else into as many as are allowed."""
    guess = max(_FIRST_GUESS * len(payload), _LEAST_GUESS)
    for room in (min(guess, most_bytes), most_bytes):
        buffer = bytearray(room)
        try:
            length = decompress(payload, buffer)
        except cramjam.DecompressionError as error:
            if _BUFFER_IS_FULL not in str(error):
                raise
        else:
            return bytes(memoryview(buffer)[:length])
    return None


_DECODERS: Final = {
    "gzip": _bounded(_gunzip),
    "snappy": _bounded(_unsnap),
    "lz4": _bounded(_unlz4),
    "zstd": _bounded(_unzstd),
}
