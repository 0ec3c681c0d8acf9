"""Batches of a source, by arithmetic: slot j of step n is position n·B + j of the stream.

Which example stands at a position, and how it is augmented, is a function of (seed, position)
(`order.py`). So batches do not depend on the number of processes, workers or threads, nor on where
reading starts, and a loader has no state to save.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from vit_jax.data.augment import Augmentation
from vit_jax.data.decode import DecodeError
from vit_jax.data.order import ORDERS, ExampleRng
from vit_jax.data.sources import load_source

Batch = dict[str, np.ndarray]

MAX_THREADS = 16  # of one process: beyond that they wait for Python's lock

BLOCK = 64  # records that are read at once, at most

LITTLE = 1 << 14  # bytes of an example, encoded and decoded, on which threads hinder each other
LITTLE_BLOCK = 4096  # of such records: a call of array_record's `read` costs as much as 100 do

HOST_ONLY = ("position", "index", "error")  # keys of a batch that stay off the devices


class Records(Protocol):
    """What can be loaded: `sources.Source`, or any list of records."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{'image': encoded bytes, 'label': int, …}`; OSError, naming it, if it is unreadable.

        A source may have `__getitems__`, too, for several at once: a list for a list.
        """


def make_loader(
    *,
    name: str,
    split: str = "train",
    data_dir: str = "data",
    order: str = "global",
    num_workers: int = 0,
    num_threads: int = 0,
    prefetch: int = 2,
    strict: bool = False,
    augment: Augmentation,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    slots: Sequence[int] | None = None,
) -> "Loader":
    """Training batches of the dataset `name`, for steps `start_step` to `num_steps` - 1.

    `batch_size` is global; this process gets `slots` of every batch. The rest of the arguments are
    those of `Loader`.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; choose from {', '.join(ORDERS)}.")
    source = load_source(name, split=split, data_dir=data_dir)
    return Loader(
        source,
        order=functools.partial(ORDERS[order], num_examples=len(source), seed=seed),
        augment=augment,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        num_steps=num_steps,
        slots=slots,
        num_workers=num_workers,
        num_threads=num_threads,
        prefetch=prefetch,
        strict=strict,
    )


def make_eval_loader(
    *,
    name: str,
    split: str,
    data_dir: str = "data",
    num_workers: int = 0,
    num_threads: int = 0,
    prefetch: int = 2,
    strict: bool = False,
    augment: Augmentation,
    batch_size: int,
    slots: Sequence[int] | None = None,
) -> "Loader":
    """Every example of a split once, in order; the same number of steps on every process.

    What the last batch lacks is padding: zero images with `mask` False and `index` -1. An
    unreadable example has `mask` False too, but its index and an `error`. So the examples with
    `mask` and those with an error make up the split.
    """
    source = load_source(name, split=split, data_dir=data_dir)
    return Loader(
        source,
        order=functools.partial(each_once, num_examples=len(source)),
        augment=augment,
        batch_size=batch_size,
        seed=0,
        num_steps=-(-len(source) // max(batch_size, 1)),
        slots=slots,
        num_workers=num_workers,
        num_threads=num_threads,
        prefetch=prefetch,
        strict=strict,
    )


def each_once(position: int, *, num_examples: int) -> int:
    """The order of an evaluation: as stored, and -1 (padding) after the last example."""
    return position if position < num_examples else -1


class Loader:
    """An iterator over batches; close it, or use it in a `with`, to end its threads and processes.

    A batch holds this process's examples, those in b `slots` of the global batch:

    - what the recipe makes, such as `image` uint8 [b, height, width, 3];
    - `label` int32 [b], and `mask` bool [b], False for padding and for unreadable examples, whose
      arrays and labels are zero;
    - for the host: `position` int64 [b] in the stream, `index` int64 [b] in the source (-1 for
      padding), and `error` str [b], which names an unreadable example and says why ('' if fine).

    The attribute `seconds` says how long it took to make the batch handed out last.

    Arguments: `slots` are all of the batch if None. `order` maps a position to an index, or to -1
    for padding. `num_workers` processes take the batches in turn, -1 for one a core; with 0 this
    process loads them itself. `num_threads` threads decode the examples of a batch, in each worker;
    0 means one there and for small images, else one for each core (up to 16). `prefetch` batches
    are kept ready, by each worker. With `strict` an unreadable example is a ValueError.
    """

    def __init__(
        self,
        source: Records,
        *,
        order: Callable[[int], int],
        augment: Augmentation,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        num_steps: int,
        slots: Sequence[int] | None = None,
        num_workers: int = 0,
        num_threads: int = 0,
        prefetch: int = 2,
        strict: bool = False,
    ):
        _check_counts(batch_size, num_workers, num_threads, prefetch)
        if not len(source):
            raise ValueError("the source has no examples; load another split.")
        self.source = source
        self.num_steps = num_steps
        blank = augment.zeros()
        little = _is_little(source, blank)
        self._batches = _LocalBatches(
            source=source,
            order=order,
            augment=augment,
            blank=blank,
            seed=seed,
            strict=strict,
            batch_size=batch_size,
            slots=np.arange(batch_size) if slots is None else np.asarray(slots),
            steps=range(start_step, num_steps),
            num_threads=num_threads
            or (1 if num_workers or little else min(num_cores(), MAX_THREADS)),
            block=LITTLE_BLOCK if little else BLOCK,
        )
        wanted = num_cores() if num_workers < 0 else num_workers
        self._num_workers = min(wanted, len(self._batches))
        self._prefetch = prefetch
        self._closed = False
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this loader was closed; make another one to read more batches.")
        # Batches from workers lie in shared memory, in a subclass of ndarray whose slices do not
        # keep that memory alive. A plain view of it does.
        batch = {name: np.asarray(value) for name, value in next(self._iterator).items()}
        self.seconds = float(batch.pop("seconds"))
        return batch

    def __len__(self) -> int:
        """The number of batches from `start_step` on."""
        return len(self._batches)

    def check(self) -> "Loader":
        """Raises ValueError if the recipe can use none of a few examples from all over the split.

        One bad image among many is only left out; a recipe that does not fit the images would leave
        out all of them.
        """
        errors = [self._batches.error(index) for index in _spread(len(self.source))]
        if all(errors):
            raise ValueError(f"no image can be used; {errors[0]}")
        return self

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and processes; batches handed out stay valid."""
        self._closed = True
        iterator = self.__dict__.pop(
            "_iterator", None
        )  # dropped, for it holds what it had prefetched
        if iterator:
            iterator.close()
        self._batches.close()

    @functools.cached_property
    def _iterator(self) -> grain.DatasetIterator:
        # Two at once, so that no thread idles while the last examples of a batch are decoded.
        reading = grain.ReadOptions(
            num_threads=min(2, self._prefetch), prefetch_buffer_size=self._prefetch
        )
        dataset = grain.MapDataset.source(self._batches).to_iter_dataset(reading)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # in a notebook, say; grain reads its own flags
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self._num_workers)
            dataset = dataset.mp_prefetch(workers, worker_init_fn=_start_worker)
        return iter(dataset)


@dataclasses.dataclass(frozen=True)
class _LocalBatches:
    """This process's part of the batch of each of `steps`, by index: what grain reads."""

    source: Records
    order: Callable[[int], int]
    augment: Augmentation
    blank: dict[str, np.ndarray]
    seed: int
    strict: bool
    batch_size: int
    slots: np.ndarray
    steps: range
    num_threads: int
    block: int

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Batch:
        start = time.monotonic()
        size = len(self.slots)
        batch = {
            name: np.empty((size, *value.shape), value.dtype) for name, value in self.blank.items()
        }
        batch["label"] = np.zeros(size, np.int32)
        batch["mask"] = np.zeros(size, bool)
        batch["position"] = self.steps[number] * self.batch_size + self.slots
        batch["index"] = np.empty(size, np.int64)
        errors = [""] * size
        # A few parts for each of several threads, so that all finish at about the same time.
        num_parts = 4 * self.num_threads if self.num_threads > 1 else 1
        length = min(-(-size // num_parts), self.block)
        parts = [slice(at, at + length) for at in range(0, size, length)]
        for _ in self._pool.map(functools.partial(self._fill, batch, errors), parts):
            pass  # here an exception from a part comes out
        batch["error"] = np.array(errors)
        batch["seconds"] = np.float64(time.monotonic() - start)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        """The fields; the threads stay behind when this goes to a worker."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def close(self) -> None:
        """Ends the threads, after the examples that they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.num_threads, thread_name_prefix="vit_jax-decode")

    def _fill(self, batch: Batch, errors: list[str], part: slice) -> None:
        """Writes the examples of some slots, each straight to where it belongs in the batch."""
        positions = batch["position"][part].tolist()
        indices = batch["index"][part] = [self.order(position) for position in positions]
        records = self._read(indices)
        for slot, (position, index) in enumerate(zip(positions, indices, strict=True), part.start):
            out = {name: batch[name][slot] for name in self.blank}
            arrays, label, errors[slot] = self._load(position, index, records.get(index), out)
            batch["label"][slot] = label
            batch["mask"][slot] = index >= 0 and not errors[slot]
            for name, value in arrays.items():
                if value is not out[name]:  # else the recipe has written it there
                    out[name][...] = value

    def _read(self, indices: list[int]) -> dict[int, dict[str, Any]]:
        """The records of a part, by index; none if one is unreadable: `_load` finds which it is."""
        together = getattr(self.source, "__getitems__", None)
        wanted = [index for index in indices if index >= 0]
        try:
            return dict(zip(wanted, together(wanted), strict=True)) if together else {}
        except OSError:
            return {}

    def error(self, index: int) -> str:
        """What is wrong with the example at `index`, '' if nothing."""
        try:
            return self._load(0, index)[2]
        except ValueError as error:  # strict
            return str(error)

    def _load(
        self,
        position: int,
        index: int,
        record: dict[str, Any] | None = None,
        out: Batch | None = None,
    ) -> tuple[dict[str, np.ndarray], int, str]:
        """The recipe's arrays, the label, and what is wrong with the example ('' if nothing)."""
        if index < 0:
            return self.blank, 0, ""
        try:
            record = self.source[index] if record is None else record
            arrays = self.augment(record, ExampleRng(position, seed=self.seed), out)
            return arrays, record["label"], ""
        except (DecodeError, OSError) as error:
            message = _describe(error, index, record or {})
            if self.strict:
                raise ValueError(message) from error
            return self.blank, 0, message


def _is_little(source: Records, blank: Batch) -> bool:
    """Whether an example is so little work that decoding it is mostly Python's.

    Then two threads, which hand Python's lock to and fro, are no quicker than one and cost half as
    much again (`benchmarks/NOTES.md`).
    """
    made, sizes = sum(value.nbytes for value in blank.values()), []
    for index in _spread(len(source)) if made <= LITTLE else ():
        with contextlib.suppress(OSError):  # said when it is its turn
            image = source[index]["image"]
            sizes.append(image.nbytes if isinstance(image, np.ndarray) else len(image))
    return bool(sizes) and statistics.median_high(sizes) + made <= LITTLE


def _spread(size: int) -> list[int]:
    """A few indices from all over a split."""
    count = min(size, 8)
    return [number * size // count for number in range(count)]


def _describe(error: Exception, index: int, record: dict[str, Any]) -> str:
    """One line on an unreadable example. A source's own OSError names the example already."""
    if isinstance(error, OSError):
        return " ".join(str(error).split())
    name = record.get("filename", b"")
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    return f"example {index}{name and f' ({name})'} cannot be decoded: {error}"


def _start_worker(worker_index: int, num_workers: int) -> None:
    """Leaves it to the parent when to stop, and stops with it, however the parent ends.

    A signal to the whole group (Ctrl-C, a scheduler's SIGTERM) must not take the data away from a
    run that is about to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nothing else ends a worker whose parent was killed: it would wait for ever to be read."""
    multiprocessing.parent_process().join()
    os._exit(1)


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_counts(batch_size: int, num_workers: int, num_threads: int, prefetch: int) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, -1),
        ("num_threads", num_threads, 0),
        ("prefetch", prefetch, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more.")
