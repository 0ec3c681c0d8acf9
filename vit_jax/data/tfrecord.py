"""TFRecord files without TensorFlow: records between checksums, which numpy verifies."""

import functools
import os
import struct
from collections.abc import Iterator

import numpy as np

_LANE = 1024  # bytes that are summed in one go
_START = bytes.fromhex("54641f64")  # brings the sum from 0 to 0xffffffff, where CRC-32C begins


def read_tfrecord(path: str | os.PathLike) -> Iterator[bytes]:
    """Yields the records of a file, each checked against its checksum.

    Raises OSError with the file and the byte where it is cut off or damaged.
    """
    with open(path, "rb") as file:
        while header := file.read(12):
            start = file.tell() - len(header)
            (size,) = struct.unpack("<Q", _checked(header, 8, path, start))
            yield _checked(file.read(size + 4), size, path, start)


def _checked(block: bytes, size: int, path: str | os.PathLike, start: int) -> bytes:
    """The first `size` bytes of `block`, which the four behind them vouch for."""
    if len(block) != size + 4:
        raise OSError(f"{os.fspath(path)} is cut off in the record at byte {start}")
    data, (stored,) = block[:size], struct.unpack("<I", block[size:])
    crc = crc32c(data)
    # TFRecord stores a rotated sum, so that a record of records does not vouch for itself.
    if stored != ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF:
        raise OSError(f"{os.fspath(path)} is damaged in the record at byte {start}")
    return data


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of `data`.

    Byte by byte, Python would take a tenth of a second for each megabyte. But the sum is linear
    over bits: what a byte adds depends on its value and its distance from the end, and is looked up
    for all bytes of a lane at once. Then lanes are joined in pairs: the left sum is moved past the
    bytes of the right one, and both are added.
    """
    values = np.frombuffer(_START + data, np.uint8)
    lanes = 1 << (-(-values.size // _LANE) - 1).bit_length()
    padded = np.zeros(lanes * _LANE, np.int32)  # zeros in front leave the sum at 0
    padded[-values.size :] = values
    padded = padded.reshape(lanes, _LANE) + 256 * np.arange(_LANE - 1, -1, -1, dtype=np.int32)
    crc = np.bitwise_xor.reduce(_byte_tables().ravel()[padded], axis=1)  # [lanes]
    moved = _LANE
    while crc.size > 1:
        crc = _move(crc[0::2], moved) ^ crc[1::2]
        moved *= 2
    return int(crc[0]) ^ 0xFFFFFFFF


def _move(crc: np.ndarray, num_bytes: int) -> np.ndarray:
    """What the sums are `num_bytes` (a power of two, a lane or more) zero bytes later."""
    tables = _move_tables(num_bytes)
    bytes_ = ((crc >> 8 * byte) & 0xFF for byte in range(4))
    return functools.reduce(
        np.bitwise_xor, (table[byte] for table, byte in zip(tables, bytes_, strict=True))
    )


@functools.cache
def _move_tables(num_bytes: int) -> np.ndarray:
    """[4, 256]: what each value of each byte of a sum becomes `num_bytes` zero bytes later."""
    if num_bytes == _LANE:
        return _byte_tables()[-1:-5:-1]  # a sum's lowest byte is the first to go
    return _move(_move_tables(num_bytes // 2), num_bytes // 2)


@functools.cache
def _byte_tables() -> np.ndarray:
    """[_LANE, 256] uint32: what each byte value adds to the sum that many bytes later."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    tables = [table]
    while len(tables) < _LANE:
        tables.append(table[tables[-1] & 0xFF] ^ (tables[-1] >> 8))
    return np.stack(tables)
