"""Finds the process that holds up a job: one that hangs, and one that is slow."""

import contextlib
import faulthandler
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from etils import epath

from vit_jax.exit_codes import EXIT_LOST
from vit_jax.runtime import Processes, end_at_once

HANG, STACKS = REPORTS = ("hang.json", "stacks.txt")
SETTLE = 5.0  # seconds that the processes give each other to write down where they hang
STORAGE = 20.0  # and the storage to take it
WINDOW = 20  # steps over which host-side work is averaged
SLOW, NOTABLE = 3.0, 0.005  # times the median, and seconds a step below which nobody cares


class Watchdog:
    """Ends a process that goes on no more, after writing where: all of them find out alike.

    It watches inside its `with`: starting, compiling, training, evaluating and saving.
    `hosts/NNN/hang.json` (last step, batch positions) and `stacks.txt` are written by each living
    process; who wrote none is named. Then all exit with EXIT_LOST.

    Args:
      folder: `workdir/hosts`.
      index: of this process.
      count: of the job's processes.
      timeout: seconds without `beat` that are a hang; 0.0 for never.
    """

    def __init__(self, folder: epath.Path, *, index: int = 0, count: int = 1, timeout: float = 0.0):
        if timeout < 0:
            raise ValueError(f"--hang_timeout={timeout} must not be negative; 0 turns it off.")
        self._folder, self._index, self._count, self._timeout = folder, index, count, timeout
        self._where: dict[str, Any] = {"step": None, "positions": None, "phase": "starting"}
        self._last, self._begun = time.monotonic(), time.time()
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        with contextlib.suppress(OSError):  # what is wrong with the folder is said elsewhere
            for name in REPORTS:  # of an earlier start
                (self._folder / f"{self._index:03}" / name).unlink(missing_ok=True)
        self._last = time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="vit_jax-watch").start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def beat(self, **where: Any) -> None:
        """This process goes on; `where` (step, positions, phase) is for the report."""
        self._last = time.monotonic()
        self._where |= where

    @contextlib.contextmanager
    def within(self, seconds: float, **where: Any) -> Iterator[None]:
        """Inside the block, which does not beat, so many seconds are a hang."""
        usual = self._timeout
        self.beat(**where)
        self._timeout = seconds
        try:
            yield
        finally:
            self.beat()
            self._timeout = usual

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._timeout / 10 or 1.0)):
            timeout = self._timeout
            if timeout and time.monotonic() - self._last > timeout:
                return self.report(f"nothing went on for {timeout:.0f} s")

    def report(self, reason: str) -> NoReturn:
        """Writes where this process is, waits for the others to do so, and ends."""
        # A storage that hangs, perhaps what held all up, raises nothing.
        told = threading.Thread(target=self._tell, args=(reason,), daemon=True)
        told.start()
        told.join(SETTLE + STORAGE)
        if told.is_alive():
            print(
                f"vit-jax: process {self._index}: {reason}; {self._folder} does not answer; "
                "ending.",
                file=sys.stderr,
                flush=True,
            )
        end_at_once(EXIT_LOST)

    def _tell(self, reason: str) -> None:
        try:
            self._write()
        except OSError as error:  # it ends all the same
            print(f"vit-jax: {self._folder}: {error}", file=sys.stderr, flush=True)
        time.sleep(SETTLE)
        absent = [i for i in range(self._count) if not self._wrote(i)]
        names = f"process {', '.join(map(str, absent))} wrote nothing" if absent else "all wrote"
        step, phase = self._where["step"], self._where["phase"]
        print(
            f"vit-jax: process {self._index}: {reason} (last: "
            f"{phase if step is None else f'step {step}, {phase}'}); {names} to {self._folder}; "
            "ending.",
            file=sys.stderr,
            flush=True,
        )

    def _write(self) -> None:
        me = self._folder / f"{self._index:03}"
        me.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile("w+") as stacks:  # the folder may be remote
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            (me / STACKS).write_text(stacks.read())
        report = {"host": socket.gethostname(), "time": time.time()}
        (me / HANG).write_text(json.dumps(report | self._where) + "\n")

    def _wrote(self, index: int) -> bool:
        try:
            report = json.loads((self._folder / f"{index:03}" / HANG).read_text())
        except (OSError, json.JSONDecodeError):
            return False
        return report["time"] > self._begun  # an older one is of an earlier start


class Stragglers:
    """Names processes whose host-side work takes three times as long as the median's.

    Args:
      processes: of the job; each publishes its mean over a window of steps, nobody waits.
    """

    def __init__(self, processes: Processes):
        self._processes, self._seconds, self._steps, self._window = processes, 0.0, 0, 0
        self._open: int | None = None

    def push(self, seconds: float) -> list[str]:
        """Takes a step's host-side work; on process 0 answers lines about slow ones, else []."""
        if self._processes.count == 1:
            return []
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if self._steps == WINDOW:
            mine = [socket.gethostname(), self._seconds / WINDOW]
            self._processes.publish(f"host_seconds/{self._window}", mine)
            self._open, self._window = self._window, self._window + 1
            self._seconds, self._steps = 0.0, 0
        if self._open is None or not self._processes.is_first:
            return []
        found = self._processes.published(f"host_seconds/{self._open}")
        if len(found) < self._processes.count:
            return []  # another time
        self._processes.forget(f"host_seconds/{self._open}")
        self._open = None
        return slow_ones({index: tuple(value) for index, value in found.items()})


def slow_ones(work: dict[int, tuple[str, float]]) -> list[str]:
    """A line about each process that is slow, of {process: (host, seconds a step)}."""
    usual = statistics.median_low(seconds for _, seconds in work.values())
    return [
        f"process {index} ({host}) is slow: its host-side work takes {1000 * seconds:.1f} ms a "
        f"step, the median is {1000 * usual:.1f} ms"
        for index, (host, seconds) in sorted(work.items())
        if seconds > max(SLOW * usual, NOTABLE)
    ]
