"""The folder of a sweep: one file for each result, leases on what is being worked at.

  results/<unit>.json   written whole and never again: the only truth about a unit
  failures/<unit>.json  the error of a unit that failed, and where it came from
  leases/<unit>         who works at it now; an optimisation: two that do the same do no harm
  sweep.json            what the sweep's file asks for by now: tells orphaned results
  features/, runs/      see `vit_jax/features.py` and the sweep's `training` section

A result file holds

  {"format": 1,
   "unit": {"id", "checkpoint", "step", "dataset", "split", "eval", "protocol", "config_digest",
            "checkpoint_digest", "run", "settings", "dataset_fingerprint"},
   "values": [{"metric", "value", "low", "high", "count"}, …],   null for what there is not
   "artefacts": {…},                                             of the evaluation, see evals/
   "seconds": …, "time": …, "worker": "host:pid"}

`low` and `high` are the ends of a 95% interval. There is no database: on a shared folder only
creating, linking and renaming files can be trusted.
"""

import contextlib
import dataclasses
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

FORMAT = 1
PLAN = "sweep.json"
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


class Store:
    """The files of a sweep in `folder`, which many processes may use at once.

    Raises:
      ValueError: no local or mounted folder, or written by a newer vit_jax.
    """

    def __init__(self, folder: str | os.PathLike):
        if "://" in str(folder):
            raise ValueError(
                f"--workdir={folder} must be a local or mounted folder: workers share it."
            )
        self.folder = pathlib.Path(folder)
        for name in ("results", "failures", "leases"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.worker = f"{socket.gethostname()}:{os.getpid()}"

    def done(self, unit_id: str) -> bool:
        """Whether there is a result."""
        return self._path("results", unit_id).exists()

    def failed(self, unit_id: str) -> bool:
        """Whether it failed and there is no result."""
        return self._path("failures", unit_id).exists()

    def results(self) -> dict[str, dict[str, Any]]:
        """All results by unit.

        Raises:
          ValueError: one was written by a newer vit_jax, or is damaged.
        """
        return dict(sorted((path.stem, read_result(path)) for path in self._files("results")))

    def save_plan(self, units: Sequence[Unit], tasks: Sequence[str] = ()) -> None:
        """Notes what the sweep's file asks for: units, and other tasks by id; see `current`."""
        plan = {
            "format": FORMAT,
            "tasks": sorted([*(unit.id for unit in units), *tasks]),
            "datasets": {unit.dataset: unit.dataset_fingerprint for unit in units},
            "settings": sorted({(unit.dataset, unit.eval, unit.config_digest) for unit in units}),
            "runs": sorted({unit.run for unit in units}),
            "checkpoints": sorted({f"{unit.run}@{unit.step}" for unit in units}),
        }
        text = json.dumps(plan, indent=1)
        path = self.folder / PLAN
        if path.exists() and path.read_text() == text:
            return
        beside = path.with_name(f".{PLAN}.{uuid.uuid4().hex}.tmp")
        beside.write_text(text)
        beside.replace(path)

    def current(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The results that the sweep's file asks for, and the orphaned ones.

        Orphaned are those of settings, runs or datasets that are no longer asked for (a dataset
        that was prepared again is another one), and those of a checkpoint that has other weights
        now. One whose checkpoint was deleted meanwhile is not.

        Raises:
          ValueError: see `read_result`.
        """
        results, plan = self.results().values(), self._plan()
        if not plan:
            return list(results), []
        tasks, checkpoints = set(plan["tasks"]), set(plan["checkpoints"])
        settings, runs = set(map(tuple, plan["settings"])), set(plan["runs"])
        kept, orphaned = [], []
        for result in results:
            unit = result["unit"]
            deleted = f"{unit['run']}@{unit['step']}" not in checkpoints
            deleted &= (unit["dataset"], unit["eval"], unit["config_digest"]) in settings
            deleted &= unit["run"] in runs
            same_data = unit.get("dataset_fingerprint") == plan["datasets"].get(unit["dataset"])
            asked = unit["id"] in tasks or (deleted and same_data)
            (kept if asked else orphaned).append(result)
        return kept, orphaned

    def current_failures(self) -> dict[str, dict[str, Any]]:
        """Those of `failures` that the sweep's file still asks for."""
        found, plan = self.failures(), self._plan()
        return {unit: found[unit] for unit in found if not plan or unit in plan["tasks"]}

    def _plan(self) -> dict[str, Any]:
        """What `save_plan` noted; {} before."""
        path = self.folder / PLAN
        plan = read_result(path) if path.exists() else {}
        return plan if "tasks" in plan else {}  # an older version's tells too little

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
        beside = path.with_name(f".{path.name[-40:]}.{token[:8]}.tmp")
        beside.write_text(json.dumps(owner))
        try:
            for _ in range(2):
                try:
                    os.link(beside, path)  # fails if it is there: of several only one succeeds
                    return token
                except FileExistsError:
                    if not self._remove_dead(path, beside):
                        return None
            return None
        finally:
            beside.unlink(missing_ok=True)

    def _remove_dead(self, path: pathlib.Path, probe: pathlib.Path) -> bool:
        """Takes a dead owner's lease away; False if the owner lives or another was quicker."""
        owner = _read(path)
        here = owner.get("boot") == _boot_id() and owner.get("host") == socket.gethostname()
        if here and owner.get("started"):
            if _process_start(owner["pid"]) == owner["started"]:
                return False
        else:
            os.utime(probe)  # the folder's own clock: the other machine's may be wrong
            try:
                silent = probe.stat().st_mtime - path.stat().st_mtime
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
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return True

    def _create(self, kind: str, unit_id: str, values: Mapping[str, Any]) -> bool:
        with self._beside(kind, unit_id, values) as written:
            try:
                os.link(written, self._path(kind, unit_id))
            except FileExistsError:
                return False
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
