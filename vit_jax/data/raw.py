"""Datasets of decoded images that are read by memory map: much disk for little work.

A version folder holds `raw.json` and for each split

- `<name>-<split>.raw-00000`, …: the pixels of image after image, uint8 [height, width, 3];
- `<name>-<split>.rows`: for each image, in order, a `ROW` that says where and what it is;
- `<name>-<split>.names`: the names of the files that the images came from, one after another.

`raw.json` has the size of every file, and the checksums (CRC-32) of rows, names and itself. Sizes
and those three are checked when a split is opened, and so are the images of its first
CHECKED_BYTES; the others when a process reads them for the first time. What differs is a
`CorruptStoreError`, which ends a run: unlike one broken image in a JPEG dataset it says that the
disk, or who wrote to it, cannot be trusted.

TFDS does not read this form. `vit_jax.data.sources` does, as any other dataset.
"""

import dataclasses
import functools
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from vit_jax.paths import in_bucket

HEAD = "raw.json"
FORMAT = "vit_jax raw 2"

ROW = np.dtype(
    [
        ("file", "<u4"),
        ("checksum", "<u4"),
        ("offset", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("label", "<i8"),
        ("name_end", "<i8"),
    ]
)
"""Of an image: number of its file, CRC-32 of its pixels, their offset; where its name ends."""

CHECKED_BYTES = 256 << 20
"""Of a split, when it is loaded: a tenth of a second, and all of a small dataset."""

_SHARD_BYTES = 1 << 30


class CorruptStoreError(ValueError):
    """A file of a raw dataset is not what its index says; the message names it."""


class RawWriter:
    """Writes the images of one split in order, in as many files as they need."""

    def __init__(self, folder: pathlib.Path, *, name: str, split: str):
        self.split = split
        self.shard_lengths: list[int] = []
        self._folder, self._prefix = folder, f"{name}-{split}"
        self._rows: list[tuple[int, ...]] = []
        self._names: list[bytes] = []
        self._name_end = self._room = self._offset = 0
        self._file: BinaryIO | None = None

    def write(self, image: np.ndarray, *, label: int, filename: bytes) -> None:
        """Appends an image, uint8 [height, width, 3]."""
        if self._room <= 0:
            self._next_shard()
        pixels = np.ascontiguousarray(image)
        self._file.write(pixels.data)
        self._name_end += len(filename)
        self._names.append(filename)
        height, width, _ = pixels.shape
        self._rows.append(
            (
                len(self.shard_lengths) - 1,
                zlib.crc32(pixels.data),
                self._offset,
                height,
                width,
                label,
                self._name_end,
            )
        )
        self.shard_lengths[-1] += 1
        self._offset += pixels.nbytes
        self._room -= pixels.nbytes

    def close(self) -> None:
        """Ends the last file, and writes rows and names."""
        if self._file is not None:
            self._file.close()
        (self._folder / f"{self._prefix}.rows").write_bytes(np.array(self._rows, ROW).tobytes())
        (self._folder / f"{self._prefix}.names").write_bytes(b"".join(self._names))

    def _next_shard(self) -> None:
        if self._file is not None:
            self._file.close()
        path = self._folder / f"{self._prefix}.raw-{len(self.shard_lengths):05d}"
        self._file = path.open("wb")
        self.shard_lengths.append(0)
        self._offset, self._room = 0, _SHARD_BYTES


def write_head(
    folder: pathlib.Path,
    *,
    name: str,
    version: str,
    writers: Sequence[RawWriter],
    class_names: Sequence[str],
) -> None:
    """Writes `raw.json` of the dataset `name` in `folder`, once all splits are closed."""
    splits = {}
    for writer in writers:
        prefix = f"{name}-{writer.split}"
        files = {
            path.name: {"bytes": path.stat().st_size} for path in sorted(folder.glob(f"{prefix}.*"))
        }
        for file in (f"{prefix}.rows", f"{prefix}.names"):
            files[file]["crc32"] = zlib.crc32((folder / file).read_bytes())
        splits[writer.split] = {"num_examples": sum(writer.shard_lengths), "files": files}
    head = {"format": FORMAT, "name": name, "version": version}
    head |= {"class_names": list(class_names), "splits": splits}
    head["crc32"] = _checksum(head)
    (folder / HEAD).write_text(json.dumps(head, indent=1))


def _checksum(head: dict[str, Any]) -> int:
    """Of what `raw.json` says beside it."""
    rest = {key: value for key, value in head.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def is_raw(folder: epath.Path) -> bool:
    """Whether a version folder holds a dataset of this form."""
    return (folder / HEAD).exists()


def read_head(folder: epath.Path) -> dict[str, Any]:
    """`raw.json`; ValueError if it is of another format, CorruptStoreError if it is damaged."""
    damaged = f"{folder / HEAD} is damaged"
    try:
        head = json.loads((folder / HEAD).read_bytes())
    except ValueError as error:  # neither JSON, nor text
        raise CorruptStoreError(f"{damaged} ({error}): prepare the dataset again") from error
    if not isinstance(head, dict) or "format" not in head:
        raise CorruptStoreError(f"{damaged}: prepare the dataset again")
    if head["format"] != FORMAT:
        raise ValueError(
            f"{folder / HEAD} says format {head.get('format')!r}, and {FORMAT!r} is read; "
            "prepare the dataset again"
        )
    if head.get("crc32") != _checksum(head):
        raise CorruptStoreError(f"{damaged}: not its own checksum; prepare the dataset again")
    return head


class RawSplit:
    """One split, by index: `{'image': uint8 [height, width, 3], 'label': int, 'filename': bytes}`.

    The image is a view of the file: nothing is read before its pixels are used, but for the
    checksum when a process meets it for the first time. Raises FileNotFoundError and
    CorruptStoreError.
    """

    def __init__(self, folder: epath.Path, split: str):
        if in_bucket(folder):
            raise ValueError(f"{folder}: a raw dataset is read from a disk; copy it to one")
        self._folder = pathlib.Path(os.fspath(folder))
        files = read_head(folder)["splits"][split]["files"]
        for name, found in files.items():
            self._check_size(self._folder / name, found["bytes"])
        rows = next(name for name in files if name.endswith(".rows"))
        self._rows = np.frombuffer(self._read(rows, files[rows]["crc32"]), ROW)
        self._check_rows(rows, [files[name]["bytes"] for name in sorted(files) if ".raw-" in name])
        names = rows.removesuffix(".rows") + ".names"
        self._names = self._read(names, files[names]["crc32"])
        self._files = [self._folder / name for name in sorted(files) if ".raw-" in name]
        self._seen = np.zeros(len(self._rows), bool)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index].item()
        file, checksum, offset, height, width, label, name_end = row
        size = height * width * 3
        pixels = self._maps[file][offset : offset + size]
        if not self._seen[index]:
            if zlib.crc32(pixels) != checksum:
                raise CorruptStoreError(
                    f"{self._files[file]} is damaged: image {index} at byte {offset:,} has not the "
                    "checksum that was taken when it was written; prepare the dataset again"
                )
            self._seen[index] = True
        begin = int(self._rows["name_end"][index - 1]) if index else 0
        image = pixels.reshape(height, width, 3)
        return {"image": image, "label": label, "filename": self._names[begin:name_end]}

    def verify(self, num_bytes: int) -> None:
        """Checks images from the first one on, until so many bytes have passed."""
        ends = np.cumsum(self._rows["height"].astype(np.int64) * self._rows["width"] * 3)
        for index in range(int(np.searchsorted(ends, num_bytes, "right"))):
            self[index]

    @functools.cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.asarray(np.memmap(path, np.uint8, "r")) for path in self._files]

    def _check_size(self, path: pathlib.Path, size: int) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: prepare the dataset again")
        if path.stat().st_size != size:
            raise CorruptStoreError(
                f"{path} has {path.stat().st_size:,} bytes and should have {size:,}; "
                "prepare the dataset again"
            )

    def _check_rows(self, name: str, sizes: list[int]) -> None:
        """That every image lies in one of the files of pixels, of these sizes."""
        number, offset = self._rows["file"].astype(np.int64), self._rows["offset"]
        height, width = (self._rows[side].astype(np.int64) for side in ("height", "width"))
        ends = np.array([*sizes, 0])[np.minimum(number, len(sizes))]
        good = (height > 0) & (width > 0) & (offset >= 0) & (offset + 3 * height * width <= ends)
        if not good.all():
            raise CorruptStoreError(
                f"{self._folder / name} is damaged: image {int(np.argmin(good))} lies outside of "
                "its file; prepare the dataset again"
            )

    def _read(self, name: str, checksum: int) -> bytes:
        data = (self._folder / name).read_bytes()
        if zlib.crc32(data) != checksum:
            raise CorruptStoreError(
                f"{self._folder / name} is damaged: its checksum is not that of {HEAD}; "
                "prepare the dataset again"
            )
        return data


@dataclasses.dataclass(frozen=True)
class Part:
    """Stretches of splits, one after another: what 'train[:90%]' or 'train+test' names."""

    stretches: tuple[tuple[RawSplit, int, int], ...]

    def verify(self, num_bytes: int) -> None:
        """As `RawSplit.verify`, for each split."""
        for split in {id(split): split for split, _, _ in self.stretches}.values():
            split.verify(num_bytes)

    def __len__(self) -> int:
        return sum(end - begin for _, begin, end in self.stretches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for split, begin, end in self.stretches:
            if index < end - begin:
                return split[begin + index]
            index -= end - begin
        raise IndexError(index)
