"""Chunks compressed with zstd (RFC 8878), and decompressed under a cap."""

from __future__ import annotations

from gossamer.errors import Dropped

LEVEL = 1  # float32 parameters are hardly smaller at higher ones


def compress(data: bytes) -> bytes:
    """Return one frame of zstd that says how large its content is."""
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def decompress(packed: memoryview, max_bytes: int) -> memoryview:
    """Return the content of one frame of zstd; nothing is allocated before its size is known to be within the cap.

    Raises:
        Dropped: it is malformed, does not say its size, or is larger than `max_bytes`.
    """
    import zstandard

    try:
        size = zstandard.get_frame_parameters(packed).content_size
        if size > max_bytes:  # also where it is not said: 2^64 - 1
            raise Dropped("too much data")
        if not size:  # or a node could send these without end
            raise Dropped("malformed compression")
        return memoryview(zstandard.ZstdDecompressor().decompress(packed))
    except zstandard.ZstdError:
        raise Dropped("malformed compression") from None
