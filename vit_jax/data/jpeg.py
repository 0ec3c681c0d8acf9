"""Less JPEG to decode: of the bytes of a file, a smaller file that still holds a window of it.

Decoders cannot jump into the entropy-coded data of a JPEG, which is four fifths of the work of
decoding an ordinary photograph. But they stop where the header says that the image ends: so a file
cut at the window's last row is decoded no further. And restart markers are places to jump to: the
intervals between them stand by themselves, so where they divide each row of blocks into tiles, the
tiles around a window are put together to a file of their own. In both cases the pixels of the
window are those of the whole image, exactly.

Structure and names are those of ITU-T T.81 (1992), annexes B (markers) and F.1.2 (what a restart
resets).
"""

import shutil
import struct
import subprocess
from typing import NamedTuple

import numpy as np

Window = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

TILE = 64
"""A tile's width in pixels, where the image's own width can be divided so."""

_SOF0, _DRI, _SOS, _EOI, _APP9 = 0xC0, 0xDD, 0xDA, 0xD9, 0xE9
_INDEX = b"vit_jax tiles\0"  # begins the segment that says where tiles end; others pass over it
_OTHER_FRAMES = {*range(0xC1, 0xD0)} - {0xC4, 0xC8, 0xCC}  # progressive, arithmetic, lossless, …


class Layout(NamedTuple):
    """What the header of a baseline JPEG says about where its pixels are."""

    height: int
    width: int
    mcu_height: int
    """Of a minimum coded unit, in pixels: 8 or 16."""
    mcu_width: int
    interval: int
    """Coded units between two restart markers; 0 if there are none."""
    index: int
    """Offset of the list of tiles' ends; 0 if there is none."""
    frame: int
    """Offset of the image's height in the bytes; its width follows."""
    scan: int
    """Offset of the entropy-coded data."""

    @property
    def rows(self) -> int:
        """Of coded units."""
        return -(-self.height // self.mcu_height)

    @property
    def columns(self) -> int:
        """Of coded units."""
        return -(-self.width // self.mcu_width)


def layout(data: bytes) -> Layout | None:
    """Reads the header of a baseline JPEG of one scan; None for every other one, broken or not."""
    at, frame, interval, index = 2, None, 0, 0
    try:
        while data[at] == 0xFF:
            marker, length = struct.unpack_from(">BH", data, at + 1)
            if marker == _SOF0:
                frame = at + 5
            elif marker == _DRI:
                (interval,) = struct.unpack_from(">H", data, at + 4)
            elif marker == _APP9 and data.startswith(_INDEX, at + 4):
                index = at + 4 + len(_INDEX)
            elif marker in _OTHER_FRAMES:
                return None
            elif marker == _SOS:
                return None if frame is None else _layout(data, frame, interval, index, at)
            at += 2 + length
    except (IndexError, struct.error):  # cut short
        pass
    return None


def _layout(data: bytes, frame: int, interval: int, index: int, scan: int) -> Layout | None:
    height, width, count = struct.unpack_from(">HHB", data, frame)
    if not height or not width or data[scan + 4] != count or count not in (1, 3):
        return None  # its height comes later, or it has several scans
    # A component: its number, how often it is sampled across and down, its table.
    across, down = divmod(data[frame + 6], 16)
    if count == 1:
        across = down = 1
    elif data[frame + 9] != 0x11 or data[frame + 12] != 0x11 or not {across, down} <= {1, 2}:
        return None
    (length,) = struct.unpack_from(">H", data, scan + 2)
    return Layout(height, width, 8 * down, 8 * across, interval, index, frame, scan + 2 + length)


class Cut(NamedTuple):
    """A smaller file, and where its first pixel was in the whole one."""

    data: bytes | np.ndarray
    top: int
    left: int
    height: int
    width: int
    ends_early: bool
    """Whether data are left over behind the last row, of which decoders warn."""


def cut(data: bytes, found: Layout, window: Window, *, margin: int) -> Cut | None:
    """The least file around a window; None where that is the whole.

    Args:
      data: of a JPEG.
      found: its layout.
      window: inside the image.
      margin: how many pixels around the window decoding looks at: those of one colour sample, times
        the factor by which it is decoded smaller. (To the left four times that: libjpeg-turbo does
        not smooth the colours of images that are very narrow.)

    That a marker stands where each tile ends is checked: if not, no tile is cut out, so that
    whoever decodes all of them may judge.
    """
    top, left, height, width = window
    bottom, right = top + height + margin, left + width + margin
    if found.index and found.interval and found.columns % found.interval == 0:
        tile = found.interval * found.mcu_width
        rows = max(top - margin, 0) // found.mcu_height, -(-bottom // found.mcu_height)
        columns = max(left - 4 * margin, 0) // tile, -(-right // tile)
        return _cut_tiles(data, found, rows, columns)
    if bottom >= found.height:
        return None
    sides = struct.pack(">H", bottom)
    shorter = data[: found.frame] + sides + data[found.frame + 2 :]
    return Cut(shorter, 0, 0, bottom, found.width, True)


def _cut_tiles(
    data: bytes, found: Layout, rows: tuple[int, int], columns: tuple[int, int]
) -> Cut | None:
    """The file of the tiles in some rows (of coded units) and columns (of tiles)."""
    across, tile = found.columns // found.interval, found.interval * found.mcu_width
    (first, last), (begin, end) = rows, columns
    last, end = min(last, found.rows), min(end, across)
    if (last - first, end - begin) == (found.rows, across):
        return None
    coded = np.frombuffer(data, np.uint8)
    count = found.rows * across
    if found.index + 4 * count > found.scan:
        return None
    stops = found.scan + np.frombuffer(data, "<u4", count, found.index).astype(np.int64)
    if not _in_order(coded, stops):
        return None
    starts = np.concatenate([[found.scan], stops[:-1] + 2]).reshape(found.rows, across)
    starts, stops = starts[first:last, begin], stops.reshape(found.rows, across)[first:last]
    stops = stops[:, begin:end]
    lengths = stops[:, -1] + 2 - starts
    offsets = found.scan + np.cumsum(lengths) - lengths  # where each row begins in the new file
    out = np.empty(found.scan + lengths.sum(), np.uint8)
    out[: found.scan] = coded[: found.scan]
    rows = zip(starts.tolist(), lengths.tolist(), offsets.tolist(), strict=True)
    for start, length, offset in rows:
        out[offset : offset + length] = coded[start : start + length]
    markers = (stops + (offsets - starts)[:, None]).ravel()
    out[markers + 1] = 0xD0 + np.arange(len(markers)) % 8  # they count, and the decoder checks
    out[-1] = _EOI
    height = min(last * found.mcu_height, found.height) - first * found.mcu_height
    width = min(end * tile, found.width) - begin * tile
    out[found.frame : found.frame + 4] = np.array([height, width], ">u2").view(np.uint8)
    return Cut(out, first * found.mcu_height, begin * tile, height, width, False)


def _in_order(coded: np.ndarray, stops: np.ndarray) -> bool:
    """Whether restart markers stand at these offsets, as they count, and the end at the last."""
    if (np.diff(stops) < 2).any() or stops[-1] + 2 > len(coded):
        return False
    kinds = 0xD0 + np.arange(len(stops)) % 8
    kinds[-1] = _EOI
    return bool((coded[stops] == 0xFF).all() and (coded[stops + 1] == kinds).all())


def tiled(data: bytes) -> bytes | None:
    """The same JPEG with a restart marker about every TILE pixels, and their list, by `jpegtran`.

    Not one coefficient changes, and 110 KB become about 1.5 KB larger. None where it cannot be
    done: what is no JPEG, has several scans that jpegtran would keep, or too many tiles.

    Raises FileNotFoundError if `jpegtran` is not installed.
    """
    found = layout(data)
    if found is None:
        return None
    program = shutil.which("jpegtran")
    if program is None:
        raise FileNotFoundError(
            "jpegtran is not installed (Debian: libjpeg-turbo-progs); choose another store"
        )
    command = [program, "-copy", "all", "-restart", f"{tile_interval(found)}B"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    return with_index(done.stdout) if done.returncode == 0 else None


def tile_interval(found: Layout) -> int:
    """Coded units in a tile: the most that make up at most TILE pixels and divide each row."""
    most = min(TILE // found.mcu_width, found.columns)
    return max(number for number in range(1, most + 1) if found.columns % number == 0)


def with_index(data: bytes) -> bytes | None:
    """Writes into a JPEG where its tiles end; None if its restart markers do not make tiles."""
    found = layout(data)
    if found is None or found.index or not found.interval or found.columns % found.interval:
        return None
    coded = np.frombuffer(data, np.uint8, offset=found.scan)
    stops = np.flatnonzero(coded[:-1] == 0xFF)
    stops = stops[coded[stops + 1] != 0]  # a zero says that the 0xFF before it is data
    stops = stops[: found.rows * found.columns // found.interval]
    if len(stops) * found.interval != found.rows * found.columns or not _in_order(coded, stops):
        return None
    content = _INDEX + stops.astype("<u4").tobytes()
    if len(content) + 2 > 0xFFFF:
        return None
    # Just before the scan: what came first in the file has to stay first.
    begin = data.rindex(b"\xff\xda", 0, found.scan)
    return (
        data[:begin] + struct.pack(">BBH", 0xFF, _APP9, len(content) + 2) + content + data[begin:]
    )
