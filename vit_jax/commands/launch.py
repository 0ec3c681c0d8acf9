"""`vit-jax launch`: starts a job in several processes, here or on a cluster."""

import pathlib
import shlex
import subprocess
import tempfile

from absl import flags

from vit_jax.commands.flags import parse
from vit_jax.launch import LocalJob, jobset, slurm_script, tpu_vm_script
from vit_jax.spelling import nearest

USAGE = """vit-jax launch: starts a job of many processes.

  vit-jax launch local --num_processes=2 [--devices_per_process=4] [--max_restarts=3] -- …
  vit-jax launch slurm --nodes=4 --gpus_per_node=8 --processes_per_node=8 -- …
  vit-jax launch gke --image=IMAGE --topology=v5e:4x4 [--num_slices=2] -- …
  vit-jax launch tpu-vm --name=vit --zone=ZONE --accelerator=v4-32 --runtime_version=V -- …

What follows `--` is for `vit-jax train` (`-- --config=… --workdir=…`), or begins with another
command's name. With --array=FILE there is a job for each line of the file, which is added to it;
with --array=N there are N of the same, such as the workers of a sweep, which share its folder.
--dry_run prints what would be run."""


def main(argv: list[str]) -> int:
    """Runs `vit-jax launch`; answers the exit code."""
    ours, command = _split(argv)
    if not ours or ours[0].startswith("-"):
        parse(ours, lambda values: None, usage=USAGE)  # answers --help
        raise ValueError(f"vit-jax launch needs a place: one of {', '.join(PLACES)}.")
    place, ours = ours[0], ours[1:]
    if place not in PLACES:
        raise ValueError(
            f"vit-jax launch {place}: unknown{nearest(place, PLACES)}; one of {', '.join(PLACES)}."
        )
    define, start = PLACES[place]

    def define_all(values: flags.FlagValues) -> None:
        where = {"flag_values": values}
        flags.DEFINE_string(
            "array", None, "How many jobs, or a file with a line of flags for each.", **where
        )
        flags.DEFINE_bool("dry_run", False, "Only print what would be run.", **where)
        flags.DEFINE_integer("max_restarts", 3, "After a death or a preemption.", **where)
        define(where)

    values, rest = parse(ours, define_all, usage=USAGE)
    if rest:
        raise ValueError(f"argument {rest[0]!r} is unknown; what is to run follows after `--`.")
    if not command:
        raise ValueError("nothing to run: end with `-- --config=… --workdir=…`.")
    return start(values, _commands(values.array, command))


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
    lines = pathlib.Path(array).read_text().splitlines()
    return [[*command, *shlex.split(line)] for line in lines if line.strip()]


def _define_local(where: dict) -> None:
    flags.DEFINE_integer("num_processes", 1, "How many.", **where)
    flags.DEFINE_integer("devices_per_process", None, "Simulated CPU devices in each.", **where)


def _local(values: flags.FlagValues, commands: list[list[str]]) -> int:
    code = 0
    for command in commands:  # of an array one after the other
        job = LocalJob(
            command,
            num_processes=values.num_processes,
            devices_per_process=values.devices_per_process,
            max_restarts=values.max_restarts,
            logs=_logs(command),
        )
        if values.dry_run:
            print(
                *(shlex.join(job.arguments(i, "PORT")) for i in range(job.num_processes)), sep="\n"
            )
            continue
        code = max(code, job.run())
        if job.stopping:
            break
    return code


def _logs(command: list[str]) -> pathlib.Path | None:
    """Where the processes but the first write: the workdir's `hosts`, if it is on this machine."""
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "workdir" and argument.startswith("-"):
            folder = value if equals else following
            return None if "://" in folder else pathlib.Path(folder) / "hosts"
    return None


def _define_slurm(where: dict) -> None:
    flags.DEFINE_string("name", "vit-jax", "Of the job.", **where)
    flags.DEFINE_integer("nodes", 1, "For each job.", **where)
    flags.DEFINE_integer("processes_per_node", 1, "1, or one for each GPU.", **where)
    flags.DEFINE_integer("gpus_per_node", 0, "0 for CPUs.", **where)
    flags.DEFINE_string("time", "24:00:00", "Limit, as sbatch takes it.", **where)
    flags.DEFINE_string("output", "slurm-%j.out", "File of what is printed.", **where)
    flags.DEFINE_integer("grace", 120, "Seconds to save in before the limit.", **where)
    flags.DEFINE_multi_string("option", [], "More of sbatch's: --option=--partition=p.", **where)


def _slurm(values: flags.FlagValues, commands: list[list[str]]) -> int:
    script = slurm_script(
        commands,
        name=values.name,
        nodes=values.nodes,
        processes_per_node=values.processes_per_node,
        gpus_per_node=values.gpus_per_node,
        time_limit=values.time,
        output=values.output,
        grace=values.grace,
        max_restarts=values.max_restarts,
        options=values.option,
    )
    return _run(["sbatch"], script, "slurm.sbatch", values.dry_run)


def _define_gke(where: dict) -> None:
    flags.DEFINE_string("name", "vit-jax", "Of the JobSet.", **where)
    flags.DEFINE_string("image", None, "Container image with vit-jax[tpu].", **where)
    flags.DEFINE_string("topology", None, "Of a slice, like v5e:4x4.", **where)
    flags.DEFINE_string("queue", "multislice-queue", "Kueue's; XPK makes this one.", **where)
    flags.DEFINE_integer("num_slices", 1, "Slices that train together.", **where)
    flags.DEFINE_integer("chips_per_host", None, "If not the usual number.", **where)
    flags.DEFINE_integer("grace", 120, "Seconds to save in after SIGTERM.", **where)


def _gke(values: flags.FlagValues, commands: list[list[str]]) -> int:
    _require(values, "image", "topology")
    manifest = jobset(
        commands,
        image=values.image,
        topology=values.topology,
        name=values.name,
        queue=values.queue,
        num_slices=values.num_slices,
        chips_per_host=values.chips_per_host,
        max_restarts=values.max_restarts,
        grace=values.grace,
    )
    return _run(["kubectl", "apply", "-f"], manifest, "jobset.yaml", values.dry_run)


def _define_tpu_vm(where: dict) -> None:
    flags.DEFINE_string("name", "vit-jax", "Of the queued resource.", **where)
    flags.DEFINE_string("zone", None, "Like us-central2-b.", **where)
    flags.DEFINE_string("project", "", "gcloud's own by default.", **where)
    flags.DEFINE_string("accelerator", None, "Like v4-32.", **where)
    flags.DEFINE_string("runtime_version", None, "Like tpu-ubuntu2204-base.", **where)
    flags.DEFINE_bool("spot", False, "Cheaper, and may be taken away.", **where)
    flags.DEFINE_bool("delete", True, "Gives the TPU back at the end.", **where)
    flags.DEFINE_integer("poll", 30, "Seconds between two looks whether it is there.", **where)


def _tpu_vm(values: flags.FlagValues, commands: list[list[str]]) -> int:
    _require(values, "zone", "accelerator", "runtime_version")
    script = tpu_vm_script(
        commands,
        name=values.name,
        zone=values.zone,
        project=values.project,
        accelerator=values.accelerator,
        runtime_version=values.runtime_version,
        spot=values.spot,
        delete=values.delete,
        poll=values.poll,
        max_restarts=values.max_restarts,
    )
    return _run(["bash"], script, "tpu_vm.sh", values.dry_run)


def _require(values: flags.FlagValues, *names: str) -> None:
    for name in names:
        if not values[name].value:
            raise ValueError(f"--{name} is missing.")


def _run(tool: list[str], text: str, name: str, dry_run: bool) -> int:
    """Gives the filled-in file to the cluster's tool, whose exit code is ours."""
    if dry_run:
        print(text, end="")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_text(text)
        try:
            return subprocess.run([*tool, str(path)]).returncode
        except FileNotFoundError as error:
            raise ValueError(
                f"{tool[0]} is not installed here; --dry_run prints {name}."
            ) from error


PLACES = {
    "local": (_define_local, _local),
    "slurm": (_define_slurm, _slurm),
    "gke": (_define_gke, _gke),
    "tpu-vm": (_define_tpu_vm, _tpu_vm),
}
