import csv
import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

import vit_jax
from tests.data.images import bad_files, encode, noise, write_tree
from tests.interop.models import source, spec
from vit_jax import cli
from vit_jax.data.augment import resize_center_crop
from vit_jax.data.decode import decode
from vit_jax.data.sources import load_source
from vit_jax.interop.export import export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(data_dir, finished, tmp_path_factory):
    """(workdir, folder of test images by class, their pixels by path)."""
    root = tmp_path_factory.mktemp("predict")
    records = load_source("digits", split="test", data_dir=data_dir)
    files = {f"{records[i]['label']}/{i:03d}.png": records[i]["image"] for i in range(40)}
    write_tree(root / "images", files)
    return finished[0], root / "images", {k: decode(files[k]) for k in sorted(files)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights of 16 × 16 pixels and five classes."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    export(source(spec()), format="safetensors", out=path)
    return path


def predict(*argv) -> int:
    return cli.main(["predict", *map(str, argv)])


def test_a_run_answers_for_a_folder_what_its_model_does(trained, capsys):
    workdir, folder, pixels = trained
    assert predict(f"--workdir={workdir}", folder, "--output=json", "--batch_size=16") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["image"] for each in found] == [str(folder / name) for name in pixels]
    logits = np.asarray(vit_jax.load(workdir)(np.stack(list(pixels.values()))), np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for each, row in zip(found, wanted, strict=True):
        said = [one["probability"] for one in each["classes"]]
        assert len(said) == 5 and said == sorted(said, reverse=True)
        np.testing.assert_allclose(said, np.sort(row)[::-1][:5], atol=1e-5)
        assert all(one["class"] == str(one["label"]) for one in each["classes"])


def test_the_formats_say_the_same(weights, tmp_path, capsys):
    image = tmp_path / "a.jpg"
    image.write_bytes(encode(noise(40, 30), "JPEG"))
    argv = f"--model={weights}", image, "--top=2"
    assert predict(*argv) == 0
    text = capsys.readouterr().out
    assert re.fullmatch(rf"{image}: kind \d [\d.]+%, kind \d [\d.]+%\n", text)
    assert predict(*argv, "--output=csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert predict(*argv, "--output=parquet", f"--out={tmp_path}/p.parquet") == 0
    assert f"done: parquet in {tmp_path}/p.parquet" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert predict(*argv, "--output=json", f"--out={tmp_path}/p.json") == 0
    (found,) = json.loads((tmp_path / "p.json").read_text())
    assert len(rows) == len(table) == len(found["classes"]) == 2
    for row, line, one in zip(rows, table, found["classes"], strict=True):
        assert row == {key: str(value) for key, value in line.items()}
        assert one == {key: line[key] for key in ("label", "class", "probability")}
        assert line["class"] == f"kind {line['label']}" and line["image"] == str(image)
    assert [line["rank"] for line in table] == [1, 2]


@pytest.mark.parametrize("flags, fraction", [([], 0.875), (["--crop_fraction=1"], 1.0)])
def test_images_are_resized_and_cropped_as_in_evaluation(
    weights, tmp_path, capsys, flags, fraction
):
    data = encode(noise(40, 60), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    image = resize_center_crop({"image": data}, None, size=(16, 16), crop_fraction=fraction)
    logits = np.asarray(vit_jax.load(weights)(image["image"][None]))[0]
    assert predict(f"--model={weights}", tmp_path / "a.png", "--output=json", *flags) == 0
    found = json.loads(capsys.readouterr().out)[0]["classes"]
    found = np.array([c["probability"] for c in sorted(found, key=lambda c: c["label"])])
    np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


def test_unreadable_images_are_named_and_left_out(weights, tmp_path, capsys):
    good = {"good/a.png": encode(noise(16, 16), "PNG"), "good/deep/b.png": encode(noise(), "PNG")}
    bad = bad_files()
    bad.pop("gif.jpg")  # unusual, but it can be read
    root = write_tree(tmp_path / "all", good | bad | {"notes.txt": b"x", ".hidden.png": b"x"})
    assert predict(f"--model={weights}", root) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    for name in bad:
        assert re.search(rf"left out: .*{re.escape(name)}.* cannot be decoded: .", said.err), name
    assert f"note: {len(bad)} of {len(bad) + 2} images could not be read" in said.err
    root = write_tree(tmp_path / "bad", bad)
    assert predict(f"--model={weights}", root) == 1
    said = capsys.readouterr()
    assert not said.out
    assert f"vit-jax: none of the {len(bad)} images could be read; the first: " in said.err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["a.png"], "give either --workdir=DIR or --model=PATH"),
        (["--model=w"], "which images"),
        (["--model=w", "a.png", "--top=0"], "--top=0 must be at least 1"),
        (
            ["--model=w", "a.png", "--output=xml"],
            "--output=xml is unknown; choose one of text, csv",
        ),
        (["--model=w", "a.png", "--output=parquet"], "--output=parquet needs --out=FILE"),
        (["--model=w", "a.png", "--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--model=w", "missing.png"], "missing.png does not exist"),
        (["--model=w", "empty"], r"no images in empty \(\*.jpg"),
        (["--workdir=empty", "a.png"], "empty: it is no folder of a run"),
        (["--model=w", "a.png", "--out=a.png"], "a.png exists; choose another --out"),
        (["--model=w", "a.png"], "w does not exist"),
    ],
)
def test_what_cannot_be_answered(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(encode(noise(), "PNG"))
    assert predict(*argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


def test_weights_without_a_head(tmp_path, capsys):
    path, image = tmp_path / "w.safetensors", tmp_path / "a.png"
    export(source(spec(num_classes=0)), format="safetensors", out=path)
    image.write_bytes(encode(noise(), "PNG"))
    assert predict(f"--model={path}", image) == 1
    assert "no head, so no classes; try vit-jax embed" in capsys.readouterr().err
