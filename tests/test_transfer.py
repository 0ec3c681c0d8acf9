"""Transfer: the recipe in each of its modes, and what pretraining is worth."""

import pathlib

import numpy as np
import pytest

from benchmarks.transfer import cifar10_files, digits_files
from tests.runs import deterministic_rows, run, saved_state, short
from vit_jax.commands.config_flag import load_config
from vit_jax.config import differences
from vit_jax.data.prepare import prepare_folder
from vit_jax.interop.load import read_source

pytestmark = pytest.mark.slow

ARCHIVE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "cifar10_jpg.zip"


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The workdir of a finished run on the digits."""
    workdir = tmp_path_factory.mktemp("transfer") / "run"
    run(short(data_dir), workdir)
    return workdir


@pytest.mark.parametrize("mode", ["full", "layerwise", "probe"])
def test_each_mode_goes_on_from_the_weights(trained, data_dir, tmp_path, mode):
    argument = f"name=digits,data_dir={data_dir},init_from={trained},mode={mode},augment=none,debug"
    config = load_config(f"transfer:{argument}")
    _, results = run(config, tmp_path / "run")
    assert results["test/count"] == 360
    assert deterministic_rows(tmp_path / "run")[4, "test/top1"] == results["test/top1"]
    before, after = read_source(trained), read_source(tmp_path / "run")
    assert after.spec.backbone == before.spec.backbone and after.spec.mean == before.spec.mean
    moved = {k for k, x in after.params.items() if not np.array_equal(x, before.params[k])}
    heads = {name for name in after.params if name.startswith("head/")}
    assert moved >= heads
    assert moved == heads if mode == "probe" else len(moved) > 20
    saved = {name for name in saved_state(tmp_path / "run", 4) if name.startswith("opt_state")}
    assert any("backbone" in name for name in saved) == (mode != "probe")


def test_the_model_is_that_of_the_weights(trained, data_dir):
    where = f"name=digits,data_dir={data_dir}"
    config = load_config(f"transfer:{where},init_from={trained},size=16")
    spec = read_source(trained).spec
    assert config.model.variant == "Ti/4x2" and config.model.dim == spec.backbone["dim"]
    assert config.model.image_size == config.augment.size == (16, 16)
    np.testing.assert_allclose(config.preprocess.mean, spec.mean)
    assert config.total_steps == round(1437 / 256 * 20)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("mode=all", "mode='all' is unknown; choose one of full, layerwise, probe"),
        ("mode=probe", "mode=probe needs weights: init_from=PATH"),
        ("init_from=nowhere", "nowhere does not exist"),
    ],
)
def test_what_cannot_be_transferred(data_dir, argument, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_config(f"transfer:name=digits,data_dir={data_dir},{argument}")


@pytest.mark.parametrize("mode", ["full", "probe"])
def test_from_scratch_the_same_model_trains_as_it_is_drawn(trained, data_dir, tmp_path, mode):
    where = f"name=digits,data_dir={data_dir},init_from={trained},augment=none,debug"
    config = load_config(f"transfer:{where},mode={mode},pretrained=false")
    wanted = load_config(f"transfer:{where},mode={mode}")
    assert differences(wanted, config) == [f"init_from: {str(trained)!r} -> ''"]
    config.seed = 1  # the weights began as those of seed 0
    run(config, tmp_path / "run")
    before, after = read_source(trained), read_source(tmp_path / "run")
    name = "backbone/blocks/0/attn/qkv/kernel"
    assert after.spec.backbone == before.spec.backbone
    assert (
        np.abs(after.params[name] - before.params[name]).mean() > 0.01
    )  # a few steps move it by less


def accuracy(recipe, workdir, seed, *, half=""):
    """Of a run of a recipe on the half of the classes, by its last evaluation."""
    config = load_config(recipe)
    if half:
        config.data.name = config.evals.test.dataset = half
    config.seed, config.save_every, config.eval_every, config.log_every = seed, 0, 0, 100
    return run(config, workdir)[1]["test/top1"]


def assert_worth_something(tmp_path, where, rates):
    """From weights, each seed of each mode beats all seeds from scratch."""

    def scores(name, mode):
        recipe = f"transfer:{where},{mode},learning_rate={rates[name]}"
        return [accuracy(recipe, tmp_path / f"{name}{seed}", seed) for seed in range(3)]

    scratch = scores("scratch", "mode=full,pretrained=false")
    for mode in rates.keys() - {"scratch"}:
        found = scores(mode, f"mode={mode}")
        print(mode, found, "from scratch", scratch)
        assert min(found) > max(scratch)


def halves(make, folder):
    """Where the datasets of the two halves of the classes are."""
    data_dir = str(folder / "data")
    for name in make(folder):
        prepare_folder(folder / name, name=name, data_dir=data_dir, progress=False)
    return data_dir


def test_digits_help_to_learn_other_digits(tmp_path):
    data_dir = halves(digits_files, tmp_path)
    recipe = f"digits:steps=300,data_dir={data_dir}"
    assert accuracy(recipe, tmp_path / "low", 0, half="digits_low") > 0.9
    where = f"name=digits_high,data_dir={data_dir},init_from={tmp_path}/low,augment=none"
    rates = {"scratch": 1e-2, "full": 3e-3, "layerwise": 1e-2}
    assert_worth_something(tmp_path, f"{where},steps=20,batch_size=64", rates)


@pytest.mark.skipif(not ARCHIVE.exists(), reason="CIFAR-10 as a folder of JPEGs is not here")
def test_pictures_help_to_learn_other_pictures_by_a_probe_too(tmp_path):
    data_dir = halves(lambda folder: cifar10_files(ARCHIVE, folder, every=3), tmp_path)
    recipe = f"cifar10:small,steps=150,name=cifar10_low,data_dir={data_dir}"
    assert accuracy(recipe, tmp_path / "low", 0) > 0.4
    where = f"name=cifar10_high,data_dir={data_dir},init_from={tmp_path}/low,augment=pad_crop_flip"
    rates = {"scratch": 3e-3, "full": 1e-3, "layerwise": 3e-3, "probe": 1e-1}
    assert_worth_something(tmp_path, f"{where},steps=20,batch_size=64", rates)
