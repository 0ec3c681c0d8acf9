"""Jobs of real processes: they train as one, agree, and end together whatever happens to one."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.runs import (
    assert_same_bits,
    call,
    deterministic_rows,
    ending,
    flags_for,
    save_recipe,
    saved_state,
    short,
    steps_on_disk,
)
from vit_jax.exit_codes import EXIT_LOST, EXIT_PREEMPTED

pytestmark = pytest.mark.slow


class Job:
    """`vit-jax launch local` of several processes with two devices in all or each."""

    def __init__(self, recipe: str, workdir: pathlib.Path, *, num_processes=4, devices=1, flags=()):
        self.workdir = workdir
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.log = workdir.with_suffix(".log")
        self.num_processes = num_processes
        command = [sys.executable, "-m", "vit_jax.cli", "launch", "local"]
        command += [f"--num_processes={num_processes}", f"--devices_per_process={devices}"]
        ours = [flag for flag in flags if "restarts" in flag]
        theirs = [flag for flag in flags if "restarts" not in flag]
        command += [*ours, "--", f"--config={recipe}", f"--workdir={workdir}", *theirs]
        with self.log.open("ab") as file:
            self.launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with ending(self.launcher):
            self.launcher.terminate()
            self.launcher.terminate()
            for pid in self.pids().values():
                os.kill(pid, signal.SIGKILL)

    def pids(self) -> dict[int, int]:
        """Process index -> pid, of the processes that are alive."""
        found = {}
        children = f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children"
        if not os.path.exists(children):
            return {}
        for pid in map(int, pathlib.Path(children).read_text().split()):
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            if match := re.search(r"--process_id=(\d+)", line):
                found[int(match[1])] = pid
        return found

    def text(self) -> str:
        return self.log.read_text()

    def until(self, moment, timeout=400) -> None:
        end = time.monotonic() + timeout
        while not moment(self):
            assert self.launcher.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def send(self, number: int, index: int) -> None:
        os.kill(self.pids()[index], number)

    def wait(self, timeout=400) -> int:
        code = self.launcher.wait(timeout)
        assert not self.pids()
        return code


def says(words: str):
    return lambda job: words in job.text()


@pytest.fixture(scope="module")
def recipe(data_dir, tmp_path_factory):
    config = short(data_dir, total_steps=400, eval_every=20, save_every=20, log_every=5)
    config.train.ema_decay = 0.0
    config.model.depth = 1
    config.evals.test.batch_size = 8  # many batches, so that an evaluation lasts
    return save_recipe(config, tmp_path_factory.mktemp("recipe") / "recipe.py")


@pytest.fixture(scope="module")
def uneven(data_dir, tmp_path_factory):
    """Ten steps whose evaluation has a last batch that is not full."""
    config = short(data_dir, total_steps=6, eval_every=3, save_every=3, train__keep=2)
    config.evals.test.batch_size = 112  # 360 = 3 * 112 + 24
    return save_recipe(config, tmp_path_factory.mktemp("recipe") / "uneven.py")


def train(recipe, workdir, devices, *flags):
    return call(
        "train",
        f"--config={recipe}",
        f"--workdir={workdir}",
        *flags,
        XLA_FLAGS=flags_for(devices),
    )


def assert_close(one, two) -> None:
    ours, theirs = deterministic_rows(one), deterministic_rows(two)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if key[1].endswith(("count", "rejected", "skipped")):
            assert theirs[key] == value, key
        else:
            np.testing.assert_allclose(theirs[key], value, atol=1e-5, rtol=0, err_msg=str(key))


def test_two_processes_train_as_one_and_others_go_on_from_them(uneven, tmp_path):
    done = train(uneven, tmp_path / "one", 8)
    assert done.returncode == 0, done.stderr
    with Job(uneven, tmp_path / "two", num_processes=2, devices=4) as job:
        assert job.wait() == 0, job.text()
    assert "on 8 × cpu in 2 processes" in job.text()
    assert_close(tmp_path / "one", tmp_path / "two")
    rows = deterministic_rows(tmp_path / "two")
    assert rows[3, "test/count"] == rows[6, "test/count"] == 360
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["devices"]["processes"] == 2 and record["devices"]["count"] == 8
    # The checkpoint of step 3, written by two, is gone on from by four, and by one.
    for name, count in (("four", 4), ("alone", 1)):
        copy = tmp_path / name
        subprocess.run(["cp", "-r", tmp_path / "two", copy], check=True)
        subprocess.run(["rm", "-r", copy / "checkpoints" / "6"], check=True)
        with Job(uneven, copy, num_processes=count, devices=8 // count) as job:
            assert job.wait() == 0, job.text()
        assert "resuming at step 3 of 6" in job.text()
        assert_close(tmp_path / "one", copy)


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """The exit code and the words of a job whose launcher got SIGTERM; its programs are cached."""
    with Job(recipe, tmp_path_factory.mktemp("stopped") / "run") as job:
        job.until(says("step  25/400"))
        job.launcher.terminate()
        return job.wait(), job


def test_sigterm_to_the_launcher_goes_to_all_and_starts_nothing_again(stopped):
    code, job = stopped
    assert code == EXIT_PREEMPTED and "restart" not in job.text()
    assert steps_on_disk(job.workdir)[-1] >= 25


def begun(job: Job) -> bool:
    return len(job.pids()) == job.num_processes


def listening(job: Job) -> bool:
    """All have begun, and SIGTERM no longer just ends them."""
    pids = job.pids().values()
    caught = [re.search(r"SigCgt:\s*(\w+)", status(pid))[1] for pid in pids]
    mask = 1 << (signal.SIGTERM - 1)
    return len(caught) == job.num_processes and all(int(each, 16) & mask for each in caught)


def status(pid: int) -> str:
    return pathlib.Path(f"/proc/{pid}/status").read_text()


def is_saving(job: Job) -> bool:
    return any((job.workdir / "checkpoints").glob("*tmp*"))


def test_sigterm_on_one_stops_all_at_the_same_step_wherever_they_are(recipe, stopped, tmp_path):
    saved = []
    moments = (listening, says("step  10/400"), says("step 20 | evaluating"), is_saving)
    for index, moment in zip((3, 2, 1, 0), moments, strict=True):
        with Job(recipe, tmp_path / "run", flags=["--max_restarts=0"]) as job:
            job.log.write_text("")
            job.until(moment)
            job.send(signal.SIGTERM, index)
            assert job.wait() == EXIT_PREEMPTED, job.text()
        if moment is listening:
            continue  # there is nothing to save
        assert "stopped by signal 15; the same command goes on" in job.text()
        saved.append(steps_on_disk(tmp_path / "run")[-1])
    assert 10 <= saved[0] < 20 == saved[1] <= saved[2]  # the evaluation was given up
    assert "step 20 | test accuracy" in job.text()  # and made up for by the next start


def test_a_killed_process_costs_a_restart_wherever_it_was(recipe, stopped, tmp_path):
    flags = ["--max_restarts=3", "--heartbeat_timeout=30"]
    with Job(recipe, tmp_path / "run", num_processes=4, flags=flags) as job:
        job.until(lambda job: len(job.pids()) == 4)
        job.send(signal.SIGKILL, 3)  # at the start
        job.until(says("restart 1 of at most 3"))
        job.until(says("step  25/400"))
        job.send(signal.SIGKILL, 0)  # in a step; the first one is the coordinator
        job.until(says("restart 2 of at most 3"))
        job.until(says("resuming at step 20 of 400"))
        before = job.text()
        job.until(lambda job: is_saving(job) and "compiled" in job.text()[len(before) :])
        job.send(signal.SIGKILL, 1)
        job.until(says("restart 3 of at most 3"))
        before = job.text()
        job.until(lambda job: "evaluating" in job.text()[len(before) :])
        begun = time.monotonic()
        job.send(signal.SIGKILL, 2)
        assert job.wait() in (137, EXIT_LOST), job.text()  # no restart is left
        assert time.monotonic() - begun < 60
    lost = json.loads((tmp_path / "run" / "run.json").read_text())
    assert lost["starts"] >= 3
    state = saved_state(tmp_path / "run", steps_on_disk(tmp_path / "run")[-1])
    assert_same_bits(state, state)  # every array can be read


@pytest.mark.parametrize(
    "index, moment, least",
    [
        (3, begun, None),
        (0, says("step  15/400"), 15),  # the coordinator
        (2, says("step 20 | evaluating"), 19),
        (1, is_saving, 19),
    ],
    ids=["start", "step", "evaluation", "save"],
)
def test_a_frozen_process_is_named_and_the_others_say_where_they_hang(
    recipe, stopped, tmp_path, index, moment, least
):
    flags = ["--max_restarts=0", "--hang_timeout=30", "--heartbeat_timeout=100"]
    with Job(recipe, tmp_path / "run", flags=flags) as job:
        job.until(moment)
        job.send(signal.SIGSTOP, index)
        frozen = time.time()
        assert job.wait() in (EXIT_LOST, 137), job.text()
    hosts = tmp_path / "run" / "hosts"
    logs = job.text() + "".join(path.read_text() for path in hosts.glob("*/log"))
    assert f"; process {index} wrote nothing to {hosts}; ending" in logs
    for other in {0, 1, 2, 3} - {index}:
        report = json.loads((hosts / f"{other:03}" / "hang.json").read_text())
        assert report["time"] - frozen < 45, report  # the time-out, and what could still be done
        assert (hosts / f"{other:03}" / "stacks.txt").read_text().startswith(("Thread", "Current"))
        if least is None:
            assert report["step"] is None and report["phase"] == "waiting for all processes"
            continue
        assert report["step"] >= least and report["phase"] in ("training", "evaluation", "saving")
        assert [at % 16 for at in report["positions"][0]] == [4 * other, 4 * other + 3]  # its slots
        assert "trainer.py" in (hosts / f"{other:03}" / "stacks.txt").read_text()
    assert not (hosts / f"{index:03}" / "hang.json").exists()


SLOW = """
import sys, time
if "--process_id=1" in sys.argv:
    from vit_jax.data.sources import Source
    fast = Source.__getitems__
    slow = lambda source, them: (time.sleep(0.05 * len(them)), fast(source, them))[1]
    Source.__getitems__ = slow
"""


def test_a_slow_host_is_named_within_fifty_steps(recipe, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    try:
        job = Job(recipe, tmp_path / "run", num_processes=2, flags=["--max_restarts=0"])
    finally:
        os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].split(os.pathsep, 1)[1]
    with job:
        job.until(says("is slow: its host-side work takes"))
        assert re.search(r"process 1 \(.*\) is slow", job.text())
        steps = [int(step) for step in re.findall(r"step +(\d+)/400", job.text())]
        assert max(steps, default=0) <= 50


def pair(*flags_of_each, folders=(None, None), **environment_of_second):
    """Two processes started by hand; their exit codes and what they said on stderr."""
    made = []
    for index, flags in enumerate(flags_of_each):
        environment = dict(os.environ, XLA_FLAGS=flags_for(2))
        environment |= environment_of_second if index else {}
        made.append(
            subprocess.Popen(
                [sys.executable, "-m", "vit_jax.cli", "train", *flags, f"--process_id={index}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=folders[index],
            )
        )
    try:
        told = [process.communicate(timeout=240)[1] for process in made]
    finally:
        for process in made:
            process.kill()
    told = [[line for line in text.splitlines() if "vit-jax:" in line] for text in told]
    return [process.returncode for process in made], told


@pytest.mark.parametrize(
    "flag, environment, words",
    [
        ("--config.seed=1", {}, r"process 1 \(.*\) has config \"\w{12}\", 1 of 2 have \"\w{12}\""),
        (
            "",
            {"XLA_FLAGS": flags_for(3)},
            r"process 1 \(.*\) has number of devices 3, 1 of 2 have 2",
        ),
        ("--config.data.data_dir=/nowhere", {}, r"process 1 .*no dataset 'digits'|config"),
        ("--platform=gpu", {}, r"process 1 \(.*\) has platform asked for \"gpu\""),
        ("--workdir=elsewhere", {}, r"process 1 \(.*\): workdir elsewhere is not the folder that"),
    ],
)
def test_who_differs_is_said_in_one_line_and_all_end(
    uneven, tmp_path, free_port, flag, environment, words
):
    flags = [f"--config={uneven}", f"--workdir={tmp_path / 'run'}", "--num_processes=2"]
    flags += [f"--coordinator=localhost:{free_port}", "--start_timeout=120"]
    folders = (None, tmp_path)
    codes, told = pair(flags, [*flags, flag] if flag else flags, folders=folders, **environment)
    assert_said_by_the_first(codes, told, words)
    assert not (tmp_path / "run" / "config.json").exists()


def assert_said_by_the_first(codes, told, words) -> None:
    assert codes == [1, 1], told
    assert len(told[0]) == 1 and not told[1], told
    assert re.search(words, told[0][0]), told


def test_another_dataset_of_the_same_name_is_seen(data_dir, tmp_path, free_port):
    """Each process reads `data` where it stands; the second's was made of other images."""
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder, fingerprint in zip(folders, "ab", strict=True):
        shutil.copytree(f"{data_dir}/digits", folder / "data" / "digits")
        (path,) = folder.glob("data/digits/*/vit_jax.json")
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"fingerprint": 64 * fingerprint})
        )
    config = short("data")
    recipe = save_recipe(config, tmp_path / "recipe.py")
    flags = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--num_processes=2"]
    flags += [f"--coordinator=localhost:{free_port}", "--start_timeout=120"]
    codes, told = pair(flags, flags, folders=folders)
    assert_said_by_the_first(codes, told, r"process 1 \(.*\) has fingerprint of data \"b{12}\"")


def test_another_version_is_seen(uneven, tmp_path, free_port):
    (tmp_path / "optax-0.0.1.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n"
    (tmp_path / "optax-0.0.1.dist-info" / "METADATA").write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    flags = [f"--config={uneven}", f"--workdir={tmp_path / 'run'}", "--num_processes=2"]
    flags += [f"--coordinator=localhost:{free_port}", "--start_timeout=120"]
    codes, told = pair(flags, flags, PYTHONPATH=path)
    assert_said_by_the_first(codes, told, r'process 1 \(.*\) has optax "0.0.1", 1 of 2 have "')


def test_two_processes_by_pmap_and_from_weights_train_as_one(data_dir, tmp_path):
    """The run by pmap starts from weights of the run that FSDP has split over both processes."""
    leaves = {"total_steps": 3, "eval_every": 3, "save_every": 3, "train__ema_decay": 0.0}
    split = save_recipe(
        short(data_dir, **leaves, mesh__data=1, mesh__fsdp=4), tmp_path / "split.py"
    )
    pmap = save_recipe(short(data_dir, **leaves, train__spmd="pmap", seed=1), tmp_path / "pmap.py")
    for name, recipe, source in (("a", split, "weights"), ("b", pmap, "a_one")):
        flags = [f"--config.init_from={tmp_path / source}"]
        if source == "weights":
            done = train(split, tmp_path / source, 4)
            assert done.returncode == 0, done.stderr
        done = train(recipe, tmp_path / f"{name}_one", 4, *flags)
        assert done.returncode == 0, done.stderr
        with Job(recipe, tmp_path / f"{name}_two", num_processes=2, devices=2, flags=flags) as job:
            assert job.wait() == 0, job.text()
        assert f"starting from {tmp_path / source}" in job.text()
        assert_close(tmp_path / f"{name}_one", tmp_path / f"{name}_two")


def test_a_dead_owner_elsewhere_costs_a_wait_and_no_restart(recipe, stopped, tmp_path):
    """Also when a hang is taken for one before the waiting is over."""
    (tmp_path / "run").mkdir()
    far = {"host": "far/1", "process": 7, "job": "x", "beat": 3}
    (tmp_path / "run" / ".lease").write_text(json.dumps(far))
    flags = ["--max_restarts=0", "--hang_timeout=40", "--config.total_steps=4"]
    with Job(recipe, tmp_path / "run", num_processes=2, devices=2, flags=flags) as job:
        job.until(says("waiting 45 s for a sign of life"))
        begun = time.monotonic()
        job.until(says("process 7 on far, which owned workdir"))
        assert time.monotonic() - begun < 60
        assert job.wait() == 0, job.text()


@pytest.fixture
def free_port():
    from vit_jax.launch import _kept_port

    with _kept_port() as port:
        yield port
