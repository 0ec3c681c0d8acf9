"""Transfer: the recipe in each of its modes, and what pretraining is worth."""

import numpy as np
import pytest
from etils import epath

from benchmarks.transfer import check_same, cifar10_files
from tests.archives import CIFAR10, NO_CIFAR10
from tests.runs import deterministic_rows, run, saved_state
from vit_jax.commands.config_flag import load_config
from vit_jax.config import differences, save_json
from vit_jax.data.prepare import prepare_folder
from vit_jax.interop.load import read_source

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(finished):
    """The workdir of a finished run on the digits."""
    return finished[0]


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
    difference = np.abs(after.params[name] - before.params[name]).mean()
    assert difference > 0.01  # a few steps move it by less


@pytest.mark.skipif(not CIFAR10.exists(), reason=NO_CIFAR10)
def test_each_mode_beats_training_from_scratch(tmp_path):
    """From five classes of CIFAR-10 to the five others: each seed's run beats all from scratch."""
    data_dir = str(tmp_path / "data")
    for name in cifar10_files(CIFAR10, tmp_path, every=3):
        prepare_folder(tmp_path / name, name=name, data_dir=data_dir, progress=False)

    def accuracy(name, recipe, seed):
        config = load_config(f"{recipe},data_dir={data_dir}")
        config.seed, config.save_every, config.eval_every, config.log_every = seed, 0, 0, 100
        config.model.scan = True  # compiles sooner, and each seed and rate is a program
        return run(config, tmp_path / f"{name}{seed}")[1]["test/top1"]

    assert accuracy("low", "cifar10:small,steps=150,name=cifar10_low", 0) > 0.4
    shape = "steps=20,batch_size=64,augment=pad_crop_flip"
    recipe = f"transfer:name=cifar10_high,init_from={tmp_path}/low0,{shape}"

    def scores(name, mode, rate):
        arm = f"{recipe},learning_rate={rate},mode={mode}"
        return [accuracy(name, arm, seed) for seed in range(3)]

    scratch = scores("scratch", "full,pretrained=false", 3e-3)
    for mode, rate in {"full": 1e-3, "layerwise": 3e-3, "probe": 3e-2}.items():
        found = scores(mode, mode, rate)
        print(mode, found, "from scratch", scratch)
        assert min(found) > max(scratch)


def test_a_benchmark_does_not_take_another_run_for_its_own(tmp_path):
    config = load_config("digits:steps=7")
    save_json(epath.Path(tmp_path) / "config.json", config)
    check_same(tmp_path, "digits.py:steps=7", [])
    with pytest.raises(SystemExit, match="holds another run"):
        check_same(tmp_path, "digits.py:steps=7", ["--config.seed=5"])
