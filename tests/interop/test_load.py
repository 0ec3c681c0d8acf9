"""`vit_jax.load`: what it answers, in other shapes too, and what it says of what it did."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
from etils import epath

import vit_jax
from tests.interop.models import assert_close, images, source, spec
from tests.runs import run, short
from vit_jax.checkpoint import Checkpoints
from vit_jax.interop import npz
from vit_jax.interop.export import export, write_own
from vit_jax.interop.facts import Told
from vit_jax.interop.layouts import BIG_VISION, GOOGLE, HF_DINOV2, HF_SIGLIP, HF_VIT, LAYOUTS, TIMM
from vit_jax.interop.load import adapt, read_source
from vit_jax.interop.spec import fill, make_model
from vit_jax.interop.tables import recognise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A finished run's trainer and workdir."""
    workdir = tmp_path_factory.mktemp("load") / "run"
    trainer, _ = run(short(data_dir), workdir)
    return trainer, workdir


def test_a_run_answers_what_its_trainer_answers(trained, tmp_path):
    trainer, workdir = trained
    pixels = images(size=(8, 8))
    wanted = trainer.parts.model(trainer.state).module()(pixels)
    step = trainer.step
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / str(step)):
        np.testing.assert_allclose(vit_jax.load(path)(pixels), wanted, atol=1e-6)
    source = read_source(workdir)
    assert source.spec.class_names == tuple("0123456789")
    export(source, format="safetensors", out=tmp_path / "m.safetensors")
    exported = vit_jax.load(tmp_path / "m.safetensors")
    np.testing.assert_allclose(exported(pixels), wanted, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="no checkpoint 99 .*there are"):
        vit_jax.load(workdir, step=99)


def test_of_a_run_only_what_its_model_needs_is_read(trained, data_dir, tmp_path, monkeypatch):
    averaged, workdir = trained
    plain, _ = run(short(data_dir, train__ema_decay=0.0), tmp_path / "run")
    pixels, asked = images(size=(8, 8)), []
    restore = Checkpoints.restore

    def spy(self, step, abstract, *, without):
        asked.append(without)
        return restore(self, step, abstract, without=without)

    monkeypatch.setattr(Checkpoints, "restore", spy)
    # Of two runs, in turns: what is known of one is not taken for the other.
    for its, path in ((averaged, workdir), (plain, tmp_path / "run"), (averaged, workdir)):
        wanted = its.parts.model(its.state).module()(pixels)
        np.testing.assert_allclose(vit_jax.load(path)(pixels), wanted, atol=1e-6)
    assert asked == [("opt_state", "params"), ("opt_state",), ("opt_state", "params")]


def test_a_run_of_a_newer_version(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": config["model"] | {"newer": 1}}))
    with pytest.raises(ValueError, match="unknown key 'newer'; if the run is of a newer vit_jax"):
        vit_jax.load(tmp_path / "run")
    path.write_text("[]")
    with pytest.raises(ValueError, match="config.json is damaged"):
        vit_jax.load(tmp_path / "run")


def test_uint8_is_preprocessed_and_float_is_not():
    made = source(spec())
    model = fill(make_model(made.spec), made.params)
    pixels = images()
    mean, std = np.array(made.spec.mean), np.array(made.spec.std)
    normalised = ((pixels / 255 - mean) / std).astype(np.float32)
    np.testing.assert_allclose(model(pixels), model(normalised), atol=1e-4)
    assert model(pixels).dtype == np.float32


@pytest.mark.parametrize(
    "pool, shape",
    [("none", (2, 17, 24)), ("cls", (2, 24)), ("cls_gap", (2, 48)), ("map", (2, 24))],
)
def test_without_a_head(pool, shape):
    made = source(spec(pool=pool, num_classes=0, cls_token=True))
    assert fill(make_model(made.spec), made.params)(images()).shape == shape


def test_another_resolution_patch_and_head():
    made = source(spec(pool="cls", cls_token=True))
    table = made.params["backbone/pos_embed"].copy()
    new = adapt(made, image_size=(32, 24), patch_size=(8, 8), num_classes=3)
    assert new.params["backbone/pos_embed"].shape == (1 + 12, 24)
    np.testing.assert_array_equal(new.params["backbone/pos_embed"][0], table[0])
    assert new.params["backbone/patch_embed/kernel"].shape == (8, 8, 3, 24)
    model = fill(make_model(new.spec), new.params)
    assert not np.any(model(images(size=(32, 24)))) and model(images(size=(32, 24))).shape == (2, 3)
    told = "\n".join(new.report.reshaped)
    assert "(4, 4) -> (8, 8), pseudo-inverse" in told
    assert "a grid of (4, 4) -> (4, 3), antialiased bicubic" in told
    assert "head: 5 classes -> 3" in told and not new.spec.class_names
    bare = adapt(made, num_classes=0)
    assert not [name for name in bare.params if name.startswith("head/")]
    with pytest.raises(ValueError, match="image_size=.30, 30. must be a multiple"):
        adapt(made, image_size=(30, 30))
    with pytest.raises(ValueError, match="num_classes=-3 must not be negative"):
        adapt(made, num_classes=-3)


def test_a_square_is_one_number_and_only_runs_have_steps(tmp_path):
    path = epath.Path(tmp_path / "own.safetensors")
    write_own(source(spec()), path)
    with pytest.warns(UserWarning, match="reshaped"):
        model = vit_jax.load(path, image_size=32, patch_size=8)
    assert model.backbone.image_size == (32, 32) and model.backbone.patch_size == (8, 8)
    with pytest.raises(ValueError, match="is no folder of a run, so it has no step=3"):
        vit_jax.load(path, step=3)
    with pytest.raises(ValueError, match="not 4; set num_heads=3"):
        vit_jax.load(path, num_heads=4)


def test_another_normalisation():
    made = source(spec())
    new = adapt(made, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert new.spec.mean == (0.1, 0.2, 0.3) and new.spec.std == (1.0, 1.0, 2.0)
    assert "mean (0.4, 0.5, 0.6) -> (0.1, 0.2, 0.3)" in new.report.reshaped[0]
    for options in ({"mean": (0.1,)}, {"std": (1.0, 0.0, 1.0)}):
        with pytest.raises(ValueError, match="must be three numbers, of std positive ones"):
            adapt(made, **options)


def test_twice_as_large_images_in_twice_as_large_patches_answer_the_same():
    """Pixels doubled by the resize that the pseudo-inverse belongs to: the same tokens."""
    from vit_jax.interop.resample import resize_matrix, triangle

    made = source(spec())
    model = fill(make_model(made.spec), made.params)
    small = np.random.default_rng(0).standard_normal((2, 4, 4, 4, 4, 3))  # rows, columns of patches
    b = resize_matrix(4, 8, triangle)
    large = np.einsum("ai,bj,nrcijk->nrcabk", b, b, small)

    def image(patches):
        n, rows, columns, height, width, _ = patches.shape
        x = patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * height, columns * width, 3)
        return x.astype(np.float32)

    new = adapt(made, image_size=(32, 32), patch_size=(8, 8))
    again = fill(make_model(new.spec), new.params)
    assert_close(again(image(large)), model(image(small)), "logits")


def test_recognition():
    vit = {"pool": "cls", "cls_token": True, "activation": "gelu"}
    from vit_jax.interop import huggingface, timm

    def names(format, **options):
        made = source(spec(**options))
        arrays = format.export(made.params, made.spec)
        return list(arrays[0] if isinstance(arrays, tuple) else arrays)

    for wanted, found in (
        (TIMM, names(timm, **vit)),
        (HF_VIT, names(huggingface, **vit)),
        (HF_DINOV2, names(huggingface, layer_scale=1.0, **vit)),
        (HF_VIT, names(huggingface)),
        (HF_SIGLIP, names(huggingface, pool="map", num_classes=0)),
        (GOOGLE, names(npz)),
        (BIG_VISION, names(npz, pool="map")),
    ):
        assert recognise(found, LAYOUTS) is wanted
        for prefix in wanted.prefixes:
            if wanted in (TIMM, GOOGLE, BIG_VISION):  # transformers' have one already
                assert recognise([prefix + name for name in found], LAYOUTS) is wanted


def test_heads_are_guessed_only_by_the_custom(tmp_path):
    from etils import epath

    from vit_jax.interop import files, timm

    path = epath.Path(tmp_path / "w.safetensors")
    for dim, wanted in ((128, 2), (24, None)):
        made = source(spec(dim=dim, num_heads=2, names=False))
        arrays, _ = timm.export(made.params, made.spec)
        files.write_safetensors(path, arrays, {})
        if wanted is None:
            with pytest.raises(ValueError, match="dim=24 is no multiple of 64.*--num_heads"):
                read_source(path)
        else:
            read = read_source(path)
            assert read.spec.backbone["num_heads"] == wanted
            assert any("64 channels a head" in note for note in read.report.notes)


def test_an_export_that_others_trained_is_not_what_it_was(tmp_path):
    """transformers keeps our note in config.json; the numbers tell whether it still holds."""
    from etils import epath

    from vit_jax.interop import files, huggingface

    made = source(spec(pool="gap", cls_token=True, layer_scale=1.0))
    arrays, config, preprocessor = huggingface.export(made.params, made.spec)
    folder = epath.Path(tmp_path)
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "preprocessor_config.json", preprocessor)
    files.write_safetensors(folder / files.SINGLE, arrays, {})
    assert read_source(folder).spec == made.spec
    arrays["classifier.weight"] = arrays["classifier.weight"] + 1
    files.write_safetensors(folder / files.SINGLE, arrays, {})
    read = read_source(folder)
    assert read.spec.pool == "cls_gap" and read.spec.class_names == made.spec.class_names
    np.testing.assert_array_equal(
        read.params["head/fc/kernel"], arrays["classifier.weight"].T, err_msg="both halves"
    )


def test_what_a_class_does_not_use_is_said(tmp_path):
    """SiglipForImageClassification carries a MAP head that it does not call."""
    from etils import epath

    from vit_jax.interop import files, huggingface

    made = source(spec(pool="map", num_classes=0, names=False))
    arrays, config, _ = huggingface.export(made.params, made.spec)
    arrays["classifier.weight"] = np.ones((4, 24), np.float32)
    arrays["classifier.bias"] = np.ones(4, np.float32)
    config.pop("vit_jax")
    path = epath.Path(tmp_path / "model.safetensors")
    files.write_safetensors(path, arrays, {})
    files.write_json(path.parent / "config.json", config)
    read = read_source(tmp_path)
    assert read.spec.pool == "gap" and read.spec.num_classes == 4
    assert any("averages the patches instead" in line for line in read.report.unexpected)


def test_what_was_left_over_or_assumed_is_warned_of(tmp_path):
    from etils import epath

    from vit_jax.interop import files, timm

    made = source(spec(dim=128, num_heads=2, names=False))
    arrays, _ = timm.export(made.params, made.spec)
    path = epath.Path(tmp_path / "w.safetensors")
    files.write_safetensors(path, arrays | {"stray": np.zeros(2, np.float32)}, {})
    with pytest.warns(UserWarning, match="stray: no row of the table") as caught:
        vit_jax.load(path)
    assert len(caught) == 1 and "64 channels a head" in str(caught[0].message)
    export(made, format="safetensors", out=tmp_path / "own.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vit_jax.load(tmp_path / "own.safetensors")  # of which nothing is assumed


@pytest.mark.parametrize("cls_token, pool", [(True, "cls"), (False, "gap")])
def test_a_new_head_on_tokens_reads_one_vector_an_image(cls_token, pool):
    made = source(spec(pool="none", num_classes=0, cls_token=cls_token))
    new = adapt(made, num_classes=10)
    assert new.spec.pool == pool and fill(make_model(new.spec), new.params)(images()).shape == (
        2,
        10,
    )
    assert any(f"all tokens -> '{pool}'" in line for line in new.report.reshaped)


def test_a_new_head_of_a_distilled_model_is_two():
    options = {"pool": "cls_dist", "cls_token": True, "dist_token": True}
    made = source(spec(num_classes=0, **options))
    new = adapt(made, num_classes=3)
    assert {name for name in new.params if name.startswith("head/")} == {
        f"head/{name}/{leaf}" for name in ("fc", "fc_dist") for leaf in ("kernel", "bias")
    }
    assert fill(make_model(new.spec), new.params)(images()).shape == (2, 3)


def test_a_class_that_has_the_same_names_is_refused(tmp_path):
    from etils import epath

    from vit_jax.interop import files, huggingface

    made = source(spec(pool="cls", cls_token=True))
    arrays, config, _ = huggingface.export(made.params, made.spec)
    files.write_safetensors(epath.Path(tmp_path) / files.SINGLE, arrays, {})
    files.write_json(epath.Path(tmp_path) / "config.json", config | {"model_type": "vit_msn"})
    with pytest.raises(ValueError, match="model_type='vit_msn'; of .* vit, deit, vit_mae, ijepa"):
        read_source(tmp_path)


@pytest.mark.parametrize("crop_fraction, interpolation", [(None, "bicubic"), (0.7, "bilinear")])
@pytest.mark.parametrize("format", ["huggingface", "timm", "safetensors"])
def test_resize_and_crop_travel(format, crop_fraction, interpolation, tmp_path):
    words = {"crop_fraction": crop_fraction, "interpolation": interpolation}
    made = source(spec(pool="cls", cls_token=True, activation="gelu"))
    made.spec = dataclasses.replace(made.spec, **words)
    out = tmp_path / f"out.{format}"
    export(made, format=format, out=out)
    assert read_source(out).spec == made.spec
    if format == "safetensors":
        return
    config = json.loads((out / "config.json").read_text())
    config.pop("vit_jax")  # others' folders have no such note
    (out / "config.json").write_text(json.dumps(config))
    read = read_source(out).spec
    assert read.interpolation == interpolation and read.mean == made.spec.mean
    if crop_fraction is None:
        assert read.crop_fraction is None
    else:
        assert read.crop_fraction == pytest.approx(crop_fraction, abs=0.02)  # whole pixels


@pytest.mark.parametrize(
    "preprocessor, wanted",
    [
        ({"size": 224, "resample": 2}, (None, "bilinear", [])),
        ({"size": {"height": 224, "width": 224}, "resample": 3}, (None, "bicubic", [])),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "resample": 3}
            | {"crop_size": {"height": 224, "width": 224}},
            (0.875, "bicubic", []),
        ),
        ({"size": 256, "do_center_crop": True, "crop_size": 224}, (0.875, "bilinear", ["shape"])),
        ({"size": 224, "resample": 1}, (None, "bilinear", ["resample=1"])),
        ({}, (0.875, "bilinear", [])),
    ],
)
def test_preprocessors_of_transformers(preprocessor, wanted):
    from vit_jax.interop import huggingface

    *found, notes = huggingface._resize(Told(preprocessor))
    assert tuple(found) == wanted[:2] and len(notes) == len(wanted[2])
    for note, words in zip(notes, wanted[2], strict=True):
        assert words in note


def test_a_preprocessor_may_say_null(tmp_path):
    """transformers 5 writes what it was not told so: the class decides."""
    from etils import epath

    from vit_jax.interop import files

    made = source(spec(pool="cls", cls_token=True))
    export(made, format="huggingface", out=tmp_path / "out")
    path = epath.Path(tmp_path / "out" / "preprocessor_config.json")
    told = files.read_json(path) | {"do_center_crop": None, "crop_size": None, "do_normalize": None}
    files.write_json(path, told | {"size": {"height": 16, "width": 16}})
    read = read_source(tmp_path / "out").spec
    assert read.crop_fraction is None and read.mean == made.spec.mean


def test_normalisations_of_transformers():
    """Ours is where white is 1."""
    from vit_jax.interop.huggingface import _normalisation

    told = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    assert _normalisation(Told(told | {"rescale_factor": 0.00392156862745098})) == (
        (0.5,) * 3,
        (0.25,) * 3,
    )
    assert _normalisation(Told(told | {"do_normalize": False})) == ((0.0,) * 3, (1.0,) * 3)
    mean, std = _normalisation(Told(told | {"rescale_factor": 1 / 127.5}))  # white is 2
    np.testing.assert_allclose(mean + std, (0.25,) * 3 + (0.125,) * 3)
    mean, std = _normalisation(Told(told | {"do_rescale": False}))
    np.testing.assert_allclose(std, (0.25 / 255,) * 3)


def test_a_run_tells_how_it_is_evaluated(trained):
    _, workdir = trained
    for path in (workdir, *(workdir / "checkpoints").glob("[0-9]*")):
        assert (
            read_source(path).spec.crop_fraction == 1.0
        )  # its evaluation takes images as they are
