import csv
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

import vit_jax
from tests.data.images import encode, noise, write_tree
from vit_jax import cli
from vit_jax.data.decode import decode
from vit_jax.data.sources import load_source

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(finished):
    return finished[0]


@pytest.fixture(scope="module")
def wanted(workdir, data_dir):
    """(records, features) of the digits' test split, by the model itself."""
    source = load_source("digits", split="test", data_dir=data_dir)
    records = [source[index] for index in range(len(source))]
    pixels = np.stack([decode(record["image"]) for record in records])
    return records, np.asarray(vit_jax.load(workdir).features(pixels))


def embed(*argv) -> int:
    return cli.main(["embed", *map(str, argv)])


def test_a_dataset(workdir, wanted, data_dir, tmp_path, capsys):
    argv = f"--workdir={workdir}", "--dataset=digits", f"--data_dir={data_dir}"
    out = tmp_path / "deep" / "f.npy"
    assert embed(*argv, f"--out={out}", "--batch_size=77") == 0
    assert f"done: 360 × 32 features in {out}" in capsys.readouterr().out
    records, features = wanted
    found = np.load(out)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, features, atol=1e-5)
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [row["image"] for row in rows] == [record["filename"].decode() for record in records]
    assert [int(row["label"]) for row in rows] == [record["label"] for record in records]
    assert all(row["class"] == row["label"] for row in rows)
    assert {path.name for path in out.parent.iterdir()} == {"f.npy", "f.csv"}


def test_parquet(workdir, wanted, data_dir, tmp_path):
    argv = f"--workdir={workdir}", "--dataset=digits", f"--data_dir={data_dir}"
    assert embed(*argv, "--split=test[:50%]", f"--out={tmp_path}/f.parquet") == 0
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["image", "label", "class", "features"]
    records, features = wanted
    assert table["label"].to_pylist() == [record["label"] for record in records[:180]]
    np.testing.assert_allclose(
        np.array(table["features"].to_pylist(), np.float32), features[:180], atol=1e-5
    )


def test_a_folder_of_which_some_cannot_be_read(workdir, wanted, tmp_path, capsys):
    records, features = wanted
    files = {f"{index}.png": records[index]["image"] for index in range(5)} | {"2.png": b"broken"}
    root = write_tree(tmp_path / "images", files)
    assert embed(f"--workdir={workdir}", root, f"--out={tmp_path}/f.npy") == 0
    assert "note: 1 of 5 images could not be read" in capsys.readouterr().err
    kept = [0, 1, 3, 4]
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), features[kept], atol=1e-5)
    names = (tmp_path / "f.csv").read_text().splitlines()
    assert names == ["image", *(str(root / f"{index}.png") for index in kept)]


def test_what_is_there_is_kept_until_it_may_be_replaced(workdir, tmp_path, capsys):
    image = tmp_path / "a.png"
    image.write_bytes(encode(noise(8, 8), "PNG"))
    for there, out in (("f.npy", "f.npy"), ("g.csv", "g.npy"), ("h.parquet", "h.parquet")):
        (tmp_path / there).write_text("precious")
        assert embed(f"--workdir={workdir}", image, f"--out={tmp_path / out}") == 1
        assert f"{there} exists; choose another --out or add" in capsys.readouterr().err
        assert (tmp_path / there).read_text() == "precious"
    assert embed(f"--workdir={workdir}", image, f"--out={tmp_path}/f.npy", "--overwrite") == 0
    assert np.load(tmp_path / "f.npy").shape == (1, 32)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["a.png"], "--out is missing"),
        (["a.png", "--out=f.txt"], "--out=f.txt must end in .npy or .parquet"),
        (["--out=f.npy"], "give either images .* or --dataset=NAME"),
        (["a.png", "--dataset=digits", "--out=f.npy"], "give either images"),
        (["missing.png", "--out=f.npy"], "missing.png does not exist"),
        (["--dataset=none", "--out=f.npy"], "no dataset 'none'"),
    ],
)
def test_what_cannot_be_done(workdir, argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(encode(noise(), "PNG"))
    assert embed(f"--workdir={workdir}", *argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png"}


@pytest.mark.parametrize("cls_token, pool", [(True, "cls"), (False, "gap")])
def test_a_model_that_answers_tokens_is_pooled(tmp_path, capsys, cls_token, pool):
    from tests.interop.models import source, spec
    from vit_jax.interop.export import write_own
    from vit_jax.interop.load import adapt
    from vit_jax.interop.spec import fill, make_model

    made = source(spec(pool="none", num_classes=0, cls_token=cls_token, names=False))
    write_own(made, tmp_path / "tokens.safetensors")
    image = tmp_path / "a.png"
    image.write_bytes(encode(noise(16, 16), "PNG"))
    flags = f"--model={tmp_path}/tokens.safetensors", "--crop_fraction=1", image
    assert embed(*flags, f"--out={tmp_path}/f.npy") == 0
    said = capsys.readouterr()
    assert "done: 1 × 24 features" in said.out and f"pooled by '{pool}'" in said.err
    pooled = adapt(made, num_classes=2)  # whose head reads the same
    wanted = fill(make_model(pooled.spec), pooled.params).features(decode(image.read_bytes())[None])
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), wanted, atol=1e-5)


def test_the_features_are_those_of_the_run_wherever_its_weights_lie(workdir, tmp_path):
    """A photo that is no square: resize and crop travel with the weights."""
    (tmp_path / "a.png").write_bytes(encode(noise(30, 50), "PNG"))
    export = "export", f"--workdir={workdir}"
    assert cli.main([*export, "--format=safetensors", f"--out={tmp_path}/m.safetensors"]) == 0
    assert cli.main([*export, "--format=timm", f"--out={tmp_path}/timm"]) == 0
    (step,) = list((workdir / "checkpoints").glob("[0-9]*"))[-1:]
    found = []
    for i, path in enumerate((workdir, step, tmp_path / "m.safetensors", tmp_path / "timm")):
        where = f"--model={path}" if i else f"--workdir={path}"
        out = tmp_path / f"{i}.npy"
        assert embed(where, tmp_path / "a.png", f"--out={out}") == 0
        found.append(np.load(out))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
