"""`config.init_from`: what a new run takes from other weights, and what it says of it."""

import collections
import gc
import json
import time

import jax
import numpy as np
import pytest
from etils import epath

from tests.interop.models import source, spec
from tests.runs import StopAfter, assert_same_bits, run, saved_state, short, steps_on_disk
from vit_jax import cli
from vit_jax import trainer as trainer_lib
from vit_jax.checkpoint import unstack
from vit_jax.interop.export import export
from vit_jax.interop.load import adapt, read_source
from vit_jax.metrics import Stopwatch
from vit_jax.runtime import Preempted, StopSignal
from vit_jax.train import Parts
from vit_jax.tree import named_leaves

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(finished):
    """The workdir of a finished run."""
    return finished[0]


def test_from_a_run_with_the_same_classes_everything_comes_in(trained, data_dir, tmp_path, capsys):
    config = short(data_dir, init_from=str(trained), optimizer__learning_rate=0.0)
    trainer, _ = run(config, tmp_path / "new")
    wanted = read_source(trained).params
    params = names_of(trainer.state.params)
    assert params.keys() == wanted.keys()
    for name in wanted:  # a learning rate of zero changes nothing
        np.testing.assert_array_equal(params[name], wanted[name], err_msg=name)
    assert_same_bits(trainer.state.params, trainer.state.ema)
    said = capsys.readouterr().out
    assert f"starting from {trained}\nlayout vit_jax checkpoint 6: {len(wanted)} arrays" in said


def names_of(params):
    """The leaves by the names of a loaded model."""
    leaves = unstack(named_leaves(params))
    return {name.removeprefix("objective/"): np.asarray(x) for name, x in leaves.items()}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("format", ["safetensors", "npz", "huggingface"])
def test_any_format_scanned_or_not(data_dir, tmp_path, format, scan):
    path, made = weights(tmp_path, format=format, patch_size=(4, 4), names=False)
    leaves = {"model__variant": "Ti/4", "model__scan": scan}
    trainer = start(short(data_dir, init_from=str(path), **leaves), tmp_path / "new")
    params = names_of(trainer.state.params)
    for name, array in made.params.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


def start(config, workdir):
    """A trainer before its first step."""
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True)
    stop = StopSignal()
    try:
        return trainer_lib.Trainer(config, workdir, clock=Stopwatch(time.time()), stop=stop)
    finally:
        stop.restore()


SUFFIXES = {"safetensors": ".safetensors", "npz": ".npz", "huggingface": ""}


def weights(tmp_path, format="safetensors", **options):
    """Weights like those of `short`'s model, but for `options`."""
    like = {"image_size": (8, 8), "patch_size": (4, 2), "dim": 32, "num_heads": 2, "mlp_dim": 64}
    made = source(spec(**like | {"num_classes": 10} | options))
    path = tmp_path / f"w{SUFFIXES[format]}"
    export(made, format=format, out=path, overwrite=True)
    return path, made


def test_another_resolution_patch_and_other_classes(data_dir, tmp_path, capsys):
    path, made = weights(tmp_path, image_size=(16, 16), patch_size=(8, 4), num_classes=5)
    trainer = start(short(data_dir, init_from=str(path)), tmp_path / "new")
    params = names_of(trainer.state.params)
    adapted = adapt(made, image_size=(8, 8), patch_size=(4, 2)).params
    for name, array in adapted.items():
        if name.startswith("backbone/"):
            np.testing.assert_array_equal(params[name], array, err_msg=name)
    assert not params["head/fc/kernel"].any()  # as drawn
    said = capsys.readouterr().out
    for words in (
        "reshaped: backbone/patch_embed/kernel: patches of (8, 4) -> (4, 2), pseudo-inverse",
        "unexpected: head/fc/kernel: its classes are others than the run's",
        "missing: objective/head/fc/kernel: stays as drawn",
        "note: normalised with mean 0.4000 0.5000 0.6000 there,",
    ):
        assert words in said


def test_as_many_classes_of_other_names_are_other_classes(data_dir, tmp_path, capsys):
    path, _ = weights(tmp_path)  # "kind 0" to "kind 9"
    trainer = start(short(data_dir, init_from=str(path)), tmp_path / "new")
    params = names_of(trainer.state.params)
    assert not params["head/fc/kernel"].any()
    assert "head/fc/bias: its classes are others than the run's" in capsys.readouterr().out
    path, made = weights(tmp_path, names=False)  # nobody knows them: as many are the same
    trainer = start(short(data_dir, init_from=str(path)), tmp_path / "again")
    params = names_of(trainer.state.params)
    np.testing.assert_array_equal(params["head/fc/kernel"], made.params["head/fc/kernel"])


def test_only_the_first_start_takes_them(trained, data_dir, tmp_path, monkeypatch, capsys):
    path, _ = weights(tmp_path)
    config = short(data_dir, init_from=str(path), save_every=1)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        run(config, tmp_path / "new", StopAfter(2, patch))
    assert steps_on_disk(tmp_path / "new")[-1] in (2, 3)
    capsys.readouterr()
    path.unlink()  # a resumed run does not need it
    parts, _ = run(config, tmp_path / "new")
    assert "starting from" not in capsys.readouterr().out
    assert json.loads((tmp_path / "new/config.json").read_text())["init_from"] == str(path)
    weights(tmp_path)
    whole, _ = run(config, tmp_path / "whole")
    assert_same_bits(whole.state, parts.state)
    assert len(saved_state(tmp_path / "new", 6)) == len(jax.tree.leaves(whole.state))


def test_no_device_holds_more_than_its_part(data_dir, tmp_path, monkeypatch):
    """Not even on the way: a model may fit only split over all of them."""
    path, made = weights(tmp_path)
    held, begin = [], Parts.start

    def spy(parts, *modules):
        held.append(bytes_by_device())
        return begin(parts, *modules)

    monkeypatch.setattr(Parts, "start", spy)
    before = bytes_by_device()
    mesh = {"mesh__data": 1, "mesh__fsdp": 8}
    trainer = start(short(data_dir, init_from=str(path), **mesh), tmp_path / "new")
    model = sum(array.nbytes for array in made.params.values())
    for after in [*held, bytes_by_device()]:
        more = [after[device] - before[device] for device in jax.devices()]
        assert max(more) - min(more) < model / 10
    assert len(held) > 1 and min(more) > model / 8
    params = names_of(trainer.state.params)
    name = "backbone/blocks/1/mlp/fc1/kernel"
    np.testing.assert_array_equal(params[name], made.params[name])


def bytes_by_device():
    """Of all arrays that are alive."""
    gc.collect()  # other tests' trainers are cycles
    found = collections.Counter()
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            found[shard.device] += shard.data.nbytes
    return found


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dim": 64}, "another backbone than config.model: set dim=64 there"),
        ({"depth": 1}, "set depth=1 there"),
        ({"num_heads": 4}, "num_heads=4, not 2; set num_heads=4"),
        ({"pos_embed": "sincos2d"}, "set pos_embed='sincos2d' there"),
        ({"activation": "gelu", "norm_eps": 1e-5}, "set activation='gelu', norm_eps=1e-05 there"),
    ],
)
def test_another_backbone_is_refused(data_dir, tmp_path, options, words):
    path, _ = weights(tmp_path, **options)
    with pytest.raises(ValueError, match=words):
        start(short(data_dir, init_from=str(path)), tmp_path / "new")
    assert not steps_on_disk(tmp_path / "new")


def test_nothing_there(data_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        start(short(data_dir, init_from="nowhere"), tmp_path / "new")


def test_the_command_says_it_in_one_line(data_dir, tmp_path, capsys):
    path, _ = weights(tmp_path, dim=64)
    where = [f"--config.{section}.data_dir={data_dir}" for section in ("data", "evals.test")]
    flags = "--config=digits:debug", f"--config.init_from={path}", f"--workdir={tmp_path}/run"
    assert cli.main(["train", *flags, *where]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "another backbone than config.model: set dim=64 there" in line
