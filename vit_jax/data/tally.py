"""What is learnt of a dataset while its examples pass by: counts, fingerprint, mean, deviation."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.ingest import is_png

MAX_MEASURED = 50_000
"""Mean and deviation are over all training images up to this many; of more, over an even sample."""


class Measured(NamedTuple):
    """What is learnt of one image."""

    digest: bytes
    num_pixels: int
    total: np.ndarray
    """[3] int64: the sum over pixels of each channel."""
    squares: np.ndarray
    """[3] int64: the sum of their squares."""


class Tally:
    """Counts, fingerprint, mean and deviation of examples that pass by in order."""

    def __init__(self, class_names: Sequence[str], *, num_train: int):
        self._class_names = list(class_names)
        self._counts: dict[str, list[int]] = {}
        self._digests: dict[str, Any] = {}
        self._stride = -(-num_train // MAX_MEASURED)
        self._num_train = self._num_measured = self._num_pixels = 0
        self._total = [0, 0, 0]
        self._squares = [0, 0, 0]

    def add(self, split: str, label: int, measured: Measured) -> None:
        """Counts the next example of a split."""
        counts = self._counts.setdefault(split, [0] * len(self._class_names))
        counts[label] += 1
        digest = self._digests.setdefault(split, hashlib.sha256())
        digest.update(measured.digest + label.to_bytes(8, "little"))
        if split != "train":
            return
        if self._num_train % self._stride == 0 and measured.num_pixels:
            self._num_measured += 1
            self._num_pixels += measured.num_pixels
            for channel in range(3):  # Python's integers: exact, whatever the order
                self._total[channel] += int(measured.total[channel])
                self._squares[channel] += int(measured.squares[channel])
        self._num_train += 1

    def result(self, notes: Sequence[str] = ()) -> dict[str, Any]:
        """The fields of `Prepared` that are known by now."""
        fingerprint = hashlib.sha256(json.dumps(self._class_names).encode())
        for split in sorted(self._digests):
            fingerprint.update(f"{split} {sum(self._counts[split])} ".encode())
            fingerprint.update(self._digests[split].digest())
        mean = std = None
        if self._num_pixels:
            means = [total / self._num_pixels for total in self._total]
            squares = [square / self._num_pixels for square in self._squares]
            mean = [value / 255 for value in means]
            std = [
                max(0.0, square - value**2) ** 0.5 / 255
                for square, value in zip(squares, means, strict=True)
            ]
        return {
            "fingerprint": fingerprint.hexdigest(),
            "class_names": self._class_names,
            "class_counts": self._counts,
            "mean": mean,
            "std": std,
            "num_measured": self._num_measured,
            "notes": [*notes, *self._gaps()],
        }

    def _gaps(self) -> Iterator[str]:
        for split, counts in self._counts.items():
            absent = [
                name for name, count in zip(self._class_names, counts, strict=True) if not count
            ]
            if absent:
                yield f"{split} has no example of {len(absent)} classes: {', '.join(absent)}"
        if "train" not in self._counts:
            yield "there is no train split: this dataset is for evaluation"


def measure(data: bytes, pixels: np.ndarray | None) -> Measured:
    """Measures `data`, decoded to uint8 [height, width, 3], or None where that is impossible.

    Where only pixels are kept, `data` is empty.
    """
    if pixels is None:
        nothing = np.zeros(3, np.int64)
        return Measured(hashlib.sha256(data).digest(), 0, nothing, nothing)
    if not data or is_png(data):  # the same pixels are other bytes under another zlib
        digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
    else:
        digest = hashlib.sha256(data).digest()
    flat = pixels.reshape(-1, 3)
    squares = np.einsum("pc,pc->c", flat, flat, dtype=np.int64)
    return Measured(digest, len(flat), flat.sum(axis=0, dtype=np.int64), squares)
