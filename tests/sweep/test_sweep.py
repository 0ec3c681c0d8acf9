"""Whole sweeps: in this process over a run that was trained for the test, and killed ones."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from tests.interop import models
from tests.runs import call, ending, run, save_recipe, save_sweep, short, start
from vit_jax import features
from vit_jax.commands import sweep
from vit_jax.data.sources import dataset_info
from vit_jax.interop.export import export
from vit_jax.metrics import read_run_rows
from vit_jax.runtime import Preempted, StopSignal
from vit_jax.sweep import units as units_lib
from vit_jax.sweep.checkpoints import Checkpoint, Finder
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
    said = capsys.readouterr().out
    assert "6 results in" in said
    took = re.findall(r"-(\d)-digits.*; (\d) feature sets extracted, (\d+) programs compiled", said)
    assert len(took) == 6 and sum(int(sets) for _, sets, _ in took) == 4
    # The second checkpoint needs no program that the first did not.
    assert sum(int(programs) for step, _, programs in took if step == "3") > 0
    assert not sum(int(programs) for step, _, programs in took if step == "6")
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


@pytest.mark.slow
def test_a_watcher_evaluates_while_the_training_goes_on(data_dir, tmp_path):
    run_dir = tmp_path / "run"
    leaves = {"total_steps": 10**6, "save_every": 300, "log_every": 50, "eval_every": 10**6}
    recipe = save_recipe(short(data_dir, train__keep=100, **leaves), tmp_path / "recipe.py")
    config = make(tmp_path, data_dir, [run_dir], evals={"knn": {"name": "knn", "k": [5]}})
    where = {"log": tmp_path / "log", "devices": 1}
    # As idle as it is, it would get nothing to do on a machine that is busy with other tests.
    less_idle = "from vit_jax.commands import sweep; sweep.NICENESS = 1"
    argv = ["sweep", config, f"--workdir={tmp_path}/sweep", "--watch"]
    watcher = start(*argv, code=less_idle, **where)
    with (
        ending(watcher),
        ending(start("train", f"--config={recipe}", f"--workdir={run_dir}", **where)) as training,
    ):  # the watcher was there first
        found, end = run_dir / "sweep.jsonl", time.monotonic() + 500
        while not found.exists() or len(found.read_text().splitlines()) < 2:
            assert time.monotonic() < end and training.poll() is None, where["log"].read_text()
            time.sleep(0.2)
        assert training.poll() is None and watcher.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, watcher.pid) == 1
        for process in (watcher, training):
            process.terminate()
            assert process.wait(60) == 75
    added = [json.loads(line) for line in found.read_text().splitlines()]
    assert all(row["step"] % 300 == 0 and 0 <= row["digits_knn/top1"] <= 1 for row in added)
    assert list((run_dir / "tensorboard" / "sweep").iterdir())
    logged = (run_dir / "metrics.jsonl").read_text()  # the training's alone
    assert "train/loss" in logged and "digits_knn" not in logged


@pytest.mark.slow
def test_launch_starts_workers_that_share_the_units(trained, data_dir, tmp_path):
    config = make(tmp_path, data_dir, [trained])
    sweep_flags = ["sweep", config, f"--workdir={tmp_path}/sweep"]
    done = call("launch", "local", "--num_processes=2", "--", *sweep_flags)
    assert done.returncode == 0, done.stderr
    said = done.stdout + (tmp_path / "sweep" / "hosts" / "001" / "log").read_text()
    results = Store(tmp_path / "sweep").results()
    assert len(results) == 6
    for unit in results:  # by one of them
        assert said.count(f"done    {unit} ") == 1


@pytest.mark.slow
def test_imported_models_stand_beside_runs(trained, data_dir, tmp_path):
    names = dataset_info("digits", data_dir=data_dir).class_names
    made = models.spec(num_classes=10, image_size=(8, 8), patch_size=(4, 4))
    made = models.source(dataclasses.replace(made, class_names=names))
    paths = [tmp_path / "folder", tmp_path / "m.safetensors", tmp_path / "m.npz"]
    for format, path in zip(("huggingface", "safetensors", "npz"), paths, strict=True):
        export(made, format=format, out=path)
    where = {"models": list(map(str, paths)), "runs": [str(trained)], "steps": "last"}
    config = make(tmp_path, data_dir, [], checkpoints=where)
    assert sweep.main([config, f"--workdir={tmp_path}/sweep"]) == 0
    found = {
        (row["checkpoint"], row["eval"], row["metric"]): row for row in rows(tmp_path / "sweep")
    }
    for path in paths:
        few, own = (found[str(path), name, "top1"] for name in ("few", "own"))
        assert few["count"] == own["count"] == 360 and few["step"] is None
    for name, metric in (("own", "loss"), ("own", "top1"), ("knn", "top1"), ("few", "top1")):
        one, two = (found[str(path), name, metric]["value"] for path in paths[:2])
        assert one == pytest.approx(two, abs=1e-5), (name, metric)
    assert found[str(trained), "own", "top1"]["step"] == 6


@pytest.mark.parametrize(
    ("changes", "argv", "words"),
    [
        ({"evals": {"x": {"name": "knnn"}}}, [], "did you mean 'knn'"),
        ({"checkpoints": {"runs": "runs/*"}}, [], "must be a list of paths or globs"),
        ({"checkpoints": {"stps": 1}}, [], "did you mean 'steps'"),
        ({"datasets": {"x": {}}}, [], "needs a 'dataset'"),
        ({"datsets": {}}, [], "unknown section 'datsets'"),
        ({"training": {"config": "digits", "leaves": {"sed": [1]}}}, [], "did you mean 'seed'"),
        ({"evals": {"x": {"name": "knn", "split": "train"}}}, [], "belongs into the sweep's data"),
        ({"evals": {"x": {"name": "knn", "temprature": 1}}}, [], "did you mean 'temperature'"),
        ({"datasets": {"x": {"dataset": "y", "batch_size": 1, "splt": "z"}}}, [], "mean 'split'"),
        ({"checkpoints": {"runs": ["no/where*"]}}, [], "'no/where.' matches no run .*--watch"),
        ({"training": {"config": "digits", "leaves": {}, "samples": -3}}, [], "samples=-3 must"),
        ({}, ["--num_workers=0"], "must be at least 1"),
        ({}, ["--csv"], "need --results"),
    ],
)
def test_bad_input(data_dir, tmp_path, changes, argv, words):
    config = make(tmp_path, data_dir, [], **changes)
    with pytest.raises(ValueError, match=words):
        sweep.main([config, f"--workdir={tmp_path}/sweep", *argv])


def test_two_files_that_disagree_are_told_before_anything_is_trained(data_dir, tmp_path):
    store = Store(tmp_path / "sweep")
    store.save_plan("other", [], settings=[("digits", "own", "of another digest")])
    training = {"config": f"digits:debug,data_dir={data_dir}", "leaves": {"seed": [0, 1]}}
    config = make(tmp_path, data_dir, [], training=training)
    with pytest.raises(ValueError, match="own on datasets.digits has other .* file 'other'"):
        sweep.main([config, f"--workdir={tmp_path}/sweep"])
    assert not (tmp_path / "sweep" / "runs").exists()


def test_a_watcher_says_that_it_waits(data_dir, tmp_path, monkeypatch, capsys):
    def stop(signal):
        raise Preempted

    monkeypatch.setattr(StopSignal, "check", stop)
    monkeypatch.setattr(sweep, "NICENESS", 0)
    config = make(tmp_path, data_dir, [tmp_path / "later*"])
    assert sweep.main([config, f"--workdir={tmp_path}/sweep", "--watch"]) == 75
    assert (
        "later*' matches no run (a folder with a config.json) yet; wait" in capsys.readouterr().out
    )


def test_a_unit_is_named_by_what_its_files_hold(data_dir, tmp_path):
    path = tmp_path / "real.json"
    datasets = {"digits": {"dataset": "digits", "data_dir": data_dir, "batch_size": 8}}
    evals = {"own": {"name": "classification", "labels": str(path)}}
    checkpoint = Checkpoint("model", "model", digest="weights")
    with pytest.raises(FileNotFoundError, match="evals.own.labels=.* is no file"):
        units_lib.make_units([checkpoint], datasets, evals)
    found = []
    for text in ("[[1]]", "[[2]]", "[[2]]"):
        path.write_text(text)
        found += [unit for unit, _ in units_lib.make_units([checkpoint], datasets, evals)]
    assert found[1] == found[2]
    assert found[0].id != found[1].id and found[0].config_digest != found[1].config_digest
    fingerprint = dataset_info("digits", data_dir=data_dir).fingerprint
    assert found[0].dataset_fingerprint == fingerprint


def test_missing_things(data_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep in"):
        sweep.main(["--results", f"--workdir={tmp_path}/none"])
    with pytest.raises(ValueError, match="--workdir is missing"):
        sweep.main([make(tmp_path, data_dir, [])])
    found = Finder(models=[f"{tmp_path}/model"])()
    assert "does not exist" in found[0].error


def test_a_checkpoint_that_vanished_is_named(data_dir, tmp_path):
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    (found,) = Finder(runs=[str(tmp_path / "run")], steps=[7])()
    assert "no checkpoint 7 in" in found.error
    datasets = {"digits": {"dataset": "digits", "data_dir": data_dir, "batch_size": 8}}
    evals = {"knn": {"name": "knn"}}
    ((unit, checkpoint),) = units_lib.make_units([found], datasets, evals)
    evaluate = units_lib.Evaluator(Store(tmp_path / "sweep"), datasets, evals)
    with pytest.raises(OSError, match="no checkpoint 7 in"):
        evaluate(unit, checkpoint)


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
    choices = {"seed": [0, 1], "save_every": [3, 6]}
    assert len(variations(choices, samples=4)) == 4  # no run twice
    with pytest.raises(ValueError, match="samples=5 is more than the 4 different runs"):
        variations(choices, samples=5)
    with pytest.raises(ValueError, match="is a range; set training.samples"):
        variations(rates)
    with pytest.raises(ValueError, match="must be a list of choices or a range"):
        variations({"seed": 3})


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("values", [[1, 2, 1], [[8, 8], [8, 8]]])
def test_a_repeated_choice_is_refused(values, samples):
    with pytest.raises(ValueError, match="training.leaves.model.size=.* repeats a choice"):
        variations({"model": {"size": values}, "seed": [0, 1]}, samples=samples)


def test_values_that_are_one_folder_name_are_still_runs_of_their_own():
    found = variations({"data": {"name": ["a/b", "a_b", "c"]}})
    assert len(found) == 3 and "name=c" in found
    assert [run["data.name"] for run in found.values()] == ["a/b", "a_b", "c"]
    assert found == variations({"data": {"name": ["a_b", "c", "a/b"]}})  # whatever the order


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
