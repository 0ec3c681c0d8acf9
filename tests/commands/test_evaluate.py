import json
import shutil

import pytest
from etils import epath

from tests.runs import call, deterministic_rows, flags_for, run, short, steps_on_disk
from vit_jax.commands import evaluate
from vit_jax.evaluation import evaluate_checkpoint


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """(config, workdir, the test metrics that were logged by step)."""
    config = short(data_dir, save_every=3, eval_every=3)
    config.evals.more = dict(config.evals.test, split="test[:50%]")  # each under its own name
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    run(config, workdir)
    logged = {3: {}, 6: {}}
    for (step, key), value in deterministic_rows(workdir).items():
        if not key.startswith("train/"):
            logged[step][key] = value
    assert len(logged[3]) == len(logged[6]) == 10
    return config, workdir, logged


@pytest.mark.parametrize("flags, step", [([], 6), (["--step=3"], 3), (["--step=6"], 6)])
def test_the_numbers_are_those_of_training(trained, capsys, flags, step):
    _, workdir, logged = trained
    assert evaluate.main([f"--workdir={workdir}", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": step} | logged[step]
    assert evaluate.main([f"--workdir={workdir}", *flags]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == f"checkpoint {workdir}/checkpoints/{step}"
    table = dict(row.split() for row in rows)
    assert table.keys() == logged[step].keys()
    for key, value in logged[step].items():
        assert float(table[key]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("batch_size", [8, 50, 77, 360, 1000])
def test_another_batch_size_counts_the_same(trained, batch_size):
    config, workdir, logged = trained
    config = config.copy_and_resolve_references()
    config.evals.test.batch_size = config.evals.more.batch_size = batch_size
    step, results = evaluate_checkpoint(config, epath.Path(workdir))
    assert step == 6
    assert_close(results, logged[6])


@pytest.mark.parametrize("devices", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_another_number_of_devices_counts_the_same(trained, devices):
    _, workdir, logged = trained
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    done = call(
        *("evaluate", f"--workdir={workdir}", "--json"),
        XLA_FLAGS=flags_for(devices),
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    results = json.loads(done.stdout)
    assert results.pop("step") == 6
    assert_close(results, logged[6])
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}  # only reads


def assert_close(results, logged):
    assert results.keys() == logged.keys()
    for key, value in logged.items():
        if key.endswith("loss"):
            assert results[key] == pytest.approx(value, abs=1e-5)
        else:  # shares of whole counts
            assert results[key] == value, key


def test_a_missing_step_lists_those_that_are_there(trained):
    _, workdir, _ = trained
    assert steps_on_disk(workdir) == [3, 6]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 5 in \S+; there are: 3, 6\."):
        evaluate.main([f"--workdir={workdir}", "--step=5"])


def test_datasets_that_were_moved_are_found(trained, data_dir, tmp_path, capsys):
    _, workdir, logged = trained
    shutil.copytree(data_dir, tmp_path / "moved")
    assert evaluate.main([f"--workdir={workdir}", "--json", f"--data_dir={tmp_path}/moved"]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 6} | logged[6]
    with pytest.raises(FileNotFoundError, match="vit-jax prepare digits --data_dir=.*nowhere"):
        evaluate.main([f"--workdir={workdir}", f"--data_dir={tmp_path}/nowhere"])


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "--workdir is missing"),
        (["--stpe=3"], "--step"),
        (["--workdir=x", "y"], "argument 'y' is unknown"),
    ],
)
def test_flags_that_are_not_understood(argv, words):
    with pytest.raises(ValueError, match=words):
        evaluate.main(argv)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*config.json"):
        evaluate.main([f"--workdir={tmp_path}"])
    assert not list(tmp_path.iterdir())
