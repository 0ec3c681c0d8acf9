"""What the launcher gives to SLURM, Kubernetes and gcloud, and what these make of it."""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tomllib

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet as JobSet
from kubernetes_validate import validate

from tests.runs import rows, save_recipe, save_sweep, short, steps_on_disk
from vit_jax import cli
from vit_jax import launch as launch_lib
from vit_jax.launch import LocalJob, jobset, slurm_script
from vit_jax.sweep.store import Store

TRAIN = ["train", "--config=digits:debug", "--workdir=runs/a b"]
SWEEP = [["evaluate", f"--workdir=runs/{name}"] for name in "xyz"]


def executable(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


# local: processes that need no jax


def job(code: str, tmp_path, **options) -> LocalJob:
    """A local job whose processes run `code`."""
    made = LocalJob(["train", "--x=1"], logs=tmp_path / "hosts", **options)
    made.arguments = lambda index, port: [sys.executable, "-c", code, str(index), str(port)]
    return made


def test_the_processes_are_told_who_they_are(tmp_path):
    made = LocalJob(["train", "--x=1"], num_processes=3, devices_per_process=2)
    flags = ["--coordinator=localhost:7", "--num_processes=3", "--process_id=2", "--x=1"]
    assert made.arguments(2, 7)[1:] == ["-u", "-m", "vit_jax.cli", "train", *flags]
    environment = made._environment(2)
    assert environment["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")
    assert environment["JAX_PLATFORMS"] == "cpu"


def test_workers_of_a_sweep_do_not_wait_for_each_other(tmp_path, monkeypatch, capfd):
    made = LocalJob(["sweep", "--workdir=s"], num_processes=2)
    assert made.arguments(1, 7)[1:] == ["-u", "-m", "vit_jax.cli", "sweep", "--workdir=s"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert made._environment(1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [made._environment(i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["4", "6"]
    # One is killed; the other outlives it by more than it would have in a training.
    monkeypatch.setattr(launch_lib, "GRACE", 0.2)
    code = f"""
import os, pathlib, sys, time
sys.argv[1] == "1" and os.kill(os.getpid(), 9)
time.sleep(1.5)
pathlib.Path({str(tmp_path)!r}, "ended").touch()
"""
    made.arguments = lambda index, port: [sys.executable, "-c", code, str(index)]
    assert made.run() == 137 and (tmp_path / "ended").exists()
    assert "process 1 ended with code 137" in capfd.readouterr().err


@pytest.mark.parametrize(
    "code, restarts, answer",
    [
        ("exit(0)", 0, 0),
        ("exit(1)", 0, 1),  # it would only repeat itself
        ("exit(75)", 2, 75),
        ("exit(134)", 2, 134),
        ("import os, sys; os.kill(os.getpid(), 9) if sys.argv[1] == '1' else None", 2, 137),
    ],
)
def test_what_a_restart_helps_is_started_again(tmp_path, capfd, code, restarts, answer):
    assert job(code, tmp_path, num_processes=2, max_restarts=2).run() == answer
    assert capfd.readouterr().err.count("restart ") == restarts


def test_the_others_end_when_one_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.launch.GRACE", 0.5)
    code = "import sys, time; time.sleep(60) if sys.argv[1] == '0' else exit(3)"
    begun = time.monotonic()
    assert job(code, tmp_path, num_processes=3).run() == 3
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("ignored, answer", [(False, 75), (True, 0)])
def test_a_terminal_that_closes_stops_the_job_unless_nohup_is_there(tmp_path, ignored, answer):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *_: None)
    try:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGHUP]).start()
        assert job("import time; time.sleep(2)", tmp_path, max_restarts=1).run() == answer
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_processes_write_to_the_workdir(tmp_path, capfd):
    assert job("import sys; print('I am', sys.argv[1])", tmp_path, num_processes=3).run() == 0
    assert capfd.readouterr().out == "I am 0\n"
    for index in (1, 2):
        assert (tmp_path / "hosts" / f"{index:03}" / "log").read_text() == f"I am {index}\n"


# GKE


def known(made, read) -> bool:
    """Whether all of a manifest is still there after JobSet's own models have read it."""
    if isinstance(made, dict):
        return all(key in read and known(made[key], read[key]) for key in made)
    if isinstance(made, list):
        return all(map(known, made, read))
    return made == read


@pytest.mark.parametrize(
    "topology, slices, hosts, chips, accelerator",
    [
        ("v5e:2x2", 1, 1, 4, "tpu-v5-lite-podslice"),
        ("v5e:16x16", 4, 64, 4, "tpu-v5-lite-podslice"),
        ("v5p:4x4x8", 2, 32, 4, "tpu-v5p-slice"),
        ("v6e:1x1", 1, 1, 1, "tpu-v6e-slice"),
        ("v4:2x2x4", 1, 4, 4, "tpu-v4-podslice"),
        ("tpu7x:4x4x4", 1, 16, 4, "tpu7x"),
    ],
)
def test_a_jobset_asks_for_the_slices(topology, slices, hosts, chips, accelerator):
    options = {"num_slices": slices, "volume": ["runs:/mnt/runs"]}
    made = yaml.safe_load(jobset([TRAIN], image="x/y:1", topology=topology, **options))
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert known(made, JobSet.from_dict(made).to_dict())
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    assert policy["rules"] == [
        {"name": "errors", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (replicated,) = made["spec"]["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    assert replicated["replicas"] == slices
    spec = replicated["template"]["spec"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}
    validate(inner, "1.31", strict=True)
    assert spec["parallelism"] == spec["completions"] == hosts
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    (container,) = pod["containers"]
    assert container["command"] == ["vit-jax", *TRAIN, "--platform=tpu"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    # A container has 64 MiB of shared memory, a batch of the loader's workers more.
    memory, disk = container["volumeMounts"]
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert memory["mountPath"] == "/dev/shm" and disk["mountPath"] == "/mnt/runs"
    assert volumes[memory["name"]] == {"emptyDir": {"medium": "Memory"}}
    assert volumes[disk["name"]] == {"persistentVolumeClaim": {"claimName": "runs"}}


def by_xpk(text: str) -> list[str]:
    """The command of XPK that a manifest names."""
    return shlex.split(re.search("^#   (xpk .*)$", text, re.MULTILINE)[1])


def test_a_manifest_says_how_xpk_makes_it():
    text = jobset([TRAIN], image="x/y:1", topology="v5e:4x4", num_slices=2, grace=60)
    flags = dict(flag.split("=", 1) for flag in by_xpk(text)[3:])
    assert flags.pop("--command") == f"{launch_lib.shell(TRAIN)} --platform=tpu"
    assert flags == {
        "--cluster": "my-cluster",
        "--workload": "vit-jax",
        "--docker-image": "x/y:1",
        "--tpu-type": "v5litepod-4x4",
        "--num-slices": "2",
        "--max-restarts": "10",
        "--restart-on-exit-codes": "75",
        "--termination-grace-period-seconds": "60",
    }


@pytest.mark.skipif(not shutil.which("xpk"), reason="needs XPK (pip install xpk)")
@pytest.mark.parametrize("topology, slices", [("v5e:16x16", 4), ("v5p:4x4x8", 2), ("v6e:1x1", 1)])
def test_xpk_makes_the_same_manifest(tmp_path, topology, slices):
    text = jobset([TRAIN], image="x/y:1", topology=topology, num_slices=slices)
    dry = ["--dry-run", "--skip-validation", "--quiet", "--project=p", "--zone=us-east1-b"]
    dry.append(f"--output-manifest-file={tmp_path / 'made.yaml'}")
    environment = dict(os.environ, HOME=str(tmp_path))
    subprocess.run([*by_xpk(text), *dry], env=environment, check=True, capture_output=True)
    ours, theirs = yaml.safe_load(text), yaml.safe_load((tmp_path / "made.yaml").read_text())
    assert ours["metadata"] == theirs["metadata"]
    assert ours["spec"]["failurePolicy"]["maxRestarts"] == 10
    (ours,), (theirs,) = (made["spec"]["replicatedJobs"] for made in (ours, theirs))
    assert ours["replicas"] == theirs["replicas"] == slices
    ours, theirs = (made["template"]["spec"] for made in (ours, theirs))
    for key in ("parallelism", "completions", "backoffLimit"):
        assert ours[key] == theirs[key]
    codes = theirs["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["operator"] == "NotIn" and {75, 134, 137} < set(codes["values"])
    assert not {1, 2} & set(codes["values"])
    ours, theirs = (made["template"]["spec"] for made in (ours, theirs))
    for key in ("nodeSelector", "restartPolicy", "terminationGracePeriodSeconds"):
        assert ours[key] == theirs[key]
    (ours,), (theirs,) = ours["containers"], theirs["containers"]
    assert ours["resources"] == theirs["resources"] and ours["image"] == theirs["image"]
    assert f"({launch_lib.shell(ours['command'][1:])}) & PID" in theirs["command"][-1]


def test_names_that_yaml_takes_for_something_else_stay_names():
    made = yaml.safe_load(jobset([TRAIN], image="x", topology="v5e:2x2", name="null", queue="no"))
    assert made["metadata"]["name"] == "null"
    assert set(made["metadata"]["labels"].values()) == {"null", "no"}


def test_a_wrong_manifest_is_seen():
    text = jobset([TRAIN], image="x", topology="v5e:4x4").replace("parallelism", "paralelism")
    spec = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}
    with pytest.raises(Exception, match="paralelism"):
        validate(inner, "1.31", strict=True)


@pytest.mark.parametrize(
    "right, wrong",
    [("maxRestarts", "maxRestart"), ("replicas:", "replica:"), ("completions:", "completion:")],
)
def test_a_wrong_jobset_is_seen(right, wrong):
    made = yaml.safe_load(jobset([TRAIN], image="x", topology="v5e:4x4").replace(right, wrong))
    assert not known(made, JobSet.from_dict(made).to_dict())


def test_a_jobset_fits_its_config(capfd):
    flags = ["--image=x", "--dry_run", "--topology=v5e:4x4"]
    command = ["--", "--config=vit_s16_i1k", "--workdir=gs://b/w", "--config.mesh.fsdp=4"]
    assert cli.main(["launch", "gke", *flags, *command]) == 0
    made = yaml.safe_load(capfd.readouterr().out)
    assert made["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 4
    for more, words in (
        (
            "--config.mesh.data=3",
            "16 devices of 1 × v5e:4x4: mesh .*data=3.* does not multiply to the 16 devices",
        ),
        ("--config.batch_size=1000", "batch_size=1000 must be a multiple of 16.*; try 992"),
        ("--config.train.accumulate=3", "batch_size=1024 must be a multiple of 48, for 16 devices"),
        ("--config.mesh.tensor=-1", "fsdp=4, tensor=-1 does not multiply to the 16 devices"),
        ("--config.mesh.fspd=2", "fspd"),
    ):
        assert cli.main(["launch", "gke", *flags, *command, more]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert re.search(words, line), line
    assert cli.main(["launch", "gke", *flags, "--num_slices=2", *command]) == 1
    assert "mesh.replica must be a multiple of --num_slices=2" in capfd.readouterr().err


def test_a_chip_of_two_devices_is_counted_twice(capfd):
    flags = ["--image=x", "--dry_run", "--topology=tpu7x:4x4x4", "--", "--config=vit_s16_i1k"]
    for data, code in ((128, 0), (64, 1)):
        assert (
            cli.main(["launch", "gke", *flags, "--workdir=gs://w", f"--config.mesh.data={data}"])
            == code
        )
    assert "128 devices of 1 × tpu7x:4x4x4: mesh" in capfd.readouterr().err


def test_an_array_is_a_jobset_each():
    made = list(yaml.safe_load_all(jobset(SWEEP, image="x", topology="v5e:2x2", name="s")))
    assert [each["metadata"]["name"] for each in made] == ["s-0", "s-1", "s-2"]
    with pytest.raises(ValueError, match="with an array's number at most 40"):
        jobset(SWEEP, image="x", topology="v5e:2x2", name="s" * 39)


# TPU VMs

GCLOUD = """#!/bin/bash
echo "gcloud $*" >> {record}
case "$*" in
  *describe*) echo ACTIVE ;;
  *--command=cd*) [ -e {failed} ] || {{ touch {failed}; exit 75; }} ;;
esac
"""

TAKEN_AWAY = """#!/bin/bash
echo "gcloud $*" >> {record}
case "$*" in
  *describe*) [ -e {failed} ] && rm {failed} && echo SUSPENDED || echo ACTIVE ;;
  *--command=cd*) [ $(grep -c create {record}) = 2 ] || {{ touch {failed}; exit 255; }} ;;
esac
"""


def test_tpu_vm_runs_gcloud_and_gives_the_tpu_back(tmp_path, monkeypatch, capfd):
    executable(
        tmp_path / "gcloud", GCLOUD.format(record=tmp_path / "calls", failed=tmp_path / "failed")
    )
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    flags = ["--name=vit", "--zone=us-central2-b", "--accelerator=v4-32", "--spot", "--poll=0"]
    flags += ["--runtime_version=tpu-ubuntu2204-base", "--prepare=sudo mount nfs:/runs runs"]
    assert cli.main(["launch", "tpu-vm", *flags, "--", *TRAIN[1:]]) == 0
    place, run = "--zone=us-central2-b", "vit-jax train --config=digits:debug"
    on_all = f"gcloud compute tpus tpu-vm ssh vit-node {place} --worker=all --command="
    calls = (tmp_path / "calls").read_text().splitlines()
    expected = [
        f"gcloud compute tpus queued-resources create vit --node-id=vit-node {place} "
        "--accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base --spot",
        f"gcloud compute tpus queued-resources describe vit {place} --format=value(state.state)",
        f"gcloud compute tpus tpu-vm scp /tmp/vit.tar.gz vit-node: {place} --worker=all",
        f"{on_all}sudo mount nfs:/runs runs && mkdir -p vit_jax",
        f"{on_all}cd vit_jax",
        f"{on_all}cd vit_jax",  # 75: once more
        f"gcloud compute tpus queued-resources delete vit {place} --force --quiet",
    ]
    assert len(calls) == len(expected)
    for call, words in zip(calls, expected, strict=True):
        assert call.startswith(words)
    # Behind the last command a shell stays: ssh has no exit code of what a signal killed.
    assert calls[4].endswith(f"{run} '--workdir=runs/a b' --platform=tpu; exit $?")
    assert "exit code 75 of attempt 0" in capfd.readouterr().out
    assert cli.main(["launch", "tpu-vm", "--dry_run", *flags, "--", *TRAIN[1:]]) == 0
    assert expected[0] in capfd.readouterr().out
    assert len((tmp_path / "calls").read_text().splitlines()) == len(expected)  # nothing was run


def test_a_tpu_vm_that_was_taken_away_is_asked_for_again(tmp_path, monkeypatch, capfd):
    record = tmp_path / "calls"
    script = TAKEN_AWAY.format(record=record, failed=tmp_path / "failed")
    executable(tmp_path / "gcloud", script)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    command = ["launch", *TPU_VM, "--spot", "--poll=0", "--", "--workdir=gs://bucket/run"]
    assert cli.main([*command[:-2], "--max_restarts=1", *command[-2:]]) == 0
    text = record.read_text()
    verbs = re.findall(r"(create|describe|scp|mkdir|command=cd|delete)", text)
    first = ["create", "describe", "scp", "mkdir", "command=cd"]
    assert verbs == [*first, "describe", "delete", *first, "delete"]
    assert "vit-jax is SUSPENDED: asking for another" in capfd.readouterr().out


ENDLESS = """#!/bin/bash
case "$*" in
  *describe*) echo ACTIVE ;;
  *--command=cd*) echo training >> {record} && sleep 60 ;;
  *delete*) sleep 1 && echo given back >> {record} ;;
esac
"""


@pytest.mark.parametrize(
    "number, to_all, ended_by",
    [
        (signal.SIGINT, True, signal.SIGINT),
        (signal.SIGINT, False, signal.SIGTERM),
        (signal.SIGTERM, False, signal.SIGTERM),
    ],
)
def test_a_launcher_that_is_stopped_gives_the_tpu_back(tmp_path, number, to_all, ended_by):
    """Ctrl-C, which the terminal sends to the script and to gcloud, too; and a kill."""
    calls = tmp_path / "calls"
    executable(tmp_path / "gcloud", ENDLESS.format(record=calls))
    command = [sys.executable, "-m", "vit_jax.cli", "launch", *TPU_VM, "--poll=0", "--", "--x=1"]
    environment = dict(os.environ, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    (tmp_path / "project").mkdir()
    options = {"cwd": tmp_path / "project", "env": environment, "start_new_session": True}
    launcher = subprocess.Popen(command, **options)
    try:
        _until(calls.exists, 60, tmp_path)
        time.sleep(0.2)
        (os.killpg if to_all else os.kill)(launcher.pid, number)
        assert launcher.wait(30) == 128 + ended_by
        assert calls.read_text() == "training\ngiven back\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)  # with what gcloud would still wait for


def test_workers_get_a_python_that_runs_this():
    script = launch_lib.tpu_vm_script(
        [TRAIN], zone="z", accelerator="v4-8", runtime_version="tpu-ubuntu2204-base"
    )
    project = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    least = tomllib.loads(project.read_text())["project"]["requires-python"]
    (version,) = re.findall(r"uv venv -q --python=(\S+)", script)
    assert _numbers(version) >= _numbers(least.removeprefix(">="))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


# What does not fit

TPU_VM = ["tpu-vm", "--zone=z", "--accelerator=v4-32", "--runtime_version=v"]
GKE = ["gke", "--image=x", "--topology=v5e:4x4", "--dry_run"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["lokal", "--", "--x"], "lokal: unknown.*did you mean 'local'"),
        (["slurm", "--", "trian", "--x"], "command 'trian' is unknown.*did you mean 'train'"),
        (["slurm", "--array=/no", "--", "--x"], "--array=/no must be a number, or a file"),
        (["local"], "nothing to run: end with `-- --config"),
        (["local", "--", "--x", "--num_processes=2"], "--num_processes is given by the launcher"),
        (["local", "--num_processes=0", "--", "--x"], "--num_processes=0 .*at least 1"),
        (["slurm", "--gpus_per_node=8", "--processes_per_node=3", "--", "--x"], "must be 1 or"),
        (["gke", "--image=x", "--", "--x"], "--topology is missing"),
        (
            [*GKE, "--volume=runs:/mnt", "--", "--workdir=runs/a"],
            "--workdir=runs/a is on a disk that goes with its machine; give --volume=CLAIM:/PATH",
        ),
        ([*GKE, "--volume=runs", "--", "--x"], "--volume=runs must be a claim and where it goes"),
        ([*TPU_VM, "--", "--workdir=a"], "--workdir=a is on a disk that .*give --prepare='…' that"),
        (
            ["gke", "--image=x", "--topology=v9:4x4", "--", "--x"],
            "unknown; the forms .* v5e:4x4,",
        ),
        (["gke", "--image=x", "--topology=v5e:4x4x4", "--", "--x"], "v5e:4x4x4 is unknown"),
        (["gke", "--image=x", "--topology=v5p:4x4x0", "--", "--x"], "v5p:4x4x0 is unknown"),
        (
            ["gke", "--image=x", "--topology=v5p:4x4x4", "--chips_per_host=8", "--", "--x"],
            "--chips_per_host=8 must divide the 64 chips of v5p:4x4x4, whose hosts have 4",
        ),
        (["gke", "--image=x", "--topology=v5e:4x4", "--name=A", "--", "--x"], "lower-case"),
        (["gke", "--image=x", "--topology=v5e:4x4", "--", "--wandb_api_key=1"], "a secret"),
        (["slurm", "--", "--password=x"], "--password looks like a secret"),
        (["slurm", "--", "--hf_token", "x"], "--hf_token looks like a secret"),
        (["slurm", "--option=--export=A_KEY=1,API_KEY=x", "--", "--x"], "API_KEY looks like a sec"),
        (["slurm", "--nodes=0", "--", "--x"], "--nodes=0 must be at least 1"),
        ([*TPU_VM, "--max_restarts=-1", "--", "--x"], "--max_restarts=-1 must be at least 0"),
        (["gke", "--image=x", "--topology=v5e:4x4", "--chips_per_host=0", "--", "--x"], "least 1"),
        (["--num_processes=2", "local", "--", "--x"], "needs a place: one of local, slurm"),
    ],
)
def test_errors_are_one_line(capfd, argv, words):
    assert cli.main(["launch", *argv]) == 1
    (line,) = capfd.readouterr().err.splitlines()

    assert re.search(words, line), line


def test_a_tool_that_is_missing_is_named(capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["launch", "slurm", "--", "--x"]) == 1
    assert "sbatch is not installed here; --dry_run prints slurm.sbatch" in capfd.readouterr().err
    assert cli.main(["launch", *TPU_VM, "--", "--x"]) == 1
    assert "gcloud is not installed here; --dry_run prints tpu_vm.sh" in capfd.readouterr().err


def test_tokens_of_a_model_are_no_secret(capfd):
    leaves = ["--config.model.num_reg_tokens=4", "--config.model.cls_token=True"]
    leaves += ["-config.model.cls_token", "--noconfig.model.dist_token"]
    assert cli.main(["launch", "slurm", "--dry_run", "--", *TRAIN[1:], *leaves]) == 0
    assert " ".join(leaves) in capfd.readouterr().out


def test_a_jobs_port_is_given_to_nobody_else_and_process_0_may_listen_there():
    with launch_lib._kept_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("localhost", port))
        socket.create_server(("", port)).close()


# SLURM


def test_the_slurm_script_is_a_shell_script_and_takes_arrays(tmp_path):
    more = {"option": ["--partition=p"], "name": "my run", "output": "a log"}
    script = slurm_script(SWEEP, gpus_per_node=8, processes_per_node=1, **more)
    assert "#SBATCH --job-name='my run'\n" in script and "#SBATCH --output='a log'\n" in script
    assert "#SBATCH --array=0-2\n" in script and "#SBATCH --partition=p\n" in script
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in script
    executable(tmp_path / "srun", '#!/bin/bash\nshift 2\nexec "$@"\n')
    executable(tmp_path / "vit-jax", '#!/bin/bash\necho "ran $*"\nexit 1\n')
    environment = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_ARRAY_TASK_ID="1")
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "ran evaluate --workdir=runs/y\n")


def test_an_array_of_workers_of_one_sweep(capfd):
    command = ["--dry_run", "--array=3", "--", "sweep", "--config=s.py", "--workdir=/s"]
    assert cli.main(["launch", "slurm", *command]) == 0
    script = capfd.readouterr().out
    assert "#SBATCH --array=0-2\n" in script
    assert script.count("vit-jax sweep --config=s.py --workdir=/s ;;") == 3
    one_host = ["--image=i", "--topology=v5e:2x2", "--name=s", "--volume=s:/s"]
    assert cli.main(["launch", "gke", *one_host, *command]) == 0
    manifests = list(yaml.safe_load_all(capfd.readouterr().out))
    assert [each["metadata"]["name"] for each in manifests] == ["s-0", "s-1", "s-2"]
    (slices,) = manifests[0]["spec"]["replicatedJobs"]
    (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["vit-jax", "sweep", "--config=s.py", "--workdir=/s"]
    assert cli.main(["launch", "gke", *one_host, "--topology=v5e:4x4", *command]) == 1
    assert "sweep runs on one host" in capfd.readouterr().err
    assert cli.main(["launch", "slurm", "--array=0", "--", "sweep", "--workdir=s"]) == 1
    assert "nothing to run" in capfd.readouterr().err


def test_a_line_of_an_array_that_is_no_shell_is_named(tmp_path, capfd):
    (tmp_path / "jobs").write_text("--config.seed=0\n\n--config.data.name='a\n")
    argv = ["launch", "slurm", "--dry_run", f"--array={tmp_path}/jobs", "--", "--config=digits"]
    assert cli.main(argv) == 1
    assert re.search("jobs, line 3: No closing quotation: --config.data", capfd.readouterr().err)


@pytest.mark.parametrize(
    "code, again", [(75, True), (134, True), (139, True), (192, True), (1, False), (128, False)]
)
def test_what_a_signal_ended_goes_back_into_the_queue(tmp_path, code, again):
    executable(tmp_path / "srun", f"#!/bin/bash\nexit {code}\n")
    for name in ("scontrol", "sleep"):
        executable(tmp_path / name, f'#!/bin/bash\necho "{name} $*"\n')
    environment = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7")
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 30}
    done = subprocess.run(["bash", "-c", slurm_script([TRAIN])], **run)
    assert done.returncode == code and ("scontrol requeue 7\n" in done.stdout) == again


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port0}
SlurmdPort={port1}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=60
MinJobAge=3600
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes={host} PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM of this machine alone, with a munge of its own."""
    tools = ["slurmctld", "slurmd", "sbatch", "munged", "mungekey"]
    missing = [tool for tool in tools if not shutil.which(tool, path=_path())]
    if missing or os.geteuid():
        pytest.skip(f"needs root and Debian's slurm-wlm and munge; missing: {missing or 'root'}")
    monkeypatch.setenv("PATH", _path())
    folder, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    for name in (folder, folder / "state", folder / "spool"):
        name.mkdir()
        name.chmod(0o755)
    ports = _free_ports(2)
    values = {"folder": folder, "host": host, "port0": ports[0], "port1": ports[1]}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**values, cpus=os.cpu_count()))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    key = folder / "munge.key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}",
         f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
         f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]  # fmt: skip
    started = []
    try:
        for daemon in daemons:
            with (folder / f"{daemon[0]}.out").open("w") as out:
                started.append(subprocess.Popen(daemon, stdout=out, stderr=out))
            time.sleep(1)
        _until(lambda: " idle" in _output("sinfo", "-h", "-o", "%P %T"), 60, folder)
        yield folder
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"])  # of a failed test
        subprocess.run(["scancel", "--user=root"])
        _until(lambda: not _output("squeue", "-h").strip(), 60, folder)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def _path() -> str:
    return f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(number: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(number)]
    for each in with_ports:
        each.bind(("localhost", 0))
    ports = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    return ports


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return f" {done.stdout}{done.stderr}"


def _until(true, timeout: float, folder: pathlib.Path) -> None:
    end = time.monotonic() + timeout
    while not true():
        logs = "".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
        assert time.monotonic() < end, logs + "".join(p.read_text() for p in folder.glob("*.out"))
        time.sleep(0.3)


@pytest.mark.slow
def test_slurm_preempts_requeues_and_finishes(slurm, data_dir, tmp_path, monkeypatch):
    executable(tmp_path / "vit-jax", f'#!/bin/bash\nexec {sys.executable} -m vit_jax.cli "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    config = short(data_dir, total_steps=150, eval_every=150, save_every=150, log_every=5)
    recipe, workdir, log = (
        save_recipe(config, tmp_path / "r.py"),
        tmp_path / "run",
        tmp_path / "log",
    )
    flags = ["--processes_per_node=2", f"--output={log}", "--max_restarts=2"]
    flags += ["--", f"--config={recipe}"]
    assert cli.main(["launch", "slurm", *flags, f"--workdir={workdir}"]) == 0

    def says(words: str) -> None:
        # SLURM itself holds a requeued job back for two minutes.
        _until(lambda: log.exists() and words in log.read_text(), 300, slurm)

    says("step  10/150")
    (number,) = _output("squeue", "-h", "-o", "%i").split()
    all_cpus = f"--ntasks={os.cpu_count()}"
    urgent = ["sbatch", "--partition=urgent", all_cpus, "--output=/dev/null", "--wrap=true"]
    subprocess.run(urgent, check=True)
    says("stopped by signal 15")
    says("exit code 75: back into the queue")
    says("resuming at step")
    says("done: test accuracy")
    assert steps_on_disk(workdir)[-1] == 150
    assert [row["step"] for row in rows(workdir) if "train/loss" in row] == [*range(5, 151, 5)]
    assert "Restarts=1" in _output("scontrol", "show", "job", number)


@pytest.mark.slow
def test_an_array_job_of_slurm_shares_a_sweep(slurm, data_dir, tmp_path, monkeypatch):
    executable(tmp_path / "vit-jax", f'#!/bin/bash\nexec {sys.executable} -m vit_jax.cli "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    recipe = save_recipe(short(data_dir, save_every=3), tmp_path / "recipe.py")
    config = save_sweep(tmp_path, data_dir, training={"config": recipe, "leaves": {"seed": [0, 1]}})
    flags = ["--array=2", f"--output={tmp_path}/log-%a", "--", "sweep", config]
    assert cli.main(["launch", "slurm", *flags, f"--workdir={tmp_path}/sweep"]) == 0
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    _until(lambda: all(x.exists() and "12 results in" in x.read_text() for x in logs), 240, slurm)
    results = Store(tmp_path / "sweep").results().values()
    assert len(results) == 12  # of both runs: steps 3 and 6, three evaluations
    said = "".join(log.read_text() for log in logs)
    for result in results:  # each by one of the two
        assert said.count(f"done    {result['unit']['id']} ") == 1
    assert len({result["worker"] for result in results}) == 2
