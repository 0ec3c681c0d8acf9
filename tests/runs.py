"""Whole runs for tests: in this process or in one of its own, and what they leave behind."""

import contextlib
import json
import os
import pathlib
import pprint
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict
from tensorboardX.proto import event_pb2

from tests.recipes import tiny
from vit_jax import trainer as trainer_lib
from vit_jax.checkpoint import Checkpoints
from vit_jax.data import sources, writer
from vit_jax.data.tfrecord import read_tfrecord
from vit_jax.metrics import Stopwatch
from vit_jax.runtime import StopSignal
from vit_jax.tree import named_leaves


def short(data_dir: str, **leaves) -> ConfigDict:
    """`tiny` in six steps, with averaged parameters: one program, compiled once for all tests."""
    return tiny(data_dir, **{"total_steps": 6, "train__ema_decay": 0.5} | leaves)


def run(config, workdir, stop=None):
    """Trains in this process; answers the trainer and the last evaluation."""
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    stop = StopSignal() if stop is None else stop  # one that has not come yet is false
    try:
        trainer = trainer_lib.Trainer(config, workdir, clock=Stopwatch(time.time()), stop=stop)
        return trainer, trainer.run()
    finally:
        stop.restore()


class StopAfter(StopSignal):
    """A signal that comes when so many steps are done."""

    def __init__(self, steps, monkeypatch):
        super().__init__()
        push = trainer_lib.Monitor.push

        def spy(monitor, step, *rest):
            push(monitor, step, *rest)
            if step == steps:
                self.received = 15

        monkeypatch.setattr(trainer_lib.Monitor, "push", spy)


def save_recipe(config: ConfigDict, path: pathlib.Path) -> str:
    """A config as a file that another process can load."""
    values = pprint.pformat(config.to_dict())
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config(arg=''):\n"
        f"    return ConfigDict({values})\n"
    )
    return str(path)


def save_sweep(folder: pathlib.Path, data_dir: str, **changes) -> str:
    """The file of a sweep over the digits, as a flag: three evaluations, and no checkpoint yet."""
    digits = {"dataset": "digits", "data_dir": data_dir, "batch_size": 120}
    values = {
        "checkpoints": {"runs": []},
        "datasets": {"digits": digits | {"augment": {"name": "none"}}},
        "evals": {
            "own": {"name": "classification"},
            "knn": {"name": "knn", "k": [5]},
            "few": {"name": "fewshot", "shots": [5]},
        },
        "training": {},
    }
    return f"--config={save_recipe(ConfigDict(values | changes), folder / 'sweep.py')}"


def flags_for(devices: int) -> str:
    """XLA's flags as these tests have them, with another number of simulated devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def start(*argv, log: pathlib.Path, devices: int | None = None, code: str = "") -> subprocess.Popen:
    """`vit-jax argv…` as a process that writes to `log`; `code` runs in it beforehand."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if devices is not None:
        environment["XLA_FLAGS"] = flags_for(devices)
    how = ["-c", f"{code}\nimport vit_jax.cli, sys\nsys.exit(vit_jax.cli.main())"]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *(how if code else ["-m", "vit_jax.cli"]), *map(str, argv)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def call(*argv, timeout=240, **environment) -> subprocess.CompletedProcess:
    """`vit-jax argv…` as a process, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "vit_jax.cli", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=dict(os.environ, **environment),
    )


@contextlib.contextmanager
def ending(process: subprocess.Popen):
    """Leaves no process behind, whatever the test finds."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def rows(workdir) -> list[dict]:
    """The rows of metrics.jsonl, every line whole."""
    return [json.loads(x) for x in (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def deterministic_rows(workdir) -> dict:
    """{(step, key): value} of all that must repeat; a (step, key) that stands twice is an error."""
    values = {}
    for row in rows(workdir):
        for key, value in row.items():
            if key not in ("step", "time") and not key.startswith("speed/"):
                assert (row["step"], key) not in values
                values[row["step"], key] = value
    return values


def board_values(workdir) -> dict:
    """{(step, tag): float32} of the TensorBoard files; a value that stands twice is an error."""
    values = {}
    for path in sorted(pathlib.Path(workdir, "tensorboard").glob("events*")):
        for record in read_tfrecord(path):
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                assert (event.step, value.tag) not in values
                values[event.step, value.tag] = value.simple_value
    return values


def assert_board_shows(workdir) -> None:
    """TensorBoard holds what metrics.jsonl does, each step once."""
    wanted = {
        (row["step"], key): struct.unpack("f", struct.pack("f", value))[0]
        for row in rows(workdir)
        for key, value in row.items()
        if key not in ("step", "time") and value is not None
    }
    assert board_values(workdir) == wanted


def steps_on_disk(workdir) -> list[int]:
    """The checkpoints that look whole, oldest first."""
    folder = pathlib.Path(workdir, "checkpoints")
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def saved_state(workdir, step) -> dict[str, np.ndarray]:
    """Name -> array of a checkpoint, read without the package."""
    path = pathlib.Path(workdir, "checkpoints", str(step), "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata.tree
        how = ocp.checkpoint_utils.construct_restore_args(metadata)
        how = {k: ocp.RestoreArgs(restore_type=np.ndarray) for k in _flat(how)}
        tree = checkpointer.restore(path, restore_args=traverse_util.unflatten_dict(how, sep="/"))
    return _flat(tree)


def saved_meta(workdir, step) -> dict:
    """The meta data of a checkpoint."""
    with contextlib.closing(Checkpoints(f"{workdir}/checkpoints", read_only=True)) as checkpoints:
        return checkpoints.meta(step)


def assert_same_bits(one, two) -> None:
    """Two trees are equal, name by name and bit by bit."""
    one, two = named_leaves(one), named_leaves(two)
    assert one.keys() == two.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(two[name])
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def damage(name: str, *, data_dir: str, bad: dict[str, dict[int, bytes]]) -> None:
    """Makes dataset `name` of the digits, with the image of some examples replaced, by split.

    `vit-jax prepare` would not let such images in: here the disk went bad later. What another test
    process made already stays.
    """
    info = sources.dataset_info("digits", data_dir=data_dir)
    made = contextlib.suppress(FileExistsError)
    with made, writer.new_dataset(name, data_dir=data_dir) as dataset:
        writers = []
        for split in info.splits:
            out = writer.SplitWriter(dataset.folder, name=name, split=split)
            source = sources.Source(info, split)
            for index in range(len(source)):
                record = source[index]
                replaced = bad.get(split, {}).get(index)
                record["image"] = record["image"] if replaced is None else replaced
                out.write(writer.serialize(_plain(record)))
            out.close()
            writers.append(out)
        writer.write_tfds_metadata(
            dataset, writers=writers, class_names=info.class_names, description="damaged digits"
        )
        shutil.copy(info.path / sources.METADATA, dataset.folder)


def _plain(record: dict) -> dict:
    return {
        k: v if isinstance(v, bytes) else v.encode() if isinstance(v, str) else int(v)
        for k, v in record.items()
    }


def _flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")
