"""Transfer: the recipe in each of its modes, and what pretraining is worth."""

import numpy as np
import pytest

from tests.runs import deterministic_rows, run, saved_state, short
from vit_jax.commands.config_flag import load_config
from vit_jax.interop.load import read_source

pytestmark = pytest.mark.slow


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
