"""What a sweep evaluates: checkpoints of runs, and models from elsewhere."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoint import Checkpoints
from vit_jax.config import differences
from vit_jax.interop.load import read_source

DEFAULT_SIZE = 224  # `make_vit`'s, where a run's config names none


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights, before they are read.

    Attributes:
      name: for tables.
      path: of the run or the model.
      step: of the run; None for a model.
      digest: of what evaluation sees of it.
      image_size: height and width in pixels.
      class_names: of its head; () if nobody knows them.
      error: why it cannot be read, '' if it can.
    """

    name: str
    path: str
    step: int | None = None
    digest: str = "unreadable"
    image_size: tuple[int, int] = (0, 0)
    class_names: tuple[str, ...] = ()
    error: str = ""


class Finder:
    """Finds checkpoints again and again, and reads what each is only once.

    Args:
      runs: folders of runs, globs allowed.
      models: whatever `vit_jax.load` reads, globs allowed.
      steps: 'all' that are on disk, 'last', or a list of steps of each run.
      inside: folder of the sweep's own runs; they are named by what differs.
      watch: whether listed steps are left out while a run has not come to them.

    Raises:
      ValueError: steps that are none of these.
    """

    def __init__(
        self,
        *,
        runs: Sequence[str] = (),
        models: Sequence[str] = (),
        steps: str | Sequence[int] = "all",
        inside: pathlib.Path | None = None,
        watch: bool = False,
    ):
        for name, value in (("runs", runs), ("models", models)):
            if isinstance(value, str):
                raise ValueError(f"checkpoints.{name}={value!r} must be a list of paths or globs.")
        if isinstance(steps, str) and steps not in ("all", "last"):
            raise ValueError(
                f"checkpoints.steps={steps!r} must be 'all', 'last' or a list of steps."
            )
        self._runs, self._models, self.steps, self._inside = runs, models, steps, inside
        self._watch = watch
        self._known: dict[tuple, Checkpoint] = {}

    def runs(self) -> list[pathlib.Path]:
        """The folders of runs that are there now."""
        found = [pathlib.Path(path) for pattern in self._runs for path in _expand(pattern)]
        return [path for path in dict.fromkeys(found) if (path / "config.json").exists()]

    def missing(self) -> list[str]:
        """Those of `runs` that match no run by now."""
        whole = ((pattern, _expand(pattern)) for pattern in self._runs)
        return [
            pattern
            for pattern, paths in whole
            if not any((pathlib.Path(path) / "config.json").exists() for path in paths)
        ]

    def __call__(self, own: Sequence[pathlib.Path] = ()) -> list[Checkpoint]:
        """All checkpoints that are there now: of `own` runs, of `runs`, and models."""
        found = []
        for path in [*own, *self.runs()]:
            on_disk = whole_steps(path)
            wanted = on_disk if self.steps == "all" else on_disk[-1:]
            if not isinstance(self.steps, str):
                waiting = self._watch and not finished(path)
                wanted = [step for step in self.steps if step in on_disk or not waiting]
            found += [self._of_run(path, step) for step in wanted]
        models = [path for pattern in self._models for path in _expand(pattern) or [pattern]]
        return found + [self._of_model(path) for path in dict.fromkeys(models)]

    def _of_run(self, path: pathlib.Path, step: int) -> Checkpoint:
        inside = self._inside is not None and path.is_relative_to(self._inside)
        name = path.name if inside else str(path)
        folder = path / "checkpoints" / str(step)
        key = (str(path), step, folder.stat().st_mtime_ns if folder.exists() else 0)
        if key not in self._known:
            self._known[key] = _read_run(name, path, step)
        return self._known[key]

    def _of_model(self, path: str) -> Checkpoint:
        if (path,) not in self._known:
            self._known[path,] = _read_model(path)
        return self._known[path,]


def whole_steps(run: pathlib.Path) -> list[int]:
    """The steps whose checkpoints were written to their end, oldest first."""
    folder = run / "checkpoints"
    return (
        sorted(int(x.name) for x in folder.iterdir() if x.name.isdigit()) if folder.exists() else []
    )


def finished(run: pathlib.Path, config: Mapping[str, Any] | None = None) -> bool:
    """Whether a run's last checkpoint is there, and the run is of `config` where one is given."""
    path = run / "config.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    same = config is None or not differences(found, config)
    return same and found["total_steps"] in whole_steps(run)


def check_same_config(run: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError, with the differences, if checkpoints of another config are there."""
    path = run / "config.json"
    if not path.exists() or not whole_steps(run):
        return
    if found := differences(json.loads(path.read_text()), config):
        raise ValueError(
            f"{run} holds a run of another config: {'; '.join(found)}; choose another --workdir "
            f"or delete {run}."
        )


def _expand(pattern: str) -> list[str]:
    return sorted(glob.glob(str(pathlib.Path(pattern).expanduser())))


def _read_run(name: str, path: pathlib.Path, step: int) -> Checkpoint:
    found = Checkpoint(name, str(path), step)
    try:
        checkpoints = Checkpoints(epath.Path(path) / "checkpoints", read_only=True)
        with contextlib.closing(checkpoints):
            if step not in checkpoints.steps():
                raise FileNotFoundError(f"no checkpoint {step} in {path}.")
            meta = checkpoints.meta(step)
        if "checksums" not in meta:
            raise ValueError(f"checkpoint {step} in {path} was written by an older version.")
    except (OSError, ValueError) as error:
        return dataclasses.replace(found, error=str(error))
    config = meta["config"]
    seen = {key: config[key] for key in ("model", "objective", "preprocess")}
    size = config["model"].get("image_size", DEFAULT_SIZE)
    return dataclasses.replace(
        found,
        digest=digest([meta["checksums"], seen, meta["preprocess"]]),
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        class_names=tuple(meta["dataset"]["class_names"]),
    )


def _read_model(path: str) -> Checkpoint:
    try:
        source = read_source(path)
    except (OSError, ValueError) as error:
        return Checkpoint(path, path, error=str(error))
    hashes = hashlib.sha256(source.spec.to_json().encode())
    for key in sorted(source.params):
        hashes.update(key.encode() + np.ascontiguousarray(source.params[key]).tobytes())
    spec = source.spec
    size = tuple(spec.backbone["image_size"])
    return Checkpoint(path, path, None, hashes.hexdigest()[:16], size, tuple(spec.class_names))


def digest(values: Mapping[str, Any] | Sequence[Any]) -> str:
    """16 hexadecimal digits of anything that is plain JSON."""
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
