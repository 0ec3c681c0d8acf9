"""What a person watches: files of metrics, where the time goes, and how fast it is."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
from etils import epath
from tensorboardX import SummaryWriter

from vit_jax.chips import CHIPS, devices_per_chip
from vit_jax.paths import absolute, in_bucket


def mfu(flops_per_second: float, devices: list[jax.Device]) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, section 4.1); None if the peak is unknown."""
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        return None
    return flops_per_second * devices_per_chip(devices) / (chip.peak_flops * len(devices))


SWEEP_ROWS = "sweep.jsonl"  # beside metrics.jsonl: what `vit-jax sweep --watch` found of a run


class Stopwatch:
    """Where the wall time went: at each moment exactly one name is running.

    Args:
      start: seconds since the epoch at which the first name, "start", began to run.
    """

    NAMES = ("start", "compile", "steps", "data_wait", "saving", "evaluation", "lost")

    def __init__(self, start: float):
        self.start = start
        self.seconds = dict.fromkeys(self.NAMES, 0.0)
        self._name, self._since = "start", start

    def resume(self, seconds: Mapping[str, float], since: float) -> None:
        """Adds what earlier processes spent up to `since`; from there to our start was lost."""
        for name, value in seconds.items():
            self.seconds[name] += value
        self.seconds["lost"] += max(self.start - since, 0.0)

    def switch(self, name: str) -> str:
        """Goes on under another name; answers the old one."""
        now, old = time.time(), self._name
        self.seconds[old] += now - self._since
        self._name, self._since = name, now
        return old

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Runs the block under `name`."""
        old = self.switch(name)
        try:
            yield
        finally:
            self.switch(old)

    def waiting(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items; the time until each arrives runs under "data_wait"."""
        iterator, end = iter(items), object()
        while True:
            with self("data_wait"):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def snapshot(self) -> dict[str, float]:
        """Seconds by name up to now."""
        self.switch(self._name)
        return dict(self.seconds)


class MetricsWriter:
    """`metrics.jsonl`, and TensorBoard (and Weights & Biases) drawn from the same rows.

    Args:
      workdir: of the run.
      resume_step: rows of later steps are cut off, and TensorBoard is written anew from the rest:
        each step stands there once.
      wandb: project name at Weights & Biases (extra `wandb`), or '' for none.
      config: recorded there.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        resume_step: int = 0,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self.path = workdir / "metrics.jsonl"
        self._wandb = _start_wandb(wandb, workdir, config) if wandb else None
        rows = [row for row in read_rows(self.path) if row["step"] <= resume_step]
        temporary = workdir / ".metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self.path)
        board = workdir / "tensorboard"
        if board.exists():
            board.rmtree()
        self._board = SummaryWriter(str(board), flush_secs=10)
        for row in rows:
            self._draw(row)
        # Nothing can be added to a bucket's objects (gcsfs empties them): all is kept here.
        self._rows = self.path.read_text() if in_bucket(workdir) else None
        self._file: TextIO | None = self.path.open("a") if self._rows is None else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row; a value that is not finite is written as null.

        Raises:
          OSError: the row could not be written; the checkpoints are as they were.
        """
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        try:
            self._add(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}); free the disk and start again: "
                "the run goes on from its newest checkpoint."
            ) from error
        self._draw(row)
        if self._wandb is not None:
            self._wandb.log(_scalars(row), step=step)

    def _add(self, line: str) -> None:
        if self._file is None:
            self._rows += line
            self.path.write_text(self._rows)
            return
        self._file.write(line)
        self._file.flush()

    def _draw(self, row: Mapping[str, Any]) -> None:
        for key, value in _scalars(row).items():
            self._board.add_scalar(key, value, row["step"], walltime=row["time"])

    def close(self) -> None:
        """Flushes and closes all of them."""
        if self._file is not None:
            self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoWriter:
    """Stands for the writer in all processes but the first."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_run_rows(workdir: epath.Path) -> list[dict[str, Any]]:
    """All rows of a run by step: of its training, and those that a watching sweep added."""
    rows = read_rows(workdir / "metrics.jsonl") + read_rows(workdir / SWEEP_ROWS)
    return sorted(rows, key=lambda row: row["step"])


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k not in ("step", "time") and v is not None}


def _start_wandb(project: str, workdir: epath.Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"train.wandb={project!r} needs: pip install 'vit-jax[wandb]'") from error
    # A stable id: a restarted run goes on where it was.
    run_id = absolute(workdir).as_posix().strip("/").replace("/", "-")[-64:]
    return wandb.init(project=project, id=run_id, resume="allow", config=dict(config or {}))


class Monitor:
    """Reads each step's metrics once the next step is under way; logs, and stops a sick run.

    Args:
      writer: of the metrics.
      clock: of the run.
      batch_size: global, in images.
      total_steps: of the run.
      log_every: steps between two rows and two lines.
      flops_per_image: of a training step, see `Objective.flops_per_image`.
      max_skips: how many updates that are not finite are skipped before the run stops.
      last_good: names the newest checkpoint, for the message of a run that stops.
      say: prints a line.
      skipped, rejected: counts so far, of a resumed run.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        clock: Stopwatch,
        *,
        batch_size: int,
        total_steps: int,
        log_every: int,
        flops_per_image: int,
        max_skips: int,
        last_good: Callable[[], str],
        say: Callable[[str], None],
        skipped: int = 0,
        rejected: int = 0,
    ):
        self._writer, self._clock, self._say = writer, clock, say
        self._batch_size, self._total_steps, self._log_every = batch_size, total_steps, log_every
        self._flops, self._max_skips, self._last_good = flops_per_image, max_skips, last_good
        self.skipped, self.rejected = skipped, rejected
        self._named: set[str] = set()
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._logged: tuple[int, dict[str, float]] | None = None

    def push(self, step: int, metrics: Mapping[str, jax.Array], errors: Sequence[str] = ()) -> None:
        """Takes a step that was just dispatched, and reads the one before it.

        Args:
          step: its number.
          metrics: of all processes; 'rejected' counts the images that were left out.
          errors: what is wrong with images of this process, which names them.
        """
        if self._logged is None:
            self._logged = (step - 1, self._clock.snapshot())
        for error in filter(None, errors):
            if error not in self._named:
                self._named.add(error)
                self._say(f"unreadable image, left out: {error}")
        pending, self._pending = self._pending, (step, metrics)
        self._read(pending)

    def flush(self) -> None:
        """Reads the pending step, if there is one."""
        pending, self._pending = self._pending, None
        self._read(pending)

    def _read(self, pending: tuple[int, Mapping[str, jax.Array]] | None) -> None:
        if pending is None:
            return
        step, metrics = pending
        finite, rejected = fetch((metrics["finite"], metrics["rejected"]))
        self.rejected += int(rejected)
        if not finite:
            self._skip(step, fetch(metrics))
        if step == self._total_steps or step % self._log_every == 0:
            self._log(step, fetch(metrics))

    def _skip(self, step: int, values: Mapping[str, Any]) -> None:
        self.skipped += 1
        what = f"step {step} is not finite (loss {values['loss']}, grad norm {values['grad_norm']})"
        # The device skips by loss and gradients; an update that came out broken all the same is in.
        whole = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        applied = whole and not math.isfinite(values["update_norm"])
        if applied or self.skipped > self._max_skips:
            raise FloatingPointError(
                f"{what}; {self._last_good()} is the last good state: lower the learning rate, "
                f"clip gradients, or skip such steps with train.max_skips (now {self._max_skips})."
            )
        self._say(f"{what}: update skipped, {self.skipped} of at most {self._max_skips}")

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        row = {f"train/{key}": float(value) for key, value in values.items() if key != "finite"}
        row |= {"train/skipped": self.skipped, "train/rejected": self.rejected}
        speed = self._speed(step)
        self._writer.write(step, row | {f"speed/{key}": value for key, value in speed.items()})
        parts = [
            f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}",
            f"loss {row['train/loss']:.4f}",
            f"lr {row['train/learning_rate']:.2e}",
            f"{speed['images_per_second']:,.0f} images/s",
            f"left {duration(speed['seconds_left'])}",
            f"data wait {speed['data_wait']:.0%}",
        ]
        parts += [f"MFU {speed['mfu']:.1%}"] if "mfu" in speed else []
        self._say(" | ".join(parts))

    def _speed(self, step: int) -> dict[str, float]:
        """Since the last row; steps and waiting for data count, saving and evaluation do not."""
        (old_step, old), now = self._logged, self._clock.snapshot()
        self._logged = (step, now)
        spent = {name: now[name] - old[name] for name in now}
        busy = max(spent["steps"] + spent["data_wait"], 1e-9)
        rate = (step - old_step) * self._batch_size / busy
        per_step = sum(spent.values()) / max(step - old_step, 1)
        speed = {
            "images_per_second": rate,
            "seconds_left": (self._total_steps - step) * per_step,
            "data_wait": spent["data_wait"] / busy,
        }
        utilisation = mfu(rate * self._flops, jax.devices())
        return speed if utilisation is None else speed | {"mfu": utilisation}


def fetch(tree: Any) -> Any:
    """Blocks until the arrays are computed; NumPy."""
    return jax.device_get(tree)


def duration(seconds: float) -> str:
    """'0:07', '12:03' or '3:12:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
