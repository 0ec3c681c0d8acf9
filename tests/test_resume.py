"""A run that is stopped and killed, as real processes, ends as one that was left in peace."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest

from tests.data.images import encode, noise
from tests.recipes import tiny
from tests.runs import (
    StopAfter,
    assert_board_shows,
    assert_same_bits,
    call,
    damage,
    deterministic_rows,
    ending,
    flags_for,
    rows,
    run,
    save_recipe,
    saved_meta,
    saved_state,
    short,
    start,
    steps_on_disk,
)
from vit_jax.exit_codes import EXIT_PREEMPTED
from vit_jax.runtime import Preempted

TOTAL, EVAL_EVERY, SAVE_EVERY = 30, 3, 2


class Run:
    """One workdir, and the processes that work on it one after the other."""

    def __init__(self, recipe: str, workdir: pathlib.Path):
        self.recipe, self.workdir = recipe, workdir
        self.starts, self.newest, self.hits = 0, 0, []
        workdir.mkdir()
        self.begun = time.time()

    def start(self):
        self.starts += 1
        self.resumed = max(steps_on_disk(self.workdir), default=0)
        assert self.resumed >= self.newest, "the newest whole checkpoint was lost"
        self.log = self.workdir / f"log{self.starts}.txt"
        flags = f"--config={self.recipe}", f"--workdir={self.workdir}"
        return start("train", *flags, log=self.log, devices=2)

    def disturb(self, number: int, moment) -> int:
        """Starts a process, sends it a signal at `moment(self)`; answers its exit code."""
        with ending(self.start()) as process:
            if self._freeze(process, moment):
                self.hits.append(moment.__name__)
                self.newest = max(steps_on_disk(self.workdir), default=0)
                self.at_signal = last_row(self)
                process.send_signal(number)
                process.send_signal(signal.SIGCONT)
            code = process.wait(timeout=240)
        self._check_resumed()
        return code

    def finish(self) -> None:
        with ending(self.start()) as process:
            assert process.wait(timeout=240) == 0, self.log.read_text()
        self.seconds = time.time() - self.begun
        self._check_resumed()

    def _freeze(self, process, moment) -> bool:
        """Stops the process while the moment lasts, so that the signal cannot come too late."""
        while process.poll() is None:
            if moment(self):
                process.send_signal(signal.SIGSTOP)
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                if not os.WIFSTOPPED(status):
                    process.returncode = os.waitstatus_to_exitcode(status)
                    return False
                if moment(self):
                    return True
                process.send_signal(signal.SIGCONT)
            time.sleep(0.003)  # a save lasts longer
        return False

    def _check_resumed(self) -> None:
        """Went on exactly where the newest whole checkpoint was."""
        text = self.log.read_text()
        if "compiling" in text:
            found = re.search(r"resuming at step (\d+) of", text)
            assert (int(found[1]) if found else 0) == self.resumed


def last_row(this: Run) -> dict:
    """The last line of metrics.jsonl; {} before this process's steps, or where it is cut short."""
    if "compiled" not in this.log.read_text():
        return {}  # what a killed process left may still be there
    path = this.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return json.loads(lines[-1]) if lines and lines[-1].endswith("\n") else {}


def compiling(this: Run) -> bool:
    text = this.log.read_text()
    return "compiling" in text and "compiled" not in text


def saving(this: Run) -> bool:
    return any((this.workdir / "checkpoints").glob("*tmp*"))


def evaluating(this: Run) -> bool:
    row = last_row(this)
    due = row.get("step", 1) % EVAL_EVERY == 0 or row.get("step") == TOTAL
    return due and "train/loss" in row and row["step"] > this.resumed


def after(steps: int):
    def steps_done(this: Run) -> bool:
        return last_row(this).get("step", 0) >= this.resumed + steps

    return steps_done


@pytest.fixture(scope="module")
def recipe(data_dir, tmp_path_factory):
    """Three epochs with all that is random, with unreadable images, evaluating and saving often."""
    truncated = encode(noise(64, 64), "PNG")[:200]
    bad = {"train": {5: b"", 40: truncated, 90: b"no image"}, "test": {7: truncated}}
    name = f"digits_damaged_{os.getpid()}"  # each test process makes its own
    damage(name, data_dir=data_dir, bad=bad)
    config = tiny(
        data_dir,
        total_steps=TOTAL,
        eval_every=EVAL_EVERY,
        save_every=SAVE_EVERY,
        data__name=name,
        data__split="train[:10%]",  # 144 images: nine batches an epoch
        evals__test__dataset=name,
        evals__test__batch_size=24,
    )
    config.train.update({"keep": 1, "keep_best": 1, "ema_decay": 0.9})
    return save_recipe(config, tmp_path_factory.mktemp("recipe") / "recipe.py")


@pytest.fixture(scope="module")
def peace(recipe, tmp_path_factory):
    """The run that nobody disturbs."""
    done = Run(recipe, tmp_path_factory.mktemp("resume") / "peace")
    done.finish()
    return done


@pytest.fixture(scope="module")
def war(recipe, tmp_path_factory):
    """The same run under signals of all kinds; what happened on the way."""
    this = Run(recipe, tmp_path_factory.mktemp("resume") / "war")
    facts = {}
    for name, number, moment in (
        ("term in compile", signal.SIGTERM, compiling),
        ("kill in save", signal.SIGKILL, saving),
        ("term in evaluation", signal.SIGTERM, evaluating),
        ("kill in evaluation", signal.SIGKILL, evaluating),
        ("int", signal.SIGINT, after(3)),
        ("kill", signal.SIGKILL, after(random.Random(0).randint(3, 9))),
    ):
        code = this.disturb(number, moment)
        there = {row["step"] for row in rows_before_a_cut(this.workdir)}
        facts[name] = {
            "code": code,
            "saved": max(steps_on_disk(this.workdir), default=0),
            "last": max(there, default=0),
            "row": this.at_signal,
            "log": this.log.read_text(),
        }
    this.facts = facts
    assert len(this.hits) == len(facts), "a process ended before its signal"
    this.finish()
    return this


def rows_before_a_cut(workdir) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def assert_same_run(one: Run, two: Run) -> None:
    assert deterministic_rows(one.workdir) == deterministic_rows(two.workdir)
    assert_board_shows(two.workdir)
    assert_same_bits(saved_state(one.workdir, TOTAL), saved_state(two.workdir, TOTAL))
    assert set(steps_on_disk(one.workdir)) <= set(steps_on_disk(two.workdir))
    (best,) = set(steps_on_disk(one.workdir)) - {TOTAL} or {TOTAL}
    assert_same_bits(saved_state(one.workdir, best), saved_state(two.workdir, best))
    ours, theirs = (saved_meta(each.workdir, TOTAL) for each in (one, two))
    for key in ("step", "skipped", "rejected", "dataset", "preprocess", "config", "versions"):
        assert ours[key] == theirs[key], key


def test_the_undisturbed_run_is_worth_comparing(peace):
    values = deterministic_rows(peace.workdir)
    steps = range(1, TOTAL + 1)
    assert len({values[step, "train/loss"] for step in steps}) == TOTAL
    assert values[TOTAL, "train/rejected"] == 10  # of four epochs' 480 images, each of three times
    evaluated = sorted(step for step, key in values if key == "test/top1")
    assert evaluated == list(range(EVAL_EVERY, TOTAL + 1, EVAL_EVERY))
    assert values[TOTAL, "test/count"] == 359
    assert values[TOTAL, "test/rejected"] == 1
    assert steps_on_disk(peace.workdir)[-1] == TOTAL
    assert_board_shows(peace.workdir)


def test_stops_and_kills_change_nothing(peace, war):
    assert_same_run(peace, war)


def test_sigterm_while_compiling_loses_nothing(war):
    fact = war.facts["term in compile"]
    assert fact["code"] == EXIT_PREEMPTED
    assert fact["saved"] == fact["last"] == 0
    assert "stopped by signal 15; the same command goes on" in fact["log"]


def test_sigterm_in_an_evaluation_saves_and_evaluates_once_after_the_restart(war):
    fact = war.facts["term in evaluation"]
    assert fact["code"] == EXIT_PREEMPTED
    assert fact["saved"] == fact["last"] == fact["row"]["step"]
    tests = [row for row in rows(war.workdir) if "test/top1" in row]
    assert [row["step"] for row in tests].count(fact["saved"]) == 1


def test_sigint_saves_too(war):
    fact = war.facts["int"]
    assert fact["code"] == EXIT_PREEMPTED
    assert fact["saved"] == fact["last"] >= fact["row"]["step"]
    assert "stopped by signal 2" in fact["log"]


def test_kills_hit_a_save_and_an_evaluation(war):
    assert all(war.facts[name]["code"] == -9 for name in war.facts if "kill" in name)
    assert not list((war.workdir / "checkpoints").glob("*tmp*"))  # the halves were cleaned up


def test_time_adds_up_over_restarts(war):
    record = json.loads((war.workdir / "run.json").read_text())
    assert sum(record["seconds"].values()) == pytest.approx(record["wall_seconds"], abs=0.1)
    assert record["seconds"]["lost"] > 0
    assert record["starts"] == war.starts
    # All but the first process's first imports and the last one's end.
    assert 0 <= war.seconds - record["wall_seconds"] < 10


def test_an_unreadable_image_is_named_once_a_process(peace):
    text = peace.log.read_text()
    named = [line for line in text.splitlines() if "unreadable image, left out: " in line]
    assert len(named) == 3 == len(set(named))
    assert "example 5 (6/0338.png) cannot be decoded: not an image (0 bytes;" in text


@pytest.mark.slow
def test_eight_devices_go_on_as_one(data_dir, tmp_path, monkeypatch):
    config = short(data_dir, eval_every=3, save_every=3)
    run(config, tmp_path / "whole")
    with pytest.raises(Preempted), monkeypatch.context() as patch:
        run(config, tmp_path / "parts", StopAfter(4, patch))
    assert steps_on_disk(tmp_path / "parts") == [3, 4]
    flags = f"--config={save_recipe(config, tmp_path / 'recipe.py')}", f"--workdir={tmp_path}/parts"
    done = call("train", *flags, XLA_FLAGS=flags_for(1))
    assert done.returncode == 0, done.stderr
    assert "on 1 × cpu" in done.stdout and "resuming at step 4 of 6" in done.stdout
    eight, one = (deterministic_rows(tmp_path / name) for name in ("whole", "parts"))
    assert eight.keys() == one.keys()
    for key, value in eight.items():
        np.testing.assert_allclose(one[key], value, atol=1e-5, rtol=0, err_msg=str(key))
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["devices"]["count"] == 1


@pytest.mark.slow
def test_fifty_kills(recipe, peace, tmp_path):
    """At random moments of a process's life, some inside a save or an evaluation."""
    rng, hits = random.Random(0), []
    this, rounds = None, 0
    while len(hits) < 50:
        if this is None:
            this, rounds = Run(recipe, tmp_path / f"war{rounds}"), rounds + 1
        code = this.disturb(signal.SIGKILL, _random_moment(rng))
        hits += this.hits[-1:] if code == -9 else []
        if code == 0:  # it came to its end: another one
            assert_same_run(peace, this)
            shutil.rmtree(this.workdir)
            this = None
        else:
            assert code == -9, this.log.read_text()
    if this is not None:
        this.finish()
        assert_same_run(peace, this)
        assert json.loads((this.workdir / "run.json").read_text())["seconds"]["lost"] > 0
    assert min(hits.count(name) for name in ("saving", "evaluating", "early", "later")) >= 5


def _random_moment(rng: random.Random):
    """While a process starts, after some steps of it, or in a later save or evaluation."""
    kind = rng.choice(["early", "later", "saving", "evaluating"])
    skip, pause = rng.randint(0, 5), rng.uniform(0, 8 if kind == "early" else 0.5)
    since = None

    def moment(this: Run) -> bool:
        nonlocal since
        if kind != "early" and last_row(this).get("step", 0) <= this.resumed + skip:
            return False
        if kind == "saving":
            return saving(this)
        if kind == "evaluating":
            return evaluating(this)
        since = since or time.time()
        return time.time() > since + pause

    moment.__name__ = kind
    return moment
