"""Writes TFDS datasets of ArrayRecord files, without TensorFlow: whole, or not at all."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from vit_jax.data.sources import versions
from vit_jax.leftovers import hidden, remove_leftovers
from vit_jax.paths import in_bucket

_SHARD_BYTES = 256 << 20  # between TFDS's 64 MiB and 1 GiB


class NewDataset(NamedTuple):
    """A dataset that is being made."""

    folder: pathlib.Path
    """Where its files go for the time being."""
    path: pathlib.Path
    """Where the folder will be in the end: `data_dir/name/version`."""
    name: str
    version: str


@contextlib.contextmanager
def new_dataset(
    name: str, *, data_dir: str, overwrite: bool = False, version: str = "1.0.0"
) -> Iterator[NewDataset]:
    """Gives an empty folder, which becomes the dataset `data_dir/name/version` if all goes well.

    Until the block ends the folder is hidden in `data_dir`, and one rename finishes it; after an
    error it is removed, after a kill the next call removes it. With `overwrite` the new dataset
    takes the next version number, which readers prefer from then on, and the old one goes.

    Raises ValueError for a name that TFDS cannot keep, and FileExistsError if the dataset is there
    already, or if another process was first.
    """
    root = _local(data_dir)
    check_name(name)
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    old = versions(epath.Path(root / name))
    if old:
        if not overwrite:
            raise FileExistsError(
                f"{root / name} exists; replace it with --overwrite, or choose another --name"
            )
        latest = tfds.core.Version(old[-1].name)
        version = f"{latest.major}.{latest.minor}.{latest.patch + 1}"
    folder = pathlib.Path(hidden(root / name))
    folder.mkdir()
    try:
        dataset = NewDataset(folder, root / name / version, name, version)
        yield dataset
        _flush(folder)
        _move(folder, dataset.path)
        for each in old:  # out of sight first: half of a dataset must not look like one
            gone = hidden(root / name)
            os.rename(each, gone)
            shutil.rmtree(gone)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_name(name: str) -> None:
    """Raises ValueError unless TFDS can keep a dataset of that name."""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ValueError(
            f"name={name!r} must be letters, digits and underscores, a letter first, "
            "such as --name=my_images"
        )


class SplitWriter:
    """Writes the records of one split in order, in as many files as they need.

    The files get their final names, which count them, in `close`.
    """

    def __init__(self, folder: pathlib.Path, *, name: str, split: str):
        self.split = split
        self.shard_lengths: list[int] = []
        self.num_bytes = 0
        self._folder = folder
        self._prefix = f"{name}-{split}.array_record"
        self._writer: ArrayRecordWriter | None = None
        self._room = 0

    def write(self, record: bytes, *, may_begin: bool = True) -> None:
        """Appends a record, in a new file if the last one is full and `may_begin`."""
        if may_begin and self._room <= 0:
            self.next_shard()
        with _plain_errors():
            self._writer.write(record)
        self.shard_lengths[-1] += 1
        self.num_bytes += len(record)
        self._room -= len(record)

    def next_shard(self) -> None:
        """Begins a new file."""
        self._close_shard()
        # Images are compressed already; groups of one are what makes random access quick.
        path = self._folder / f"{self._prefix}-{len(self.shard_lengths):05d}"
        with _plain_errors():
            self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self.shard_lengths.append(0)
        self._room = _SHARD_BYTES

    def close(self) -> None:
        """Ends the last file and names them all."""
        self._close_shard()
        count = len(self.shard_lengths)
        for shard in range(count):
            path = self._folder / f"{self._prefix}-{shard:05d}"
            path.rename(f"{path}-of-{count:05d}")

    def _close_shard(self) -> None:
        if self._writer is not None:
            with _plain_errors():
                self._writer.close()
            self._writer = None


def serialize(features: Mapping[str, bytes | int]) -> bytes:
    """A tf.Example, as TFDS's own serializer makes it (that one takes five times as long)."""

    def feature(value: bytes | int) -> tf_feature_pb2.Feature:
        if isinstance(value, bytes):
            return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[value]))

    fields = {key: feature(value) for key, value in features.items()}
    return tf_example_pb2.Example(
        features=tf_feature_pb2.Features(feature=fields)
    ).SerializeToString(deterministic=True)


def write_tfds_metadata(
    dataset: NewDataset,
    *,
    writers: Sequence[SplitWriter],
    class_names: Sequence[str],
    description: str,
) -> None:
    """Writes what makes the dataset a TFDS dataset with `image`, `label` and `filename`."""
    features = {
        # Three channels for all: TFDS repeats grey ones. No encoding: files are JPEG or PNG.
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=list(class_names)),
        "filename": tfds.features.Text(),
    }
    splits = [
        tfds.core.SplitInfo(
            name=writer.split,
            shard_lengths=writer.shard_lengths,
            num_bytes=writer.num_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=epath.Path(dataset.folder),
                dataset_name=dataset.name,
                split=writer.split,
                filetype_suffix="array_record",
            ),
        )
        for writer in writers
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=dataset.folder,
        features=features,
        split_infos=splits,
        version=dataset.version,
        check_data=False,  # would read with TensorFlow
        description=description,
    )


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """array_record reports a full disk, like everything else, as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write the dataset: {' '.join(str(error).split())}") from error


def _local(data_dir: str) -> pathlib.Path:
    if in_bucket(data_dir):
        raise ValueError(
            f"data_dir={data_dir!r}: datasets are prepared on a local disk; copy them there after"
        )
    return pathlib.Path(data_dir).expanduser()


def _flush(folder: pathlib.Path) -> None:
    """Brings the folder's files to the disk, so that not even a power cut leaves half of them."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(folder: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(
            f"another process finished {target} first; this one changed nothing"
        ) from error
