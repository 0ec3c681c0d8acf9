"""Bad files, half-written ones and pickles: one clear line each, and nothing left behind."""

import json
import os
import pickle
import subprocess

import numpy as np
import pytest
from etils import epath

import vit_jax
from tests.interop.models import source, spec
from vit_jax.interop import files
from vit_jax.interop.export import export, write_own
from vit_jax.interop.load import read_source
from vit_jax.leftovers import hidden


@pytest.fixture
def own(tmp_path):
    """A good file of our own."""
    path = epath.Path(tmp_path / "model.safetensors")
    write_own(source(spec()), path)
    return path


def reason(path, error=ValueError):
    with pytest.raises(error) as caught:
        vit_jax.load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pkl"])
def test_pickles_are_refused_with_the_way_out(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    text = reason(path)
    lines = text.partition("where torch is: ")[2]
    compile(lines, "pasted", "exec")
    assert lines.startswith(f"import torch; state = torch.load({str(path)!r}, ")
    assert "weights_only=True" in lines and "; import safetensors.torch; " in lines
    target = str(tmp_path / "weights.safetensors")
    assert lines.endswith(f"save_file(state, {target!r})")
    assert "torch.load(" in reason(tmp_path)


@pytest.mark.parity
def test_the_way_out_of_a_pickle_leads_out(tmp_path):
    """Shared and transposed tensors, which safetensors itself does not save, and a wrapping."""
    torch = pytest.importorskip("torch")
    weight = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "w.pth"
    torch.save({"model": {"a": weight, "b": weight, "c": weight.T}, "epoch": 3}, path)
    exec(reason(path).partition("where torch is: ")[2], {})
    found = files.read_arrays(epath.Path(tmp_path / "w.safetensors"))
    for name, wanted in {"a": weight, "b": weight, "c": weight.T}.items():
        np.testing.assert_array_equal(found[name], wanted.numpy())


def test_pickled_members(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, trap=np.array([Trap()], dtype=object))
    assert "pickled members" in reason(path)
    path.write_bytes(pickle.dumps(Trap()))
    assert "pickled members" in reason(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_file_cut_short(own, keep):
    data = own.read_bytes()
    own.write_bytes(data[:keep])
    assert "damaged or cut short" in reason(own)


def test_an_npz_cut_short(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.zeros((100, 100)))
    path.write_bytes(path.read_bytes()[:-300])
    assert "damaged or cut short" in reason(path)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 20,
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_hostile_headers(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert "damaged or cut short" in reason(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + header)
    assert "damaged or cut short" in reason(path)


def test_an_npz_with_a_flipped_byte(tmp_path):
    """Wherever it lies: in the compressed numbers, in a header, in the archive's own tables."""
    path = tmp_path / "w.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).integers(0, 9, (20, 20)), b=np.zeros(3))
    data = path.read_bytes()
    seen = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x8D]) + data[place + 1 :])
        try:
            files.read_arrays(epath.Path(path))
        except ValueError as error:
            seen += 1
            assert str(path) in str(error)
    assert len(data) / 2 < seen < len(data)  # a damaged name or date goes unseen


def test_an_array_that_claims_more_than_there_is(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.zeros(3))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"(3,)", b"(9,)"))
    assert "damaged or cut short" in reason(path)


def test_a_newer_version(own):
    arrays = files.read_arrays(own)
    metadata = files.safetensors_metadata(own)
    described = json.loads(metadata["spec"]) | {"version": 99}
    files.write_safetensors(own, arrays, metadata | {"spec": json.dumps(described)})
    assert "newer vit_jax (format 99" in reason(own)
    files.write_safetensors(own, arrays, metadata | {"spec": "{"})
    assert "damaged" in reason(own)


def test_weights_that_do_not_make_one_model(own):
    arrays, metadata = files.read_arrays(own), files.safetensors_metadata(own)
    arrays["backbone/norm/scale"] = np.zeros(3, np.float32)
    del arrays["backbone/norm/bias"]
    arrays["stranger"] = np.zeros(3, np.float32)
    files.write_safetensors(own, arrays, metadata)
    text = reason(own)
    assert "backbone/norm/scale is (3,), wanted (24,)" in text
    assert "backbone/norm/bias is missing" in text and "stranger is left over" in text


def test_a_head_of_the_wrong_size(tmp_path, own):
    arrays, metadata = files.read_arrays(own), files.safetensors_metadata(own)
    arrays["head/fc/kernel"] = arrays["head/fc/kernel"][:10]
    files.write_safetensors(own, arrays, metadata)
    wanted = "head/fc/kernel is (10, 5), wanted (24, 5); num_classes=0 leaves the head out"
    assert wanted in reason(own)
    with pytest.warns(UserWarning, match="head: 5 classes -> 0"):
        assert vit_jax.load(own, num_classes=0).head is None


def test_an_unknown_layout(tmp_path):
    path = epath.Path(tmp_path / "w.safetensors")
    files.write_safetensors(path, {"conv1.weight": np.zeros((3, 3), np.float32)}, {})
    assert "no known layout: 1 arrays such as 'conv1.weight'" in reason(path)
    names = ["cls_token", "pos_embed", *(f"layer{i}.weight" for i in range(9))]
    files.write_safetensors(path, {name: np.zeros(1, np.float32) for name in names}, {})
    assert "nearest is timm, which knows 2 of 11 names but not 'layer0.weight'" in reason(path)


@pytest.mark.parametrize("part", ["mlp.norm.weight", "attn.relative_position_bias_table"])
def test_blocks_that_compute_something_else(tmp_path, part):
    """EVA-02 norms inside its MLP, BEiT adds biases of relative positions: no such model here."""
    from vit_jax.interop import timm

    made = source(spec(pool="cls", cls_token=True, activation="gelu", names=False))
    arrays, _ = timm.export(made.params, made.spec)
    path = epath.Path(tmp_path / "w.safetensors")
    more = {f"blocks.{i}.{part}": np.ones(24, np.float32) for i in range(2)}
    files.write_safetensors(path, arrays | more, {})
    text = reason(path)
    assert f"timm has no 'blocks.0.{part}' and 1 more in its blocks" in text


def test_nothing_there(tmp_path):
    assert "does not exist" in reason(tmp_path / "nowhere", FileNotFoundError)
    assert "no .safetensors or .npz" in reason(tmp_path, FileNotFoundError)
    (tmp_path / "notes.txt").write_text("x")
    assert "neither .safetensors nor .npz" in reason(tmp_path / "notes.txt")


def test_an_index_of_several_files(tmp_path, own):
    arrays = files.read_arrays(own)
    folder = epath.Path(tmp_path / "split")
    folder.mkdir()
    names = sorted(arrays)
    for part, chosen in enumerate((names[::2], names[1::2])):
        files.write_safetensors(folder / f"{part}.safetensors", {n: arrays[n] for n in chosen}, {})
    where = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    files.write_json(folder / files.INDEX, {"weight_map": where})
    assert files.read_folder(folder).keys() == arrays.keys()
    files.write_json(folder / files.INDEX, {"weight_map": {"a": "../model.safetensors"}})
    with pytest.raises(ValueError, match="outside of its folder"):
        files.read_folder(folder)


def test_a_new_file_or_folder_is_whole_or_not_there(tmp_path):
    for place in (files.new_file, files.new_folder):
        with pytest.raises(RuntimeError), place(tmp_path / "x", overwrite=False) as path:
            if place is files.new_file:
                path.write_text("half")
            else:
                (path / "half").write_text("half")
            raise RuntimeError
        assert not list(tmp_path.iterdir())
    with files.new_folder(tmp_path / "x", overwrite=False) as path:
        (path / files.IMPORTED).write_text("{}")
    with pytest.raises(FileExistsError, match="add --overwrite"):
        files.new_folder(tmp_path / "x", overwrite=False).__enter__()
    with files.new_folder(tmp_path / "x", overwrite=True) as path:
        (path / files.CERTIFICATE).write_text("new")
    assert [p.name for p in (tmp_path / "x").iterdir()] == [files.CERTIFICATE]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "x", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "x" / files.CERTIFICATE).read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next(tmp_path, monkeypatch, kind):
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = epath.Path(tmp_path / "x.npz")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead.pid)
        left = [hidden(path), hidden(path), hidden(path)]
        others = [hidden(tmp_path / "y.npz"), hidden(path.with_name("xynpz"))]
    left[1].mkdir()
    for place in (left[0], left[1] / "half", left[2].with_name(f"{left[2].name}.npz"), *others):
        place.write_text("half")
    (living := hidden(path)).write_text("half")
    place = {"file": files.new_file, "folder": files.new_folder}[kind]
    with place(path, overwrite=False) as beside:
        beside.write_text("new") if kind == "file" else (beside / "new").write_text("new")
    wanted = {path.name, living.name, *(other.name for other in others)}
    assert {found.name for found in tmp_path.iterdir()} == wanted


def test_a_signal_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "x")
    with files.new_folder(path, overwrite=False) as folder:
        (folder / files.CERTIFICATE).write_text("old")
    rename = type(path).rename

    def interrupted(self, target):
        answer = rename(self, target)
        if self == path:
            raise SystemExit(143)
        return answer

    monkeypatch.setattr(type(path), "rename", interrupted)
    with pytest.raises(SystemExit), files.new_folder(path, overwrite=True):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["x"]
    assert (path / files.CERTIFICATE).read_text() == "old"


def test_only_our_own_is_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("x")
    with pytest.raises(FileExistsError, match="no export or import of ours"):
        files.new_folder(tmp_path / "thesis", overwrite=True).__enter__()
    with pytest.raises(FileExistsError, match="is a folder"):
        files.new_file(tmp_path / "thesis", overwrite=True).__enter__()
    with pytest.raises(FileExistsError, match="is a file"):
        files.new_folder(tmp_path / "thesis" / "chapter1.txt", overwrite=True).__enter__()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match="is no .npz"):
        export(source(spec()), format="npz", out=tmp_path / "notes.txt", overwrite=True)
    left = [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))]
    assert left == ["notes.txt", "thesis", "thesis/chapter1.txt"]


def test_half_precision_becomes_float32(tmp_path):
    made = source(spec(names=False))
    from vit_jax.interop import timm

    arrays, _ = timm.export(made.params, made.spec)
    path = epath.Path(tmp_path / "w.safetensors")
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    files.write_safetensors(path, halves, {})
    read = read_source(path, num_heads=3)
    assert {x.dtype for x in read.params.values()} == {np.dtype(np.float32)}
    import ml_dtypes

    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    files.write_safetensors(path, halves, {})
    read = read_source(path, num_heads=3)
    name = "backbone/blocks/0/mlp/fc1/kernel"
    np.testing.assert_allclose(read.params[name], made.params[name], rtol=1e-2)
