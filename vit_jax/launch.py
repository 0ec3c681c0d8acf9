"""Starts jobs of `vit-jax` commands: here in several processes, or by a cluster's own tools."""

import contextlib
import json
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vit_jax.exit_codes import EXIT_LOST, EXIT_PREEMPTED

RESTARTABLE = {EXIT_PREEMPTED, EXIT_LOST}  # and whatever a signal ended, 128 + its number
GRACE = 10.0  # seconds that the others have to end by themselves when one has failed

FILES = pathlib.Path(__file__).parent / "launch_files"
if not FILES.exists():  # in a checkout they lie beside the package
    FILES = pathlib.Path(__file__).parents[1] / "launch"


class Tpu(NamedTuple):
    """A generation of TPUs.

    Attributes:
      accelerator: GKE's name of it.
      xpk: XPK's.
      sides: of a slice.
      chips_per_host: the usual number first.
      devices_per_chip: 2 where JAX takes each core for a device.
    """

    accelerator: str
    xpk: str
    sides: int
    chips_per_host: tuple[int, ...]
    devices_per_chip: int = 1


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and cloud.google.com/tpu/docs/tpu7x; a
# slice of one host may have fewer chips.
TPUS = {
    "v4": Tpu("tpu-v4-podslice", "v4", 3, (4,)),
    "v5e": Tpu("tpu-v5-lite-podslice", "v5litepod", 2, (4, 8, 1)),
    "v5p": Tpu("tpu-v5p-slice", "v5p", 3, (4,)),
    "v6e": Tpu("tpu-v6e-slice", "v6e", 2, (4, 8, 1)),
    "tpu7x": Tpu("tpu7x", "tpu7x", 3, (4,), 2),
}


class LocalJob:
    """N processes of one command on this machine, started again where a restart helps.

    Process 0 writes to this terminal, process k to `logs/00k/log`. Those of a training are one job:
    where one dies, all of them end. Those of any other command, such as a sweep's workers, know
    nothing of each other.

    Args:
      command: of `vit-jax`, such as ['train', '--config=digits', '--workdir=runs/digits'].
      num_processes: how many.
      devices_per_process: that many simulated CPU devices in each; None for the real ones, where
        each process takes one GPU.
      max_restarts: how often all of them are started again after one died or was preempted.
      logs: folder; None lets all write to this terminal.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        num_processes: int = 1,
        devices_per_process: int | None = None,
        max_restarts: int = 3,
        logs: pathlib.Path | None = None,
    ):
        _at_least(1, num_processes=num_processes, devices_per_process=devices_per_process)
        _at_least(0, max_restarts=max_restarts)
        self.command, self.num_processes = list(command), num_processes
        self.devices_per_process, self.max_restarts = devices_per_process, max_restarts
        self.logs, self.stopping = logs, False
        self.together = self.command[0] == "train"
        for argument in self.command if self.together else ():
            if found := re.match(r"--?(coordinator|num_processes|process_id)\b", argument):
                raise ValueError(f"{found[0]} is given by the launcher; leave it out behind `--`.")
        self.children: list[subprocess.Popen] = []

    def run(self) -> int:
        """Runs to the end; SIGTERM, Ctrl-C and a hang-up are passed on. Answers the exit code."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            restarts = 0
            while True:
                with _kept_port() as port:
                    code = self._run_once(port)
                again = code in RESTARTABLE or code > 128
                if self.stopping and code == 128 + signal.SIGTERM:
                    return EXIT_PREEMPTED  # it was told before it had begun
                if self.stopping or not again or restarts == self.max_restarts:
                    return code
                restarts += 1
                _say(f"exit code {code}; restart {restarts} of at most {self.max_restarts}")
        finally:
            for child in self.children:  # also if this process fails
                child.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _) -> None:
        again, self.stopping = self.stopping, True
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def _run_once(self, port: int) -> int:
        self.children = []
        for index in range(self.num_processes):
            if self.stopping:
                break
            self.children.append(self._start(index, port))
        deadline = None
        codes: list[int] = []
        while any(child.poll() is None for child in self.children):
            failed = [_code(child) for child in self.children if child.poll()]
            if failed and deadline is None and self.together:
                codes, deadline = failed, time.monotonic() + GRACE
                self._name_failed()
            if deadline is not None and time.monotonic() > deadline:
                for child in self.children:
                    child.kill()
            time.sleep(0.05)
        if not self.together:
            self._name_failed()
        codes = codes or [_code(child) for child in self.children]
        # Of those that ended first; a death by a signal explains an error beside it.
        return max(codes, default=EXIT_PREEMPTED)

    def _name_failed(self) -> None:
        for index, child in enumerate(self.children):
            if child.poll() and _code(child) != EXIT_PREEMPTED:
                log = f"; see {self._log(index)}" if index and self.logs else ""
                _say(f"process {index} ended with code {_code(child)}{log}")

    def _log(self, index: int) -> pathlib.Path:
        return self.logs / f"{index:03}" / "log"

    def arguments(self, index: int, port: int | str) -> list[str]:
        """What process `index` is, where process 0 listens at a port."""
        python, who = [sys.executable, "-u", "-m", "vit_jax.cli"], []
        if self.together:
            who = [f"--coordinator=localhost:{port}", f"--num_processes={self.num_processes}"]
            who += [f"--process_id={index}"]
        return [*python, self.command[0], *who, *self.command[1:]]

    def _start(self, index: int, port: int) -> subprocess.Popen:
        output = None
        if index and self.logs is not None:
            self._log(index).parent.mkdir(parents=True, exist_ok=True)
            output = self._log(index).open("ab")
        try:
            return subprocess.Popen(
                self.arguments(index, port),
                env=self._environment(index),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches them through this process alone
            )
        finally:
            if output is not None:
                output.close()

    def _environment(self, index: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.devices_per_process is None and self.together:
            environment["JAX_LOCAL_DEVICE_IDS"] = str(index)
        elif self.devices_per_process is None:  # jax reads the other one in a job of several alone
            given = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = (
                given[index] if index < len(given) > 1 else f"{index}"
            )
        else:
            flag = "--xla_force_host_platform_device_count"
            others = environment.get("XLA_FLAGS", "").split()
            kept = [each for each in others if not each.startswith(flag)]
            environment["XLA_FLAGS"] = " ".join([*kept, f"{flag}={self.devices_per_process}"])
            environment["JAX_PLATFORMS"] = "cpu"
        return environment


def _code(child: subprocess.Popen) -> int:
    """As a shell gives it: 128 + the number of a signal."""
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


@contextlib.contextmanager
def _kept_port() -> Iterator[int]:
    """A port of this machine that nobody else is given until process 0 listens there, as it may."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JAX's own does
        keeper.bind(("localhost", 0))
        yield keeper.getsockname()[1]


def _say(text: str) -> None:
    print(f"vit-jax launch: {text}", file=sys.stderr, flush=True)


def render(file: str, **values: Any) -> str:
    """A file of `launch/` with its braces filled in."""
    return (FILES / file).read_text().format(**values)


def shell(command: Sequence[str]) -> str:
    """A `vit-jax` command as a line for a shell."""
    return shlex.join(["vit-jax", *command])


def slurm_script(
    commands: Sequence[Sequence[str]],
    *,
    name: str = "vit-jax",
    nodes: int = 1,
    processes_per_node: int = 1,
    gpus_per_node: int = 0,
    time: str = "24:00:00",
    output: str = "slurm-%j.out",
    grace: int = 120,
    max_restarts: int = 100,
    option: Sequence[str] = (),
) -> str:
    """The sbatch script of a job, or of an array job if there are several commands.

    Args:
      commands: of `vit-jax`.
      name: of the job.
      nodes: for each command.
      processes_per_node: without GPUs any number, else 1 or as many: then each takes one.
      gpus_per_node: 0 for CPUs.
      time: limit, as sbatch takes it.
      output: file of what is printed.
      grace: seconds before the time limit at which the job is told to save.
      max_restarts: how often it goes back into the queue.
      option: more lines for sbatch, such as '--partition=long'.

    Raises:
      ValueError: counts that do not fit together.
    """
    _check_commands(commands)
    _check_secrets(option)
    _at_least(1, nodes=nodes, processes_per_node=processes_per_node)
    _at_least(0, gpus_per_node=gpus_per_node, grace=grace, max_restarts=max_restarts)
    if gpus_per_node and processes_per_node not in (1, gpus_per_node):
        raise ValueError(
            f"--processes_per_node={processes_per_node} must be 1 or the number of GPUs of a node "
            f"({gpus_per_node})."
        )
    lines = [f"#SBATCH --gpus-per-node={gpus_per_node}"] if gpus_per_node else []
    lines += [f"#SBATCH {each}" for each in option]
    if len(commands) > 1:
        lines.append(f"#SBATCH --array=0-{len(commands) - 1}")
    every = processes_per_node == 1 and gpus_per_node
    devices = ",".join(map(str, range(gpus_per_node))) if every else ""
    return render(
        "slurm.sbatch",
        name=shlex.quote(name),
        nodes=nodes,
        tasks_per_node=processes_per_node,
        time=shlex.quote(time),
        output=shlex.quote(output),
        grace=grace,
        options="\n".join(lines) or "#",
        devices=f"export JAX_LOCAL_DEVICE_IDS={devices}" if devices else "#",
        command=_one_of(commands, "SLURM_ARRAY_TASK_ID"),
        max_restarts=max_restarts,
    )


def _one_of(commands: Sequence[Sequence[str]], variable: str) -> str:
    """A line that runs the only command, or the one whose number is in the variable."""
    if len(commands) == 1:
        return shell(commands[0])
    cases = " ".join(f"{number}) {shell(each)} ;;" for number, each in enumerate(commands))
    return f"bash -c {shlex.quote(f'case ${variable} in {cases} esac')}"


def jobset(
    commands: Sequence[Sequence[str]],
    *,
    image: str,
    topology: str,
    name: str = "vit-jax",
    queue: str = "multislice-queue",
    num_slices: int = 1,
    chips_per_host: int | None = None,
    max_restarts: int = 10,
    grace: int = 120,
    volume: Sequence[str] = (),
) -> str:
    """The JobSet manifests (YAML documents) of a job on TPU slices, one for each command.

    Args:
      commands: of `vit-jax`.
      image: container image with vit-jax[tpu] in it.
      topology: such as 'v5e:4x4', the shape of one slice.
      name: of the JobSet; several get -0, -1, …
      queue: Kueue's, where there is one; XPK makes this one.
      num_slices: slices that train together.
      chips_per_host: None for the usual number.
      max_restarts: of the whole JobSet.
      grace: seconds to save in after SIGTERM.
      volume: PersistentVolumeClaims that all pods mount, such as 'runs:/mnt/runs'.

    Raises:
      ValueError: an unknown topology, or a name that Kubernetes does not take.
    """
    tpu, shape = parse_topology(topology)
    chips = math.prod(shape)
    per_host = _chips_per_host(chips_per_host, topology)
    _at_least(1, num_slices=num_slices, chips_per_host=chips_per_host)
    _at_least(0, max_restarts=max_restarts, grace=grace)
    _check_commands(commands)
    names = _names(name, len(commands))
    alone = next((each[0] for each in commands if each[0] != "train"), "")
    if alone and chips // per_host * num_slices > 1:
        raise ValueError(
            f"{alone} runs on one host, --topology={topology} has {chips // per_host}, slices "
            f"{num_slices}; take the topology of one host, and --array=N for more workers."
        )
    mounts, volumes = _volumes(volume)
    manifests, sides = [], "x".join(map(str, shape))
    for each, command in zip(names, map(_with_platform, commands), strict=True):
        values = {"name": each, "num_slices": num_slices, "max_restarts": max_restarts}
        manifests.append(
            render(
                "jobset.yaml",
                **values,
                grace=grace,
                queue=json.dumps(queue),
                hosts_per_slice=chips // per_host,
                accelerator=tpu.accelerator,
                topology=sides,
                image=json.dumps(image),
                command=json.dumps(["vit-jax", *command]),
                chips_per_host=per_host,
                mounts=json.dumps(mounts),
                volumes=json.dumps(volumes),
                xpk=_xpk(command, image, f"{tpu.xpk}-{sides}", grace, **values),
            )
        )
    return "---\n".join(manifests)


def _volumes(claims: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """What a container mounts and its pod has: shared memory, and the claims."""
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    for number, each in enumerate(claims):
        claim, _, path = each.partition(":")
        if not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", claim) or not path.startswith("/"):
            raise ValueError(f"--volume={each} must be a claim and where it goes, like runs:/runs.")
        name = f"volume-{number}"
        mounts.append({"name": name, "mountPath": path})
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim}})
    return mounts, volumes


def _chips_per_host(given: int | None, topology: str) -> int:
    tpu, shape = parse_topology(topology)
    chips = math.prod(shape)
    per_host = given or min(tpu.chips_per_host[0], chips)
    if chips % per_host or (per_host not in tpu.chips_per_host and per_host != chips):
        known = " or ".join(map(str, sorted(tpu.chips_per_host)))
        raise ValueError(
            f"--chips_per_host={per_host} must divide the {chips} chips of {topology}, whose hosts "
            f"have {known}."
        )
    return per_host


def _names(name: str, count: int) -> list[str]:
    """Those of `count` jobs, as Kubernetes takes them."""
    names = [f"{name}-{number}" for number in range(count)] if count > 1 else [name]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", names[-1]):
        raise ValueError(
            f"--name={name} must be lower-case letters, digits and -, with an array's number at "
            "most 40."
        )
    return names


def _xpk(
    command: Sequence[str],
    image: str,
    tpu_type: str,
    grace: int,
    *,
    name: str,
    num_slices: int,
    max_restarts: int,
) -> str:
    """The command by which XPK makes such a manifest itself; it restarts after 127 to 255."""
    line = ["xpk", "workload", "create", "--cluster=my-cluster", f"--workload={name}"]
    line += [f"--docker-image={image}", f"--tpu-type={tpu_type}", f"--num-slices={num_slices}"]
    line += [f"--max-restarts={max_restarts}", f"--restart-on-exit-codes={EXIT_PREEMPTED}"]
    line += [f"--termination-grace-period-seconds={grace}", f"--command={shell(command)}"]
    return shlex.join(line)


def parse_topology(topology: str) -> tuple[Tpu, tuple[int, ...]]:
    """The generation of 'v5e:4x4', and its sides in chips; ValueError for another form."""
    generation, _, shape = topology.partition(":")
    sides = tuple(int(side) for side in shape.split("x") if side.isdigit() and int(side))
    tpu = TPUS.get(generation)
    if tpu is None or len(sides) != tpu.sides or "x".join(map(str, sides)) != shape:
        forms = ", ".join(f"{name}:{'x'.join('4' * each.sides)}" for name, each in TPUS.items())
        raise ValueError(f"--topology={topology} is unknown; the forms are {forms}.")
    return tpu, sides


def _with_platform(command: Sequence[str]) -> list[str]:
    """A training on TPUs says so: it must not go on with the host's CPU."""
    given = any(each.startswith("--platform") for each in command)
    return [*command] if given or command[0] != "train" else [*command, "--platform=tpu"]


def tpu_vm_script(
    commands: Sequence[Sequence[str]],
    *,
    zone: str,
    accelerator: str,
    runtime_version: str,
    name: str = "vit-jax",
    project: str = "",
    spot: bool = False,
    max_restarts: int = 3,
    delete: bool = True,
    poll: int = 30,
    prepare: str = "",
) -> str:
    """The shell script of `gcloud` commands: create, copy, install, run on all workers, delete.

    Args:
      commands: of `vit-jax`, one after the other.
      name: of the queued resource and its node.
      zone: such as 'us-central2-b'.
      accelerator: such as 'v4-32'.
      runtime_version: such as 'tpu-ubuntu2204-base'.
      project: '' for gcloud's own.
      spot: cheaper, and may be taken away; then another is asked for.
      max_restarts: for each start of the commands.
      delete: the queued resource when all is done, or has failed.
      poll: seconds between two looks whether it is there.
      prepare: a shell command for all workers before the install, such as mounting a disk.
    """
    _check_commands(commands)
    _check_secrets([prepare])
    _at_least(0, max_restarts=max_restarts, poll=poll)
    for flag, value in {"name": name, "zone": zone, "accelerator": accelerator}.items():
        if not re.fullmatch(r"[a-z][-a-z0-9]*", value):
            raise ValueError(f"--{flag}={value!r} must be lower-case letters, digits and -.")
    place = f"--zone={zone}" + (f" --project={shlex.quote(project)}" if project else "")
    remove = f"gcloud compute tpus queued-resources delete {name} {place} --force --quiet"
    run = " && ".join(shell(_with_platform(command)) for command in commands)
    run += "; exit $?"  # so that a shell is there to say 137: ssh answers 255 for a killed command
    return render(
        "tpu_vm.sh",
        name=name,
        accelerator=accelerator,
        runtime=shlex.quote(runtime_version),
        place=place,
        spot="--spot" if spot else "",
        poll=poll,
        install=shlex.quote(  # Ubuntu 22.04, which most runtime versions are, has Python 3.10
            (f"{prepare} && " if prepare else "")
            + f"mkdir -p vit_jax && tar -xzf {name}.tar.gz -C vit_jax && cd vit_jax"
            " && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv"
            " && python3 -m uv venv -q --python=3.12 .venv"
            " && python3 -m uv pip install -q --python=.venv -e '.[tpu]'"
        ),
        command=shlex.quote(f"cd vit_jax && export PATH=$PWD/.venv/bin:$PATH && {run}"),
        max_restarts=max_restarts,
        remove=remove,
        delete=f"""trap 'trap "" INT TERM; {remove}' EXIT""" if delete else f"# {remove}",
    )


def _check_commands(commands: Sequence[Sequence[str]]) -> None:
    if not commands:
        raise ValueError("nothing to run: end with `-- --config=… --workdir=…`.")
    _check_secrets(each for command in commands for each in command)


SECRET = re.compile(r"api_?key|password|secret|token(?![a-z])", re.IGNORECASE)
MODEL = re.compile(r"--?(no)?config\.model\.")


def _check_secrets(arguments: Iterable[str]) -> None:
    """Raises ValueError for `--NAME=…`, `NAME=…` or `--NAME …` with the name of a secret."""
    for argument in arguments:
        names = re.findall(r"([\w.-]+)=", argument) or re.findall(r"^-[\w.-]+$", argument)
        for name in names:
            # A model's tokens (cls_token) are none.
            if SECRET.search(name) and not MODEL.match(name):
                raise ValueError(
                    f"{name} looks like a secret: everyone can read command lines; put it into "
                    "the environment (on GKE into the Secret vit-jax)."
                )


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}.")
