import errno
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.images import encode, noise
from vit_jax.data import writer


def write(new: writer.NewDataset, *, count: int = 3, shard_bytes: int | None = None) -> None:
    out = writer.SplitWriter(new.folder, name=new.name, split="train")
    for index in range(count):
        image = encode(noise(seed=index), "PNG")
        record = writer.serialize({"image": image, "label": index % 2, "filename": b"%d" % index})
        out.write(record)
    out.close()
    writer.write_tfds_metadata(new, writers=[out], class_names=["a", "b b"], description="A test.")


def make(data_dir, **options) -> pathlib.Path:
    with writer.new_dataset("mine", data_dir=str(data_dir), **options) as new:
        write(new)
    return new.path


def names(data_dir) -> list[str]:
    return sorted(os.listdir(data_dir))


def test_stock_tfds_opens_it(tmp_path):
    path = make(tmp_path)
    builder = tfds.builder_from_directory(path)
    assert builder.name == "mine" and str(builder.version) == "1.0.0"
    assert builder.info.features["label"].names == ["a", "b b"]
    source = builder.as_data_source("train")
    assert [example["label"] for example in source] == [0, 1, 0]
    assert source[1]["image"].shape == (16, 24, 3)
    assert source[1]["filename"] == b"1"


def test_tfds_finds_it_by_name(tmp_path):
    make(tmp_path)
    assert len(tfds.builder("mine", data_dir=tmp_path).as_data_source("train")) == 3


def test_records_are_those_of_tfds_own_serializer():
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
            "filename": tfds.features.Text(),
        }
    )
    example = {"image": encode(noise(), "PNG"), "label": 7, "filename": b"a/b.png"}
    expected = features.serialize_example(features.encode_example(example))
    parse = tf_example_pb2.Example.FromString
    assert parse(writer.serialize(example)) == parse(expected)


def test_a_full_file_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SHARD_BYTES", 1000)
    with writer.new_dataset("mine", data_dir=str(tmp_path)) as new:
        write(new, count=20)
    files = [name for name in names(new.path) if "array_record" in name]
    count = len(files)
    assert count > 3
    assert files == [
        f"mine-train.array_record-{index:05d}-of-{count:05d}" for index in range(count)
    ]
    source = tfds.builder_from_directory(new.path).as_data_source("train")
    assert [int(example["filename"]) for example in source] == list(range(20))


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), writer.new_dataset("mine", data_dir=str(tmp_path)) as new:
        write(new)
        raise KeyError
    assert names(tmp_path) == []


def test_nothing_is_to_be_seen_before_the_end(tmp_path):
    with writer.new_dataset("mine", data_dir=str(tmp_path)) as new:
        write(new)
        assert not (tmp_path / "mine").exists()
        assert all(name.startswith(".") for name in names(tmp_path))
    assert names(tmp_path) == ["mine"]


def test_an_existing_dataset_is_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(FileExistsError, match="--overwrite"):
        make(tmp_path)


def test_overwriting_shows_the_old_one_until_the_new_one_is_whole(tmp_path):
    make(tmp_path)
    with writer.new_dataset("mine", data_dir=str(tmp_path), overwrite=True) as new:
        write(new, count=5)
        assert names(tmp_path / "mine") == ["1.0.0"]
        assert len(tfds.builder("mine", data_dir=tmp_path).as_data_source("train")) == 3
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == ["1.0.1"]
    builder = tfds.builder("mine", data_dir=tmp_path)
    assert len(builder.as_data_source("train")) == 5 and str(builder.version) == "1.0.1"


def test_overwriting_in_vain_keeps_the_old_one(tmp_path):
    make(tmp_path)
    with (
        pytest.raises(KeyError),
        writer.new_dataset("mine", data_dir=str(tmp_path), overwrite=True),
    ):
        raise KeyError
    assert names(tmp_path / "mine") == ["1.0.0"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_writers_one_is_told_that_the_other_was_first(tmp_path, overwrite):
    if overwrite:
        make(tmp_path)
    with (
        pytest.raises(FileExistsError, match="another process finished"),
        writer.new_dataset("mine", data_dir=str(tmp_path), overwrite=overwrite) as new,
    ):
        make(tmp_path, overwrite=overwrite)
        write(new, count=9)
    assert names(tmp_path) == ["mine"]
    assert len(tfds.builder("mine", data_dir=tmp_path).as_data_source("train")) == 3


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    for owner in (f"{host}-{dead.pid}", f"{host}-{os.getpid()}", f"elsewhere-{dead.pid}"):
        (tmp_path / f".mine.incomplete-{owner}-0a0b").mkdir()
    make(tmp_path)
    assert names(tmp_path) == sorted(
        [
            "mine",
            f".mine.incomplete-{host}-{os.getpid()}-0a0b",
            f".mine.incomplete-elsewhere-{dead.pid}-0a0b",
        ]
    )


@pytest.mark.parametrize("name", ["", "my-set", "a/b", "../a", "1st", "a b", ".a", "ä"])
def test_names_that_tfds_would_not_keep(tmp_path, name):
    with (
        pytest.raises(ValueError, match="must be letters, digits and underscores"),
        writer.new_dataset(name, data_dir=str(tmp_path)),
    ):
        pass


def test_a_remote_data_dir_is_refused():
    with (
        pytest.raises(ValueError, match="local disk"),
        writer.new_dataset("mine", data_dir="gs://bucket/data"),
    ):
        pass


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path):
    script = """
import resource, sys
from vit_jax.data import writer
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with writer.new_dataset("mine", data_dir=sys.argv[1]) as new:
        out = writer.SplitWriter(new.folder, name="mine", split="train")
        for _ in range(1000):
            out.write(bytes(range(256)) * 4)
        out.close()
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot write the dataset" in done.stdout
    assert os.strerror(errno.EFBIG) in done.stdout and done.stdout.count("\n") == 1
    assert names(tmp_path) == []


def test_metadata_is_plain_json(tmp_path):
    info = json.loads((make(tmp_path) / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record" and info["description"] == "A test."
