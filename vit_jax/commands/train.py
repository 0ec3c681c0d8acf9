"""`vit-jax train`: trains, or goes on where the workdir's newest checkpoint is."""

import math
import os
import sys

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_jax import PROCESS_START, runtime
from vit_jax.commands.config_flag import parse_with_config
from vit_jax.config import digest
from vit_jax.data.prepare import prepare_if_digits
from vit_jax.exit_codes import EXIT_PREEMPTED
from vit_jax.lease import PATIENCE, SIGHT, WorkdirLease, check_shared
from vit_jax.metrics import Stopwatch, duration
from vit_jax.watchdog import Watchdog

USAGE = """vit-jax train: trains; started again on the same workdir, it resumes.

  vit-jax train --config=configs/digits.py[:debug] --workdir=runs/digits
      [--config.optimizer.learning_rate=3e-4 …]

A job of several processes (see `vit-jax launch`) starts this in each of them; TPU pods and SLURM
steps are recognised, elsewhere --coordinator, --num_processes and --process_id say who is who."""


def main(argv: list[str]) -> int:
    """Runs `vit-jax train`; answers the exit code."""
    values, config = parse_with_config(argv, define_flags, usage=USAGE)
    if not values.workdir:
        raise ValueError("--workdir is missing: give the run's folder, like --workdir=runs/digits.")
    who = (values.coordinator, values.num_processes, values.process_id)
    index, count = runtime.who_am_i(*who)
    folder, timeout = epath.Path(values.workdir) / "hosts", values.hang_timeout
    with Watchdog(folder, index=index, count=count, timeout=timeout) as watchdog:
        # Where no coordinator answers, that is said first.
        limit = min(values.start_timeout + 2, timeout or math.inf)
        with watchdog.within(limit, phase="waiting for all processes"):
            processes = runtime.start_processes(
                coordinator=values.coordinator,
                num_processes=values.num_processes,
                process_id=values.process_id,
                platform=values.platform,
                start_timeout=values.start_timeout,
                heartbeat_timeout=values.heartbeat_timeout,
            )
        try:
            return runtime.until_a_peer_is_lost(
                processes, lambda: _train(values, config, processes, watchdog)
            )
        except runtime.AbsentError as error:
            watchdog.report(str(error))


def define_flags(values: flags.FlagValues) -> None:
    """The command's flags but --config."""
    where = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "Folder of the run.", **where)
    flags.DEFINE_enum(
        "platform", None, [*runtime.PLATFORMS], "What must be there; else nothing is run.", **where
    )
    flags.DEFINE_string("coordinator", None, "host:port where process 0 listens.", **where)
    flags.DEFINE_integer("num_processes", None, "Of the job.", **where)
    flags.DEFINE_integer("process_id", None, "Of this one, from 0.", **where)
    flags.DEFINE_float("start_timeout", 300.0, "Seconds to wait for all processes.", **where)
    flags.DEFINE_float(
        "hang_timeout", 1200.0, "Seconds without progress after which all end; 0: never.", **where
    )
    flags.DEFINE_float(
        "heartbeat_timeout", 100.0, "Seconds after which the others end if one is silent.", **where
    )


def _train(
    values: flags.FlagValues,
    config: ConfigDict,
    processes: runtime.Processes,
    watchdog: Watchdog,
) -> int:
    from vit_jax.evaluation import summary  # jax starts here, after the flags were understood
    from vit_jax.trainer import Trainer

    runtime.enable_compilation_cache()
    if not processes.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for good: process 0 speaks for all)
    clock, stop = Stopwatch(PROCESS_START), runtime.make_stop()
    workdir = epath.Path(values.workdir)
    _compare(config, values.platform, processes)
    with processes.together("the start"):
        prepare_if_digits(config.data.get("name", ""), data_dir=config.data.data_dir)
        _make_folder(workdir)
    lease, hang_timeout = None, values.hang_timeout
    limit = hang_timeout and hang_timeout + PATIENCE + SIGHT
    try:
        with watchdog.within(limit, phase="waiting for the workdir"):
            with processes.together("the workdir", extra=PATIENCE):
                lease = WorkdirLease(workdir) if processes.is_first else None
            job = processes.gather("the workdir", lease and lease.job)[0]
            with processes.together("the workdir", extra=SIGHT):
                check_shared(workdir, job)
        trainer = Trainer(
            config, workdir, clock=clock, stop=stop, processes=processes, watchdog=watchdog
        )
        _announce(trainer)
        results = trainer.run()
    except runtime.Preempted:
        print(f"stopped by signal {stop.received}; the same command goes on from here.", flush=True)
        return EXIT_PREEMPTED
    finally:
        stop.restore()
        if lease is not None:
            lease.release()
    print(f"time: {_account(trainer.record.values)}")
    print(f"checkpoint {workdir / 'checkpoints' / str(trainer.step)}")
    print(f"metrics {workdir / 'metrics.jsonl'}, TensorBoard {workdir / 'tensorboard'}")
    print(f"done: {summary(results)}", flush=True)
    return 0


def _compare(config: ConfigDict, platform: str | None, processes: runtime.Processes) -> None:
    """Ends all processes unless they are alike in all that a result depends on."""
    from vit_jax.workdir import versions

    platforms = platform or os.environ.get("JAX_PLATFORMS", "")
    processes.check_same(versions() | {"platform asked for": platforms, "config": digest(config)})
    with processes.together("the start of the devices"):
        found = runtime.start_devices(platform)
    processes.check_same(found)


def _make_folder(workdir: epath.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--workdir={workdir} must be a folder; a file is in the way.") from error


def _announce(trainer) -> None:
    devices = trainer.mesh.devices.flatten()
    where = f"{len(devices)} × {devices[0].device_kind}"
    count = trainer.processes.count
    where += f" in {count} processes" if count > 1 else ""
    frozen = trainer.num_params - trainer.num_trained
    some = f" ({frozen:,} of them frozen)" if frozen else ""
    print(f"{trainer.num_params:,} parameters{some} on {where}, {trainer.info.name}: ", end="")
    print(f"{sum(trainer.info.splits.values()):,} images, {len(trainer.info.class_names)} classes")
    total = trainer.config.total_steps
    if trainer.finished:
        print(f"all {total} steps are done")
    elif trainer.step:
        print(f"resuming at step {trainer.step} of {total}")
        if changes := trainer.record.changes:
            print(f"other versions than before ({', '.join(changes)}): not the same bit for bit")


def _account(record) -> str:
    parts = [f"{name.replace('_', ' ')} {value:.1f} s" for name, value in record["seconds"].items()]
    return f"{', '.join(parts)}; {duration(record['wall_seconds'])} in all"
