import errno
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from vit_jax.commands import sweep
from vit_jax.sweep import store as lib
from vit_jax.sweep import table
from vit_jax.sweep.checkpoints import Finder, check_same_config, finished
from vit_jax.sweep.worker import Task, work


def unit(name="a", **changes):
    values = {
        **{"id": name, "checkpoint": "run", "step": 3, "dataset": "digits", "split": "test"},
        **{"eval": "knn", "protocol": "knn", "config_digest": "c", "checkpoint_digest": "w"},
        **{"run": "runs/run", "settings": {}},
    }
    return lib.Unit(**(values | changes))


def value(metric="top1", number=0.5, **more):
    return {"metric": metric, "value": number, "count": 10} | more


def save(store, unit, *values, **artefacts):
    return store.save_result(unit, values or [value()], artefacts, seconds=1.0)


def test_a_result_is_written_once(tmp_path):
    store = lib.Store(tmp_path)
    assert not store.done("a")
    store.save_failure("a", "why", "where")
    assert store.failed("a")
    assert save(store, unit(), value("top1", 0.5, low=0.4), value("loss", float("nan")))
    assert not save(store, unit(), value("top1", 0.9))
    assert store.done("a") and not store.failed("a")
    result = store.results()["a"]
    assert result["unit"]["checkpoint"] == "run" and result["format"] == lib.FORMAT
    top1 = {"metric": "top1", "value": 0.5, "low": 0.4, "high": None, "count": 10}
    assert result["values"] == [top1, top1 | {"metric": "loss", "value": None, "low": None}]
    assert not [p for p in tmp_path.rglob("*.tmp")]


def test_results_of_a_newer_version_are_refused(tmp_path):
    store = lib.Store(tmp_path)
    save(store, unit())
    path = tmp_path / "results" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": lib.FORMAT + 1}))
    with pytest.raises(ValueError, match="written by a newer vit_jax .*another --workdir"):
        store.results()
    path.write_text(json.dumps({"format": str(lib.FORMAT + 1)}))
    with pytest.raises(ValueError, match="written by a newer vit_jax"):
        store.results()
    path.write_text("{")
    with pytest.raises(ValueError, match="a.json is damaged .*delete it"):
        store.results()
    with pytest.raises(ValueError, match="must be a local or mounted folder"):
        lib.Store("gs://bucket/sweep")


def test_what_the_file_no_longer_asks_for_is_orphaned(tmp_path):
    store = lib.Store(tmp_path)
    units = [
        unit("asked"),
        unit("deleted", step=1),  # its checkpoint was, not the run
        unit("setting", config_digest="other"),
        unit("run", run="runs/other"),
        unit("weights", checkpoint_digest="before"),
    ]
    for each in units:
        save(store, each)
    assert len(store.current()[0]) == 5  # nothing is known yet
    store.save_plan("a", [unit("asked"), unit("new", eval="fewshot")])
    kept, orphaned = (sorted(r["unit"]["id"] for r in part) for part in store.current())
    assert kept == ["asked", "deleted"]
    assert orphaned == ["run", "setting", "weights"]


@pytest.mark.parametrize(("steps", "kept"), [("all", "ad"), ("last", "a"), ([3], "a"), ([1], "ad")])
def test_other_steps_are_orphaned(tmp_path, steps, kept):
    store = lib.Store(tmp_path)
    save(store, unit("a"))
    save(store, unit("d", step=1))  # its checkpoint is gone
    store.save_plan("sweep", [unit("a")], steps=steps)
    found, orphaned = ("".join(r["unit"]["id"] for r in part) for part in store.current())
    assert (found, orphaned) == (kept, "ad"[len(kept) :])


def test_two_files_share_a_folder(tmp_path):
    store = lib.Store(tmp_path)
    for name in ("one", "two", "both", "none"):
        save(store, unit(name))
    store.save_plan("first", [unit("one"), unit("both")])
    store.save_plan("second", [unit("two"), unit("both")])
    kept, orphaned = (sorted(r["unit"]["id"] for r in part) for part in store.current())
    assert kept == ["both", "one", "two"] and orphaned == ["none"]
    store.save_failure("x", "why", "where")
    assert not store.current_failures()
    store.save_plan("first", [unit("one"), unit("x")])  # it was changed
    assert [r["unit"]["id"] for r in store.current()[1]] == ["none"]
    assert list(store.current_failures()) == ["x"]
    store.save_plan("second", [unit("two")])
    assert [r["unit"]["id"] for r in store.current()[1]] == ["both", "none"]


def test_two_files_do_not_mean_two_things_by_one_name(tmp_path):
    store = lib.Store(tmp_path)
    store.save_plan("first", [unit("one")])
    with pytest.raises(ValueError, match="evals.knn on datasets.digits has other .*'first'.*call"):
        store.save_plan("second", [unit("two", config_digest="k of 5")])
    store.save_plan("second", [unit("two", config_digest="k of 5", eval="knn5"), unit("one")])
    store.save_plan("first", [unit("two", eval="fewshot", config_digest="k of 5")])  # changed
    # Before there is any checkpoint, so any unit.
    with pytest.raises(ValueError, match="evals.fewshot on datasets.digits has other settings"):
        store.save_plan("third", [], settings=[("digits", "fewshot", "other")])


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_try_one_succeeds(tmp_path, monkeypatch, links):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(lib.os, "link", link)
    store, barrier = lib.Store(tmp_path), threading.Barrier(8)

    def attempt(number):
        barrier.wait()
        with store.lease("a") as mine:
            barrier.wait()  # nobody gives it back before all have tried
            return mine and save(store, unit(), value("top1", number))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            mine = list(pool.map(attempt, range(8)))
            assert mine.count(False) >= 7
            assert not list((tmp_path / "leases").iterdir())
    assert not save(store, unit(), value("top1", 9.0))
    assert store.results()["a"]["values"][0]["value"] < 8
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.json"]


def test_a_dataset_that_was_prepared_again_is_another_one(tmp_path):
    store, correct = lib.Store(tmp_path), {"examples": "e", "count": 8}
    old, new = {"dataset_fingerprint": "old"}, {"dataset_fingerprint": "new"}
    save(store, unit("before", **old), correct=correct | {"bits": "8A=="})
    save(store, unit("gone", step=1, **old), correct=correct | {"bits": "8A=="})
    save(store, unit("after", **new), value("top1", 0.75), correct=correct | {"bits": "/A=="})
    # What is in one table after all is not taken for the same examples.
    board = table.leaderboard(store.current()[0])
    assert len(board) == 3 and [row["p_value"] for row in board] == [None] * 3
    store.save_plan("a", [unit("after", **new)])
    kept, orphaned = (sorted(r["unit"]["id"] for r in part) for part in store.current())
    assert kept == ["after"] and orphaned == ["before", "gone"]


def test_failures_that_are_no_longer_asked_for_do_not_count(tmp_path):
    store = lib.Store(tmp_path)
    for name in ("asked", "dropped", "train-asked", "train-dropped"):
        store.save_failure(name, "why", "where")
    assert len(store.current_failures()) == 4  # nothing is known yet
    store.save_plan("a", [unit("asked"), unit("other")], ["train-asked"])
    assert sorted(store.current_failures()) == ["asked", "train-asked"]
    with pytest.raises(ValueError, match="2 units failed, 0 are done"):
        sweep._finish(store)
    store.save_plan("a", [unit("other")])
    assert sweep._finish(store) == 0


def write_run(folder, **leaves):
    """A run with its last checkpoint, as far as a look at the folder tells."""
    config = {"total_steps": 6, "log_every": 2, "optimizer": {"learning_rate": 1e-3}} | leaves
    (folder / "checkpoints" / "6").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def test_a_run_of_another_config_is_not_the_one_that_is_wanted(tmp_path):
    run = tmp_path / "runs" / "seed=0"
    config = write_run(run)
    assert finished(run) and finished(run, config) and finished(run, config | {"log_every": 1})
    other = config | {"optimizer": {"learning_rate": 2e-3}}
    assert not finished(run, other)
    words = r"optimizer.learning_rate: 0.001 -> 0.002; choose another --workdir or delete .*seed=0"
    for refuse in (check_same_config, lambda run, config: sweep._train(config, run, stop=None)):
        with pytest.raises(ValueError, match=words):
            refuse(run, other)
    check_same_config(run, config | {"log_every": 1})
    (run / "checkpoints" / "6").rmdir()
    check_same_config(run, other)  # nothing binds it yet


def test_patterns_without_a_run_are_found(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    patterns = [f"{tmp_path}/{name}" for name in ("*", "b", "c*")]
    assert Finder(runs=patterns).missing() == patterns[1:]


def test_a_watcher_waits_for_the_steps_that_are_listed(tmp_path):
    config = write_run(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"total_steps": 9}))
    listed = {"runs": [str(tmp_path / "a")], "steps": [3, 6, 9]}
    assert [found.step for found in Finder(**listed)()] == [3, 6, 9]
    watching = Finder(**listed, watch=True)
    assert [found.step for found in watching()] == [6]
    (tmp_path / "a" / "checkpoints" / "9").mkdir()  # the run is at its end: 3 is missing
    assert [found.step for found in watching()] == [3, 6, 9]


def test_what_was_done_before_its_checkpoint_was_deleted_is_done(tmp_path):
    store = lib.Store(tmp_path)
    save(store, unit("with-weights"))
    gone = {"checkpoint_digest": "unreadable"}
    assert store.was_done(unit("without", **gone))
    for other in ({"step": 4}, {"config_digest": "d"}, {"dataset_fingerprint": "f"}):
        assert not store.was_done(unit("without", **gone, **other))


HOLD = """
import sys, time
from vit_jax.sweep.store import Store
with Store(sys.argv[1]).lease(sys.argv[2]) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_lease_is_held_by_one_until_its_process_is_gone(tmp_path):
    store = lib.Store(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path), "a"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with store.lease("a") as mine:
        assert not mine
    with store.lease("b") as mine, store.lease("b") as again:
        assert mine and not again
    other.kill()
    other.communicate()
    with store.lease("a") as mine:
        assert mine
    assert not list((tmp_path / "leases").iterdir())


@pytest.mark.parametrize(
    "written",
    ["", json.dumps({"host": "elsewhere", "boot": "x", "pid": 1, "token": "t"})],
    ids=["created and not written", "of another machine"],
)
def test_a_lease_ends_when_its_heart_stops(tmp_path, written):
    store = lib.Store(tmp_path)
    path = tmp_path / "leases" / "a"
    path.write_text(written)
    with store.lease("a") as mine:
        assert not mine
    past = time.time() - lib.EXPIRED - 5
    os.utime(path, (past, past))
    with store.lease("a") as mine:
        assert mine
    assert not path.exists()


def test_a_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "HEARTBEAT", 0.02)
    with lib.Store(tmp_path).lease("a"):
        path = tmp_path / "leases" / "a"
        os.utime(path, (1, 1))
        for _ in range(200):
            time.sleep(0.02)
            if path.stat().st_mtime > 1:
                return
    pytest.fail("no heartbeat")


def test_a_number_of_a_process_that_comes_again_is_another_process(tmp_path):
    store = lib.Store(tmp_path)
    path = pathlib.Path(tmp_path / "leases" / "a")
    owner = {"host": lib.socket.gethostname(), "boot": lib._boot_id(), "pid": os.getpid()}
    path.write_text(json.dumps(owner | {"started": "1", "token": "t"}))
    if not lib._boot_id():
        pytest.skip("needs /proc")
    with store.lease("a") as mine:
        assert mine


def test_the_worker_goes_on_after_failures_and_says_them(tmp_path):
    store, done, said = lib.Store(tmp_path), set(), []

    def fail():
        raise ValueError("no\ngood")

    tasks = [
        Task("bad", lambda: "bad" in done, fail),
        Task("good", lambda: "good" in done, lambda: done.add("good")),
    ]
    work(store, lambda: (tasks, False), check_stop=lambda: None, say=said.append)
    assert done == {"good"}
    assert store.failures()["bad"]["error"] == "no good"
    assert "ValueError" in store.failures()["bad"]["traceback"]
    assert said[0] == "failed  bad: no good" and said[1].startswith("done    good")
    tasks[0] = tasks[0]._replace(run=lambda: done.add("bad"))
    work(store, lambda: (tasks, False), check_stop=lambda: None, say=said.append)
    assert "bad" not in done  # not without being asked
    store.forget_failure("bad")
    work(store, lambda: (tasks, False), check_stop=lambda: None, say=said.append)
    assert done == {"good", "bad"}


def test_tables(tmp_path):
    store = lib.Store(tmp_path)
    correct = {"examples": "e", "count": 8}
    save(
        store, unit("a"), value("top1", 0.5), value("loss", 1.5), correct=correct | {"bits": "8A=="}
    )
    save(store, unit("b", step=9), value("top1", 0.75), correct=correct | {"bits": "/A=="})
    save(store, unit("c", checkpoint="other", step=None), value("top1", 0.25))
    results = list(store.results().values())
    rows = table.long_form(results)
    assert [(row["checkpoint"], row["step"], row["metric"]) for row in rows] == [
        *(("other", None, "top1"), ("run", 3, "loss"), ("run", 3, "top1"), ("run", 9, "top1")),
    ]
    path = table.write_parquet(rows, tmp_path)
    assert pq.read_table(path).to_pylist() == rows
    assert tuple(pq.read_table(path).column_names) == table.COLUMNS
    pivoted = table.pivot(rows, "step")
    assert pivoted[2] == {
        **{"checkpoint": "run", "dataset": "digits", "eval": "knn", "metric": "top1"},
        **{"None": None, "3": 0.5, "9": 0.75},
    }
    with pytest.raises(ValueError, match="--pivot=evl is unknown .did you mean 'eval'"):
        table.pivot(rows, "evl")
    board = table.leaderboard(results)
    assert [row["value"] for row in board] == [0.75, 0.5, 0.25]
    assert [row["p_value"] for row in board] == [None, 0.5, None]  # 2 differ, the same way
    assert table.to_csv(rows[:1], ["checkpoint", "value"]) == "checkpoint,value\nother,0.25\n"
    assert table.to_text(rows[:1], ["step", "value"]).splitlines() == ["step  value", "-     0.25"]
