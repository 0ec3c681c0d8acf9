"""`config.init_from`: a new run begins with other weights, and says what it did with each."""

import jax
import numpy as np
import pytest
from etils import epath

from tests.interop.models import BACKBONE, source, spec
from tests.runs import run, short
from vit_jax import cli
from vit_jax.checkpoint import unstack
from vit_jax.interop.export import write_own
from vit_jax.interop.load import read_source
from vit_jax.train import Trainer
from vit_jax.tree import named_leaves


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("start") / "run"
    config = short(data_dir)
    run(config, workdir)
    return config, workdir


@pytest.fixture
def started(monkeypatch):
    """A trainer that has taken up its state and not done a step."""

    def started(config, workdir):
        monkeypatch.setattr(Trainer, "_loop", lambda _: None)
        return run(config, workdir)[0]

    return started


def parameters(trainer):
    return {k: np.asarray(v) for k, v in unstack(named_leaves(trainer.state.params)).items()}


@pytest.mark.parametrize("scan", [False, True])
def test_all_of_it(trained, started, tmp_path, scan, capsys, data_dir):
    _, workdir = trained
    config = short(data_dir, seed=7, init_from=str(workdir), model__scan=scan)
    found = parameters(started(config, tmp_path / "new"))
    printed = capsys.readouterr().out
    wanted = read_source(workdir).params
    assert len(found) == len(wanted)
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name.removeprefix("objective/")], err_msg=name)
    assert "starting from" in printed and "missing" not in printed


def test_another_resolution_and_head(trained, started, tmp_path, data_dir, capsys):
    path = epath.Path(tmp_path / "other.safetensors")
    config = short(data_dir, init_from=str(path))
    model = config.model
    shape = {key: model[key] for key in ("dim", "depth", "num_heads", "mlp_dim")}
    other = source(spec(image_size=(16, 8), patch_size=(4, 4), num_classes=3, **shape))
    write_own(other, path)
    trainer = started(config, tmp_path / "new")
    found, printed = parameters(trainer), capsys.readouterr().out
    name = "backbone/blocks/0/attn/qkv/kernel"
    np.testing.assert_array_equal(found[name], other.params[name])
    assert "reshaped: backbone/pos_embed: a grid of (4, 2) -> (2, 4)" in printed
    assert "reshaped: backbone/patch_embed/kernel: patches of (4, 4) -> (4, 2)" in printed
    assert "missing: objective/head/fc/kernel: stays as drawn" in printed
    assert "unexpected: head/fc/kernel" in printed
    assert "the weights want mean (0.4, 0.5, 0.6)" in printed
    state = jax.tree.leaves(trainer.state.ema)
    assert len(state) == len(found)


def test_another_backbone_is_refused(tmp_path, data_dir, capsys):
    path = epath.Path(tmp_path / "other.safetensors")
    write_own(source(spec(activation="gelu", **{k: BACKBONE[k] for k in ("dim",)})), path)
    where = [f"--config.{section}.data_dir={data_dir}" for section in ("data", "evals.test")]
    flags = "--config=digits:debug", f"--config.init_from={path}", f"--workdir={tmp_path}/run"
    assert cli.main(["train", *flags, *where]) == 1
    line = capsys.readouterr().err
    assert "another backbone than config.model: set dim=24" in line and "activation='gelu'" in line


def test_resuming_does_not_start_again(trained, tmp_path, data_dir, capsys):
    _, workdir = trained
    config = short(data_dir, init_from=str(workdir))
    run(config, tmp_path / "new")
    assert "starting from" in capsys.readouterr().out
    run(config, tmp_path / "new")
    assert "starting from" not in capsys.readouterr().out
