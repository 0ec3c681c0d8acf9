"""What a run left in its workdir, as far as it got."""

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from vit_jax.config import flatten
from vit_jax.metrics import read_run_rows


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      name: unique among those on a page.
      workdir: of the run.
      config: resolved, plain.
      record: run.json's values; {} before the run got that far.
      rows: of training and of a watching sweep, by step.
    """

    name: str
    workdir: epath.Path
    config: dict[str, Any]
    record: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """The last step that was logged or evaluated."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total_steps(self) -> int:
        """What it is to reach."""
        return self.config.get("total_steps", 0)

    def series(self, key: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a metric; None where it was not finite."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        _, values = self.series(key)
        return values[-1] if values else None

    def seconds_to(self, step: int | None) -> float | None:
        """What the steps took up to this one, or to the last one logged before it.

        By their throughput: compiling, evaluation and the time that a run stood still between a
        kill and its next start are no cost of the model.
        """
        seconds, before = 0.0, 0
        for logged, rate in zip(*self.series("speed/images_per_second"), strict=True):
            if logged <= (step or 0) and rate:
                seconds += (logged - before) * self.config["batch_size"] / rate
                before = logged
        return seconds if before else None

    def evaluated(self) -> list[str]:
        """Names of metrics of evaluations, such as 'test/top1', in the order of the file."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        return [key for key in keys if "/" in key and key.split("/")[0] not in ("train", "speed")]


def is_run(folder: epath.Path) -> bool:
    """Whether a run began in the folder (an export has a config.json too)."""
    try:
        return "total_steps" in _read(folder / "config.json")
    except ValueError:
        return False


def read_run(workdir: epath.Path, *, name: str = "") -> Run:
    """Reads a run, finished or not.

    Raises:
      FileNotFoundError: no such folder, or no run in it.
      ValueError: a damaged file.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is no folder; give the workdir of a run or a sweep.")
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json) and no sweep; give the --workdir that was "
            "trained or swept in."
        )
    config, record = _read(workdir / "config.json"), _read(workdir / "run.json")
    if "total_steps" not in config:
        raise ValueError(f"{workdir} holds no run: its config.json is of another kind.")
    rows = read_run_rows(workdir)  # a watching sweep's among them
    name = name or workdir.name or str(workdir)
    return Run(name, workdir, config, record, rows)


def _read(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file."""
    try:
        values = json.loads(path.read_text()) if path.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no object.")
    return values


def is_sweep(folder: epath.Path) -> bool:
    """Whether the folder is a sweep's."""
    return (folder / "results").is_dir() and (folder / "failures").is_dir()


def read_runs(workdirs: list[epath.Path]) -> list[Run]:
    """Several, each with as much of its path as tells it from the others."""
    return [read_run(path, name=name) for path, name in zip(workdirs, names(workdirs), strict=True)]


def names(paths: list[epath.Path]) -> list[str]:
    """The shortest ends of the paths that differ; the whole path where none does."""
    parts = [epath.Path(path).parts for path in paths]
    found = []
    for mine in parts:
        ends = ("/".join(mine[-length:]) for length in range(1, len(mine) + 1))
        others = [other for other in parts if other != mine]
        found.append(
            next(
                end
                for end in ends
                if not any("/".join(other[-len(end.split("/")) :]) == end for other in others)
            )
        )
    return found


def parent_of(run: Run) -> tuple[Run | None, str]:
    """The run that `init_from` names, and a sentence on it.

    A parent is where the weights came from: a workdir, or a checkpoint in one.
    """
    source = run.config.get("init_from") or ""
    if not source:
        return None, "It began from random weights, so it has no parent."
    path = epath.Path(source)
    for folder in (path, path.parent, path.parent.parent):
        if is_run(folder) and folder.absolute() != run.workdir.absolute():
            parent = read_run(folder)
            return dataclasses.replace(parent, name=f"{parent.name} (parent)"), (
                f"It began from the weights of {source}."
            )
    return None, f"It began from {source}, which is no run that can be read from here."


def config_rows(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """(leaf, its value in each config, whether they differ); '' where a config lacks the leaf."""
    flat = {name: flatten(config) for name, config in configs.items()}
    leaves = dict.fromkeys(leaf for values in flat.values() for leaf in values)
    rows = []
    for leaf in leaves:
        shown = [_shown(values[leaf]) if leaf in values else "" for values in flat.values()]
        rows.append((leaf, shown, len(set(shown)) > 1))
    return rows


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def when(seconds: float) -> str:
    """Seconds since the epoch -> '2026-11-22 14:30 UTC'."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
