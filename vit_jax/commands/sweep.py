"""`vit-jax sweep`: checkpoints × datasets × evaluations, and the training of checkpoints."""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_jax.commands.config_flag import load_config, load_sweep, parse_with_config, take_config
from vit_jax.commands.flags import parse
from vit_jax.config import call, flatten
from vit_jax.exit_codes import EXIT_PREEMPTED
from vit_jax.spelling import nearest

USAGE = """vit-jax sweep: evaluates many checkpoints, each thing once, and trains them if it is to.

  vit-jax sweep --config=configs/sweeps/digits.py --workdir=sweeps/digits [--num_workers=N]
      [--retry_failed] [--watch]
  vit-jax sweep --workdir=sweeps/digits --results [--pivot=metric|dataset|eval|step] [--csv]

Stopped or killed at any time, the same command goes on. Started again elsewhere on the same folder,
it shares the work. Files of different names may share a folder, too; one that was changed is the
same sweep, and results that it no longer asks for are kept and said."""

SECTIONS = {"checkpoints", "datasets", "evals", "training"}
NICENESS = 19  # of a watcher: the training beside it goes first
WATCH_EVERY = 2.0  # seconds between two looks for checkpoints


def main(argv: list[str]) -> int:
    """Runs `vit-jax sweep`; answers the exit code."""
    if any(each.lstrip("-").split("=")[0] == "results" for each in argv):
        values, _ = parse(argv, _define, usage=USAGE)
        _check_flags(values)
        return _print_results(values)
    values, config = parse_with_config(argv, _define, usage=USAGE, load=load_sweep)
    _check_flags(values)
    _check_sections(config)
    return _run(values, config, argv)


def _name(argv: list[str]) -> str:
    """Of the sweep's file, without folder, ending and argument."""
    return pathlib.Path(take_config(list(argv))[0].partition(":")[0]).stem


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the sweep.", flag_values=values)
    flags.DEFINE_integer("num_workers", 1, "Processes on this machine.", flag_values=values)
    flags.DEFINE_bool("retry_failed", False, "Try failed units again.", flag_values=values)
    flags.DEFINE_bool("watch", False, "Until the runs are at their ends.", flag_values=values)
    flags.DEFINE_bool("results", False, "Only print what there is.", flag_values=values)
    flags.DEFINE_string("pivot", "", "A column whose values become columns.", flag_values=values)
    flags.DEFINE_bool("csv", False, "Print CSV.", flag_values=values)


def _check_flags(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise ValueError(
            "--workdir is missing: a folder for the sweep, like --workdir=sweeps/digits."
        )
    if values.num_workers < 1:
        raise ValueError(f"--num_workers={values.num_workers} must be at least 1.")
    if (values.pivot or values.csv) and not values.results:
        raise ValueError("--pivot and --csv need --results.")


def _check_sections(config: ConfigDict) -> None:
    for key in config:
        if key not in SECTIONS:
            raise ValueError(f"the sweep has an unknown section {key!r}{nearest(key, SECTIONS)}.")
    if missing := sorted(SECTIONS - set(config)):
        raise ValueError(f"the sweep lacks {', '.join(missing)}; a section may be empty.")


def _run(values: flags.FlagValues, config: ConfigDict, argv: list[str]) -> int:
    from vit_jax.runtime import Preempted, StopSignal

    stop = StopSignal()
    children = [_start_child(argv, number) for number in range(1, values.num_workers)]
    try:
        store = _work(values, config, stop, _name(argv))
    except Preempted:
        print(f"stopped by signal {stop.received}; the same command goes on from here.", flush=True)
        return EXIT_PREEMPTED
    finally:
        for child in children:
            child.terminate()
            child.join()
        stop.restore()
    return _finish(store)


def _work(values, config, stop, name: str, number: int = 0) -> Any:
    """Works as one worker until nothing is left; answers the store."""
    from vit_jax.runtime import enable_compilation_cache
    from vit_jax.sweep.store import Store
    from vit_jax.sweep.worker import POLL, work

    store = Store(values.workdir)
    store.results()  # a newer version's are refused now
    if values.watch:
        os.nice(NICENESS)
    if values.retry_failed and not number:
        for unit in store.failures():
            store.forget_failure(unit)
    enable_compilation_cache()
    tasks = _Tasks(values, config, store, stop, name)
    if not number and (missing := tasks.missing()):
        said = f"checkpoints.runs: {', '.join(map(repr, missing))} matches no run (a folder with a "
        said += "config.json)"
        if not values.watch:
            raise ValueError(f"{said}; mend the path, or add --watch to wait for it.")
        print(f"{said} yet; waiting for it", flush=True)
    shift = number * 1000 + os.getpid()  # workers begin at different tasks
    work(
        store,
        functools.partial(tasks.list, shift=shift if values.num_workers > 1 else 0),
        check_stop=stop.check,
        say=functools.partial(print, flush=True),
        progress=(lambda: None) if number else tasks.publish,
        idle=WATCH_EVERY if values.watch else POLL,
    )
    return store


class _Tasks:
    """What there is to do, found anew whenever a worker asks."""

    def __init__(self, values: Any, config: ConfigDict, store: Any, stop: Any, name: str):
        from vit_jax.data.prepare import prepare_if_digits
        from vit_jax.sweep.checkpoints import Finder
        from vit_jax.sweep.units import Evaluator

        self._store, self._stop, self._watch, self._name = store, stop, values.watch, name
        self._own = store.folder / "runs"
        self._runs = call("training", make_runs, config.training) if config.training else {}
        self._datasets, self._evals = config.datasets.to_dict(), config.evals.to_dict()
        for section in (*self._datasets.values(), *(run.data for run in self._runs.values())):
            name = section.get("dataset", section.get("name", ""))
            prepare_if_digits(name, data_dir=section.get("data_dir", "data"))
        derived = {"inside": self._own, "watch": values.watch}
        self._finder = call("checkpoints", Finder, config.checkpoints, **derived)
        self._evaluator = Evaluator(store, self._datasets, self._evals, check_stop=stop.check)

    def missing(self) -> list[str]:
        """Those of the file's runs that are not there yet."""
        return self._finder.missing()

    def list(self, shift: int = 0) -> tuple[list, bool]:
        """The tasks, and whether more may come."""
        from vit_jax.sweep.checkpoints import finished
        from vit_jax.sweep.units import make_settings, make_units
        from vit_jax.sweep.worker import Task

        runs = {self._own / name: config for name, config in self._runs.items()}
        ready = [run for run, config in runs.items() if finished(run, config)]
        more = any(run not in ready and not self._store.failed(_train_id(run)) for run in runs)
        watched = self._finder.runs() if self._watch else []
        more |= self._watch and (not watched or not all(map(finished, watched)))
        units = [
            (unit, checkpoint)
            for unit, checkpoint in make_units(self._finder(ready), self._datasets, self._evals)
            if not checkpoint.error or not self._store.was_done(unit)
        ]
        to_train = [_train_id(run) for run in runs if run not in ready]
        settings = make_settings(self._datasets, self._evals)
        asked = [unit for unit, _ in units]
        self._store.save_plan(self._name, asked, to_train, self._finder.steps, settings)
        tasks = [
            Task(
                unit.id,
                functools.partial(self._store.done, unit.id),
                functools.partial(self._evaluator, unit, checkpoint),
            )
            for unit, checkpoint in units
        ]
        training = [
            Task(
                _train_id(run),
                functools.partial(finished, run, config),
                functools.partial(_train, config, run, self._stop),
            )
            for run, config in runs.items()
        ]
        found = training + tasks
        start = shift % max(len(found), 1)
        return found[start:] + found[:start], more

    def publish(self) -> None:
        """In watch mode, brings new results to the runs that they are of."""
        if self._watch:
            from vit_jax.sweep.publish import publish

            publish(self._store.current()[0])


def _train_id(run: pathlib.Path) -> str:
    return f"train-{run.name}"


def make_runs(
    *, config: str, leaves: Mapping[str, Any], samples: int = 0, seed: int = 0
) -> dict[str, ConfigDict]:
    """The configs of a training sweep by name.

    Args:
      config: a recipe, as for `vit-jax train --config`.
      leaves, samples, seed: see `vit_jax.sweep.training.variations`.

    Raises:
      ValueError: a leaf that the recipe does not have, or a value of another type.
    """
    from vit_jax.sweep.training import variations

    runs = {}
    for name, values in variations(leaves, samples=samples, seed=seed).items():
        run = load_config(config)
        known = flatten(run)
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"training.leaves.{key} is no leaf of it{nearest(key, known)}.")
            _set_leaf(run, key, value)
        runs[name] = run
    return runs


def _set_leaf(config: ConfigDict, key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        config = config[section]
    try:
        config[leaf] = value
    except TypeError as error:
        raise ValueError(f"training.leaves.{key}={value!r}: {error}") from error


def _train(config: ConfigDict, workdir: pathlib.Path, stop: Any) -> None:
    """Trains one run of the sweep, or goes on with it."""
    from vit_jax.lease import WorkdirLease
    from vit_jax.metrics import Stopwatch
    from vit_jax.sweep.checkpoints import check_same_config
    from vit_jax.sweep.units import Busy
    from vit_jax.trainer import Trainer

    check_same_config(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        lock = WorkdirLease(epath.Path(workdir))
    except ValueError as error:  # some process that still ends, or a `vit-jax train`
        raise Busy from error
    log = (workdir / "train.log").open("a")
    with contextlib.closing(log), contextlib.redirect_stdout(log):
        try:
            clock = Stopwatch(time.time())
            Trainer(config, epath.Path(workdir), clock=clock, stop=stop).run()
        finally:
            lock.release()


def _start_child(argv: list[str], number: int) -> multiprocessing.Process:
    context = multiprocessing.get_context("spawn")  # jax does not survive a fork
    child = context.Process(target=_child, args=(argv, number), daemon=True)
    child.start()
    return child


def _child(argv: list[str], number: int) -> None:
    """Another worker on this machine; ends with the first one, however that ends."""
    from vit_jax.runtime import Preempted, StopSignal

    threading.Thread(target=_end_with_parent, daemon=True).start()
    stop = StopSignal()
    values, config = parse_with_config(argv, _define, usage=USAGE, load=load_sweep)
    with contextlib.suppress(Preempted):
        _work(values, config, stop, _name(argv), number=number)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _finish(store: Any) -> int:
    """Writes the table and says what there is; an error if units failed."""
    from vit_jax.sweep import table

    results, orphaned = store.current()
    path = table.write_parquet(table.long_form(results), store.folder)
    if results:
        print(_board_text(results))
    if orphaned:
        print(
            f"{len(orphaned)} results that the sweep's file no longer asks for are kept in results/"
        )
    print(f"{len(results)} results in {path}", flush=True)
    if failures := store.current_failures():
        unit, failure = next(iter(failures.items()))
        raise ValueError(
            f"{len(failures)} units failed, {len(results)} are done; the first, {unit}: "
            f"{failure['error'].rstrip('.')}; mend it and add --retry_failed."
        )
    return 0


def _board_text(results: list[dict[str, Any]]) -> str:
    from vit_jax.sweep import table

    columns = ("dataset", "eval", "checkpoint", "step", "metric", "value", "low", "high", "count")
    return table.to_text(table.leaderboard(results), (*columns, "p_value"))


def _print_results(values: flags.FlagValues) -> int:
    from vit_jax.sweep import table
    from vit_jax.sweep.store import Store

    if not (pathlib.Path(values.workdir) / "results").is_dir():
        raise FileNotFoundError(f"no sweep in {values.workdir}: it has no folder results/.")
    store = Store(values.workdir)
    results, orphaned = store.current()
    rows = table.long_form(results)
    columns = list(table.COLUMNS)
    if values.pivot:
        rows = table.pivot(rows, values.pivot)
        columns = list(rows[0]) if rows else [values.pivot]
    if values.csv:
        print(table.to_csv(rows, columns), end="")
    elif values.pivot:
        print(table.to_text(rows, columns))
    else:
        print(_board_text(results) if results else "no results yet")
    if orphaned:
        print(f"{len(orphaned)} orphaned results are kept, and left out here", file=sys.stderr)
    if failures := store.current_failures():
        print(f"{len(failures)} units failed: see {store.folder / 'failures'}", file=sys.stderr)
    return 0
