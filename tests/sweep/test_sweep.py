"""Whole sweeps: in this process over a run that was trained for the test, and killed ones."""

import contextlib
import json
import pathlib
import random
import shutil
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from tests.runs import call, run, save_recipe, save_sweep, short, start
from vit_jax import features
from vit_jax.commands import sweep
from vit_jax.metrics import read_run_rows
from vit_jax.sweep import units as units_lib
from vit_jax.sweep.checkpoints import Finder
from vit_jax.sweep.store import Store
from vit_jax.sweep.training import variations


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A run with checkpoints at steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("sweep") / "run"
    config = short(data_dir, save_every=3, eval_every=3)
    run(config, workdir)
    return workdir


def make(folder, data_dir, runs, **changes):
    """The file of a sweep over `runs`."""
    checkpoints = {"checkpoints": {"runs": [str(each) for each in runs]}}
    return save_sweep(folder, data_dir, **(checkpoints | changes))


def rows(workdir):
    """All that must repeat."""
    table = pq.read_table(workdir / "results.parquet").to_pylist()
    return [{key: row[key] for key in row if key != "seconds"} for row in table]


@pytest.mark.slow
def test_a_sweep_does_each_thing_once(trained, data_dir, tmp_path, monkeypatch, capsys):
    config = make(tmp_path, data_dir, [trained.parent / "r*"])
    workdir = tmp_path / "sweep"
    calls = []
    extract = units_lib.extract

    def spy(model, loader, names, **options):
        calls.append(tuple(names))
        return extract(model, loader, names, **options)

    monkeypatch.setattr(units_lib, "extract", spy)
    programs = features._batch._cache_size()
    assert sweep.main([config, f"--workdir={workdir}"]) == 0
    assert "6 results in" in capsys.readouterr().out
    # Of both checkpoints, all that is wanted of a split at once.
    assert sorted(calls) == 2 * [("logits", "pooled")] + 2 * [("pooled",)]
    assert features._batch._cache_size() - programs == 2  # one for each set of names
    table = rows(workdir)
    assert {row["step"] for row in table} == {3, 6}
    logged = {row["step"]: row for row in read_run_rows(epath.Path(trained)) if "test/top1" in row}
    for row in table:
        if row["eval"] == "own" and row["metric"] in ("top1", "top5", "loss"):
            wanted = logged[row["step"]][f"test/{row['metric']}"]
            assert row["value"] == pytest.approx(wanted, abs=1e-5)
            assert row["low"] <= row["value"] <= row["high"] and row["count"] == 360
    before = {path: path.stat().st_mtime_ns for path in (workdir / "results").iterdir()}
    calls.clear()
    assert sweep.main([config, f"--workdir={workdir}"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (workdir / "results").iterdir()}
    assert not calls and rows(workdir) == table
    # Another k: that unit is added, the old one's result stays and is said.
    evals = {"own": {"name": "classification"}, "knn": {"name": "knn", "k": [7]}}
    config = make(tmp_path, data_dir, [trained], evals=evals, checkpoints={"runs": [str(trained)]})
    capsys.readouterr()
    assert sweep.main([config, f"--workdir={workdir}"]) == 0
    said = capsys.readouterr().out
    assert "4 results that the sweep's file no longer asks for are kept" in said
    assert not calls  # features were there
    assert len(list((workdir / "results").iterdir())) == 8
    assert {row["metric"] for row in rows(workdir) if row["eval"] == "knn"} == {
        *("top1", "top1_k7", "top5_k7"),
    }
    assert sweep.main(["--results", f"--workdir={workdir}", "--pivot=metric", "--csv"]) == 0
    out = capsys.readouterr()
    assert out.out.startswith("checkpoint,step,dataset,eval,") and "4 orphaned" in out.err


@pytest.mark.slow
def test_what_fails_does_not_stop_the_rest(trained, data_dir, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "3" / "state"
    shutil.rmtree(state / "d", ignore_errors=True)  # half written
    (tmp_path / "run" / "checkpoints" / "9").mkdir()
    evals = {
        "own": {"name": "classification", "subset": ["1", "elk"]},
        "knn": {"name": "knn", "k": [5]},
    }
    config = make(tmp_path, data_dir, [tmp_path / "run"], evals=evals)
    workdir = tmp_path / "sweep"
    with pytest.raises(ValueError, match=r"5 units failed, 1 are done; .*--retry_failed"):
        sweep.main([config, f"--workdir={workdir}"])
    failures = Store(workdir).failures()
    errors = " ".join(failure["error"] for failure in failures.values())
    assert "head lacks 'elk'" in errors and "damaged" in errors
    assert [row["eval"] for row in rows(workdir)] == ["knn"] * 3
    capsys.readouterr()
    with pytest.raises(ValueError, match="5 units failed"):  # not tried again
        sweep.main([config, f"--workdir={workdir}"])
    assert "failed  " not in capsys.readouterr().out
    config = make(tmp_path, data_dir, [trained])
    with contextlib.suppress(ValueError):
        sweep.main([config, f"--workdir={workdir}", "--retry_failed"])
    assert len(rows(workdir)) > 3


@pytest.mark.slow
def test_watching_brings_results_to_the_run(trained, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "NICENESS", 0)
    shutil.copytree(trained, tmp_path / "run")
    config = make(tmp_path, data_dir, [tmp_path / "run"], evals={"knn": {"name": "knn", "k": [5]}})
    argv = [config, f"--workdir={tmp_path}/sweep", "--watch"]
    assert sweep.main(argv) == 0  # the run is at its end
    path = epath.Path(tmp_path / "run")
    added = [json.loads(line) for line in (path / "sweep.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in added) == [3, 6]
    assert all(0 <= row["digits_knn/top1"] <= 1 for row in added)
    assert [row for row in read_run_rows(path) if "digits_knn/top1" in row]
    assert list((path / "tensorboard" / "sweep").iterdir())
    shutil.rmtree(path / "tensorboard")  # as a run that is started again does
    assert sweep.main(argv) == 0
    assert len((path / "sweep.jsonl").read_text().splitlines()) == 2  # each once
    assert list((path / "tensorboard" / "sweep").iterdir())


@pytest.mark.parametrize(
    ("changes", "argv", "words"),
    [
        ({"evals": {"x": {"name": "knnn"}}}, [], "did you mean 'knn'"),
        ({"checkpoints": {"runs": "runs/*"}}, [], "must be a list of paths or globs"),
        ({"checkpoints": {"stps": 1}}, [], "did you mean 'steps'"),
        ({"datasets": {"x": {}}}, [], "needs a 'dataset'"),
        ({"datsets": {}}, [], "unknown section 'datsets'"),
        ({"training": {"config": "digits", "leaves": {"sed": [1]}}}, [], "did you mean 'seed'"),
        ({}, ["--num_workers=0"], "must be at least 1"),
        ({}, ["--csv"], "need --results"),
    ],
)
def test_bad_input(data_dir, tmp_path, changes, argv, words):
    config = make(tmp_path, data_dir, [], **changes)
    with pytest.raises(ValueError, match=words):
        sweep.main([config, f"--workdir={tmp_path}/sweep", *argv])


def test_missing_things(data_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep in"):
        sweep.main(["--results", f"--workdir={tmp_path}/none"])
    with pytest.raises(ValueError, match="--workdir is missing"):
        sweep.main([make(tmp_path, data_dir, [])])
    found = Finder(models=[f"{tmp_path}/model"])()
    assert "does not exist" in found[0].error


def test_grids_and_draws():
    leaves = {"seed": [0, 1], "optimizer": {"learning_rate": [1e-3, 3e-3], "clip_norm": [1.0]}}
    grid = variations(leaves)
    assert list(grid) == [
        *("seed=0,learning_rate=0.001", "seed=0,learning_rate=0.003"),
        *("seed=1,learning_rate=0.001", "seed=1,learning_rate=0.003"),
    ]
    assert grid["seed=1,learning_rate=0.003"] == {
        **{"seed": 1, "optimizer.learning_rate": 3e-3, "optimizer.clip_norm": 1.0},
    }
    rates = {"optimizer": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}}
    drawn = variations(rates, samples=50, seed=3)
    assert drawn == variations(rates, samples=50, seed=3) != variations(rates, samples=50, seed=4)
    values = np.log10([run["optimizer.learning_rate"] for run in drawn.values()])
    assert -4 <= values.min() < -3.5 and -2.5 < values.max() <= -2
    with pytest.raises(ValueError, match="is a range; set training.samples"):
        variations(rates)
    with pytest.raises(ValueError, match="must be a list of choices or a range"):
        variations({"seed": 3})


@pytest.mark.slow
def test_ten_kills_leave_the_results_of_an_undisturbed_sweep(data_dir, tmp_path):
    recipe = save_recipe(short(data_dir, save_every=3), tmp_path / "recipe.py")
    training = {"config": recipe, "leaves": {"seed": [0, 1]}}
    config = make(tmp_path, data_dir, [], training=training)
    flags = [config, "--num_workers=2"]
    done = call("sweep", *flags, f"--workdir={tmp_path}/calm")
    assert done.returncode == 0, done.stderr
    rng, kills, log = random.Random(0), 0, tmp_path / "log"
    while kills < 10:
        process = start("sweep", *flags, f"--workdir={tmp_path}/killed", log=log)
        time.sleep(rng.uniform(1.0, 8.0))
        if process.poll() is not None:  # it had come to its end: once more, from the start
            shutil.rmtree(tmp_path / "killed")
            continue
        process.kill()
        process.wait()
        kills += 1
    done = call("sweep", *flags, f"--workdir={tmp_path}/killed")
    assert done.returncode == 0, done.stderr
    calm, killed = rows(tmp_path / "calm"), rows(tmp_path / "killed")
    assert len(calm) == 4 * (5 + 3 + 2)
    assert killed == calm
    keys = [tuple(row[k] for k in ("checkpoint", "step", "eval", "metric")) for row in killed]
    assert len(set(keys)) == len(keys)
    leases = [p for p in pathlib.Path(tmp_path / "killed" / "leases").iterdir()]
    assert not [p for p in leases if not p.name.startswith(".")]
