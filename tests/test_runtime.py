import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from tests.recipes import tiny
from tests.runs import flags_for, save_recipe
from vit_jax.runtime import (
    Preempted,
    Processes,
    StopSignal,
    start_devices,
    start_processes,
    who_am_i,
)


@pytest.fixture
def stop():
    stop = StopSignal()
    yield stop
    stop.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(stop, number):
    assert not stop
    stop.check()
    os.kill(os.getpid(), number)
    assert stop and stop.received == number
    with pytest.raises(Preempted):
        stop.check()


def test_a_second_interrupt_ends_at_once(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_go_back_to_who_had_them():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    StopSignal().restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_a_thread_there_are_no_signals_to_note():
    made = []
    thread = threading.Thread(target=lambda: made.append(StopSignal()))
    thread.start()
    thread.join()
    assert not made[0]
    made[0].restore()


COUNTED = """
import sys
from jax import monitoring
counts = {}
monitoring.register_event_listener(lambda name, **_: counts.update({name: counts.get(name, 0) + 1}))
%s
print("hits", counts.get("/jax/compilation_cache/cache_hits", 0))
"""
SMALL = """
import jax
from vit_jax.runtime import enable_compilation_cache
enable_compilation_cache()
assert jax.config.jax_persistent_cache_min_compile_time_secs <= 1
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda train_step: train_step + 1).lower(1.0).compile()
"""
TRAIN = """
import vit_jax.cli
assert vit_jax.cli.main() == 0
"""


@pytest.mark.parametrize("code", [SMALL, pytest.param(TRAIN, marks=pytest.mark.slow)])
def test_the_second_start_takes_what_was_compiled_from_the_cache(data_dir, tmp_path, code):
    recipe = save_recipe(tiny(data_dir, total_steps=2, model__depth=1), tmp_path / "recipe.py")
    environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache"))
    environment["XLA_FLAGS"] = flags_for(1)
    del environment["JAX_COMPILATION_CACHE_DIR"]  # so that it is the user's own
    found = []
    for number in range(2):
        flags = f"--config={recipe}", f"--workdir={tmp_path / str(number)}"
        done = subprocess.run(
            [sys.executable, "-c", COUNTED % code, "train", *flags],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        files = [path.name for path in (tmp_path / "cache" / "vit_jax" / "xla").glob("*-cache")]
        kept = {name for name in files if "train_step" in name or code == SMALL}
        found.append((int(re.search(r"hits (\d+)", done.stdout)[1]), kept))
    (cold, first), (warm, second) = found
    assert cold == 0 < warm
    assert len(first) == 1 and first == second


def test_a_signal_during_a_sleep_is_noted_at_once(stop):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begun = time.time()
    while not stop and time.time() - begun < 10:
        time.sleep(0.01)
    assert stop.received == signal.SIGTERM


@pytest.mark.parametrize(
    "flags, error, words",
    [
        ({"num_processes": 2}, ValueError, "go together: give all"),
        (
            {"coordinator": "here", "num_processes": 2, "process_id": 1},
            ValueError,
            "--coordinator=here must be host:port",
        ),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": 2},
            ValueError,
            "--process_id=2 must be at least 0 and less than --num_processes=2",
        ),
        (
            {"coordinator": "localhost:65536", "num_processes": 2, "process_id": 0},
            ValueError,
            "--coordinator=localhost:65536 must be host:port",
        ),
        (
            {"coordinator": "::1:1234", "num_processes": 2, "process_id": 1},
            ValueError,
            r"--coordinator=::1:1234 must be host:port, as .* \[::1\]:1234",
        ),
        (
            {"coordinator": "[::1]:1", "num_processes": 2, "process_id": 1},
            TimeoutError,
            r"coordinator \[::1\]:1 did not answer within 0 s",
        ),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": 1},
            TimeoutError,
            "coordinator localhost:1 did not answer within 0 s",
        ),
        ({"heartbeat_timeout": 0.0}, ValueError, "--heartbeat_timeout=0.0 must be at least 1 s"),
        ({"platform": "npu"}, ValueError, "--platform=npu must be one of cpu, gpu, tpu"),
    ],
)
def test_a_job_that_cannot_start_says_why(flags, error, words):
    with pytest.raises(error, match=words) as caught:
        start_processes(**flags, start_timeout=0.4)
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"--coordinator={address}: process 0 cannot listen"):
            start_processes(coordinator=address, num_processes=2, process_id=0)


def test_a_cluster_whose_first_process_is_silent_is_told_its_address(monkeypatch):
    """By the variables that SLURM sets in a step; port 61,440 is JAX's for such a job."""
    step = {"JOB_ID": "4096", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": "1"}
    for name, value in {**step, "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(TimeoutError, match="coordinator localhost:61440 did not answer within 0 s"):
        start_processes(start_timeout=0.4)


def test_a_pod_of_several_slices_knows_who_it_is(monkeypatch):
    """By the variables that GKE sets in the pods of a JobSet."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    pod = {"TPU_WORKER_HOSTNAMES": "vit-slice-1-0.vit,vit-slice-1-1.vit", "TPU_WORKER_ID": "1"}
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    slices["MEGASCALE_COORDINATOR_ADDRESS"] = "vit-slice-0-0.vit"
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", **pod, **slices}.items():
        monkeypatch.setenv(name, value)
    assert who_am_i(None, None, None) == (3, 4)


def test_a_platform_that_is_not_there_is_no_cpu():
    assert start_devices("cpu")["number of devices"] == len(jax.local_devices())
    with pytest.raises(ValueError, match="tpu was asked for, and .* has cpu only"):
        start_devices("tpu")


def test_one_process_agrees_with_itself():
    alone = Processes()
    assert alone.gather("x", 3) == [3] and alone.first("x", lambda: 4) == 4
    alone.check_same({"config": "abc"})
    with pytest.raises(OSError, match="nothing there"), alone.together("x"):
        raise OSError("nothing there")


class Shared:
    """Stands for one process of three, given what all of them say."""

    def __init__(self, index, everything):
        self.processes = Processes()
        self.processes.index, self.processes.count = index, 3
        self.processes.gather = lambda what, value, extra=0.0: everything


@pytest.mark.parametrize("index, error", [(0, ValueError), (1, SystemExit), (2, SystemExit)])
def test_who_differs_and_who_failed_is_told_by_the_first(index, error):
    found = [["a", {"jax": "1"}], ["b", {"jax": "1"}], ["c", {"jax": "2"}]]
    with pytest.raises(error) as caught:
        Shared(index, found).processes.check_same({"jax": found[index][1]["jax"]})
    words = 'process 2 (c) has jax "2", 2 of 3 have "1"'
    assert index or words in str(caught.value)
    failed = [[None, ""], ["no dataset", "b"], [None, ""]]
    with pytest.raises(error) as caught, Shared(index, failed).processes.together("x"):
        if index == 1:
            raise ValueError("no dataset")
    assert index or str(caught.value) == "process 1 (b): no dataset"
