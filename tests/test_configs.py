"""Every recipe runs, shrunken, exactly as it is written."""

import ast
import pathlib
import re

import pytest

from tests.data.images import encode, noise, write_tree
from tests.runs import deterministic_rows, run, steps_on_disk
from vit_jax.commands.config_flag import load_config
from vit_jax.config import OPTIONAL, TOP_LEVEL, flatten
from vit_jax.data.prepare import prepare_folder

CONFIGS = sorted(pathlib.Path(__file__, "../../configs").resolve().glob("*.py"))
# The others' debug forms are much like these two: only `make test-all` runs them.
RUNS = [
    pytest.param(path, marks=() if path.stem in ("cifar10", "digits") else pytest.mark.slow)
    for path in CONFIGS
]


@pytest.fixture(scope="module")
def folder_data(tmp_path_factory):
    """A folder of images, prepared under the name that the recipes for folders expect."""
    root = tmp_path_factory.mktemp("folder")
    files = {
        f"{label}/{number}.jpg": encode(noise(32, 32, seed=number), "JPEG")
        for label in ("cat", "dog")
        for number in range(8)
    }
    write_tree(root / "images", files)
    for name in ("mine", "cifar10", "imagenet2012", "imagenet21k"):
        options = {"data_dir": str(root / "data"), "holdout": 0.25, "progress": False}
        prepare_folder(root / "images", name=name, **options)
    return str(root / "data")


@pytest.fixture
def shrunken(data_dir, folder_data):
    """Loads a recipe's debug form, or the full one, on data that is there."""

    def shrunken(path: pathlib.Path, arg: str = "debug"):
        where = data_dir if path.stem == "digits" else folder_data
        return load_config(f"{path}:{arg},data_dir={where}")

    return shrunken


def test_there_are_recipes():
    assert {"digits", "cifar10", "image_folder", "transfer"} <= {path.stem for path in CONFIGS}
    assert {"vit_s16_i1k", "vit_l16_i21k", "vit_g14_i21k", "vit_22b"} <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_debug_form_trains_evaluates_and_saves(path, shrunken, tmp_path):
    config = shrunken(path)
    _, results = run(config, tmp_path / "run")
    steps = config.total_steps
    assert steps <= 20
    assert steps_on_disk(tmp_path / "run")[-1] == steps
    values = deterministic_rows(tmp_path / "run")
    assert values[steps, "train/loss"] > 0
    assert all(values[steps, key] == value for key, value in results.items())
    assert results["test/count"] > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_docstring_says_how_to_run_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"vit-jax train --config=configs/{path.name}" in docstring
    assert re.search(r"--workdir=runs/\w+", docstring)
    assert re.search(r"\d%|not yet\s+run", docstring)  # the number reached


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_leaves_are_few_and_plain(path, shrunken):
    config = shrunken(path, "")
    assert set(config) == TOP_LEVEL | OPTIONAL
    leaves = flatten(config)
    given = ["init_from", "mesh.replica", "mesh.fsdp", "mesh.tensor"]
    given += ["train.spmd", "train.accumulate", "train.offload_opt_state"]
    for key in given:
        leaves.pop(key)  # `load_config` gives these to every recipe
    assert 25 <= len(leaves) <= 45
    for key, value in leaves.items():
        assert isinstance(value, (bool, int, float, str, list)), key
        assert key.count(".") <= (3 if key.startswith("evals.") else 1), key
    assert isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_is_found_by_name_and_refuses_what_it_does_not_know(path, shrunken):
    with pytest.raises(ValueError, match="config argument 'vriant' is unknown"):
        load_config(f"{path.stem}:vriant=S/16")
