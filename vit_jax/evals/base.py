"""The seam between an evaluation and whoever runs it: a training loop, or a sweep."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from vit_jax.data.augment import make_augmentation
from vit_jax.data.feed import WHOLE, Feed
from vit_jax.data.loader import Loader, make_eval_loader
from vit_jax.data.sources import dataset_info
from vit_jax.features import Features, extract
from vit_jax.functional import Functional

Put = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


class Value(NamedTuple):
    """A number with the count of examples it was computed on, and perhaps a 95% interval."""

    metric: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None


class Scores(NamedTuple):
    """What an evaluation found.

    Attributes:
      values: numbers for tables.
      artefacts: vectors, matrices and pictures for the report; plain JSON.
    """

    values: list[Value]
    artefacts: dict[str, Any]


class Reader(Protocol):
    """Where an evaluation gets what it scores."""

    model: Functional

    def features(self, evaluation: "Evaluation", split: str) -> Features:
        """The features that `evaluation.wants` of a split."""


KEPT_BYTES = 1 << 28  # a split whose batches are no larger is decoded once


class Batches:
    """A loader's batches, kept after the first pass where they are few: decoding is not repeated.

    Args:
      loader: see `make_eval_loader`.
      kept: split -> what was kept, of one evaluation.
      split: of the loader.
    """

    def __init__(self, loader: Loader, kept: "dict[str, Batches]", split: str):
        self.source, self._loader, self._kept, self._split = loader.source, loader, kept, split
        self._batches: list[dict[str, np.ndarray]] = []

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        if self._kept.get(self._split) is self:
            yield from self._batches
            return
        size = 0
        for batch in self._loader:
            size += sum(value.nbytes for value in batch.values())
            if size <= KEPT_BYTES:
                self._batches.append(batch)
            yield batch
        if size <= KEPT_BYTES:
            self._kept[self._split] = self


@dataclasses.dataclass(kw_only=True, eq=False)
class Evaluation:
    """A labelled dataset, and how images become what the model wants.

    A protocol is a subclass with its own settings, `wants` and `measure`.

    Args:
      dataset: name of a prepared dataset.
      split: that is scored.
      data_dir: where it lies.
      augment: the evaluation's own recipe, {'name': …, …}.
      batch_size: global; the last batch is padded, as is any that the devices do not divide.
      num_workers, strict: see `data.loader`.
      feed: which examples of each batch this process brings; all by default.

    Attributes:
      info: of the dataset.
      wants: split -> names of features, see `vit_jax/features.py`.
      FILES: which settings are paths of files whose content decides the result.
    """

    FILES = ()

    dataset: str
    split: str = "test"
    data_dir: str = "data"
    augment: Mapping[str, Any]
    batch_size: int
    num_workers: int = 0
    strict: bool = False
    feed: Feed = WHOLE

    def __post_init__(self):
        self._kept: dict[str, Batches] = {}
        self._opened: dict[str, Loader] = {}  # for the first pass: opening takes 15 ms
        self.info = dataset_info(self.dataset, data_dir=self.data_dir)
        self.wants: dict[str, tuple[str, ...]] = {}
        self.check_split(self.split)

    def check_split(self, split: str) -> None:
        """Raises what does not fit now, and not after hours of training."""
        self._opened[split] = self._open(split).check()

    def loader(self, split: str) -> Batches:
        """This process's part of every example of a split, once."""
        if split in self._kept:
            return self._kept[split]
        loader = self._opened.pop(split, None) or self._open(split)
        return Batches(loader, self._kept, split)

    def _open(self, split: str) -> Loader:
        return make_eval_loader(
            name=self.dataset,
            split=split,
            data_dir=self.data_dir,
            augment=make_augmentation(**self.augment),
            batch_size=self.feed.whole(self.batch_size),
            num_workers=self.num_workers,
            strict=self.strict,
            slots=self.feed.slots(self.feed.whole(self.batch_size)),
        )

    def read(self, reader: Reader, split: str) -> Features:
        """The features of a split.

        Raises:
          ValueError: some of them are not finite: the numbers made of them would mean nothing.
        """
        found = reader.features(self, split)
        for name in self.wants[split]:
            if bad := num_not_finite(found.values[name]):
                raise ValueError(
                    f"{type(self).__name__} on {self.dataset}/{split}: {name!r} is not finite for "
                    f"{bad} of {len(found.label)} examples; the weights, or their precision, are "
                    "at fault: evaluate another checkpoint."
                )
        return found

    def measure(self, reader: Reader) -> Scores:
        """Scores what the reader gives."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing.")

    def run(
        self,
        model: Functional,
        *,
        put: Put,
        check_stop: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Evaluates a model in a training loop.

        Args:
          model: its parameters on the devices.
          put: places a host batch on the devices.
          check_stop: called at every batch; may raise to give up.

        Returns:
          The values by metric, and `count` of the first; of a metric that was computed on another
          number of examples, `<metric>_count` too.
        """
        scores = self.measure(Live(model, put, check_stop))
        count = scores.values[0].count
        results = {value.metric: value.value for value in scores.values}
        others = {f"{x.metric}_count": x.count for x in scores.values if x.count != count}
        return results | others | {"count": count}


def check_numbers(
    name: str, values: Any, *, least: float = 0, above: bool = False, whole: bool = False
) -> None:
    """Raises ValueError unless a setting is a list of different finite numbers.

    Args:
      name: of the setting.
      values: that it was given.
      least: of them.
      above: whether they must be above that.
      whole: whether they must be integers.
    """
    kinds = (int,) if whole else (int, float)
    good = isinstance(values, (list, tuple)) and len(values) > 0 and len(set(values)) == len(values)
    for value in values if good else ():
        good &= isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        good = good and (value > least if above else value >= least)
    if not good:
        kind = "integers" if whole else "numbers"
        bound = f"above {least}" if above else f"of at least {least}"
        raise ValueError(f"{name}={values!r} must be a list of different {kind} {bound}.")


def num_not_finite(values: np.ndarray) -> int:
    """How many rows hold a number that is not finite; in pieces, as they may be on disk."""
    count = 0
    for start in range(0, len(values), 8192):
        finite = np.isfinite(values[start : start + 8192])
        count += int((~finite.all(axis=tuple(range(1, finite.ndim)))).sum())
    return count


class Live:
    """Reads from a model at hand; nothing is kept."""

    def __init__(self, model: Functional, put: Put, check_stop: Callable[[], None]):
        self.model, self._put, self._check_stop = model, put, check_stop

    def features(self, evaluation: Evaluation, split: str) -> Features:
        """See `Reader`."""
        options = {"put": self._put, "check_stop": self._check_stop}
        return extract(self.model, evaluation.loader(split), evaluation.wants[split], **options)
