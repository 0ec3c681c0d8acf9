"""Datasets on disk: TFDS folders of ArrayRecord files, read by index and without TensorFlow.

Whatever `vit-jax prepare` makes is a stock TFDS dataset with one more file, `vit_jax.json`: what
was learnt while it was made (fingerprint, mean and standard deviation, class counts, unreadable
files). Datasets made by TFDS itself are read too; they only lack that file. The exception are
datasets of decoded images, `vit_jax.data.raw`, which look the same from outside.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data import raw

METADATA = "vit_jax.json"
"""The file beside TFDS's own `dataset_info.json` that holds what `vit-jax prepare` learnt."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a dataset on disk holds; cheap to make, no record is read."""

    name: str
    path: epath.Path
    """The version folder, which `tfds.builder_from_directory` opens."""
    splits: dict[str, int]
    """Number of examples in each split."""
    class_names: tuple[str, ...]
    fingerprint: str
    """SHA-256 over what training sees: class names, and per split and in order the labels and
    images (of a JPEG its bytes, of a PNG its pixels). Files, machine and time do not enter. Where
    `vit-jax prepare` has not seen a dataset: over its metadata and its files' names and sizes."""
    mean: tuple[float, float, float] | None
    """Of each channel of the training images, in [0, 1]; None if it was not measured."""
    std: tuple[float, float, float] | None


def dataset_info(name: str, *, data_dir: str) -> DatasetInfo:
    """Describes the dataset `name` (`name[/config][:version]`, the newest version by default).

    Raises FileNotFoundError, with the command that makes it, if it is not there, and ValueError if
    it is not in ArrayRecord form or has no images with class labels.
    """
    path = _version_folder(name, data_dir)
    if raw.is_raw(path):
        return _raw_info(name, path)
    info = _builder(path).info
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{path} holds {info.file_format.value} files, which cannot be read by index; "
            f"run `vit-jax prepare convert {path} --name={info.name}_array --data_dir={data_dir}`"
        )
    splits = {split: found.num_examples for split, found in info.splits.items()}
    metadata = read_metadata(path)
    return DatasetInfo(
        name=name,
        path=path,
        splits=splits,
        class_names=class_names(info),
        fingerprint=metadata.get("fingerprint") or _files_fingerprint(path),
        mean=_triple(metadata.get("mean")),
        std=_triple(metadata.get("std")),
    )


def _raw_info(name: str, path: epath.Path) -> DatasetInfo:
    head, metadata = raw.read_head(path), read_metadata(path)
    if missing := ", ".join({"fingerprint", "mean", "std"} - metadata.keys()):
        raise raw.CorruptStoreError(
            f"{path / METADATA} is missing or lacks {missing}: prepare the dataset again"
        )
    return DatasetInfo(
        name=name,
        path=path,
        splits={split: found["num_examples"] for split, found in head["splits"].items()},
        class_names=tuple(head["class_names"]),
        fingerprint=metadata["fingerprint"],
        mean=_triple(metadata["mean"]),
        std=_triple(metadata["std"]),
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """One split, read by index: `len()` and `[index] -> {'image': encoded bytes, 'label': int, …}`.

    Of a raw dataset (`vit_jax.data.raw`) the image is its pixels, uint8 [height, width, 3].
    Any number of threads may read at once. A pickle holds the path and not the open files, so it
    can go to worker processes. A record that cannot be read is an OSError that names it.
    """

    info: DatasetInfo
    split: str

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.info.name}/{self.split}")
        try:
            record = self._records[index]
        except RuntimeError as error:  # array_record's word for a missing, cut or damaged file
            raise OSError(
                f"example {index} of {self.info.name}/{self.split} cannot be read: "
                f"{_one_line(error)}"
            ) from error
        return _parse(record) if isinstance(record, bytes) else record

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several examples: those of a file in one go, which costs a third of one by one."""
        if not isinstance(self._records, _Files):
            return [self[index] for index in indices]
        try:
            return [_parse(record) for record in self._records.read(indices)]
        except RuntimeError as error:
            raise OSError(
                f"an example of {self.info.name}/{self.split} cannot be read: {_one_line(error)}"
            ) from error

    def verify(self, num_bytes: int) -> None:
        """Checks the beginning of a raw dataset against its checksums; others check themselves."""
        if isinstance(self._records, raw.RawSplit | raw.Part):
            self._records.verify(num_bytes)

    def __reduce__(self):
        return Source, (self.info, self.split)

    @functools.cached_property
    def _records(self):
        if raw.is_raw(self.info.path):
            return _raw_part(self.info, self.split)
        builder = _builder(self.info.path)
        if {type(each) for each in builder.info.features.values()} <= _SIMPLE:
            return _Files(builder.info.splits[self.split].file_instructions)
        return builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})


class _Files:
    """The serialised records of a split's files, several in one go and without threads for that.

    Any number of threads may read at once. Raises RuntimeError where a file is missing or damaged.

    Args:
      files: TFDS's file instructions.
    """

    def __init__(self, files: Sequence[Any]):
        self._files = files
        self._ends = list(itertools.accumulate(file.take for file in files))
        self._readers: dict[int, Any] = {}
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The records of these indices, in their order."""
        places: dict[int, list[int]] = {}  # file -> places in `indices`
        for place, index in enumerate(indices):
            places.setdefault(bisect.bisect_right(self._ends, index), []).append(place)
        records = [b""] * len(indices)
        for number, mine in places.items():
            file = self._files[number]
            first = file.skip - (self._ends[number] - file.take)
            found = self._reader(number).read([first + indices[place] for place in mine])
            for place, record in zip(mine, found, strict=True):
                records[place] = record
        return records

    def _reader(self, number: int) -> Any:
        # Not everywhere installed, and raw datasets do without.
        from array_record.python.array_record_module import ArrayRecordReader

        if number not in self._readers:
            with self._opening:
                if number not in self._readers:
                    name = os.fspath(self._files[number].filename)
                    # Without reading ahead, as what comes next is anywhere in the file.
                    self._readers[number] = ArrayRecordReader(
                        name, options="readahead_buffer_size:0", file_reader_buffer_size=32768
                    )
        return self._readers[number]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# Features of one value each, which are read in half of the time that TFDS's reader takes.
_SIMPLE = {tfds.features.Image, tfds.features.ClassLabel, tfds.features.Text}


def _parse(record: bytes) -> dict[str, Any]:
    """The features of a tf.Example, by name: bytes or an integer."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    return {
        name: (value.bytes_list.value or value.int64_list.value)[0]
        for name, value in features.items()
    }


def load_source(name: str, *, split: str, data_dir: str) -> Source:
    """Opens a split of the dataset `name`; TFDS's arithmetic (`train[:90%]`) is understood.

    Raises what `dataset_info` raises, ValueError for an unknown or empty split,
    FileNotFoundError if a file of the split is missing, and raw.CorruptStoreError.
    """
    info = dataset_info(name, data_dir=data_dir)
    if raw.is_raw(info.path):
        source = Source(info, split)
        _refuse_empty(len(source), info, split)
        source.verify(raw.CHECKED_BYTES)
        return source
    try:
        files = _builder(info.path).info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise _unknown_split(info, split) from error
    _refuse_empty(len(files), info, split)
    for file in files:
        if not epath.Path(file.filename).exists():
            raise FileNotFoundError(f"{file.filename} is missing: prepare {name!r} again")
    return Source(info, split)


def _raw_part(info: DatasetInfo, split: str) -> raw.RawSplit | raw.Part:
    """A split of a raw dataset, or what TFDS's arithmetic makes of it."""
    if split in info.splits:
        return raw.RawSplit(info.path, split)
    counts = [
        tfds.core.SplitInfo(name=each, shard_lengths=[count], num_bytes=0, filename_template=None)
        for each, count in info.splits.items()
    ]
    try:
        asked = tfds.core.ReadInstruction.from_spec(split)
        stretches = asked.to_absolute({each.name: each for each in counts})
    except (KeyError, ValueError) as error:
        raise _unknown_split(info, split) from error
    opened = {each.splitname: raw.RawSplit(info.path, each.splitname) for each in stretches}
    parts = []
    for each in stretches:  # None stands for the beginning and for the end
        end = info.splits[each.splitname] if each.to is None else each.to
        parts.append((opened[each.splitname], each.from_ or 0, end))
    return raw.Part(tuple(parts))


def _unknown_split(info: DatasetInfo, split: str) -> ValueError:
    return ValueError(
        f"{info.name!r} has no split {split!r}; it has {', '.join(info.splits)} "
        "(or a part of one, such as 'train[:90%]')"
    )


def _refuse_empty(count: int, info: DatasetInfo, split: str) -> None:
    if not count:
        raise ValueError(f"split {split!r} of {info.name!r} holds no example; take a larger part")


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """What `vit-jax prepare` wrote beside the dataset in the version folder `path`, or nothing."""
    file = path / METADATA
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:  # neither JSON, nor text
        raise ValueError(f"{file} is damaged ({error}): prepare the dataset again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: prepare the dataset again")
    return found


def class_names(info: tfds.core.DatasetInfo) -> tuple[str, ...]:
    """The names of the classes, by label; ValueError if examples are not images with a label."""
    features = dict(info.features.items())
    label = features.get("label")
    if "image" not in features or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"{info.full_name} has the features {', '.join(features)}; "
            "an 'image' and a 'label' with classes are needed"
        )
    if not label.num_classes:
        raise ValueError(f"{info.full_name} does not say how many classes its labels have")
    return tuple(label.names or map(str, range(label.num_classes)))


def versions(folder: epath.Path) -> list[epath.Path]:
    """The version folders (`1.0.0`) in `folder` that hold a dataset, oldest first."""
    if not folder.is_dir():
        return []
    found = [each for each in folder.iterdir() if tfds.core.Version.is_valid(each.name)]
    found = [each for each in found if (each / "dataset_info.json").exists() or raw.is_raw(each)]
    return sorted(found, key=lambda each: tfds.core.Version(each.name))


def _version_folder(name: str, data_dir: str) -> epath.Path:
    root = epath.Path(data_dir).expanduser()
    base, _, version = name.partition(":")
    found = versions(root / base) if base else []
    if not found:
        raise FileNotFoundError(_missing(base, root))
    if not version:
        return found[-1]
    named = {each.name: each for each in found}
    if version not in named:
        raise FileNotFoundError(f"{base!r} has no version {version}; it has {', '.join(named)}")
    return named[version]


def _missing(base: str, root: epath.Path) -> str:
    configs = [each.name for each in _folders(root / base) if versions(each)] if base else []
    if configs:
        choices = ", ".join(f"{base}/{config}" for config in sorted(configs))
        return f"{base!r} is there in several configurations; name one of {choices}"
    command = "digits" if base == "digits" else f"folder PATH --name={base}"
    there = ", ".join(sorted(each.name for each in _folders(root))) or "nothing"
    return (
        f"no dataset {base!r} in data_dir {str(root)!r} (there: {there}); "
        f"make it with `vit-jax prepare {command} --data_dir={root}`"
    )


def _folders(root: epath.Path) -> list[epath.Path]:
    if not root.is_dir():
        return []
    return [each for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")]


def _files_fingerprint(path: epath.Path) -> str:
    """Stands in for a fingerprint of the content where only TFDS has seen the dataset."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir(), key=lambda each: each.name):
        if ".array_record-" in file.name:
            digest.update(f"{file.name} {file.stat().length}\n".encode())
        elif file.name.endswith(("dataset_info.json", "features.json", ".labels.txt")):
            digest.update(f"{file.name} {file.read_text()}\n".encode())
    return digest.hexdigest()


def _triple(values: list[float] | None) -> tuple[float, float, float] | None:
    return None if values is None else (values[0], values[1], values[2])


def _builder(path: epath.Path) -> tfds.core.DatasetBuilder:
    return tfds.builder_from_directory(path)
