"""What a run leaves beside its checkpoints: config.json and run.json; whether a start fits them."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.data.sources import DatasetInfo
from vit_jax.metrics import Stopwatch

PACKAGES = ("vit-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found


class RunRecord:
    """Keeps config.json and run.json, and the account of time over restarts.

    `changes` lists what was installed anew since the checkpoint that is resumed.

    Args:
      workdir: of the run.
      config: resolved.
      info: the training data.
      clock: this process's.
      fingerprints: of all datasets, by section of the config.
      mesh: sizes of its axes.
      num_params: recorded.
      started: whether there is a checkpoint, whose config and dataset must then be these.
      writes: whether it is this process that writes.

    Raises:
      ValueError: the workdir holds a run with another config or dataset; the differences are
        listed.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: ConfigDict,
        info: DatasetInfo,
        clock: Stopwatch,
        *,
        fingerprints: Mapping[str, str],
        mesh: Mapping[str, int],
        num_params: int,
        started: bool,
        writes: bool = True,
    ):
        self.path, self.clock, self.writes = workdir / "run.json", clock, writes
        self.changes: list[str] = []
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        if started:
            self._check_same_run(workdir, config, fingerprints, old)
        self.values = old | {
            "versions": versions(),
            "devices": {
                "platform": jax.default_backend(),
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "processes": jax.process_count(),
            },
            "mesh": dict(mesh),
            "dataset": {
                "name": info.name,
                "fingerprint": info.fingerprint,
                "splits": info.splits,
                "class_names": info.class_names,
            },
            "fingerprints": dict(fingerprints),
            "num_params": num_params,
            "started": old.get("started", clock.start),
            "starts": old.get("starts", 0) + 1,
        }
        if writes:
            config_lib.save_json(workdir / "config.json", config)
        if not old:  # however early a kill comes, the account begins here
            self.save()

    def _check_same_run(self, workdir, config, new: Mapping[str, str], old: Mapping) -> None:
        if not (workdir / "config.json").exists():
            raise ValueError(
                f"workdir {workdir} holds checkpoints but no config.json, so nobody can tell "
                "whether this is their run; use another --workdir, or put the file back."
            )
        found = config_lib.differences(config_lib.load_run_config(workdir), config)
        for key, was in old.get("fingerprints", {}).items():
            if key in new and new[key] != was:
                found.append(f"fingerprint of {key}: {was[:12]} -> {new[key][:12]}")
        if found:
            raise ValueError(
                f"workdir {workdir} holds a run with another config: {'; '.join(found)}; "
                "use another --workdir, or undo the changes."
            )

    def resume(self, meta: Mapping[str, Any]) -> None:
        """Takes over the clock of the checkpoint that is resumed (or of nothing).

        What came after that checkpoint, in earlier processes and between them, is lost.
        """
        was, now = meta.get("versions", {}), self.values["versions"]
        self.changes = [f"{k} {was[k]} -> {now.get(k)}" for k in was if was[k] != now.get(k)]
        since = meta.get("time", self.values["started"])
        self.clock.resume(meta.get("seconds", {}), since)
        self.save()

    def save(self) -> None:
        """Writes run.json with the time so far; its parts add up to the wall time."""
        seconds = {name: round(value, 3) for name, value in self.clock.snapshot().items()}
        self.values["seconds"] = seconds
        self.values["wall_seconds"] = round(time.time() - self.values["started"], 3)
        if self.writes:
            config_lib.save_json(self.path, self.values)
