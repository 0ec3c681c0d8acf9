"""`vit-jax launch`: starts a job in several processes, here or on a cluster."""

import inspect
import math
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from vit_jax.cli import check_command
from vit_jax.commands.config_flag import parse_with_config
from vit_jax.commands.flags import parse
from vit_jax.config import call
from vit_jax.launch import LocalJob, jobset, parse_topology, slurm_script, tpu_vm_script
from vit_jax.paths import in_bucket
from vit_jax.sharding import mesh_sizes
from vit_jax.spelling import nearest
from vit_jax.train import TrainOptions

USAGE = """vit-jax launch: starts a job of many processes.

  vit-jax launch local --num_processes=2 [--devices_per_process=4] [--max_restarts=3] -- …
  vit-jax launch slurm --nodes=4 --gpus_per_node=8 --processes_per_node=8 -- …
  vit-jax launch gke --image=IMAGE --topology=v5e:4x4 [--num_slices=2] --volume=CLAIM:/PATH -- …
  vit-jax launch tpu-vm --name=vit --zone=ZONE --accelerator=v4-32 --runtime_version=V -- …

What follows `--` is for `vit-jax train` (`-- --config=… --workdir=…`), or begins with another
command's name. With --array=FILE there is a job for each line of the file, which is added to it;
with --array=N there are N of the same, such as the workers of a sweep, which share its folder.
--dry_run prints what would be run."""


def main(argv: list[str]) -> int:
    """Runs `vit-jax launch`; answers the exit code."""
    ours, command = _split(argv)
    if not ours or ours[0].startswith("-"):
        asked = [flag for flag in ours if flag in ("-h", "-help", "--help")]
        parse(asked, lambda values: None, usage=USAGE)  # answers it
        raise ValueError(f"vit-jax launch needs a place: one of {', '.join(PLACES)}.")
    place, ours = ours[0], ours[1:]
    if place not in PLACES:
        raise ValueError(
            f"vit-jax launch {place}: unknown{nearest(place, PLACES)}; one of {', '.join(PLACES)}."
        )
    function, start = PLACES[place]
    options = _options(function)

    def define(values: flags.FlagValues) -> None:
        where = {"flag_values": values}
        flags.DEFINE_string(
            "array", None, "How many jobs, or a file with a line of flags for each.", **where
        )
        flags.DEFINE_bool("dry_run", False, "Only print what would be run.", **where)
        for name, (kind, default, text) in options.items():
            DEFINE[kind](name, default, text, **where)

    values, rest = parse(ours, define, usage=USAGE)
    if rest:
        raise ValueError(f"argument {rest[0]!r} is unknown; what is to run follows after `--`.")
    if not command:
        raise ValueError("nothing to run: end with `-- --config=… --workdir=…`.")
    check_command(command[0])  # here, and not when the machines are paid for
    commands = _commands(values.array, command)
    given = {name: values[name].value for name in options}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in given and parameter.default is parameter.empty and given[name] is None:
            raise ValueError(f"--{name} is missing.")
    return start(commands, values.dry_run, **given)


DEFINE = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
    Sequence[str]: flags.DEFINE_multi_string,
}


def _options(function: Callable) -> dict[str, tuple[Any, Any, str]]:
    """Name -> (type, default, help) of a function's keywords, the help from its docstring."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = parameter.annotation
        if kind not in DEFINE:  # int | None
            kind = next((x for x in typing.get_args(kind) if x in DEFINE), kind)
        text = re.search(rf"^ +{name}: (.*?)$(?=\n +\w+: |\n *$|\Z)", function.__doc__, RE)
        if parameter.kind is parameter.KEYWORD_ONLY and kind in DEFINE:
            default = None if parameter.default is parameter.empty else parameter.default
            default = list(default) if isinstance(default, tuple) else default
            found[name] = (kind, default, " ".join(text[1].split()))
    return found


RE = re.MULTILINE | re.DOTALL


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and the command behind `--`, whose name is train by default."""
    at = argv.index("--") if "--" in argv else len(argv)
    command = argv[at + 1 :]
    if command and command[0].startswith("-"):
        command = ["train", *command]
    return argv[:at], command


def _commands(array: str | None, command: list[str]) -> list[list[str]]:
    if array is None:
        return [command]
    if array.isdigit():
        return [command] * int(array)
    if not pathlib.Path(array).is_file():
        raise ValueError(f"--array={array} must be a number, or a file with flags in each line.")
    commands = []
    for number, line in enumerate(pathlib.Path(array).read_text().splitlines(), start=1):
        try:
            flags_of_one = shlex.split(line)
        except ValueError as error:
            raise ValueError(f"--array={array}, line {number}: {error}: {line}") from error
        commands += [[*command, *flags_of_one]] if line.strip() else []
    return commands


def _local(commands: list[list[str]], dry_run: bool, **options: Any) -> int:
    code = 0
    for command in commands:  # of an array one after the other
        job = LocalJob(command, logs=_logs(command), **options)
        if dry_run:
            lines = [shlex.join(job.arguments(i, "PORT")) for i in range(job.num_processes)]
            print(*lines, sep="\n")
            continue
        code = max(code, job.run())
        if job.stopping:
            break
    return code


def _logs(command: list[str]) -> pathlib.Path | None:
    """Where the processes but the first write: the workdir's `hosts`, if it is on this machine."""
    folder = _workdir(command)
    return None if folder is None or in_bucket(folder) else pathlib.Path(folder) / "hosts"


def _workdir(command: list[str]) -> str | None:
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "workdir" and argument.startswith("-"):
            return value if equals else following
    return None


def _check_outlives(commands: list[list[str]], disks: list[str], remedy: str) -> None:
    """Raises ValueError for a workdir that would go with the machines that wrote it."""
    for folder in filter(None, map(_workdir, commands)):
        if not in_bucket(folder) and not any(map(pathlib.Path(folder).is_relative_to, disks)):
            raise ValueError(
                f"--workdir={folder} is on a disk that goes with its machine; give {remedy}"
            )


def _slurm(commands: list[list[str]], dry_run: bool, **options: Any) -> int:
    return _run(["sbatch"], slurm_script(commands, **options), "slurm.sbatch", dry_run)


def _gke(commands: list[list[str]], dry_run: bool, **options: Any) -> int:
    manifest = jobset(commands, **options)
    disks = [each.partition(":")[2] for each in options["volume"]]
    _check_outlives(commands, disks, "--volume=CLAIM:/PATH and a --workdir below that path.")
    for command in commands:
        _check_config(command, options["topology"], options["num_slices"])
    return _run(["kubectl", "apply", "-f"], manifest, "jobset.yaml", dry_run)


def _tpu_vm(commands: list[list[str]], dry_run: bool, **options: Any) -> int:
    script = tpu_vm_script(commands, **options)
    if options["delete"] and not options["prepare"]:
        _check_outlives(commands, [], "--prepare='…' that mounts the workdir's, or --nodelete.")
    return _run(["bash"], script, "tpu_vm.sh", dry_run, needs="gcloud")


def _check_config(command: list[str], topology: str, num_slices: int) -> None:
    """Raises ValueError where a training's mesh or batch does not fit what is asked for."""
    from vit_jax.commands import train

    if command[0] != "train":
        return
    _, config = parse_with_config(command[1:], train.define_flags, usage=train.USAGE)
    tpu, sides = parse_topology(topology)
    devices = num_slices * math.prod(sides) * tpu.devices_per_chip
    where = f"{devices} devices of {num_slices} × {topology}"
    try:
        sizes = call("mesh", mesh_sizes, config.mesh, num_devices=devices)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    accumulate = call("train", TrainOptions, config.train).accumulate
    parts = devices // sizes["tensor"] * accumulate
    if sizes["replica"] % num_slices:
        raise ValueError(f"mesh.replica must be a multiple of --num_slices={num_slices}.")
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {parts}, for {where}; "
            f"try {max(round(config.batch_size / parts), 1) * parts}."
        )


# Signals that end what was started, and the seconds until it is told. Ctrl-C it gets from the
# terminal, and a second signal could end it before it gives back what it has.
STOPS = {signal.SIGTERM: 0.0, signal.SIGINT: 2.0}


def _run(tool: list[str], text: str, name: str, dry_run: bool, *, needs: str = "") -> int:
    """Gives the filled-in file to the cluster's tool, whose exit code is ours."""
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which(needs := needs or tool[0]) is None:
        raise ValueError(f"{needs} is not installed here; --dry_run prints {name}.")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_text(text)
        with subprocess.Popen([*tool, str(path)]) as child:
            # It is waited for: what it asked the cluster for it gives back at its end.
            def stop(number: int, _: Any) -> None:
                threading.Timer(STOPS[signal.Signals(number)], child.terminate).start()

            before = {number: signal.signal(number, stop) for number in STOPS}
            try:
                code = child.wait()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
    return code if code >= 0 else 128 - code


# What a place's flags are the keyword arguments of, and what starts it.
PLACES = {
    "local": (LocalJob, _local),
    "slurm": (slurm_script, _slurm),
    "gke": (jobset, _gke),
    "tpu-vm": (tpu_vm_script, _tpu_vm),
}
