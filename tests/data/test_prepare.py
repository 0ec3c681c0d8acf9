import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.archives import CIFAR10
from tests.data.images import bad_files, class_tree, encode, noise, write_tree
from tests.data.tfrecords import frame
from vit_jax.data import prepare, sources, tally
from vit_jax.data.decode import decode
from vit_jax.data.prepare import (
    UnreadableImagesError,
    prepare_convert,
    prepare_digits,
    prepare_folder,
    prepare_tfds,
)


def folder(root, data_dir=None, **options):
    options = {"name": "mine", "progress": False} | options
    return prepare_folder(root, data_dir=str(data_dir or root.parent / "data"), **options)


def examples(prepared, split="train"):
    source = sources.load_source(prepared.name, split=split, data_dir=prepared.data_dir)
    return {record["filename"].decode(): record for record in source}


def python(code: str, *args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True
    )


# Digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare_digits(data_dir=str(tmp_path_factory.mktemp("digits")))


def test_digits_hold_out_a_fifth(digits):
    info = sources.dataset_info("digits", data_dir=digits.data_dir)
    assert info.splits == {"train": 1437, "test": 360}
    assert 360 / 1797 >= 0.2
    assert info.class_names == tuple("0123456789")
    assert info.mean[0] == info.mean[1] == info.mean[2]


def test_digits_are_scikit_learns_pixels(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    both = examples(digits) | examples(digits, "test")
    assert len(both) == 1797
    for index in (0, 17, 1796):
        label = int(bunch.target[index])
        record = both[f"{label}/{index:04d}.png"]
        assert record["label"] == label
        grey = decode(record["image"])[..., 0]
        assert np.abs(grey * (16 / 255) - bunch.images[index]).max() < 0.04


def test_stock_tfds_decodes_digits_to_three_channels(digits):
    source = tfds.builder("digits", data_dir=digits.data_dir).as_data_source("test")
    assert source[0]["image"].shape == (8, 8, 3) and source[0]["image"].dtype == np.uint8


def test_digits_are_the_same_everywhere_and_always(digits, tmp_path):
    # Whoever changes this breaks the resuming of digits runs.
    assert digits.fingerprint == (
        "1429b6a104d3bdfd2769d95e5b6c9ffb6405b60e43bf4ca92331cd24a6054783"
    )
    again = prepare_digits(data_dir=str(tmp_path), name="others")
    assert again.fingerprint == digits.fingerprint


def test_digits_that_are_there_already(digits):
    with pytest.raises(FileExistsError):
        prepare_digits(data_dir=digits.data_dir)
    again = prepare_digits(data_dir=digits.data_dir, exist_ok=True)
    assert again.fingerprint == digits.fingerprint and again.path == digits.path


def test_two_processes_may_want_the_digits_at_once(tmp_path):
    code = (
        "import sys; from vit_jax.data.prepare import prepare_digits;"
        "print(prepare_digits(data_dir=sys.argv[1], exist_ok=True).fingerprint)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    answers = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(answers) == 1
    assert os.listdir(tmp_path) == ["digits"]


def test_who_comes_second_takes_what_the_first_one_made(tmp_path, monkeypatch):
    first = prepare_digits(data_dir=str(tmp_path / "first"))

    def too_late(*args, **kwargs):
        shutil.copytree(tmp_path / "first", tmp_path / "second", dirs_exist_ok=True)
        raise FileExistsError

    monkeypatch.setattr(prepare.writer, "_move", too_late)
    second = prepare_digits(data_dir=str(tmp_path / "second"), exist_ok=True)
    assert second.fingerprint == first.fingerprint
    with pytest.raises(FileExistsError):
        prepare_digits(data_dir=str(tmp_path / "third"))


def test_tensorflow_is_not_imported(tmp_path):
    code = """
import sys
from vit_jax.data import prepare, sources, tally
made = prepare.prepare_digits(data_dir=sys.argv[1])
source = sources.load_source("digits", split="test", data_dir=sys.argv[1])
print(len(source[0]["image"]) > 0, "tensorflow" in sys.modules, "jax" in sys.modules)
"""
    assert python(code, tmp_path).stdout.split() == ["True", "False", "False"]


# A folder of images


def test_every_kind_of_file(tmp_path):
    root = tmp_path / "images"
    files = {
        "a/plain.jpg": encode(noise(), "JPEG"),
        "a/UPPER.JPEG": encode(noise(), "JPEG", progressive=True),
        "a/grey.jpg": encode(noise(), "JPEG", mode="L"),
        "a/cmyk.jpg": encode(noise(), "JPEG", mode="CMYK"),
        "b/plain.png": encode(noise(), "PNG"),
        "b/grey.PNG": encode(noise(), "PNG", mode="L"),
        "b/alpha.png": encode(noise(), "PNG", mode="RGBA"),
        "b/palette.png": encode(noise(), "PNG", mode="P"),
        "b/really.jpg": encode(noise(), "PNG"),
        "b/rotated.jpg": encode(noise(), "JPEG", orientation=6),
        "b/new.webp": encode(noise(), "WEBP"),
        "b/old.bmp": encode(noise(), "BMP"),
    }
    made = folder(write_tree(root, files))
    found = examples(made)
    assert set(found) == set(files)
    changed = {"b/rotated.jpg", "b/new.webp", "b/old.bmp"}
    for name in set(files) - changed:
        assert found[name]["image"] == files[name], f"the bytes of {name} changed"
    assert {name for name, _ in made.converted} >= {"b/new.webp", "b/old.bmp"}
    assert [name for name, _ in made.transposed] == ["b/rotated.jpg"]
    assert decode(found["b/rotated.jpg"]["image"]).shape == (24, 16, 3)
    assert made.rejected == [] and made.class_counts == {"train": [4, 8]}
    stock = tfds.builder_from_directory(made.path).as_data_source("train")
    for record in stock:
        height, width, channels = record["image"].shape
        assert {height, width} == {16, 24}
        assert channels == (4 if record["filename"] == b"b/alpha.png" else 3)


def test_unreadable_files_are_left_out_and_listed_with_their_reason(tmp_path):
    root = class_tree(tmp_path / "images")
    write_tree(root, {f"cat/{name}": data for name, data in bad_files().items()})
    (root / "dog/gone.jpg").symlink_to(tmp_path / "nowhere")
    made = folder(root)
    reasons = dict(made.rejected)
    assert set(reasons) == {f"cat/{name}" for name in bad_files()} | {"dog/gone.jpg"}
    assert all(reasons.values())
    assert "60000" in reasons["cat/bomb.png"]
    assert reasons["cat/empty.jpg"] == "the file is empty"
    assert reasons["dog/gone.jpg"] == "No such file or directory"
    assert len(examples(made)) == 8
    lines = (pathlib.Path(made.path) / "rejected.txt").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name}\t{reason}" for name, reason in reasons.items())


def test_files_without_permission_are_unreadable(tmp_path):
    root = class_tree(tmp_path / "images")
    (root / "cat/0.jpg").chmod(0)
    if os.access(root / "cat/0.jpg", os.R_OK):
        pytest.skip("root may read everything")
    assert folder(root).rejected == [("cat/0.jpg", "Permission denied")]


def test_a_pipe_does_not_hang(tmp_path):
    root = class_tree(tmp_path / "images")
    os.mkfifo(root / "cat/pipe.jpg")
    assert folder(root).rejected == [("cat/pipe.jpg", "not a regular file")]


def test_strict_fails_and_leaves_nothing(tmp_path):
    root = write_tree(class_tree(tmp_path / "images"), {"cat/bad.jpg": b"no image"})
    with pytest.raises(UnreadableImagesError, match=r"1 of 9 images .*cat/bad.jpg") as caught:
        folder(root, strict=True)
    assert [name for name, _ in caught.value.rejected] == ["cat/bad.jpg"]
    assert os.listdir(tmp_path / "data") == []
    (root / "cat/bad.jpg").unlink()
    assert folder(root, strict=True).class_counts == {"train": [4, 4]}


def test_nothing_readable_at_all(tmp_path):
    root = write_tree(tmp_path / "images", {"a/1.jpg": b"no image"})
    with pytest.raises(ValueError, match=r"no readable images in train: 1 .*a/1.jpg"):
        folder(root)
    assert os.listdir(tmp_path / "data") == []


def test_splits_and_a_class_that_one_of_them_lacks(tmp_path):
    root = class_tree(tmp_path / "images", prefix="train/")
    write_tree(root, {"test/dog/1.jpg": encode(noise(), "JPEG")})
    made = folder(root)
    assert made.class_counts == {"train": [4, 4], "test": [0, 1]}
    assert made.notes == ["test has no example of 1 classes: cat"]
    assert examples(made, "test")["test/dog/1.jpg"]["label"] == 1


def test_without_train_there_is_nothing_to_measure(tmp_path):
    made = folder(class_tree(tmp_path / "images", prefix="test/"))
    assert made.mean is None and "for evaluation" in made.notes[0]
    assert sources.dataset_info("mine", data_dir=made.data_dir).mean is None


def test_the_hold_out_is_a_seeded_permutation(tmp_path):
    root = class_tree(tmp_path / "images", per_class=20)
    made = folder(root, holdout=0.25)
    assert [sum(counts) for counts in made.class_counts.values()] == [30, 10]
    assert all(made.class_counts["test"]), "sorted by class"
    train, test = examples(made), examples(made, "test")
    assert not set(train) & set(test) and len(train) + len(test) == 40
    again = folder(root, tmp_path / "again", holdout=0.25)
    assert examples(again, "test") == test and again.fingerprint == made.fingerprint
    other = folder(root, tmp_path / "other", holdout=0.25, seed=1)
    assert set(examples(other, "test")) != set(test)


def test_a_hold_out_beside_a_split_is_refused(tmp_path):
    root = class_tree(class_tree(tmp_path / "images", prefix="train/"), prefix="val/")
    with pytest.raises(ValueError, match=r"holds the splits train, val; leave --holdout out"):
        folder(root, holdout=0.1)


def test_parts_of_a_split_hold_all_classes(tmp_path):
    made = folder(class_tree(tmp_path / "images", per_class=30))
    part = sources.load_source("mine", split="train[:30%]", data_dir=made.data_dir)
    assert {record["label"] for record in part} == {0, 1}


def test_shuffled_labels_are_those_of_train_only(tmp_path):
    root = class_tree(tmp_path / "images", per_class=40)
    made = folder(root, holdout=0.25, shuffle_labels=True)
    plain = folder(root, tmp_path / "plain", holdout=0.25)
    assert examples(made, "test") == examples(plain, "test")
    train = examples(made)
    assert made.class_counts["train"] == plain.class_counts["train"]
    wrong = sum(record["label"] != examples_label(name) for name, record in train.items())
    assert 15 < wrong < 45  # 30 of 60 by chance
    assert made.fingerprint != plain.fingerprint and "SHUFFLED" in " ".join(made.notes)
    assert all(not note.startswith("the train labels") for note in plain.notes)


def examples_label(name):
    return ("cat", "dog").index(name.split("/")[0])


def test_mean_and_deviation_are_those_of_all_training_pixels(tmp_path):
    root = class_tree(tmp_path / "images", per_class=5)
    write_tree(root, {"cat/large.png": encode(noise(40, 60, seed=7), "PNG")})
    made = folder(root, holdout=0.3)
    pixels = [decode(record["image"]).reshape(-1, 3) / 255 for record in examples(made).values()]
    pixels = np.concatenate(pixels)
    np.testing.assert_allclose(made.mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(made.std, pixels.std(axis=0), rtol=1e-9)
    assert made.num_measured == sum(made.class_counts["train"])


def test_of_many_images_an_even_sample_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "MAX_MEASURED", 7)
    made = folder(class_tree(tmp_path / "images", per_class=10))
    assert made.num_measured == 7  # every third of 20
    records = list(sources.load_source("mine", split="train", data_dir=made.data_dir))[::3]
    pixels = np.stack([decode(record["image"]) for record in records]).reshape(-1, 3) / 255
    np.testing.assert_allclose(made.mean, pixels.mean(axis=0), rtol=1e-9)


def test_the_fingerprint_is_of_the_content_alone(tmp_path, monkeypatch):
    root = class_tree(tmp_path / "images", per_class=5)
    fingerprint = folder(root).fingerprint
    shutil.copytree(root, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere/cat/0.jpg", (0, 0))
    monkeypatch.setattr(prepare.writer, "_SHARD_BYTES", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    made = folder(tmp_path / "elsewhere", tmp_path / "other", name="another")
    assert len(list(pathlib.Path(made.path).glob("*.array_record-*"))) > 2
    assert made.fingerprint == fingerprint
    assert sources.dataset_info("another", data_dir=made.data_dir).fingerprint == fingerprint


@pytest.mark.parametrize("change", ["pixels", "label", "class", "split", "missing"])
def test_the_fingerprint_changes_with_the_content(tmp_path, change):
    root = class_tree(tmp_path / "images", per_class=5)
    before = folder(root)
    if change == "pixels":
        (root / "cat/0.jpg").write_bytes(encode(noise(seed=999), "JPEG"))
    elif change == "label":
        (root / "cat/0.jpg").rename(root / "dog/5.jpg")
    elif change == "class":
        (root / "dog").rename(root / "fox")
    elif change == "missing":
        (root / "cat/0.jpg").unlink()
    after = folder(root, tmp_path / "after", holdout=0.1 if change == "split" else 0.0)
    assert before.fingerprint != after.fingerprint


def test_a_png_counts_by_its_pixels(tmp_path):
    # Digits made under another zlib are the same digits.
    prints = set()
    for level in (1, 9):
        root = class_tree(tmp_path / str(level) / "images")
        write_tree(root, {"cat/x.png": encode(noise(), "PNG", compress_level=level)})
        prints.add(folder(root).fingerprint)
    assert len(prints) == 1


def test_what_was_prepared_can_be_read_again(tmp_path):
    root = write_tree(class_tree(tmp_path / "images"), {"cat/bad.jpg": b"x", "notes.txt": b"x"})
    made = folder(root)
    kept = json.loads((pathlib.Path(made.path) / sources.METADATA).read_text())
    expected = json.loads(json.dumps(dataclasses.asdict(made)))
    assert kept == {k: v for k, v in expected.items() if k not in ("path", "data_dir")}
    assert kept["ignored"] == ["notes.txt"] and kept["made_by"].startswith("vit-jax 0.")


def test_file_names_of_any_bytes(tmp_path):
    root = class_tree(tmp_path / "images")
    name = os.fsdecode(b"cat/\xff\n.jpg")
    write_tree(root, {name: b"no image", "cat/ü.jpg": encode(noise(), "JPEG")})
    assert [name for name, _ in folder(root).rejected] == [r"cat/\udcff\n.jpg"]


KILLED = """
import sys, time
from vit_jax.data import prepare
take = prepare._take
prepare._take = lambda store, item: (time.sleep(0.002), take(store, item))[1]
print("ready", flush=True)
prepare.prepare_folder(sys.argv[1], name="mine", data_dir=sys.argv[2], progress=False)
"""


def test_a_killed_prepare_leaves_nothing_that_looks_finished(tmp_path):
    root, data_dir = class_tree(tmp_path / "images", per_class=60), tmp_path / "data"
    finished = 0
    for delay in (0.0, 0.03, 0.08, 0.13, 0.18, 0.25):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, root, data_dir], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        hidden = f".mine.incomplete-*-{process.pid}-*"
        while process.poll() is None and not list(data_dir.glob(hidden)):
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (data_dir / "mine").exists():
            finished += 1
            assert len(examples(prepare._read_prepared("mine", str(data_dir)))) == 120
            shutil.rmtree(data_dir)
        else:
            with pytest.raises(FileNotFoundError, match="no dataset 'mine'"):
                sources.dataset_info("mine", data_dir=str(data_dir))
            assert list(data_dir.glob(hidden)), "killed too early to tell"
    assert finished < 6, "all were killed too late to tell"
    folder(root, data_dir, overwrite=True)
    assert os.listdir(data_dir) == ["mine"]


# TFRecord to ArrayRecord


@pytest.fixture
def tfrecords(tmp_path):
    """A dataset of two splits as TFDS writes it with TensorFlow; one has two files."""
    folder = tmp_path / "tfds" / "old" / "cfg" / "2.1.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "id": tfds.features.Text(),
        }
    )
    infos = []
    for split, lengths in {"train": [3, 2], "test": [2]}.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="old", split=split, filetype_suffix="tfrecord"
        )
        for shard, length in enumerate(lengths):
            records = [
                features.serialize_example(
                    features.encode_example(
                        {
                            "image": encode(noise(seed=10 * shard + index), "PNG"),
                            "label": index % 2,
                            "id": f"{split}{shard}{index}",
                        }
                    )
                )
                for index in range(length)
            ]
            path = template.sharded_filepath(shard_index=shard, num_shards=len(lengths))
            path.write_bytes(b"".join(map(frame, records)))
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=1, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version="2.1.0",
        description="Described.",
        check_data=False,
    )
    return folder


def convert(path, data_dir, **options):
    return prepare_convert(path, data_dir=str(data_dir), progress=False, **options)


def test_a_tfrecord_dataset_becomes_array_records(tfrecords, tmp_path):
    made = convert(tfrecords, tmp_path / "data")
    assert made.path == str(tmp_path / "data" / "old" / "2.1.0")
    assert made.class_counts == {"test": [1, 1], "train": [3, 2]}
    builder = tfds.builder("old", data_dir=tmp_path / "data")
    assert builder.info.description == "Described." and str(builder.version) == "2.1.0"
    assert builder.info.splits["train"].shard_lengths == [3, 2]
    train = builder.as_data_source("train")
    assert [example["id"] for example in train] == [
        b"train00", b"train01", b"train02", b"train10", b"train11"
    ]  # fmt: skip
    assert np.array_equal(train[3]["image"], noise(seed=10))
    info = sources.dataset_info("old", data_dir=str(tmp_path / "data"))
    assert info.class_names == ("no", "yes") and info.mean is not None
    assert info.fingerprint == made.fingerprint


def test_a_conversion_may_be_called_otherwise_and_found_from_above(tfrecords, tmp_path):
    made = convert(tfrecords.parent, tmp_path / "data", name="new")
    builder = tfds.builder("new", data_dir=tmp_path / "data")
    assert builder.name == made.name == "new"
    assert len(builder.as_data_source("test")) == 2


def test_a_conversion_takes_the_next_version_when_it_overwrites(tfrecords, tmp_path):
    convert(tfrecords, tmp_path / "data")
    with pytest.raises(FileExistsError):
        convert(tfrecords, tmp_path / "data")
    made = convert(tfrecords, tmp_path / "data", overwrite=True)
    assert made.path.endswith("2.1.1")
    assert str(tfds.builder("old", data_dir=tmp_path / "data").version) == "2.1.1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "is cut off"),
        (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "is damaged"),
        (lambda data: data + frame(b"x"), "holds 4 records and should hold 3"),
        (lambda data: b"", "holds 0 records and should hold 3"),
    ],
)
def test_damaged_tfrecords_are_found_and_leave_nothing(tfrecords, tmp_path, damage, message):
    path = tfrecords / "old-train.tfrecord-00000-of-00002"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=message) as caught:
        convert(tfrecords, tmp_path / "data")
    assert path.name in str(caught.value)
    assert os.listdir(tmp_path / "data") == []


def test_converting_something_else(tfrecords, tmp_path, digits):
    with pytest.raises(FileNotFoundError, match="holds no TFDS dataset"):
        convert(tmp_path, tmp_path / "data")
    with pytest.raises(ValueError, match="holds array_record files, and tfrecord is converted"):
        convert(digits.path, tmp_path / "data")
    next(tfrecords.glob("*test.tfrecord*")).unlink()
    with pytest.raises(FileNotFoundError):
        convert(tfrecords, tmp_path / "data")


def test_unreadable_images_are_kept_by_a_conversion_but_listed(tfrecords, tmp_path):
    path = tfrecords / "old-test.tfrecord-00000-of-00001"
    features = tfds.builder_from_directory(tfrecords).info.features
    bad = features.serialize_example({"image": b"no image", "label": 0, "id": b"x"})
    good = features.serialize_example({"image": encode(noise(), "PNG"), "label": 1, "id": b"y"})
    path.write_bytes(frame(bad) + frame(good))
    made = convert(tfrecords, tmp_path / "data")
    assert [name for name, _ in made.rejected] == ["test[0]"]
    assert made.class_counts["test"] == [1, 1]
    with pytest.raises(UnreadableImagesError):
        convert(tfrecords, tmp_path / "strict", strict=True)
    assert os.listdir(tmp_path / "strict") == []


# Official datasets


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(16, 24, 3)),
                    "label": tfds.features.ClassLabel(names=["x", "y"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for index in range(count):
            yield (
                index,
                {
                    "image": prepare.io.BytesIO(encode(noise(seed=index), "PNG")),
                    "label": index % 2,
                },
            )


def test_an_official_dataset_is_built_as_array_records(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: True)
    for _ in range(2):  # the second time it is there already
        made = prepare_tfds("tiny", data_dir=str(tmp_path), progress=False)
        assert made.class_counts == {"test": [1, 1], "train": [3, 3]}
        info = sources.dataset_info("tiny", data_dir=str(tmp_path))
        assert info.fingerprint == made.fingerprint and info.mean is not None
        assert made.path == str(tmp_path / "tiny" / "1.2.3")


def test_a_killed_build_of_an_official_dataset_leaves_nothing_that_looks_finished(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: True)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_examine_dataset", lambda *_, **__: 1 / 0)  # TFDS is through
        with pytest.raises(ZeroDivisionError):
            prepare_tfds("tiny", data_dir=str(tmp_path), progress=False)
    with pytest.raises(FileNotFoundError, match="no dataset 'tiny'"):
        sources.dataset_info("tiny", data_dir=str(tmp_path))
    monkeypatch.setattr(Tiny, "_generate_examples", lambda *_: 1 / 0)  # what was built stays
    made = prepare_tfds("tiny", data_dir=str(tmp_path), progress=False)
    assert sources.dataset_info("tiny", data_dir=str(tmp_path)).fingerprint == made.fingerprint


def test_an_unknown_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="TFDS cannot build 'no_such_set'") as caught:
        prepare_tfds("no_such_set", data_dir=str(tmp_path), progress=False)
    assert "\n" not in str(caught.value)


def test_without_tensorflow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vit-jax\[tfds\]'"):
        prepare_tfds("mnist", data_dir=str(tmp_path))


# CIFAR10-10 as a folder of JPEGs


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR10-10 as a folder of JPEGs is not here")
def test_cifar10(tmp_path):
    shutil.unpack_archive(CIFAR10, tmp_path / "cifar10")
    made = folder(tmp_path / "cifar10", name="cifar10")
    assert made.class_counts == {"train": [5000] * 10, "test": [1000] * 10}
    assert made.rejected == [] and made.num_measured == 50_000
    # The published figures are 0.4914 0.4822 0.4465; JPEG takes some of the deviation.
    np.testing.assert_allclose(made.mean, [0.4914, 0.4822, 0.4465], atol=1e-3)
    for name, record in examples(made, "test").items():
        assert record["image"] == (tmp_path / "cifar10" / name).read_bytes()
