"""A workdir has one owner: a living one keeps it, a dead one is replaced."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from tests.runs import call, ending, save_recipe, short
from vit_jax.lease import HEARTBEAT, PATIENCE, WorkdirLease, check_shared

OWNER = """
import sys, time
from etils import epath
from vit_jax.lease import WorkdirLease
lease = WorkdirLease(epath.Path(sys.argv[1]), heartbeat=0.1)
print("owned", flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that owns `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ending(process):
        assert process.stdout.readline() == "owned\n"
        yield process


def move_away(workdir: epath.Path) -> None:
    """Makes the owner look as if it were on another host, whose locks are not seen here."""
    lease = json.loads((workdir / ".lease").read_text())
    (workdir / ".lease").write_text(json.dumps(lease | {"host": "far/1"}))
    (workdir / ".lock").unlink()


def test_a_living_owner_on_this_host_is_named_at_once(tmp_path, owner):
    begun = time.monotonic()
    with pytest.raises(
        ValueError, match=f"in use by process {owner.pid} on .*; stop it or"
    ) as caught:
        WorkdirLease(epath.Path(tmp_path))
    assert time.monotonic() - begun < 1
    assert "\n" not in str(caught.value) and f"delete {tmp_path}/.lease" in str(caught.value)


def test_a_dead_owner_on_this_host_is_replaced_at_once(tmp_path, owner, capsys):
    owner.kill()
    owner.wait()
    begun = time.monotonic()
    lease = WorkdirLease(epath.Path(tmp_path))
    assert time.monotonic() - begun < 1
    assert f"process {owner.pid} on " in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        WorkdirLease(epath.Path(tmp_path))
    lease.release()
    WorkdirLease(epath.Path(tmp_path)).release()
    assert capsys.readouterr().out == ""  # one that was given back needs no words


def test_a_living_owner_on_another_host_is_found_by_its_heartbeat(tmp_path):
    workdir = epath.Path(tmp_path)
    far = {"host": "far/1", "process": 7, "job": "x", "beat": 0}
    (workdir / ".lease").write_text(json.dumps(far))

    def beat():
        time.sleep(0.4)
        (workdir / ".lease").write_text(json.dumps(far | {"beat": 1}))

    threading.Thread(target=beat).start()
    with pytest.raises(ValueError, match="in use by process 7 on far; stop it"):
        WorkdirLease(workdir, patience=5)
    assert json.loads((workdir / ".lease").read_text())["host"] == "far/1"


def test_a_dead_owner_on_another_host_is_replaced_after_a_while(tmp_path, owner, capsys):
    workdir = epath.Path(tmp_path)
    owner.send_signal(signal.SIGSTOP)
    move_away(workdir)
    begun = time.monotonic()
    lease = WorkdirLease(workdir, patience=1)
    assert 0.9 < time.monotonic() - begun < 3
    text = capsys.readouterr().out
    assert "waiting 1 s for a sign of life" in text
    assert f"process {owner.pid} on far, which owned workdir {tmp_path}, is gone" in text
    owner.send_signal(signal.SIGCONT)  # it was only frozen: it sees that it lost, and ends
    assert owner.wait(10) == 1
    assert "taken over by another job; this one ends" in owner.stderr.read()
    assert json.loads((workdir / ".lease").read_text())["process"] == os.getpid()
    lease.release()


def test_a_lock_that_a_dead_host_left_behind_holds_nobody_up(tmp_path, owner, capsys):
    """As NFS keeps it for a while: only the lease tells that nobody is there."""
    workdir = epath.Path(tmp_path)
    owner.send_signal(signal.SIGSTOP)
    lease = json.loads((workdir / ".lease").read_text())
    (workdir / ".lease").write_text(json.dumps(lease | {"host": "far/1"}))
    WorkdirLease(workdir, patience=1).release()
    assert "on far, which owned workdir" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_the_lease_tells(tmp_path, monkeypatch, capsys, number):
    """As Lustre may be mounted."""

    def flock(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    workdir = epath.Path(tmp_path)
    lease = WorkdirLease(workdir, heartbeat=0.1)
    with pytest.raises(ValueError, match="in use by process"):
        WorkdirLease(workdir, patience=5)
    lease.release()
    WorkdirLease(workdir, patience=5).release()
    assert capsys.readouterr().out.count("waiting 5 s for a sign of life") == 1


def test_who_sees_another_folder_is_told(tmp_path):
    (tmp_path / "mine").mkdir()
    lease = WorkdirLease(epath.Path(tmp_path))
    check_shared(epath.Path(tmp_path), lease.job)
    with pytest.raises(ValueError, match="mine is not the folder that process 0 writes to"):
        check_shared(epath.Path(tmp_path) / "mine", lease.job, sight=0.3)
    with pytest.raises(ValueError, match="give all of them one that they share"):
        check_shared(epath.Path(tmp_path), "an earlier job", sight=0.3)
    lease.release()


def test_deleting_the_lease_takes_over(tmp_path, owner):
    (tmp_path / ".lease").unlink()
    assert owner.wait(10) == 1
    WorkdirLease(epath.Path(tmp_path)).release()


def test_the_waiting_is_less_than_a_minute():
    assert HEARTBEAT * 4 < PATIENCE <= 55


def test_a_second_run_on_a_workdir_is_refused_in_one_line(data_dir, tmp_path, owner):
    recipe = save_recipe(short(data_dir), tmp_path / "recipe.py")
    second = call("train", f"--config={recipe}", f"--workdir={tmp_path}")
    assert second.returncode == 1
    assert re.fullmatch(
        rf"vit-jax: workdir \S+ is in use by process {owner.pid} .*\n", second.stderr
    )
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"7", b"{}", b'{"host": "far/1"', b'{"host": 1, "process": 2, "job": 3}'],
)
def test_a_lease_that_no_owner_wrote_holds_nobody_up(tmp_path, content):
    (tmp_path / ".lease").write_bytes(content)
    WorkdirLease(epath.Path(tmp_path)).release()
    assert not (tmp_path / ".lease").exists()


def test_a_remote_workdir_has_no_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vit_jax.lease._read", lambda path: None)
    monkeypatch.setattr(WorkdirLease, "_write", lambda self: None)
    WorkdirLease(epath.Path("gs://bucket/run")).release()
    assert not list(tmp_path.iterdir())  # nothing was made on this machine in its stead
