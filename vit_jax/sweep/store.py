"""The folder of a sweep: one file for each result, leases on what is being worked at.

  results/<unit>.json   written whole and never again: the only truth about a unit
  failures/<unit>.json  the error of a unit that failed, and where it came from
  leases/<unit>         who works at it now; an optimisation: two that do the same do no harm
  plans/<name>.json     what the sweep's file of that name asks for by now: tells orphaned results
  features/, runs/      see `vit_jax/features.py` and the sweep's `training` section

A result file holds

  {"format": 1,
   "unit": {"id", "checkpoint", "step", "dataset", "split", "eval", "protocol", "config_digest",
            "checkpoint_digest", "run", "settings", "dataset_fingerprint"},
   "values": [{"metric", "value", "low", "high", "count"}, …],   null for what there is not
   "artefacts": {…},                                             of the evaluation, see evals/
   "seconds": …, "time": …, "worker": "host:pid"}

`low` and `high` are the ends of a 95% interval. There is no database: on a shared folder only
creating and renaming files can be trusted. Of two workers that end the same unit (one was thought
dead) the first one's result stays; where there are no hard links, one that was written in the same
moment may replace it, whole and of the same numbers.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit_jax.paths import in_bucket

FORMAT = 1
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}  # of this file system
HEARTBEAT = 5.0  # seconds
EXPIRED = (
    60.0  # seconds without one, on another machine; a dead process of this one is seen at once
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One checkpoint, one dataset, one evaluation.

    Attributes:
      id: its file's name, made of all that the result depends on.
      checkpoint: the run's or model's name in tables.
      step: of the run; None for a model.
      dataset, eval: their names in the sweep's file.
      split: that is scored.
      protocol: the evaluation's name in EVALS.
      config_digest: of the sweep's settings for the dataset and the evaluation.
      checkpoint_digest: of the weights.
      run: path of the run or model.
      settings: what config_digest was taken of.
      dataset_fingerprint: of the dataset's files.
    """

    id: str
    checkpoint: str
    step: int | None
    dataset: str
    split: str
    eval: str
    protocol: str
    config_digest: str
    checkpoint_digest: str
    run: str
    settings: Mapping[str, Any]
    dataset_fingerprint: str = ""


class _Plan:
    """What a sweep's file asks for; see `Store.save_plan`."""

    def __init__(self, noted: Mapping[str, Any]):
        self.tasks = set(noted["tasks"])
        self._datasets, self._steps = noted["datasets"], noted["steps"]
        self._settings = set(map(tuple, noted["settings"]))
        self._runs, self._checkpoints = set(noted["runs"]), set(noted["checkpoints"])

    def asks_for(self, unit: Mapping[str, Any]) -> bool:
        """Whether it does, or would if the unit's checkpoint had not been deleted."""
        if unit["id"] in self.tasks:
            return True
        settings = unit["dataset"], unit["eval"], unit["config_digest"]
        return (
            settings in self._settings
            and unit.get("dataset_fingerprint") == self._datasets.get(unit["dataset"])
            and unit["run"] in self._runs
            and f"{unit['run']}@{unit['step']}" not in self._checkpoints
            and (self._steps == "all" or (self._steps != "last" and unit["step"] in self._steps))
        )


class Store:
    """The files of a sweep in `folder`, which many processes may use at once.

    Raises:
      ValueError: no local or mounted folder, or written by a newer vit_jax.
    """

    def __init__(self, folder: str | os.PathLike):
        if in_bucket(folder):
            raise ValueError(
                f"--workdir={folder} must be a local or mounted folder: workers share it."
            )
        self.folder = pathlib.Path(folder)
        for name in ("results", "failures", "leases", "plans"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.worker = f"{socket.gethostname()}:{os.getpid()}"

    def done(self, unit_id: str) -> bool:
        """Whether there is a result."""
        return self._path("results", unit_id).exists()

    def was_done(self, unit: Unit) -> bool:
        """Whether there is a result of the unit from before its checkpoint was deleted."""
        same = ("run", "step", "dataset", "eval", "config_digest", "dataset_fingerprint")
        results = (result["unit"] for result in self.results().values())
        return any(all(old.get(key) == getattr(unit, key) for key in same) for old in results)

    def failed(self, unit_id: str) -> bool:
        """Whether it failed and there is no result."""
        return self._path("failures", unit_id).exists()

    def results(self) -> dict[str, dict[str, Any]]:
        """All results by unit.

        Raises:
          ValueError: one was written by a newer vit_jax, or is damaged.
        """
        return dict(sorted((path.stem, read_result(path)) for path in self._files("results")))

    def save_plan(
        self,
        name: str,
        units: Sequence[Unit],
        tasks: Sequence[str] = (),
        steps: str | Sequence[int] = "all",
        settings: Sequence[tuple[str, str, str]] = (),
    ) -> None:
        """Notes what the sweep's file `name` asks for, instead of what it did; see `current`.

        Args:
          name: of the file; several may share the folder.
          units: that there are now.
          tasks: others, by id.
          steps: of the runs' checkpoints, see `Finder`.
          settings: (dataset, evaluation, config digest) of units that may come, too.

        Raises:
          ValueError: another file means something else by a name of this one.
        """
        plan = {
            "format": FORMAT,
            "tasks": sorted([*(unit.id for unit in units), *tasks]),
            "datasets": {unit.dataset: unit.dataset_fingerprint for unit in units},
            "settings": sorted(
                {(unit.dataset, unit.eval, unit.config_digest) for unit in units} | set(settings)
            ),
            "runs": sorted({unit.run for unit in units}),
            "checkpoints": sorted({f"{unit.run}@{unit.step}" for unit in units}),
            "steps": steps if isinstance(steps, str) else list(steps),
        }
        self._check_names(name, plan["settings"])
        text = json.dumps(plan, indent=1)
        path = self._path("plans", name)
        if path.exists() and path.read_text() == text:
            return
        beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
        beside.write_text(text)
        beside.replace(path)

    def _check_names(self, name: str, settings: Sequence[tuple[str, str, str]]) -> None:
        """Tables go by names: of one evaluation there are no two kinds in a folder."""
        for path in self._files("plans"):
            noted = read_result(path)["settings"] if path.stem != name else []
            theirs = {(dataset, evaluation): digest for dataset, evaluation, digest in noted}
            for dataset, evaluation, digest in settings:
                if theirs.get((dataset, evaluation), digest) != digest:
                    raise ValueError(
                        f"evals.{evaluation} on datasets.{dataset} has other settings in the sweep "
                        f"file {path.stem!r}, which shares this folder, and tables could not tell "
                        f"them apart; call one of them otherwise, or delete {path} if that file "
                        "is gone."
                    )

    def current(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The results that the folder's sweep files ask for, and the orphaned ones.

        Orphaned are those of settings, runs, steps or datasets that no file asks for any longer (a
        dataset that was prepared again is another one), and those of a checkpoint that has other
        weights now. One whose checkpoint was deleted meanwhile is not.

        Raises:
          ValueError: see `read_result`.
        """
        plans = self._plans()
        kept, orphaned = [], []
        for result in self.results().values():
            asked = not plans or any(plan.asks_for(result["unit"]) for plan in plans)
            (kept if asked else orphaned).append(result)
        return kept, orphaned

    def current_failures(self) -> dict[str, dict[str, Any]]:
        """Those of `failures` that a file of the folder still asks for."""
        found, plans = self.failures(), self._plans()
        asked = set(found) if not plans else set().union(*(plan.tasks for plan in plans))
        return {unit: failure for unit, failure in found.items() if unit in asked}

    def _plans(self) -> list["_Plan"]:
        """What `save_plan` noted, of each file."""
        return [_Plan(read_result(path)) for path in self._files("plans")]

    def failures(self) -> dict[str, dict[str, Any]]:
        """All failures by unit: 'error' in one line, 'traceback', 'time', 'worker'."""
        return {path.stem: json.loads(path.read_text()) for path in self._files("failures")}

    def save_result(
        self,
        unit: Unit,
        values: Sequence[Mapping[str, Any]],
        artefacts: Mapping[str, Any],
        *,
        seconds: float,
    ) -> bool:
        """Keeps a result, unless there is one already; answers whether it was kept."""
        row = {
            "format": FORMAT,
            "unit": dataclasses.asdict(unit),
            "values": [_finite(value) for value in values],
            "artefacts": artefacts,
            **self._signature(seconds=round(seconds, 3)),
        }
        kept = self._create("results", unit.id, row)
        self.forget_failure(unit.id)
        return kept

    def save_failure(self, unit_id: str, error: str, traceback: str) -> None:
        """Keeps why a unit failed."""
        values = {"error": error, "traceback": traceback, **self._signature()}
        with self._beside("failures", unit_id, values) as written:
            written.replace(self._path("failures", unit_id))

    def forget_failure(self, unit_id: str) -> None:
        """It is to be tried again."""
        self._path("failures", unit_id).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[bool]:
        """Whether `name` is ours for the block: nobody else that lives has it."""
        path = self.folder / "leases" / name
        token = self._take(path)
        if token is None:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            if _read(path).get("token") == token:  # else it was thought dead, and another took over
                path.unlink(missing_ok=True)

    def _take(self, path: pathlib.Path) -> str | None:
        token = uuid.uuid4().hex
        owner = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid()}
        owner |= {"started": _process_start(os.getpid()), "token": token}
        for _ in range(2):
            if _create_new(path, json.dumps(owner)):
                return token
            if not self._remove_dead(path):
                return None
        return None

    def _remove_dead(self, path: pathlib.Path) -> bool:
        """Takes a dead owner's lease away; False if the owner lives or another was quicker."""
        owner = _read(path)
        here = owner.get("boot") == _boot_id() and owner.get("host") == socket.gethostname()
        if here and owner.get("started"):
            if _process_start(owner["pid"]) == owner["started"]:
                return False
        else:
            try:
                silent = self._now() - path.stat().st_mtime
            except FileNotFoundError:
                return True
            if silent < EXPIRED:
                return False
        aside = path.with_name(f".{path.name[-40:]}.{uuid.uuid4().hex[:8]}.dead")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return True
        if _read(aside).get("token") != owner.get("token"):  # a living one's, taken meanwhile
            _create_new(path, aside.read_text())
        aside.unlink(missing_ok=True)
        return True

    def _now(self) -> float:
        """By the folder's own clock: the other machine's may be wrong."""
        probe = self.folder / "leases" / f".{uuid.uuid4().hex}.tmp"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _create(self, kind: str, unit_id: str, values: Mapping[str, Any]) -> bool:
        with self._beside(kind, unit_id, values) as written:
            path = self._path(kind, unit_id)
            try:
                os.link(written, path)  # fails if it is there: of several only one succeeds
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                if path.exists():
                    return False
                written.replace(path)
        return True

    @contextlib.contextmanager
    def _beside(self, kind: str, unit_id: str, values: Mapping[str, Any]) -> Iterator[pathlib.Path]:
        # A name of its own: another worker may be writing the same.
        path = self.folder / kind / f".{uuid.uuid4().hex}.tmp"
        try:
            with path.open("w") as file:
                json.dump(values, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _signature(self, **more: Any) -> dict[str, Any]:
        return {**more, "time": round(time.time(), 3), "worker": self.worker}

    def _path(self, kind: str, unit_id: str) -> pathlib.Path:
        return self.folder / kind / f"{unit_id}.json"

    def _files(self, kind: str) -> list[pathlib.Path]:
        folder = self.folder / kind
        return [path for path in folder.glob("*.json") if not path.name.startswith(".")]


def read_result(path: pathlib.Path) -> dict[str, Any]:
    """One result file.

    Raises:
      ValueError: written by a newer vit_jax, or damaged.
    """
    try:
        result = json.loads(path.read_text())
        version = result["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it: it will be done again."
        ) from error
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{path} was written by a newer vit_jax (format {version}, this one reads up to "
            f"{FORMAT}); upgrade, or use another --workdir."
        )
    return result


def _finite(value: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: value.get(key) for key in ("metric", "value", "low", "high", "count")}
    return {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in row.items()}


def _create_new(path: pathlib.Path, text: str) -> bool:
    """Writes a file unless there is one: of several that try only one succeeds."""
    try:
        with path.open("x") as file:  # its beginning may be read: `_read` takes it for nothing
            file.write(text)
    except FileExistsError:
        return False
    return True


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _beat(path: pathlib.Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _boot_id() -> str:
    path = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _process_start(pid: int) -> str | None:
    """When the process started, in ticks (a number may come again); None if there is none."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
