"""Makes datasets: scikit-learn's digits, a folder of images, official TFDS sets, TFRecord folders.

Each function leaves a stock TFDS dataset of ArrayRecord files and answers a `Prepared`, which is
also kept beside the dataset. Only `prepare_tfds` needs TensorFlow.
"""

import collections
import dataclasses
import functools
import importlib.util
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from etils import epath
from PIL import Image

import vit_jax
from vit_jax.data import folder as folder_lib
from vit_jax.data import raw, sources, writer
from vit_jax.data.decode import DecodeError, decode
from vit_jax.data.folder import Item
from vit_jax.data.ingest import Ingested, ingest
from vit_jax.data.stores import AS_IT_CAME, Store
from vit_jax.data.tally import Measured, Tally, measure
from vit_jax.data.tfrecord import read_tfrecord

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was made and what happened to the files on the way."""

    name: str
    made_by: str
    fingerprint: str
    class_names: list[str]
    class_counts: dict[str, list[int]]
    """Split -> number of examples of each class."""
    mean: list[float] | None
    """Of each channel over the pixels of the training images, in [0, 1]; None without `train`."""
    std: list[float] | None
    num_measured: int
    """Number of training images that mean and std were taken from."""
    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Unreadable images and why. They are not in the dataset, except after `convert` and `tfds`."""
    transposed: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Images that EXIF said were rotated, and how they were turned upright."""
    converted: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Images whose format was changed."""
    ignored: list[str] = dataclasses.field(default_factory=list)
    """Files that were not taken for images."""
    notes: list[str] = dataclasses.field(default_factory=list)
    store: str = "jpeg"
    """In which form images are kept: one of `stores.STORES`."""
    data_dir: str = ""
    path: str = ""
    """The version folder in `data_dir`. Neither is kept: the dataset may be moved."""


class UnreadableImagesError(ValueError):
    """With `strict`: some images are unreadable. `rejected` lists each with its reason."""

    def __init__(self, rejected: Sequence[tuple[str, str]], num_images: int):
        super().__init__(
            f"{len(rejected)} of {num_images} images are unreadable, the first one "
            f"{rejected[0][0]} ({rejected[0][1]}); mend or remove them, or leave out --strict"
        )
        self.rejected = list(rejected)


def prepare_digits(
    *,
    name: str = "digits",
    data_dir: str = "data",
    holdout: float = 0.2,
    seed: int = 0,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> Prepared:
    """Writes scikit-learn's digits: 1,797 grey 8x8 images of 10 classes, in `train` and `test`.

    `test` is `holdout` of them, rounded up (360, 20.03%), drawn by a permutation that is seeded and
    not stratified. With `exist_ok` a dataset that is there already, or that another process
    finishes first, is answered as it is.
    """
    if exist_ok and (made := _read_prepared(name, data_dir)):
        return made
    from sklearn.datasets import load_digits  # takes a second to import, and only here

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], from 0..16
    items = [
        Item(f"{label}/{index:04d}.png", int(label), functools.partial(_encode_png, image))
        for index, (image, label) in enumerate(zip(grey, digits.target, strict=True))
    ]
    train, test = folder_lib.hold_out(items, fraction=holdout, seed=seed)
    try:
        return _write(
            {"train": train, "test": test},
            class_names=[str(digit) for digit in digits.target_names],
            name=name,
            data_dir=data_dir,
            seed=seed,
            overwrite=overwrite,
            made_by="digits",
            progress=False,
        )
    except FileExistsError:
        if exist_ok and (made := _read_prepared(name, data_dir)):
            return made
        raise


def prepare_if_digits(name: str, *, data_dir: str = "data") -> None:
    """Writes scikit-learn's digits if they are wanted and missing: they need no download."""
    if name != "digits":
        return
    try:
        sources.dataset_info(name, data_dir=data_dir)
    except FileNotFoundError:
        print(f"preparing the digits in {data_dir}", file=sys.stderr)
        prepare_digits(data_dir=data_dir, exist_ok=True)


def prepare_folder(
    path: str | os.PathLike,
    *,
    name: str,
    data_dir: str = "data",
    holdout: float = 0.0,
    seed: int = 0,
    shuffle_labels: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    store: str = "jpeg",
    store_size: int = 0,
) -> Prepared:
    """Makes a dataset of `PATH/<class>/*` or `PATH/<split>/<class>/*` (see `folder.scan_folder`).

    Each image is decoded once, to prove that it can be; what becomes of its bytes, `ingest.ingest`
    says. Unreadable ones are left out and listed, or, with `strict`, nothing is made. Records lie
    in a seeded permutation of the files.

    Args:
      path: the folder.
      name: what the dataset is called: letters, digits and underscores.
      data_dir: where datasets are kept.
      holdout: this fraction of the files, rounded up, becomes the split `test`: the beginning of
        the permutation, so it is not stratified. Refused where PATH holds another split than train.
      seed: of the permutation.
      shuffle_labels: deals the labels of `train` out anew: a control that must not generalise.
      strict: raise UnreadableImagesError instead of leaving images out.
      overwrite: replace a dataset of that name, once the new one is whole.
      progress: show a bar on stderr.
      store, store_size: in which form images are kept; see `stores.Store`.

    Raises OSError and ValueError in one line each.
    """
    writer.check_name(name)
    kept = Store(store, store_size)
    found = folder_lib.scan_folder(path)
    splits, notes = dict(found.splits), []
    if holdout:
        others = sorted(set(splits) - {"train"})
        if others:
            raise ValueError(
                f"holdout={holdout} makes a test split, but {path} holds the splits "
                f"{', '.join(sorted(splits))}; leave --holdout out"
            )
        splits["train"], splits["test"] = folder_lib.hold_out(
            splits["train"], fraction=holdout, seed=seed
        )
        notes.append(f"test is a hold-out of {holdout:g} of the images (seed {seed})")
    if shuffle_labels:
        if "train" not in splits:
            raise ValueError(f"shuffle_labels: {path} has no train split, only {', '.join(splits)}")
        splits["train"] = folder_lib.shuffle_labels(splits["train"], seed=seed)
        notes.append(f"the train labels are SHUFFLED (seed {seed}): a control, not for use")
    return _write(
        splits,
        class_names=found.class_names,
        name=name,
        data_dir=data_dir,
        seed=seed,
        strict=strict,
        overwrite=overwrite,
        made_by="folder",
        ignored=found.ignored,
        notes=notes,
        progress=progress,
        store=kept,
    )


def prepare_convert(
    path: str | os.PathLike,
    *,
    name: str = "",
    data_dir: str = "data",
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    store: str = "jpeg",
    store_size: int = 0,
) -> Prepared:
    """Copies a TFDS dataset of TFRecord files into ArrayRecord files, record by record.

    All splits, shards and features stay as they are; each record's checksum is verified. Images are
    decoded once, and unreadable ones are listed but kept (with `strict`, nothing is made).

    A dataset of ArrayRecord files is copied into another `store`: image, label and filename of
    every example, unreadable ones left out, splits in a permuted order (as `prepare_folder`).

    Args:
      path: the version folder (`…/cifar10/3.0.2`), or the one above with its newest version.
      name: what the copy is called; by default like the original.
      data_dir, strict, overwrite, progress, store, store_size: as in `prepare_folder`.
    """
    source = _version_folder(path)
    builder = tfds.builder_from_directory(source)
    names = sources.class_names(builder.info)  # refuses what could not be trained on
    kept = Store(store, store_size)
    arrays = builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    if arrays and store != "jpeg":
        return _write(
            {split: _items(source, split) for split in builder.info.splits},
            class_names=names,
            name=name or builder.name,
            data_dir=data_dir,
            seed=0,
            strict=strict,
            overwrite=overwrite,
            made_by="convert",
            progress=progress,
            store=kept,
        )
    if store != "jpeg":
        raise ValueError(
            f"{source} is converted in two steps: leave --store out, then convert the copy with it"
        )
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise ValueError(
            f"{source} holds {builder.info.file_format.value} files, and tfrecord is converted; "
            "with --store=tiled, resized or raw array_record is, too"
        )
    name = name or builder.name
    with writer.new_dataset(
        name, data_dir=data_dir, overwrite=overwrite, version=str(builder.version)
    ) as new:
        for split, info in builder.info.splits.items():
            shards = zip(info.filepaths, info.shard_lengths, strict=True)
            _copy_shards(new, split, list(shards), progress=progress)
        _copy_metadata(source, new)
        prepared = _examine_dataset(epath.Path(new.folder), made_by="convert", progress=progress)
        if strict and prepared.rejected:
            raise UnreadableImagesError(prepared.rejected, _num_examples(prepared))
        prepared = dataclasses.replace(prepared, name=name, data_dir=data_dir, path=str(new.path))
        _save_prepared(prepared, new.folder)
    return prepared


def prepare_tfds(
    name: str,
    *,
    data_dir: str = "data",
    manual_dir: str = "",
    progress: bool = True,
) -> Prepared:
    """Builds an official TFDS dataset (`name[/config][:version]`) in ArrayRecord form.

    TFDS downloads and writes it, in a hidden folder; then images are decoded once, and unreadable
    ones are listed but kept; then it gets its name. A killed call goes on where it can, and what is
    built is not built twice.

    Args:
      name: as TFDS knows it, such as `cifar100` or `imagenet2012`.
      data_dir: where datasets are kept.
      manual_dir: where you put what TFDS may not download (ImageNet's archives).
      progress: show a bar on stderr.

    Raises ValueError if TensorFlow is not installed, or TFDS does not know or cannot build it.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            "building a TFDS dataset needs TensorFlow (reading it does not): "
            "pip install 'vit-jax[tfds]'"
        )
    root = epath.Path(data_dir).expanduser()
    hidden = root / ".tfds"
    try:
        builder = tfds.builder(name, data_dir=hidden, file_format="array_record")
        final = root / epath.Path(builder.data_dir).relative_to(hidden)
        if not final.exists():
            builder.download_and_prepare(
                download_dir=root / "downloads",
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None),
            )
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        # AssertionError is what TFDS raises where something must be downloaded by hand.
        raise ValueError(f"TFDS cannot build {name!r}: {' '.join(str(error).split())}") from error
    path = final if final.exists() else epath.Path(builder.data_dir)
    prepared = _examine_dataset(path, made_by="tfds", progress=progress)
    prepared = dataclasses.replace(prepared, name=name, data_dir=data_dir, path=str(final))
    _save_prepared(prepared, pathlib.Path(path))
    if path != final:
        final.parent.mkdir(parents=True, exist_ok=True)
        path.rename(final)
    return prepared


def _items(path: epath.Path, split: str) -> list[Item]:
    """The examples of a TFDS dataset, to be written anew."""
    info = tfds.builder_from_directory(path).info
    dataset = sources.DatasetInfo(info.name, path, {}, sources.class_names(info), "", None, None)
    source = sources.Source(dataset, split)
    items = []
    for index in range(len(source)):
        record = source[index]
        name = record.get("filename", record.get("file_name", b"")) or f"{split}/{index}".encode()
        name = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
        read = functools.partial(_read_record, source, index)
        items.append(Item(name, int(record["label"]), read))
    return items


def _read_record(source: sources.Source, index: int) -> bytes:
    return source[index]["image"]


def _write(
    splits: dict[str, list[Item]],
    *,
    class_names: Sequence[str],
    name: str,
    data_dir: str,
    seed: int,
    made_by: str,
    strict: bool = False,
    overwrite: bool = False,
    ignored: Sequence[str] = (),
    notes: Sequence[str] = (),
    progress: bool = True,
    store: Store = AS_IT_CAME,
) -> Prepared:
    """Takes the items in, in permuted order, and writes those that are readable."""
    num_items = sum(map(len, splits.values()))
    tally = Tally(class_names, num_train=len(splits.get("train", ())))
    changes = _Changes([], [], [])
    with (
        writer.new_dataset(name, data_dir=data_dir, overwrite=overwrite) as new,
        _bar(num_items, name, progress) as bar,
    ):
        kind = raw.RawWriter if store.name == "raw" else writer.SplitWriter
        writers = [kind(new.folder, name=name, split=split) for split in splits]
        for out in writers:
            items = folder_lib.permute(splits[out.split], seed=seed)
            _write_split(out, items, store, tally=tally, changes=changes, bar=bar)
        if changes.rejected and strict:
            raise UnreadableImagesError(sorted(changes.rejected), num_items)
        _refuse_empty(writers, changes.rejected)
        if store.name == "raw":
            named = {"name": name, "version": new.version, "class_names": class_names}
            raw.write_head(new.folder, writers=writers, **named)
        else:
            description = f"Made by `vit-jax prepare {made_by}`."
            writer.write_tfds_metadata(
                new, writers=writers, class_names=class_names, description=description
            )
        prepared = Prepared(
            name=name,
            made_by=f"vit-jax {vit_jax.__version__} prepare {made_by}",
            store=store.name,
            data_dir=data_dir,
            path=str(new.path),
            ignored=[_printable(each) for each in ignored],
            **{change: sorted(files) for change, files in changes._asdict().items()},
            **tally.result(notes),
        )
        _save_prepared(prepared, new.folder)
    return prepared


class _Changes(NamedTuple):
    """Files that are not stored as they were, each with the reason."""

    rejected: list[tuple[str, str]]
    transposed: list[tuple[str, str]]
    converted: list[tuple[str, str]]


def _write_split(
    out: writer.SplitWriter | raw.RawWriter,
    items: Sequence[Item],
    store: Store,
    *,
    tally: Tally,
    changes: _Changes,
    bar: tqdm.tqdm,
) -> None:
    for item, taken in zip(items, _parallel(functools.partial(_take, store), items), strict=True):
        bar.update()
        shown = _printable(item.name)
        if isinstance(taken, str):
            changes.rejected.append((shown, taken))
            continue
        image, measured = taken
        filename = item.name.encode("utf-8", "surrogateescape")
        if isinstance(out, raw.RawWriter):
            out.write(image.pixels, label=item.label, filename=filename)
        else:
            record = {"image": image.data, "label": item.label, "filename": filename}
            out.write(writer.serialize(record))
        tally.add(out.split, item.label, measured)
        if image.transposed:
            changes.transposed.append((shown, image.transposed))
        if image.converted:
            changes.converted.append((shown, image.converted))
    out.close()


def _take(store: Store, item: Item) -> tuple[Ingested, Measured] | str:
    """Reads, verifies and measures one file; the reason if that fails."""
    try:
        image = ingest(item.read())
    except DecodeError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    stored = store.take(image)
    # Tiles change no pixel, and so not the fingerprint.
    measured = measure(image.data if store.name == "tiled" else stored.data, stored.pixels)
    if store.name != "raw":  # pixels are large, and others wait in the queue
        stored = stored._replace(pixels=None)
    return stored, measured


def _refuse_empty(writers: Sequence[writer.SplitWriter], rejected: list[tuple[str, str]]) -> None:
    for each in writers:
        if not each.shard_lengths:
            raise ValueError(
                f"no readable images in {each.split}: {len(rejected)} were rejected, the first one "
                f"{rejected[0][0]} ({rejected[0][1]})"
            )


def _examine_dataset(path: epath.Path, *, made_by: str, progress: bool) -> Prepared:
    """Reads every record of a finished dataset once, and tells what `_write` would have told."""
    info = tfds.builder_from_directory(path).info
    names = sources.class_names(info)
    splits = {split: found.num_examples for split, found in info.splits.items()}
    dataset = sources.DatasetInfo(info.name, path, splits, names, "", None, None)
    tally = Tally(names, num_train=splits.get("train", 0))
    rejected, unlabelled = [], collections.Counter()
    with _bar(sum(splits.values()), info.name, progress) as bar:
        for split in splits:
            source = sources.Source(dataset, split)
            read = functools.partial(_examine_record, source)
            for index, (label, reason, measured) in enumerate(_parallel(read, range(len(source)))):
                bar.update()
                if reason:
                    rejected.append((f"{split}[{index}]", reason))
                if 0 <= label < len(names):
                    tally.add(split, label, measured)
                else:
                    unlabelled[split] += 1
    notes = [f"{count} examples of {split} have no label" for split, count in unlabelled.items()]
    return Prepared(
        name=info.name,
        made_by=f"vit-jax {vit_jax.__version__} prepare {made_by}",
        path=str(path),
        rejected=rejected,
        **tally.result(notes),
    )


def _examine_record(source: sources.Source, index: int) -> tuple[int, str, Measured]:
    record = source[index]
    try:
        pixels, reason = decode(record["image"]), ""
    except DecodeError as error:
        pixels, reason = None, str(error)
    return int(record["label"]), reason, measure(record["image"], pixels)


def _copy_shards(
    new: writer.NewDataset, split: str, shards: list[tuple[Any, int]], *, progress: bool
) -> None:
    out = writer.SplitWriter(new.folder, name=new.name, split=split)
    for path, length in shards:
        out.next_shard()
        with _bar(length, path.name, progress) as bar:
            for record in read_tfrecord(path):
                out.write(record, may_begin=False)
                bar.update()
        if out.shard_lengths[-1] != length:
            raise OSError(
                f"{path} holds {out.shard_lengths[-1]} records and should hold {length}; "
                "fetch the dataset again"
            )
    out.close()


def _copy_metadata(source: epath.Path, new: writer.NewDataset) -> None:
    """Everything but the records, with the format, name and version of the copy."""
    for file in source.iterdir():
        if ".tfrecord" not in file.name and not file.is_dir():
            shutil.copyfile(file, new.folder / file.name)
    path = new.folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info |= {"name": new.name, "version": new.version, "fileFormat": "array_record"}
    info.pop("configName", None)  # the copy stands by itself: name/version
    for split in info["splits"]:
        split.pop("filepathTemplate", None)
    path.write_text(json.dumps(info, indent=2, sort_keys=True))


def _version_folder(path: str | os.PathLike) -> epath.Path:
    folder = epath.Path(path).expanduser()
    found = [folder] if (folder / "dataset_info.json").exists() else sources.versions(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no TFDS dataset: no dataset_info.json is in it")
    return found[-1]


def _bar(total: int, name: str, progress: bool) -> tqdm.tqdm:
    """A progress bar on stderr; in a log file, a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm.tqdm(
        total=total, desc=name, unit=" records", disable=not progress, mininterval=interval
    )


def _encode_png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def _num_examples(prepared: Prepared) -> int:
    return sum(map(sum, prepared.class_counts.values()))


def _save_prepared(prepared: Prepared, folder: pathlib.Path) -> None:
    """Writes `vit_jax.json`, and `rejected.txt` if there is anything to tell in it."""
    kept = dataclasses.asdict(prepared)
    del kept["path"], kept["data_dir"]
    if prepared.rejected:
        lines = [f"{name}\t{reason}\n" for name, reason in prepared.rejected]
        (folder / "rejected.txt").write_text("".join(lines))
    hidden = folder / f".{sources.METADATA}.incomplete-{os.getpid()}"
    hidden.write_text(json.dumps(kept, indent=1))
    hidden.rename(folder / sources.METADATA)


def _read_prepared(name: str, data_dir: str) -> Prepared | None:
    found = sources.versions(epath.Path(data_dir).expanduser() / name)
    kept = sources.read_metadata(found[-1]) if found else {}
    return Prepared(**kept, data_dir=data_dir, path=str(found[-1])) if kept else None


def _printable(text: str) -> str:
    """File names may hold anything; what is shown of them, fits a line and a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _parallel(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in threads, one a core: in order, and only a little ahead of who reads the results."""
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    with ThreadPoolExecutor(num_threads) as pool:
        ahead = collections.deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 8 * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
