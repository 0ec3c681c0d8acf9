"""`vit-jax import`, `export` and `inspect`: what they print and leave, and how they refuse."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

import vit_jax
from tests.data.images import encode, noise
from tests.interop.models import images, source, spec
from vit_jax import cli
from vit_jax.interop import files, timm
from vit_jax.interop.certificate import fixed_images
from vit_jax.interop.export import write_own

pytestmark = pytest.mark.slow


@pytest.fixture
def own(tmp_path):
    path = epath.Path(tmp_path / "own.safetensors")
    write_own(source(spec(pool="cls", cls_token=True)), path)
    return path


def vit(*argv) -> int:
    return cli.main(list(map(str, argv)))


def test_import(tmp_path, capsys):
    made = source(spec(pool="cls", cls_token=True, activation="gelu", names=False))
    arrays, _ = timm.export(made.params, made.spec)
    path = epath.Path(tmp_path / "w.safetensors")
    files.write_safetensors(path, arrays | {"stray": np.zeros(2, np.float32)}, {})
    flags = "import", f"--source={path}", f"--out={tmp_path}/in", "--num_heads=3"
    assert vit(*flags) == 0
    printed = capsys.readouterr().out
    assert f"layout timm: {len(arrays)} arrays taken" in printed
    assert "unexpected: stray: no row of the table" in printed
    assert "normalisation by 0.5" in printed
    assert json.loads((tmp_path / "in" / "import.json").read_text())["unexpected"]
    assert vit_jax.load(tmp_path / "in")(images()).shape == (2, 5)
    assert vit(*flags) == 1 and "add --overwrite" in capsys.readouterr().err
    assert "import has --mean and --std" in printed
    normalise = "--mean=0.1,0.2,0.3", "--std=1,1,2"
    assert vit(*flags, "--overwrite", "--image_size=32x16", "--num_classes=2", *normalise) == 0
    assert vit_jax.load(tmp_path / "in").preprocess.std == (1, 1, 2)
    assert "reshaped: backbone/pos_embed: a grid of (4, 4) -> (8, 4)" in capsys.readouterr().out
    assert vit_jax.load(tmp_path / "in")(images(size=(32, 16))).shape == (2, 2)


@pytest.mark.parametrize("format", ["safetensors", "npz", "stablehlo"])
def test_export_with_a_certificate(own, tmp_path, format, capsys):
    out = tmp_path / f"out.{format}"
    assert vit("export", f"--model={own}", f"--format={format}", f"--out={out}") == 0
    printed = capsys.readouterr().out
    digest = files.sha256(epath.Path(out))
    assert f"out.{format}  sha256 {digest}" in printed
    found = json.loads((tmp_path / f"out.{format}.certificate.json").read_text())
    assert found["sha256"] == {out.name: digest} and found["inputs"]["seed"] == 0
    assert found["logits"]["max_abs_difference"] < 1e-4
    assert f"{found['logits']['max_abs_difference']:.3g}" in printed
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_stablehlo_runs_without_this_package(own, tmp_path):
    """In a process of its own, for another number of images, for three platforms."""
    out = tmp_path / "m.stablehlo"
    assert vit("export", f"--model={own}", "--format=stablehlo", f"--out={out}") == 0
    np.save(tmp_path / "images.npy", images(3))
    code = (
        "import sys, jax, numpy as np\n"
        "model = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))\n"
        "assert set(model.platforms) == {'cpu', 'cuda', 'tpu'}\n"
        "np.save('logits.npy', model.call(np.load('images.npy'))['logits'])\n"
        "assert not [name for name in sys.modules if name.startswith(('vit_jax', 'flax'))]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=tmp_path, check=True)
    wanted = vit_jax.load(own)(images(3))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-5)


def test_a_target_that_is_not_installed_is_said(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    out = tmp_path / "folder"
    assert vit("export", f"--model={own}", "--format=timm", f"--out={out}") == 0
    assert re.search(r"not run: (timm|torch) is not installed", capsys.readouterr().out)
    assert {p.name for p in out.iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md"),
        "certificate.json",
    }


def test_the_fixed_images_do_not_change():
    pixels = fixed_images((4, 4))
    assert pixels.shape == (2, 4, 4, 3) and pixels[0, 0, 0].tolist() == [95, 130, 194]


def test_a_graph_has_no_accelerators_own_kernel(tmp_path, monkeypatch):
    """On a TPU as here: the file runs on three platforms."""
    from vit_jax.interop.export import export
    from vit_jax.kernels import attention

    made = source(spec(dim=64, num_heads=2, mlp_dim=64))  # heads that the kernel could take
    export(made, format="stablehlo", out=tmp_path / "here.stablehlo")
    monkeypatch.setattr(attention, "_platform", lambda: "tpu")
    qkv = jax.ShapeDtypeStruct((2, 16, 192), np.float32)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    assert attention.choose("auto", qkv, 2) == "tpu"
    export(made, format="stablehlo", out=tmp_path / "there.stablehlo")
    graphs = [(tmp_path / f"{name}.stablehlo").read_bytes() for name in ("here", "there")]
    assert b"tpu_custom_call" not in graphs[1] and len(graphs[0]) == len(graphs[1])


def test_a_graph_is_checked_where_products_are_whole(tmp_path, monkeypatch):
    """On a TPU or a recent GPU it answers in bfloat16 or TF32, which the certificate refuses."""
    from vit_jax.interop import stablehlo

    class Graph:
        def call(self, images):
            assert jax.config.jax_default_device.platform == "cpu"
            return {"logits": np.zeros(2)}

    monkeypatch.setattr(jax.export, "deserialize", lambda data: Graph())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    (tmp_path / "m").write_bytes(b"")
    answer = stablehlo.run(epath.Path(tmp_path / "m"), images())
    assert answer.runner.endswith(", cpu")

    def absent(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", absent)
    assert "has no CPU here" in stablehlo.run(epath.Path(tmp_path / "m"), images()).not_run


def test_inspect_tells_types_and_bytes_of_the_file(tmp_path, capsys):
    made = source(spec(pool="cls", cls_token=True, activation="gelu", dim=64, num_heads=1))
    arrays, _ = timm.export(made.params, made.spec)
    arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    path = epath.Path(tmp_path / "half.safetensors")
    files.write_safetensors(path, arrays, {})
    assert vit("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(array.nbytes for array in arrays.values())
    assert {array["dtype"] for array in found["arrays"].values()} == {"float16"}


def test_a_certificate_of_others_is_not_replaced(own, tmp_path, capsys):
    beside = tmp_path / "m.npz.certificate.json"
    beside.write_text("precious")
    flags = "export", f"--model={own}", "--format=npz", f"--out={tmp_path}/m.npz"
    assert vit(*flags) == 1 and "add --overwrite" in capsys.readouterr().err
    assert beside.read_text() == "precious" and not (tmp_path / "m.npz").exists()
    assert vit(*flags, "--overwrite") == 0
    assert "not run: google's code" in json.loads(beside.read_text())["not_run"]


def test_an_export_that_fails_leaves_no_certificate(own, tmp_path, monkeypatch):
    from vit_jax.interop import export as export_lib

    def fail(*_):
        raise ValueError("other logits")

    monkeypatch.setattr(export_lib.certificate, "certify", fail)
    assert vit("export", f"--model={own}", "--format=npz", f"--out={tmp_path}/m.npz") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


def test_inspect(own, tmp_path, capsys):
    assert vit("inspect", own) == 0
    printed = capsys.readouterr().out
    for words in ("format: vit_jax", "variant: custom/4", "num_classes: 5", "kind 0, kind 1"):
        assert words in printed
    assert re.search(r"backbone/blocks/1/attn/qkv/kernel +\[24, 72\]  float32  6912", printed)
    assert vit("inspect", own, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pool"] == "cls"
    other = epath.Path(tmp_path / "other.safetensors")
    changed = source(spec(pool="cls", cls_token=True, activation="gelu"))
    changed.params["backbone/norm/bias"] = changed.params["backbone/norm/bias"] + 1
    write_own(changed, other)
    assert vit("inspect", own, f"--diff={other}") == 0
    printed = capsys.readouterr().out
    assert "backbone/norm/bias  largest difference 1" in printed
    assert re.search("equal arrays: 3[0-9]", printed) and "gelu_tanh" in printed


def test_what_no_file_tells_is_told_by_flags(tmp_path, capsys):
    """google's names say neither the grid of an oblong image nor, in the file, its size."""
    made = source(spec(pool="cls", cls_token=True, image_size=(16, 8)))
    write_own(made, epath.Path(tmp_path / "own.safetensors"))
    there = tmp_path / "own.npz"
    flags = f"--model={tmp_path}/own.safetensors", "--format=npz", f"--out={there}"
    assert vit("export", *flags) == 0
    printed = capsys.readouterr().out
    assert "left out: normalisation by mean 0.4 0.5 0.6, std 0.2 0.25 0.3; readers take" in printed
    assert "left out: class names" in printed and "resized" not in printed
    assert "left out: the grid of (4, 2) patches; tell readers --image_size=16x8" in printed
    for command in (["inspect", there], ["predict", f"--model={there}", tmp_path / "a.png"]):
        (tmp_path / "a.png").write_bytes(encode(noise(16, 8), "PNG"))
        assert vit(*command) == 1 and "as image_size" in capsys.readouterr().err
        assert vit(*command, "--image_size=16x8") == 0
    out = tmp_path / "large.safetensors"
    assert vit("export", *flags[:1], "--format=safetensors", "--image_size=32", f"--out={out}") == 0
    assert "a grid of (4, 2) -> (8, 8)" in capsys.readouterr().out
    assert vit_jax.load(out).backbone.image_size == (32, 32)


def test_a_graph_is_not_read(own, tmp_path, capsys):
    out = tmp_path / "m.stablehlo"
    assert vit("export", f"--model={own}", "--format=stablehlo", f"--out={out}") == 0
    assert vit("inspect", out) == 1
    assert "m.stablehlo is a whole graph; export the weights by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["import"], "--source is missing"),
        (["import", "--source=x"], "--out is missing"),
        (["import", "--source=nowhere", "--out=in"], "nowhere does not exist"),
        (["import", "--source=w.pth", "--out=in"], "torch.load|does not exist"),
        (["import", "--source=x", "--out=y", "--image_size=big"], "like 224 or 224x128"),
        (
            ["import", "--source=x", "--out=y", "--mean=half"],
            "--mean=half must be like 0.5,0.5,0.5",
        ),
        (["export", "--format=timm", "--out=x"], "either --workdir=DIR or --model=PATH"),
        (["export", "--model=a", "--workdir=b", "--out=x"], "either --workdir"),
        (["export", "--model=nowhere", "--out=x"], "--format is missing"),
        (["export", "--model=nowhere", "--format=timm", "--out=x"], "nowhere does not exist"),
        (["export", "--workdir=nowhere", "--format=timm", "--out=x"], "no checkpoint in nowhere"),
        (["export", "--model=a", "--format=timm", "--out=x", "--image_size=0"], "in pixels"),
        (["inspect"], "give one path"),
        (["inspect", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_is_not_understood(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vit(*argv) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(words, lines[0])
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_and_an_existing_path(own, tmp_path, capsys):
    assert vit("export", f"--model={own}", "--format=huggingfac", f"--out={tmp_path}/x") == 1
    assert "did you mean 'huggingface'" in capsys.readouterr().err
    (tmp_path / "x").write_text("precious")
    assert vit("export", f"--model={own}", "--format=npz", f"--out={tmp_path}/x") == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "precious"
