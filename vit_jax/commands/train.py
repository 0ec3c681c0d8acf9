"""`vit-jax train`: trains, or goes on where the workdir's newest checkpoint is."""

import sys

from absl import flags
from etils import epath

from vit_jax import PROCESS_START
from vit_jax.commands.config_flag import parse_with_config
from vit_jax.data.prepare import prepare_digits
from vit_jax.data.sources import dataset_info
from vit_jax.metrics import Stopwatch, duration
from vit_jax.runtime import (
    EXIT_PREEMPTED,
    Preempted,
    StopSignal,
    WorkdirLock,
    enable_compilation_cache,
)

USAGE = """vit-jax train: trains; started again on the same workdir, it resumes.

  vit-jax train --config=configs/digits.py[:debug] --workdir=runs/digits
      [--config.optimizer.learning_rate=3e-4 …]"""


def main(argv: list[str]) -> int:
    """Runs `vit-jax train`; answers the exit code."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)

    values, config = parse_with_config(argv, define, usage=USAGE)
    if not values.workdir:
        raise ValueError("--workdir is missing: give the run's folder, like --workdir=runs/digits.")
    from vit_jax.train import Trainer, summary  # jax starts here, after the flags were understood

    enable_compilation_cache()
    clock, stop = Stopwatch(PROCESS_START), StopSignal()
    _prepare_embedded(config)
    workdir = epath.Path(values.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--workdir={workdir} must be a folder; a file is in the way.") from error
    lock = WorkdirLock(workdir)
    try:
        trainer = Trainer(config, workdir, clock=clock, stop=stop)
        _announce(trainer)
        results = trainer.run()
    except Preempted:
        print(f"stopped by signal {stop.received}; the same command goes on from here.", flush=True)
        return EXIT_PREEMPTED
    finally:
        stop.restore()
        lock.release()
    print(f"time: {_account(trainer.record.values)}")
    print(f"checkpoint {workdir / 'checkpoints' / str(trainer.step)}")
    print(f"metrics {workdir / 'metrics.jsonl'}, TensorBoard {workdir / 'tensorboard'}")
    print(f"done: {summary(results)}", flush=True)
    return 0


def _prepare_embedded(config) -> None:
    """Writes scikit-learn's digits if they are wanted and missing: they need no download."""
    if config.data.get("name") != "digits":
        return
    try:
        dataset_info("digits", data_dir=config.data.data_dir)
    except FileNotFoundError:
        print(f"preparing the digits in {config.data.data_dir}", file=sys.stderr)
        prepare_digits(data_dir=config.data.data_dir, exist_ok=True)


def _announce(trainer) -> None:
    devices = trainer.mesh.devices.flatten()
    where = f"{len(devices)} × {devices[0].device_kind}"
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
